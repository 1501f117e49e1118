"""``trim-export verify`` and ``bench``: what an artifact computes, and how fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trim_export.cli.common import (
    Device,
    Directory,
    Json,
    LmHead,
    Runtimes,
    app,
    open_quietly,
    out,
    quiet,
    read_tokenizer,
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
    json_file: Json = None,
) -> None:
    """Compare every runtime with the dense masked model on real prompts; exit code 1 outside the tolerances."""
    from trim_export.report import table
    from trim_export.runtimes import available_runtimes
    from trim_export.runtimes.onnxruntime import EXECUTIONS, is_onnx
    from trim_export.verify import verify as verify_artifact
    from trim_export.verify import verify_onnx

    if is_onnx(directory):
        quiet()
        names = runtime or [name for name in EXECUTIONS if reference is not None or EXECUTIONS[name]]
        result = verify_onnx(directory, read_tokenizer(directory), names, reference)
    elif reference is not None:
        raise UsageError("--reference belongs to an ONNX directory; an artifact is compared with itself, run densely")
    else:
        artifact = open_quietly(directory)
        result = verify_artifact(artifact, read_tokenizer(directory), runtime or available_runtimes())
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
    beside: Annotated[
        list[Path] | None, typer.Option(help="An ONNX directory to measure in the same run; repeat for several.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Measure latency and memory of each runtime against the dense model, interleaved, each in its own process."""
    from trim_export.bench import Workload, contestants, onnx_contestants
    from trim_export.bench import bench as bench_entries
    from trim_export.forward import choose_device
    from trim_export.report import bench_table
    from trim_export.runtimes import LM_HEADS, available_runtimes
    from trim_export.runtimes.onnxruntime import EXECUTIONS, is_onnx

    others = beside or []
    for path in others:
        if not is_onnx(path):
            raise UsageError(f"{path}: no ONNX directory")
    place = choose_device(device).type
    workload = Workload(tuple(batch or (1,)), prompt, generate, repeats, threads, place)
    head = choose("LM head", lm_head, LM_HEADS)
    if is_onnx(directory):
        quiet()
        entries = onnx_contestants(directory, runtime or EXECUTIONS)
    else:
        entries = contestants(open_quietly(directory), runtime or available_runtimes(place), head)
    entries += [entry for path in others for entry in onnx_contestants(path, ["onnxruntime"])]
    result = bench_entries(entries, workload)
    out.print(bench_table(result))
    write_json(json_file, result)
