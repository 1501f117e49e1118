"""Finding the compiled libraries that a build may have brought along."""

import ctypes
import warnings
from pathlib import Path

import trim_export

__all__ = ["load_library"]


def load_library(*path: str) -> ctypes.CDLL | None:
    """The library at ``path`` within this package, or None: not installed, or (with a warning) not loadable."""
    # An editable install has two directories under this package's name: the checkout and, with the compiled library,
    # the one in site-packages. Both are in __path__.
    for folder in trim_export.__path__:
        file = Path(folder, *path)
        if not file.is_file():
            continue
        try:
            return ctypes.CDLL(str(file))
        except OSError as error:
            warnings.warn(f"{file} does not load ({error}): slower code is used instead", RuntimeWarning, stacklevel=3)
    return None
