"""``trim-export recover``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trim_export.cli.common import Device, Directory, Json, app, cost, measure_data, out, read_texts, track, write_json
from trim_export.errors import UsageError

if TYPE_CHECKING:
    from trim_export.recover import Recovery


@app.command()
def recover(
    directory: Directory,
    output: Annotated[Path, typer.Option("--output", "-o", help="Artifact directory to write.")],
    calibration: Annotated[
        str, typer.Option(help="Text or JSONL file, c4, wikitext2, or self (the dense model's own text).")
    ],
    method: Annotated[
        str, typer.Option(help="blocks (one decoder block at a time), or spp (adapters of the whole model).")
    ] = "blocks",
    model: Annotated[
        str | None, typer.Option(help="The dense model, where prune cannot have it from the same place again.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Windows, of which an eighth is held out.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens of each window.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of the optimizer: for each block, or for the model.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="At its highest.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the windows and the adapters.")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory and more time, for spp.")
    ] = False,
    device: Device = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished run of the same settings.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an artifact that is there.")] = False,
    data: Annotated[Path | None, typer.Option(help="Text to measure perplexity on, before and after.")] = None,
    json_file: Json = None,
) -> None:
    """Train the kept weights of an artifact towards the dense model; every zero stays zero."""
    from trim_export.recover import make_recovery

    recovery = make_recovery(
        method,
        calibration,
        samples=samples,
        sequence_length=sequence_length,
        steps=steps,
        learning_rate=learning_rate,
        seed=seed,
        gradient_checkpointing=gradient_checkpointing,
    )
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    result = _recover(directory, recovery, output, model, device, resume, overwrite, data)
    write_json(json_file, result)


def _recover(
    directory: Path,
    recovery: Recovery,
    output: Path,
    model: str | None,
    device: str,
    resume: bool,
    overwrite: bool,
    data: Path | None,
) -> dict[str, Any]:
    from trim_export.artifact_writer import remove_artifact, require_room
    from trim_export.calibration import training_windows
    from trim_export.forward import choose_compute, choose_device
    from trim_export.models import quiet_transformers
    from trim_export.recover import load_teacher, open_intact
    from trim_export.recover import recover as recover_artifact
    from trim_export.report import facts, recovery_table, summary_table
    from trim_export.runtimes import load
    from trim_export.training import held_out_windows

    quiet_transformers()
    begin = time.perf_counter()
    artifact = open_intact(directory, output)
    require_room(output, resume, overwrite)
    choose_device(device)
    text = read_texts(recovery.calibration, recovery.samples * recovery.sequence_length, data)
    dense = load_teacher(artifact, model)
    tokens = training_windows(
        recovery.calibration,
        dense.model,
        dense.tokenizer,
        recovery.samples,
        recovery.sequence_length,
        recovery.seed,
        held_out_windows(recovery.samples),
    )
    calibrated = time.perf_counter()
    if overwrite:
        remove_artifact(output)
    compute = choose_compute(device, dense.model.dtype)
    recovered = recover_artifact(artifact, dense, recovery, tokens, output, compute, resume, track)
    measured, rows = cost("recover", begin, calibrated)
    manifest = recovered.manifest
    out.print(recovery_table(manifest))
    out.print(summary_table(manifest))
    if text is not None:
        for when, path in (("before", directory), ("after", output)):
            measured[f"perplexity_{when}"], row = measure_data(load(path, "dense"), dense.tokenizer, text, f" {when}")
            rows.append(row)
    out.print(facts("this run", rows))
    return {"artifact": str(output), "sparsity": manifest["sparsity"], "recovery": manifest["recovery"], **measured}
