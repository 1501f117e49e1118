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
    app,
    open_quietly,
    out,
    read_tokenizer,
    track,
    write_json,
)
from trim_export.errors import CheckFailed, choose


@app.command()
def verify(directory: Directory, runtime: Runtimes = None, json_file: Json = None) -> None:
    """Compare every runtime with the dense masked model on real prompts; exit code 1 outside the tolerances."""
    from trim_export.report import table

    artifact = open_quietly(directory)
    from trim_export.runtimes import available_runtimes
    from trim_export.verify import verify as verify_artifact

    result = verify_artifact(artifact, read_tokenizer(directory), runtime or available_runtimes(), track)
    out.print(
        table(
            "parity with the dense masked model in float32 (prefill and cached decode)",
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
    if result["pattern"]["name"] != "none":
        out.print(f"pattern {result['pattern']['name']}: {'holds' if result['pattern']['passed'] else 'BROKEN'}")
    write_json(json_file, result)
    if not result["passed"]:
        failed = [row["name"] for row in result["runtimes"] if not row["passed"]]
        if not result["pattern"]["passed"]:
            failed.append(f"pattern {result['pattern']['name']}")
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
    artifact = open_quietly(directory)
    if tune is not None:
        write_json(json_file, _tune(directory, tune))
        return

    from trim_export.bench import Workload, contestants
    from trim_export.bench import bench as bench_artifact
    from trim_export.forward import choose_device
    from trim_export.report import bench_table
    from trim_export.runtimes import LM_HEADS, available_runtimes

    place = choose_device(device).type
    workload = Workload(tuple(batch or (1,)), prompt, generate, repeats, threads, place)
    entries = contestants(artifact, runtime or available_runtimes(place), choose("LM head", lm_head, LM_HEADS))
    result = bench_artifact(artifact, entries, workload)
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
