"""A model's matrices as they would lie in a file: the bytes they take, and the weights that reading them gives back.

Plain round-to-nearest quantisation, symmetric around zero. It is the simplest there is: methods that look at data
(GPTQ, AWQ) lose less at 3 and 4 bits, so where this one wins against pruning the others win too.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from trim_export.errors import ModelError
from trim_export.models import BUNDLED, unique_tensors

__all__ = ["FORMS", "GGUF", "Form", "gguf_file", "gguf_matrix_bytes", "mask_bytes", "stored_as"]

REST_BYTES = 2
"""Bytes of each number outside the matrices (embeddings, head, norms): bfloat16 for every contestant."""

GGUF = "gguf"
"""The dense matrices exactly as the file holds that they were loaded from."""


@dataclass(frozen=True)
class Form:
    """How the numbers of a matrix are stored.

    Attributes:
        bits: of each number.
        scale: dtype of the scales; None for numbers stored as they are, in bfloat16.
        group: consecutive numbers of a row that share a scale; None for the whole row.
    """

    bits: int
    scale: torch.dtype | None = None
    group: int | None = None

    def read_back(self, weight: Tensor) -> Tensor:
        """Store and read a matrix ``[rows, columns]``; float32, zeros stay zeros.

        Codes are the integers from ``-top`` to ``top = 2^(bits - 1) - 1``; a scale is a group's largest magnitude
        divided by ``top`` in the dtype of the scales.
        """
        if self.scale is None:
            return weight.bfloat16().float()
        rows, columns = weight.shape
        width = self.group or columns
        groups = nn.functional.pad(weight.float(), (0, -columns % width)).view(rows, -1, width)
        top = 2 ** (self.bits - 1) - 1
        scales = (groups.abs().amax(dim=-1, keepdim=True) / top).to(self.scale).float()
        codes = (groups / scales.where(scales > 0, 1.0)).round().clamp(-top, top)
        read: Tensor = (codes * scales).view(rows, -1)[:, :columns]
        return read

    def nbytes(self, rows: int, columns: int, count: int) -> int:
        """Bytes of ``count`` numbers of a matrix of this shape, packed without gaps, and of its scales."""
        scales = 0 if self.scale is None else rows * -(-columns // (self.group or columns)) * self.scale.itemsize
        return -(-count * self.bits // 8) + scales


FORMS = {
    "bf16": Form(16),
    "int8": Form(8, torch.float32),
    "int4": Form(4, torch.float16, 64),
    "int3": Form(3, torch.float16, 64),
}


def mask_bytes(rows: int, columns: int) -> int:
    """One bit a weight, each row in whole bytes, as `trim_export.converters.bitmap` writes it."""
    return rows * -(-columns // 8)


@torch.no_grad()
def stored_as(
    names: tuple[str, ...], model: nn.Module, masks: Mapping[str, Tensor | None], source: str
) -> Iterator[tuple[str, int, int]]:
    """Put a model into one stored form after the other.

    Args:
        names: in `FORMS`, or `GGUF`.
        model: made float32; all outside its matrices is rounded to bfloat16 for good.
        masks: the names of the matrices, each with its bool mask ``[rows, columns]``; None where none is pruned.
        source: the dense model, for `GGUF`.

    Yields:
        Form, bytes of the matrices and bytes of all weights, while ``model`` holds what reading that form gives.
    """
    model.float()
    weights = {name: model.get_parameter(f"{name}.weight") for name in masks}
    exact = {name: weight.data for name, weight in weights.items()}
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in weights:
            parameter.data = parameter.data.bfloat16().float()
    numbers = sum(tensor.numel() for tensor in unique_tensors(model.state_dict()).values())
    rest = REST_BYTES * (numbers - sum(weight.numel() for weight in exact.values()))
    for form in names:
        taken = gguf_matrix_bytes(source, exact) if form == GGUF else 0
        for name, weight in exact.items():
            if form == GGUF:
                weights[name].data = weight
                continue
            rows, columns = weight.shape
            mask = masks[name]
            weights[name].data = FORMS[form].read_back(weight)
            taken += FORMS[form].nbytes(rows, columns, weight.numel() if mask is None else int(mask.sum()))
            taken += 0 if mask is None else mask_bytes(rows, columns)
        yield form, taken, taken + rest


def gguf_file(source: str) -> Path | None:
    """The GGUF file behind a model, if it comes from one."""
    if source in BUNDLED:
        package, file = BUNDLED[source]
        spec = importlib.util.find_spec(package)
        return Path(spec.origin).with_name(file) if spec and spec.origin else None
    return Path(source) if source.endswith(".gguf") else None


def gguf_matrix_bytes(source: str, matrices: Mapping[str, Tensor]) -> int:
    """Bytes that the matrices of the decoder blocks take in the GGUF file that the model was loaded from.

    Raises:
        ModelError: the file's blocks hold other matrices than ``matrices``.
    """
    from gguf import GGUFReader

    found = [
        tensor
        for tensor in GGUFReader(str(gguf_file(source))).tensors
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2
    ]
    if sum(int(tensor.n_elements) for tensor in found) != sum(weight.numel() for weight in matrices.values()):
        raise ModelError(f"{source}: the matrices of its blocks are not those that are pruned")
    return sum(int(tensor.n_bytes) for tensor in found)
