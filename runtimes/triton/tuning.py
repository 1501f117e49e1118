"""From how many tokens on a GPU had better expand the weight, and how finely it wants its work cut.

Without a measurement these are predictions (``benchmarks/roofline.py``); ``trim-export bench --tune`` writes measured
ones (`timing`) to a small JSON file, one entry for each kind of GPU.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from trim_export.errors import UsageError

__all__ = ["Choice", "choice_for", "predicted", "read_table", "table_path", "write_choice"]

_SERVER = ((8, 0), (9, 0), (10, 0))
"""Capabilities of cards whose memory is so fast that instructions bind at larger batches."""


@dataclass(frozen=True)
class Choice:
    """What is chosen for one kind of GPU.

    Attributes:
        gathered_tokens: most tokens at a time for which weights are multiplied as they lie; more expand them.
        waves: rows are cut into parts until they fill the GPU so many times.
    """

    gathered_tokens: int
    waves: int = 2

    def __post_init__(self) -> None:
        """Refuse what cannot be launched."""
        if not all(type(value) is int and 1 <= value <= 16 for value in (self.gathered_tokens, self.waves)):
            raise ValueError("gathered_tokens and waves are integers from 1 to 16")


def predicted(capability: tuple[int, int] | None) -> Choice:
    """The choice for an NVIDIA GPU of a compute capability, or another GPU (None), from the model of the cost."""
    return Choice(gathered_tokens=8 if capability is None or capability in _SERVER else 16)


def table_path() -> Path:
    """Where measured choices are kept: ``TRIM_EXPORT_TUNING``, or the user's cache directory."""
    named = os.environ.get("TRIM_EXPORT_TUNING")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else cache / "trim-export" / "gpu_tuning.json"


@functools.cache
def choice_for(device: torch.device) -> Choice:
    """The measured choice for a GPU of this name, else the predicted one; read once in a process.

    Raises:
        UsageError: the table is damaged.
    """
    if device.type != "cuda":
        return predicted((8, 9))
    measured = read_table(table_path()).get(torch.cuda.get_device_name(device))
    nvidia = torch.version.hip is None
    return measured or predicted(torch.cuda.get_device_capability(device) if nvidia else None)


def write_choice(path: Path, name: str, choice: Choice) -> None:
    """Add or replace the choice for GPUs called ``name`` in a table; other entries stay."""
    table = {known: asdict(found) for known, found in read_table(path).items()} | {name: asdict(choice)}
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(".partial")
    staged.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    os.replace(staged, path)
    choice_for.cache_clear()


def read_table(path: Path) -> dict[str, Choice]:
    """Choices by the names of GPUs, none where there is no file; `UsageError` when the table is damaged."""
    if not path.exists():
        return {}
    try:
        return {name: Choice(**entry) for name, entry in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: not a table of GPU choices ({error}); delete it or tune again") from error
