"""The few figures that say what pruning cost and gained: dense beside sparse."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trim_export.errors import UsageError
from trim_export.report.words import megabytes

__all__ = ["NOTHING", "Headline", "Measured", "conditions", "headlines", "read_measured"]


@dataclass(frozen=True)
class Measured:
    """Results of other commands that a report repeats; None where they were not given.

    Attributes:
        bench: what ``bench --json`` wrote.
        quality: what ``eval --json`` wrote.
    """

    bench: dict[str, Any] | None = None
    quality: dict[str, Any] | None = None


NOTHING = Measured()


@dataclass(frozen=True)
class Headline:
    """One line of the table: what, in the dense model, in the sparse one, and the second divided by the first.

    Attributes:
        more_is_better: as of tokens/s; of bytes and perplexity less is.
    """

    what: str
    dense: str
    sparse: str
    ratio: float | None = None
    more_is_better: bool = False

    @property
    def gained(self) -> bool:
        """Whether pruning made this better."""
        return self.ratio is not None and (self.ratio > 1 if self.more_is_better else self.ratio < 1)


def headlines(manifest: dict[str, Any], measured: Measured = NOTHING) -> list[Headline]:
    """All that is known, sizes first."""
    sizes = manifest["bytes"]
    ratio = sizes["artifact"] / sizes["dense"]
    lines = [Headline("weight files", megabytes(sizes["dense"]), megabytes(sizes["artifact"]), ratio)]
    if measured.bench is not None:
        lines += _speed(measured.bench["rows"])
    if measured.quality is not None:
        lines += _quality(measured.quality)
    return lines


def conditions(measured: Measured) -> list[str]:
    """Sentences on where, with what and on which text it was measured."""
    sentences = []
    if measured.bench is not None:
        about = measured.bench["machine"]
        sentences.append(
            f"Speed and memory: {about['cpu']} ({about['instructions']}), {about['device']}, {about['threads']} "
            f"threads, torch {about['torch']}, median of {about['repeats']} interleaved rounds."
        )
    if measured.quality is not None and "data" in measured.quality:
        tokens = max((score.get("tokens", 0) for score in measured.quality["tasks"].values()), default=0)
        sentences.append(f"Perplexity and divergence: on {tokens:,} tokens of {measured.quality['data']}.")
    return sentences


def read_measured(bench: Path | None, quality: Path | None) -> Measured:
    """Read the results of other commands.

    Raises:
        UsageError: a file that is not what that command writes.
    """
    return Measured(_read(bench, "bench", ("machine", "rows")), _read(quality, "eval", ("source", "tasks")))


def _read(path: Path | None, command: str, fields: Sequence[str]) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not readable as JSON ({error})") from error
    missing = [field for field in fields if not isinstance(value, dict) or field not in value]
    if missing:
        raise UsageError(f"{path}: no {missing[0]!r} in it; give what trim-export {command} --json wrote")
    result: dict[str, Any] = value
    return result


def _speed(rows: Sequence[dict[str, Any]]) -> list[Headline]:
    """Memory and tokens per second of the sparse runtime that decodes fastest, and of the dense model.

    A head that was rounded for speed does not count: the quality beside it is that of the artifact as stored.
    """
    batch = min((row["batch"] for row in rows), default=0)
    here = [row for row in rows if row["batch"] == batch]
    dense = [row for row in here if row["runtime"] == "dense"]
    decoded = [row for row in here if row["runtime"] != "dense" and row["phase"] == "decode"]
    decoded = [row for row in decoded if not row["runtime"].endswith(" head")]
    if not dense or not decoded:
        return []
    best = max(decoded, key=lambda row: row["tokens_per_s"])
    lines = []
    for phase in ("decode", "prefill"):
        rivals = [row for row in dense if row["phase"] == phase]
        row = next(
            row
            for row in here
            if (row["runtime"], row["dtype"], row["phase"]) == (best["runtime"], best["dtype"], phase)
        )
        same = next((rival for rival in rivals if rival["dtype"] == best["dtype"]), rivals[0])
        others = ", ".join(f"{rival['tokens_per_s']:.1f} in {rival['dtype']}" for rival in rivals if rival is not same)
        lines.append(
            Headline(
                f"{phase}, tokens/s ({best['runtime']})",
                f"{same['tokens_per_s']:.1f}" + (f" ({others})" if others else ""),
                f"{row['tokens_per_s']:.1f}",
                row["tokens_per_s"] / same["tokens_per_s"],
                more_is_better=True,
            )
        )
    same = next((row for row in dense if row["dtype"] == best["dtype"]), dense[0])
    for what, field in (("weights in memory", "weight_bytes"), ("peak memory", "peak_memory_bytes")):
        ratio = best[field] / same[field]
        lines.append(Headline(f"{what} ({best['runtime']})", megabytes(same[field]), megabytes(best[field]), ratio))
    return lines


def _quality(quality: dict[str, Any]) -> list[Headline]:
    lines = []
    for task, score in quality["tasks"].items():
        if task == "divergence":
            lines.append(Headline("KL to the dense model, nats", "0", f"{score['kl']:.4f}"))
            lines.append(Headline("same most likely token", "100 %", f"{score['argmax_agreement']:.1%}"))
            continue
        form = "{:.2f}" if task == "perplexity" else "{:.1%}"
        dense = score.get("reference")
        ratio = score["value"] / dense if dense and task == "perplexity" else None
        known = "-" if dense is None else form.format(dense)
        lines.append(Headline(task, known, form.format(score["value"]), ratio))
    return lines
