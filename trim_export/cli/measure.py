"""``trim-export verify`` and ``bench``: what an artifact computes, and how fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from trim_export.cli.common import (
    Device,
    Directory,
    Json,
    LmHead,
    Runtimes,
    Values,
    app,
    open_quietly,
    out,
    quiet,
    read_tokenizer,
    track,
    write_json,
)
from trim_export.errors import CheckFailed, UsageError, choose


@app.command()
def verify(
    directory: Directory,
    runtime: Runtimes = None,
    reference: Annotated[
        Path | None, typer.Option(help="Of an ONNX directory, the artifact; else its own standard operators are.")
    ] = None,
    values: Values = "stored",
    json_file: Json = None,
) -> None:
    """Compare every runtime with the dense masked model on real prompts; exit code 1 outside the tolerances."""
    from trim_export.report import table
    from trim_export.runtimes import available_runtimes, pick_runtime
    from trim_export.runtimes.onnxruntime import EXECUTIONS, is_onnx
    from trim_export.verify import verify as verify_artifact
    from trim_export.verify import verify_onnx

    if is_onnx(directory):
        if values != "stored":
            raise UsageError(f"{directory}: convert --to onnx decides on values; leave --values out")
        quiet()
        names = runtime or [name for name in EXECUTIONS if reference is not None or EXECUTIONS[name]]
        result = verify_onnx(directory, read_tokenizer(directory), names, reference, track)
    elif reference is not None:
        raise UsageError("--reference belongs to an ONNX directory; an artifact is compared with itself, run densely")
    else:
        artifact = open_quietly(directory)
        names = runtime or (available_runtimes() if values == "stored" else [pick_runtime("auto").name])
        result = verify_artifact(artifact, read_tokenizer(directory), names, track, values)
    against = "standard operators" if is_onnx(directory) and reference is None else "the dense masked model in float32"
    out.print(
        table(
            f"parity with {against} (prefill and cached decode)",
            ("runtime", "dtype", "max |diff|", "KL", "argmax agreement", "tolerance", "passed"),
            [
                (
                    row["name"],
                    row["dtype"],
                    f"{row['max_abs_diff']:.2e}",
                    f"{row['kl']:.2e}",
                    f"{row['argmax_agreement']:.4f}",
                    f"KL <= {row['tolerance']['kl']:g}, agreement >= {row['tolerance']['argmax_agreement']:g}",
                    "yes" if row["passed"] else "NO",
                )
                for row in result["runtimes"]
            ],
        )
    )
    pattern = result.get("pattern", {"name": "none", "passed": True})
    if pattern["name"] != "none":
        out.print(f"pattern {pattern['name']}: {'holds' if pattern['passed'] else 'BROKEN'}")
    write_json(json_file, result)
    if not result["passed"]:
        failed = [row["name"] for row in result["runtimes"] if not row["passed"]]
        if not pattern["passed"]:
            failed.append(f"pattern {pattern['name']}")
        raise CheckFailed(f"{directory}: outside the tolerance: {', '.join(failed)}")


@app.command()
def bench(
    directory: Directory,
    runtime: Runtimes = None,
    device: Device = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of each process.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Sequences at a time; repeat for several.")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prefill.")] = 128,
    generate: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 5,
    lm_head: LmHead = "stored",
    values: Values = "stored",
    beside: Annotated[
        list[Path] | None, typer.Option(help="An ONNX directory to measure in the same run; repeat for several.")
    ] = None,
    tune: Annotated[
        Path | None,
        typer.Option(
            help="Instead time the Triton kernels with this artifact's layers on this machine's GPU, and write which "
            "of them to use for how many tokens into this table.",
            metavar="FILE",
        ),
    ] = None,
    json_file: Json = None,
) -> None:
    """Measure latency and memory of each runtime against the dense model, interleaved, each in its own process."""
    from trim_export.bench import Workload, contestants, onnx_contestants
    from trim_export.bench import bench as bench_entries
    from trim_export.forward import choose_device
    from trim_export.report import bench_table
    from trim_export.runtimes import LM_HEADS, VALUES, available_runtimes
    from trim_export.runtimes.onnxruntime import EXECUTIONS, is_onnx

    if tune is not None:
        write_json(json_file, _tune(directory, tune))
        return
    others = beside or []
    for path in others:
        if not is_onnx(path):
            raise UsageError(f"{path}: no ONNX directory")
    place = choose_device(device).type
    workload = Workload(tuple(batch or (1,)), prompt, generate, repeats, threads, place)
    choose("LM head", lm_head, LM_HEADS)
    choose("form of values", values, VALUES)
    if is_onnx(directory):
        quiet()
        entries = onnx_contestants(directory, runtime or EXECUTIONS)
    else:
        entries = contestants(open_quietly(directory), runtime or available_runtimes(place), lm_head, values)
    entries += [entry for path in others for entry in onnx_contestants(path, ["onnxruntime"])]
    result = bench_entries(entries, workload)
    out.print(bench_table(result))
    write_json(json_file, result)


def _tune(directory: Path, table: Path) -> dict[str, Any]:
    """Time the Triton kernels and write the best choice for this GPU into a table."""
    from dataclasses import asdict
    from functools import partial

    import torch

    from trim_export.report import facts
    from trim_export.runtimes import load
    from trim_export.runtimes.triton import PackedRows
    from trim_export.runtimes.triton.timing import gpu_times, tune
    from trim_export.runtimes.triton.tuning import read_table, write_choice

    open_quietly(directory)
    read_table(table)  # a damaged one is told before anything is timed
    model = load(directory, "triton", device="cuda")
    layers = [module.tensors() for module in model.modules() if isinstance(module, PackedRows)]
    device = torch.device("cuda", torch.cuda.current_device())
    gpu, choice = torch.cuda.get_device_name(device), tune(layers, partial(gpu_times, device=device), track)
    write_choice(table, gpu, choice)
    out.print(
        facts(
            gpu,
            [
                ("weights are multiplied as they lie", f"up to {choice.gathered_tokens} tokens at a time"),
                ("rows are cut until they fill the GPU", f"{choice.waves} times"),
                ("the runtime reads this with", f"TRIM_EXPORT_TUNING={table}"),
            ],
        )
    )
    return {"gpu": gpu, **asdict(choice)}
