"""``trim-export eval``: how good a model or an artifact is, alone or beside another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trim_export.cli.common import Json, Values, app, out, read_tokenizer, track, write_json
from trim_export.errors import UsageError, choose

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]

ON_TEXT = ("perplexity", "divergence")
ALL = "zero-shot"


@app.command(name="eval")
def evaluate(
    source: Annotated[str, typer.Argument(help="Artifact directory, or a model as for prune.", show_default=False)],
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="perplexity (if none is named), divergence (KL and top-1 agreement to --reference), boolq, rte, "
            "hellaswag, winogrande, arc_easy, arc_challenge, openbookqa, zero-shot (these seven); repeat for several."
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Text or JSONL file for perplexity and divergence.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="A model or artifact to compare with, run densely: the dense model, say.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Directory of NAME.jsonl files for zero-shot tasks; without it, the hub.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many questions of each task.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time in zero-shot tasks.")] = 1,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens of each window.")] = 1024,
    windows: Annotated[int, typer.Option(min=1, help="Consecutive windows to score.")] = 8,
    first_window: Annotated[int, typer.Option(min=0, help="Windows to skip.")] = 0,
    runtime: Annotated[str, typer.Option(help="Runtime that executes an artifact.")] = "dense",
    values: Values = "stored",
    json_file: Json = None,
) -> None:
    """Measure a model or an artifact on a text or on zero-shot tasks, alone or beside a reference."""
    names = _tasks(task or ["perplexity"])
    on_text = [name for name in names if name in ON_TEXT]
    if on_text and data is None:
        raise UsageError(f"{on_text[0]} needs a text: --data FILE")
    if "divergence" in names and reference is None:
        raise UsageError("divergence needs something to be compared with: --reference MODEL")
    if data_dir is not None and not data_dir.is_dir():
        raise UsageError(f"{data_dir}: no such directory")
    from trim_export.calibration import consecutive_windows, read_text, token_stream
    from trim_export.report import table

    text = read_text(str(data), windows * sequence_length) if on_text else ""
    loaded = _load_any(source, runtime, values)
    other = None if reference is None else _load_any(reference)
    scores: dict[str, dict[str, Any]] = {}
    if on_text:
        tokens = consecutive_windows(token_stream(text, loaded[1]), sequence_length, windows, first_window)
        scores |= _on_text(on_text, loaded, other, tokens)
    scores |= _zero_shot([name for name in names if name not in ON_TEXT], loaded, other, data_dir, limit, batch)
    beside = "" if reference is None else f", beside {reference}"
    out.print(
        table(
            f"{source}{beside}" + (f" on {data.name}" if data is not None and on_text else ""),
            ("task", "value", "reference", "about"),
            [(name, *_cells(name, scores[name])) for name in names],
        )
    )
    about = {"source": source, "runtime": runtime, "values": values, "reference": reference}
    text_name = {"data": data.name} if data is not None and on_text else {}
    write_json(json_file, about | text_name | {"tasks": {name: scores[name] for name in names}})


def _tasks(given: Sequence[str]) -> list[str]:
    """The tasks by name, `ALL` replaced by what it stands for."""
    from trim_export.tasks import TASKS

    known: dict[str, list[str]] = {name: [name] for name in (*ON_TEXT, *TASKS)} | {ALL: list(TASKS)}
    return list(dict.fromkeys(name for word in given for name in choose("task", word, known)))


def _on_text(names: Sequence[str], loaded: Loaded, other: Loaded | None, tokens: Any) -> dict[str, dict[str, Any]]:
    from trim_export.evaluate import compare, perplexity

    scores: dict[str, dict[str, Any]] = {}
    if "perplexity" in names:
        scores["perplexity"] = asdict(perplexity(loaded[0], tokens, track))
        if other is not None:
            scores["perplexity"]["reference"] = perplexity(other[0], tokens, track).value
    if "divergence" in names and other is not None:
        if other[0].get_input_embeddings().num_embeddings != loaded[0].get_input_embeddings().num_embeddings:
            raise UsageError("divergence compares models of one vocabulary; these two have vocabularies of other sizes")
        found = asdict(compare(other[0], loaded[0], tokens, track))
        scores["divergence"] = {**found, "windows": len(tokens), "tokens": tokens.numel()}
    return scores


def _zero_shot(
    names: Sequence[str], loaded: Loaded, other: Loaded | None, data_dir: Path | None, limit: int | None, batch: int
) -> dict[str, dict[str, Any]]:
    if not names:
        return {}
    from trim_export.tasks import agreement, zero_shot

    found = zero_shot(*loaded, names, data_dir, limit, batch, track)
    scores = {name: score.as_json() for name, score in found.items()}
    if other is not None:
        for name, score in zero_shot(*other, names, data_dir, limit, batch, track).items():
            scores[name] |= {"reference": score.value, "agreement": agreement(found[name], score)}
    return scores


def _cells(name: str, score: Mapping[str, Any]) -> tuple[str | None, ...]:
    """Value, reference's value and the rest, as text."""
    dense = score.get("reference")
    if name == "perplexity":
        known = None if dense is None else f"{dense:.4f}"
        return f"{score['value']:.4f}", known, f"{score['windows']} windows, {score['tokens']} tokens"
    if name == "divergence":
        about = f"same most likely token {score['argmax_agreement']:.2%}, {score['tokens']} tokens"
        return f"{score['kl']:.3g} nats", None, about
    about = f"+- {score['stderr']:.4f}, {score['questions']} questions"
    if "normalised" in score:
        about = f"by length {score['normalised']:.4f}, {about}"
    if "agreement" in score:
        about = f"same choice {score['agreement']:.2%}, {about}"
    return f"{score['value']:.4f}", None if dense is None else f"{dense:.4f}", about


def _load_any(source: str, runtime: str = "dense", values: str = "stored") -> Loaded:
    """An artifact through a runtime, or a dense model."""
    from trim_export.artifact import JOURNAL, MANIFEST, open_artifact
    from trim_export.models import load_model, quiet_transformers
    from trim_export.runtimes import load
    from trim_export.runtimes.onnxruntime import is_onnx

    quiet_transformers()
    path = Path(source)
    if is_onnx(path):
        return load(path, "auto" if runtime == "dense" else runtime, values=values), read_tokenizer(path)
    if (path / MANIFEST).exists() or (path / JOURNAL).exists():
        open_artifact(path)
        return load(path, runtime, values=values), read_tokenizer(path)
    if values != "stored":
        raise UsageError(f"{source}: --values belongs to an artifact, not to a dense model")
    dense = load_model(source)
    return dense.model, dense.tokenizer
