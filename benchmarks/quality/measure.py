"""Measuring one cell, in a process of its own: fresh memory, so that its peak means something."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.quality.cells import Cell, Protocol, Row, Sources, recipe_of
from trim_export.errors import ModelError, TrimExportError

__all__ = ["measure", "measure_apart"]

ROOT = Path(__file__).parents[2]
RESULT = "result.json"
WORKER = (sys.executable, "-m", "benchmarks.quality.measure")


def measure_apart(cell: Cell, protocol: Protocol, sources: Sources, command: Sequence[str] = WORKER) -> dict[str, Any]:
    """Measure a cell in another process; everything it writes is removed.

    Args:
        cell, protocol, sources: as for `measure`.
        command: the process, which reads the request from its input and leaves `RESULT` in the request's directory.

    Returns:
        What `measure` returns, or ``{"failed": sentence}`` if it raised or its process died.
    """
    with tempfile.TemporaryDirectory(prefix="trim-quality-") as directory:
        request = {
            "cell": asdict(cell),
            "protocol": asdict(protocol),
            "sources": asdict(sources),
            "directory": directory,
        }
        # The paths of the sources are the user's; the module is found from the root.
        run = subprocess.run(
            command,
            input=json.dumps(request),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))},
        )
        if run.returncode == 0:
            outcome: dict[str, Any] = json.loads((Path(directory) / RESULT).read_text())
            return outcome
    sys.stderr.write(run.stderr)
    return {"failed": _reason(run.returncode, run.stderr)}


def measure(cell: Cell, protocol: Protocol, sources: Sources, directory: Path) -> dict[str, Any]:
    """Prune as the cell says, unless it is the dense model, and measure perplexity.

    Args:
        cell: what to measure.
        protocol: windows and device.
        sources: where model and texts are.
        directory: an empty one for the artifact.

    Returns:
        ``perplexity``, ``later_perplexity`` and ``machine``; of pruned models ``prune_seconds`` by the clock and
        ``prune_cpu_seconds`` over all threads (which a busy machine stretches less), ``sparsity`` as realised, and
        ``peak_memory_bytes`` of the process up to the end of pruning; if the cell asks for stored forms, ``stored``:
        form -> bytes and perplexities.

    Raises:
        ModelError: activations or perplexity are not finite.
        UsageError: a text is too short.
    """
    from benchmarks.quality.stored import stored_as
    from trim_export.calibration import calibration_windows, consecutive_windows, read_text, token_stream
    from trim_export.forward import choose_compute
    from trim_export.models import decoder_blocks, load_model, projections, quiet_transformers
    from trim_export.prune import prune

    about = _machine(protocol.device)  # now: the checkout may move on while this runs
    quiet_transformers()
    dense = load_model(sources.model)
    model = dense.model
    compute = choose_compute(protocol.device, model.dtype)
    stream = token_stream(read_text(sources.data, 0), dense.tokenizer)
    windows = consecutive_windows(stream, protocol.window, 2 * protocol.windows)
    masks: dict[str, Any] = {
        f"{name}.{path}": None for name, block in decoder_blocks(model).items() for path in projections(block)
    }
    found: dict[str, Any] = {}
    if cell.row.recipe is not None:
        recipe = recipe_of(cell, protocol)
        tokens = calibration_windows(
            sources.calibration, model, dense.tokenizer, recipe.samples, recipe.sequence_length, recipe.seed
        )
        begin, begin_cpu = time.perf_counter(), time.process_time()
        artifact = prune(dense, recipe, tokens, directory / "artifact", compute)
        found = {
            "prune_seconds": time.perf_counter() - begin,
            "prune_cpu_seconds": time.process_time() - begin_cpu,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "sparsity": artifact.manifest["sparsity"]["achieved"],
        }
        if cell.stored:
            masks = {name: matrix.mask for name, matrix in artifact.matrices()}
    model.to(compute.device)  # type: ignore[arg-type]
    found |= _perplexities(model, windows)
    if cell.stored:
        found["stored"] = {
            form: {"matrix_bytes": matrices, "bytes": total} | _perplexities(model, windows)
            for form, matrices, total in stored_as(cell.stored, model, masks, sources.model)
        }
    return found | {"machine": about}


def _perplexities(model: Any, windows: Any) -> dict[str, float]:
    """On the first half of the windows and on the second."""
    from trim_export.evaluate import perplexity

    first, later = (perplexity(model, half).value for half in windows.chunk(2))
    if not (math.isfinite(first) and math.isfinite(later)):
        raise ModelError(f"the perplexity is not finite: {first} and {later}")
    return {"perplexity": first, "later_perplexity": later}


def _machine(device: str) -> dict[str, Any]:
    import trim_export
    from trim_export.bench import Workload, machine

    about = machine(Workload(device=device))
    del about["repeats"]  # of a timing benchmark
    return about | {"trim_export": trim_export.__version__, "commit": _commit()}


def _commit() -> str | None:
    """Of the checkout, since between releases the version alone does not say what was measured; None outside git."""
    described = _git("rev-parse", "--short", "HEAD").stdout.strip()
    changed = _git("diff", "--quiet", "HEAD", "--", "trim_export", "converters", "runtimes").returncode == 1
    return (described + "-dirty" * changed) or None


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)


def _reason(status: int, messages: str) -> str:
    if status < 0:
        return f"its process was killed by {signal.Signals(-status).name}"
    return next(reversed(messages.strip().splitlines()), f"its process ended with status {status}")


def _serve(request: Mapping[str, Any]) -> None:
    """Answer one request of `measure_apart`."""
    directory = Path(request["directory"])
    cell = request["cell"] | {"row": Row(**request["cell"]["row"]), "stored": tuple(request["cell"]["stored"])}
    try:
        outcome = measure(Cell(**cell), Protocol(**request["protocol"]), Sources(**request["sources"]), directory)
    except TrimExportError as error:  # its sentence is the reason; anything else leaves a trace
        sys.exit(str(error))
    (directory / RESULT).write_text(json.dumps(outcome))


if __name__ == "__main__":
    _serve(json.load(sys.stdin))
