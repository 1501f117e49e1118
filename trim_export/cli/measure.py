"""``trim-export verify``, ``bench`` and ``eval``: what an artifact computes, how fast and how well."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trim_export.cli.common import (
    Device,
    Directory,
    Json,
    LmHead,
    Runtimes,
    app,
    measure_perplexity,
    open_quietly,
    out,
    read_tokenizer,
    write_json,
)
from trim_export.errors import CheckFailed, UsageError, choose

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@app.command()
def verify(directory: Directory, runtime: Runtimes = None, json_file: Json = None) -> None:
    """Compare every runtime with the dense masked model on real prompts; exit code 1 outside the tolerances."""
    from trim_export.report import table

    artifact = open_quietly(directory)
    from trim_export.runtimes import available_runtimes
    from trim_export.verify import verify as verify_artifact

    result = verify_artifact(artifact, read_tokenizer(directory), runtime or available_runtimes())
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
    write_json(json_file, result)
    if not result["passed"]:
        failed = [row["name"] for row in result["runtimes"] if not row["passed"]]
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
    json_file: Json = None,
) -> None:
    """Measure latency and memory of each runtime against the dense model, interleaved, each in its own process."""
    artifact = open_quietly(directory)

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


@app.command(name="eval")
def evaluate(
    source: Annotated[str, typer.Argument(help="Artifact directory, or a model as for prune.", show_default=False)],
    data: Annotated[Path, typer.Option(help="Text or JSONL file.")],
    task: Annotated[str, typer.Option(help="perplexity.")] = "perplexity",
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens of each window.")] = 1024,
    windows: Annotated[int, typer.Option(min=1, help="Consecutive windows to score.")] = 8,
    first_window: Annotated[int, typer.Option(min=0, help="Windows to skip.")] = 0,
    runtime: Annotated[str, typer.Option(help="Runtime that executes an artifact.")] = "dense",
    json_file: Json = None,
) -> None:
    """Measure a model or an artifact on a text."""
    if task != "perplexity":
        raise UsageError(f"unknown task {task!r}; known: perplexity")
    from trim_export.calibration import read_text

    text = read_text(str(data), windows * sequence_length)
    model, tokenizer = _load_any(source, runtime)
    score = measure_perplexity(model, tokenizer, text, sequence_length, windows, first_window)
    result = {"tasks": {"perplexity": score}}
    from trim_export.report import table

    out.print(
        table(
            f"{source} on {data.name}",
            ("task", "value", "windows", "tokens"),
            [("perplexity", f"{score['value']:.4f}", score["windows"], score["tokens"])],
        )
    )
    write_json(json_file, result)


def _load_any(source: str, runtime: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An artifact through a runtime, or a dense model."""
    from trim_export.artifact import JOURNAL, MANIFEST, open_artifact
    from trim_export.models import load_model, quiet_transformers
    from trim_export.runtimes import load

    quiet_transformers()
    path = Path(source)
    if (path / MANIFEST).exists() or (path / JOURNAL).exists():
        open_artifact(path)
        return load(path, runtime), read_tokenizer(path)
    dense = load_model(source)
    return dense.model, dense.tokenizer
