"""Memory for weights: zeros that belong to nobody else."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trim_export.runtimes.native.pages import zeros

SIZES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 700)), min_size=1, max_size=12)


@given(shapes=SIZES, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]))
def test_tensors_share_nothing(shapes: list[tuple[int, int]], dtype: torch.dtype) -> None:
    made = [zeros(shape, dtype) for shape in shapes]
    for i, (tensor, shape) in enumerate(zip(made, shapes, strict=True)):
        assert (tensor.shape, tensor.dtype) == (shape, dtype)
        assert tensor.is_contiguous()
        assert not tensor.any()
        assert tensor.numel() == 0 or tensor.data_ptr() % 64 == 0
        tensor.fill_(i + 1)
    assert all(bool((tensor == i + 1).all()) for i, tensor in enumerate(made))


@pytest.mark.parametrize("count", [3, 2**22, 2**25])  # of a chunk, half of one, more than one
def test_a_tensor_outlives_its_neighbours(count: int) -> None:
    before, kept, after = zeros((7,), torch.float32), zeros((count,), torch.float32), zeros((7,), torch.float32)
    kept += 1
    del before, after
    gc.collect()
    zeros((count,), torch.float32).fill_(3)
    assert kept.sum() == count
    assert torch.equal(copy.deepcopy(kept), kept)
    assert kept.untyped_storage().nbytes() == 4 * count  # what is saved of it
