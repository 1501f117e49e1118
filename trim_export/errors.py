"""Every failure a user can meet, as one tree; each class knows its exit code.

    TrimExportError
    ├── UsageError            2  wrong option, missing or unsuitable input
    │   ├── ModelError        2  a model that cannot be read, or whose activations are not finite
    │   └── ArtifactError     2  a damaged, hostile or unfinished artifact: file, tensor, reason
    ├── EnvironmentLacks      3  a library, a device or a kernel that is not there
    └── CheckFailed           1  parity or integrity did not hold

A message is one sentence that says what is wrong, where, and what to do. This module imports only the standard
library, so that every package may use it.
"""

import difflib
from collections.abc import Mapping
from typing import ClassVar, TypeVar

__all__ = [
    "ArtifactError",
    "CheckFailed",
    "EnvironmentLacks",
    "ModelError",
    "TrimExportError",
    "UsageError",
    "choose",
    "first_line",
]

T = TypeVar("T")


class TrimExportError(Exception):
    """Root of all expected failures; ``exit_code`` is what the command line ends with."""

    exit_code: ClassVar[int] = 2


class UsageError(TrimExportError):
    """The request cannot be carried out as given."""


class ModelError(UsageError):
    """The model cannot be read, has nothing to prune, or computes NaN or infinity."""


class ArtifactError(UsageError):
    """A stored artifact is damaged, inconsistent, unsafe or unfinished."""


class EnvironmentLacks(TrimExportError):
    """A library, a device or a kernel that the request needs is not available here."""

    exit_code = 3


class CheckFailed(TrimExportError):
    """A verification ran and its result is outside the stated tolerance."""

    exit_code = 1


def choose(kind: str, name: str, known: Mapping[str, T]) -> T:
    """Look ``name`` up in a registry; an unknown name is a `UsageError` that lists the known ones."""
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise UsageError(f"unknown {kind} {name!r}{hint}; known: {', '.join(sorted(known))}")


def first_line(error: BaseException) -> str:
    """The first line of what a foreign exception says, or its kind if it says nothing: fit for a sentence of ours."""
    return next(iter(str(error).splitlines()), type(error).__name__)
