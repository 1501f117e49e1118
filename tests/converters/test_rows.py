"""Index dtypes at sizes that no test can hold."""

from __future__ import annotations

import pytest
import torch

from trim_export.converters._rows import column_dtype, pointer_dtype


@pytest.mark.parametrize(("entries", "dtype"), [(0, torch.int32), (2**31 - 1, torch.int32), (2**31, torch.int64)])
def test_row_pointers_reach_the_last_entry(entries: int, dtype: torch.dtype) -> None:
    assert pointer_dtype(entries) == dtype
    assert entries <= torch.iinfo(dtype).max


@pytest.mark.parametrize(("columns", "dtype"), [(1, torch.int16), (2**15, torch.int16), (2**15 + 1, torch.int32)])
def test_column_indices_reach_the_last_column(columns: int, dtype: torch.dtype) -> None:
    assert column_dtype(columns) == dtype
    assert columns - 1 <= torch.iinfo(dtype).max
