"""Prune large language models and run the result sparse: smaller on disk, in memory and per token.

The command line (``trim-export --help``) is the front door; the modules below are named after what they hold:
``prune`` (the driver), ``trim`` (the row-wise search of arXiv 2505.16743), ``artifact`` (the directory that travels),
``converters`` (encodings of one sparse matrix) and ``runtimes`` (execution). Importing this package imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["__version__", "load"]

__version__ = "0.1.0"


def load(directory: Path | str, runtime: str = "auto", **options: Any) -> PreTrainedModel:
    """Load an artifact for execution: `trim_export.runtimes.load`, imported when it is called."""
    from trim_export.runtimes import load as load_artifact

    return load_artifact(directory, runtime, **options)
