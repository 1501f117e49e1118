"""Encodings: one sparse matrix to named tensors and back, and writers for foreign formats.

`ENCODINGS` is the registry; `SparseMatrix` is the form they all share. ``trim_export.converters.scipy`` is imported
by name, so that reading an artifact does not need scipy.
"""

from __future__ import annotations

from trim_export.converters._checks import require_finite
from trim_export.converters.bitmap import Bitmap
from trim_export.converters.bitmap_4x64 import Bitmap4x64
from trim_export.converters.bsr import Bsr
from trim_export.converters.csr import Csr
from trim_export.converters.csr_interleaved import InterleavedCsr
from trim_export.converters.dense import Dense
from trim_export.converters.encoding import Encoding, nbytes
from trim_export.converters.g8 import G8
from trim_export.converters.matrix import SparseMatrix

__all__ = [
    "ENCODINGS",
    "G8",
    "Bitmap",
    "Bitmap4x64",
    "Bsr",
    "Csr",
    "Dense",
    "Encoding",
    "InterleavedCsr",
    "SparseMatrix",
    "nbytes",
    "require_finite",
]

_KNOWN: tuple[Encoding, ...] = (Bitmap(), Csr(), Bsr(), Bitmap4x64(), G8(), InterleavedCsr(), Dense())

ENCODINGS: dict[str, Encoding] = {encoding.name: encoding for encoding in _KNOWN}
