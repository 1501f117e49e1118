"""Latency and memory of each runtime against the dense model, side by side on the machine in front of you.

Every contestant lives in a process of its own (`trim_export.bench_worker`), so that its peak memory is its own. All are
loaded first; then single measurements go round, A B C A B C, so that a machine whose speed drifts treats all alike.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from trim_export.artifact import Artifact
from trim_export.cuda import driver_facts
from trim_export.errors import EnvironmentLacks, UsageError, choose
from trim_export.forward import cpu_capabilities
from trim_export.runtimes import pick_runtime
from trim_export.runtimes.onnxruntime import EXECUTIONS, read_form

__all__ = ["Contestant", "Workload", "bench", "contestants", "machine", "onnx_contestants"]


# Idle threads of the process before spin on cores that the next one needs: ONNX Runtime's some 65 ms, OpenMP's 13.
_PAUSE_S = 0.2


@dataclass(frozen=True)
class Contestant:
    """One directory in one runtime.

    Attributes:
        directory: an artifact or an ONNX model.
        runtime: that executes it.
        dtype: of the weights: what they are loaded in, or in an ONNX model what they were stored in.
        lm_head: as it is ``stored``, or in ``int8``.
        values: kept weights as they are ``stored``, or in another form.
        dense: whether others are compared with it.
        label: what tables call it; empty for the runtime's name.
    """

    directory: Path
    runtime: str
    dtype: str
    lm_head: str = "stored"
    values: str = "stored"
    dense: bool = False
    label: str = ""

    @property
    def name(self) -> str:
        """What tables call it."""
        forms = {"values": self.values, "head": self.lm_head}
        changed = [f"{form} {what}" for what, form in forms.items() if form != "stored"]
        return ", ".join([self.label or self.runtime, *changed])


@dataclass(frozen=True)
class Workload:
    """What is measured.

    Attributes:
        batches: sequences at a time.
        prompt: tokens of the prefill.
        generate: tokens decoded one by one after it.
        repeats: rounds; the median and the minimum over them are reported.
        threads: of each process; None leaves torch's choice.
        device: ``cpu`` or ``cuda``.
    """

    batches: tuple[int, ...] = (1,)
    prompt: int = 128
    generate: int = 32
    repeats: int = 5
    threads: int | None = None
    device: str = "cpu"


def contestants(
    artifact: Artifact, runtimes: Iterable[str], lm_head: str = "stored", values: str = "stored"
) -> list[Contestant]:
    """Each runtime in the artifact's dtype; the dense one also in bfloat16, whichever a user might deploy instead.

    With another form of ``lm_head`` or ``values`` the best sparse runtime takes part a second time.
    """
    path, stored = artifact.path, artifact.manifest["source"]["dtype"]
    found = [Contestant(path, "dense", stored, dense=True)]
    if stored != "bfloat16":
        found.append(Contestant(path, "dense", "bfloat16", dense=True))
    sparse = [Contestant(path, pick_runtime(name).name, stored) for name in runtimes if name != "dense"]
    found += sparse
    found += [replace(entry, lm_head=lm_head, values=values) for entry in sparse[:1]]
    return list(dict.fromkeys(found))


def onnx_contestants(directory: Path, runtimes: Iterable[str]) -> list[Contestant]:
    """An ONNX model with our operators and without them; only once where it has none."""
    form = read_form(directory)
    if not isinstance(form, dict):
        return [Contestant(directory, "onnxruntime", "-", dense=form == "dense", label=f"onnxruntime {directory.name}")]
    values = f"{form['encoding']} {form['values']}" + (", int8 head" if form["head"] == "int8" else "")
    return [
        Contestant(directory, choose("runtime", name, {word: word for word in EXECUTIONS}), values)
        for name in runtimes
    ]  # fmt: skip


def bench(entries: Sequence[Contestant], workload: Workload) -> dict[str, Any]:
    """Measure all contestants in turn.

    Returns:
        ``{"machine": {...}, "rows": [...]}``; ``ratio_to_dense`` above 1 is faster than the first dense contestant in
        the same run (the artifact's dense model in its dtype, if there is one), ``ratio_to_fastest_dense`` than the
        fastest dense one; both are None where none is dense.

    Raises:
        UsageError: idle threads are told to spin for ever, on cores that whoever is measured needs.
        EnvironmentLacks: a contestant's process ended early.
    """
    if len(entries) > 1 and os.environ.get("OMP_WAIT_POLICY", "").upper() == "ACTIVE":
        raise UsageError(
            "OMP_WAIT_POLICY=ACTIVE has idle threads of every contestant compute beside the one that is measured; "
            "unset it, or set it to PASSIVE"
        )
    times: dict[tuple[Contestant, str, int], list[float]] = {}
    with ExitStack() as stack:
        workers = {entry: stack.enter_context(_Worker(entry, workload)) for entry in entries}
        for batch in workload.batches:
            for round_ in range(workload.repeats + 1):
                for entry, worker in workers.items():
                    time.sleep(_PAUSE_S)
                    measured = worker.ask(batch=batch, prompt=workload.prompt, generate=workload.generate)
                    if round_ == 0:
                        continue  # the first round warms caches and allocators
                    times.setdefault((entry, "prefill", batch), []).append(measured["prefill_ms"])
                    times.setdefault((entry, "decode", batch), []).extend(measured["decode_ms"])
        memory = {entry: worker.ask(memory=True) for entry, worker in workers.items()}
    rows = [
        _row(entry, phase, batch, samples, workload, memory[entry]) for (entry, phase, batch), samples in times.items()
    ]
    dense = [row for row in rows if row.pop("dense")]
    for row in rows:
        rivals = [rival for rival in dense if (rival["phase"], rival["batch"]) == (row["phase"], row["batch"])]
        medians = [rival["median_ms"] for rival in rivals]
        row["ratio_to_dense"] = medians[0] / row["median_ms"] if medians else None
        row["ratio_to_fastest_dense"] = min(medians) / row["median_ms"] if medians else None
    rows.sort(key=lambda row: (row["phase"], row["batch"]))
    return {"machine": machine(workload), "rows": rows}


def machine(workload: Workload) -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    return {
        "cpu": cpu_capabilities().get("cpu_name", platform.processor()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": workload.threads or torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "device": torch.cuda.get_device_name() if workload.device == "cuda" else "cpu",
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "repeats": workload.repeats,
        **(driver_facts(torch.device("cuda", torch.cuda.current_device())) if workload.device == "cuda" else {}),
    }


class _Worker:
    """A process that holds one loaded model and answers one JSON line with another."""

    def __init__(self, entry: Contestant, workload: Workload) -> None:
        self.name = f"{entry.name} {entry.dtype}"
        settings = {
            "directory": str(entry.directory),
            "runtime": entry.runtime,
            "dtype": entry.dtype,
            "lm_head": entry.lm_head,
            "values": entry.values,
            "device": workload.device,
            "threads": workload.threads,
        }
        # Whether waiting threads spin for a while or sleep is left as it is, for it is part of what is measured: only
        # one of the processes works at a time, and threads of the others have gone to sleep by then.
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        if entry.runtime in EXECUTIONS:
            # A session has threads of its own; torch's, which only pick tokens, would spin beside them.
            environment["OMP_WAIT_POLICY"] = "PASSIVE"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trim_export.bench_worker", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __enter__(self) -> _Worker:
        self._read()  # the line that says it is loaded
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EnvironmentLacks(f"the benchmark process of {self.name} ended early; its message is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _row(
    entry: Contestant,
    phase: str,
    batch: int,
    samples: list[float],
    workload: Workload,
    memory: dict[str, Any],
) -> dict[str, Any]:
    median = statistics.median(samples)
    tokens = workload.prompt if phase == "prefill" else workload.generate
    per_measurement = batch * (tokens if phase == "prefill" else 1)
    return {
        "runtime": entry.name,
        "dense": entry.dense,
        "dtype": entry.dtype,
        "phase": phase,
        "batch": batch,
        "tokens": tokens,
        "median_ms": median,
        "min_ms": min(samples),
        "tokens_per_s": per_measurement * 1000 / median,
        **memory,
    }
