"""What the commands share: the application, its two streams, their common options and small steps.

Heavy imports (torch, transformers) happen inside the functions, here and in every command, so that --help and
usage errors are immediate.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import track as rich_track

from trim_export.errors import ArtifactError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from trim_export.artifact import Artifact

app = typer.Typer(
    name="trim-export",
    help="Prune large language models and run the result sparse.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(highlight=False, width=None if sys.stdout.isatty() else 160)  # a pipe has no width to fit
err = Console(stderr=True, highlight=False)

Directory = Annotated[Path, typer.Argument(help="Artifact directory.", show_default=False)]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this JSON file.")]
Runtimes = Annotated[list[str] | None, typer.Option("--runtime", help="Runtime to use; repeat for several.")]
LmHead = Annotated[str, typer.Option(help="stored, or int8: faster on a small model, not exact.")]
Values = Annotated[
    str, typer.Option(help="Kept weights as stored, or rounded to bfloat16 or int8: smaller and faster, not exact.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


def cost(work: str, begin: float, calibrated: float) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """What a run took until now, as JSON and as lines of a table."""
    from trim_export.report import megabytes

    now = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": now - begin, f"{work}_seconds": now - calibrated, "peak_memory_bytes": peak}, [
        ("time", f"{now - begin:.1f} s"),
        ("of it after loading and calibration text", f"{now - calibrated:.1f} s"),
        ("peak memory of this process", megabytes(peak)),
    ]


def read_texts(calibration: str, tokens: int, data: Path | None) -> str | None:
    """The text of ``--data``; both texts are read before anything is loaded, so that a missing one is told at once."""
    from trim_export.calibration import read_text

    if calibration != "self":
        read_text(calibration, tokens)
    return None if data is None else read_text(str(data), 8 * 1024)


def measure_data(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, when: str = ""
) -> tuple[dict[str, Any], tuple[str, str]]:
    """Perplexity on the first 8 x 1024 tokens of ``--data``, as JSON and as a line of a table."""
    score = measure_perplexity(model, tokenizer, text, 1024, 8, 0)
    return score, (f"perplexity{when}, first 8 x 1024 tokens of --data", f"{score['value']:.2f}")


def measure_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, length: int, windows: int, first: int
) -> dict[str, Any]:
    """Perplexity on consecutive windows of a text, ``first`` windows left out at its beginning, as JSON."""
    from dataclasses import asdict

    from trim_export.calibration import consecutive_windows, token_stream
    from trim_export.evaluate import perplexity

    scored = consecutive_windows(token_stream(text, tokenizer), length, windows, first)
    return asdict(perplexity(model, scored, track))


def open_quietly(directory: Path) -> Artifact:
    """Open an artifact, and keep transformers from printing."""
    from trim_export.artifact import open_artifact

    artifact = open_artifact(directory)
    quiet()
    return artifact


def quiet() -> None:
    """Keep transformers from printing."""
    from trim_export.models import quiet_transformers

    quiet_transformers()


def read_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside an artifact; `ArtifactError` when it cannot be read."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{directory}: its tokenizer cannot be read ({first_line(error)})") from error
    return tokenizer


def track(items: Iterable[Any], description: str) -> Iterable[Any]:
    """A progress bar with the time left on stderr, nothing when that is not a terminal."""
    return rich_track(list(items), description, console=err, disable=not err.is_terminal)


def write_json(path: Path | None, value: dict[str, Any]) -> None:
    """Write a result where ``--json`` asked for it."""
    if path is not None:
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
