"""Finding the compiled libraries that a build may have brought along."""

import ctypes
import warnings
from pathlib import Path

import trim_export

__all__ = ["find_library", "load_library"]


def find_library(*path: str) -> Path | None:
    """The file at ``path`` within this package, or None if it is not installed."""
    # An editable install has two directories under this package's name: the checkout and, with the compiled library,
    # the one in site-packages. Both are in __path__.
    return next((file for folder in trim_export.__path__ if (file := Path(folder, *path)).is_file()), None)


def load_library(*path: str) -> ctypes.CDLL | None:
    """The library at ``path`` within this package, or None: not installed, or (with a warning) not loadable."""
    file = find_library(*path)
    if file is None:
        return None
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:
        warnings.warn(f"{file} does not load ({error}): slower code is used instead", RuntimeWarning, stacklevel=3)
        return None
