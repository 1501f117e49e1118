"""Random sparse matrices, and the slow obvious forms that encodings are compared with."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor

from trim_export.converters import SparseMatrix

__all__ = ["DTYPES", "assert_same", "dense64", "matrices"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SPECIAL = (0.0, -0.0, float("nan"), float("inf"), float("-inf"), 1e-40, 65504.0)


@st.composite
def matrices(draw: st.DrawFn, max_side: int = 20) -> SparseMatrix:
    """Matrices of 1..``max_side`` rows and columns: any mask, any float dtype, kept zeros, infinities and NaN."""
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=max_side))
    some = hnp.arrays(np.bool_, shape, elements=st.booleans())
    masks = st.one_of(some, some.map(np.logical_not), st.just(np.zeros(shape, bool)), st.just(np.ones(shape, bool)))
    mask = torch.from_numpy(draw(masks))
    if draw(st.booleans()):
        mask = mask.t().contiguous().t()
    numbers = st.one_of(st.sampled_from(_SPECIAL), st.floats(width=16))
    values = draw(hnp.arrays(np.float32, int(mask.sum()), elements=numbers, fill=numbers))
    return SparseMatrix(mask, torch.from_numpy(values).to(draw(st.sampled_from(DTYPES))))


def dense64(matrix: SparseMatrix) -> NDArray[np.float64]:
    """The matrix in float64, placed value by value."""
    dense = np.zeros(matrix.shape)
    values = iter(matrix.values.tolist())
    for row, column in np.argwhere(matrix.mask.numpy()):
        dense[row, column] = next(values)
    return dense


def assert_same(actual: SparseMatrix, expected: SparseMatrix) -> None:
    """Same mask, same dtype and, bit by bit, same values; one NaN is like another."""
    assert torch.equal(actual.mask, expected.mask)
    assert actual.values.dtype == expected.values.dtype
    assert torch.equal(_bits(actual.values), _bits(expected.values))


def _bits(values: Tensor) -> Tensor:
    one_nan = values.masked_fill(values.isnan(), float("nan"))
    return one_nan.view(torch.int32 if values.element_size() == 4 else torch.int16)
