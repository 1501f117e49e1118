"""Constants of our ONNX operators that lie: what is done to sound ones, and words of what must come of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trim_export.converters import SparseMatrix
from trim_export.converters.onnx.operators import DENSE, SPARSE

__all__ = ["LIES", "OPERATORS", "SHAPE", "Change", "random_matrix"]

OPERATORS = {**SPARSE, "dense": DENSE}
SHAPE = (10, 70)
Change = Callable[[dict[str, Tensor]], None]


def random_matrix() -> SparseMatrix:
    mask = torch.rand(SHAPE) < 0.4
    return SparseMatrix(mask, torch.randn(int(mask.sum())))


def cut(name: str) -> Change:
    return lambda parts: parts.update({name: parts[name][:-1].clone()})


def put(name: str, place: int, value: float) -> Change:
    def change(parts: dict[str, Tensor]) -> None:
        changed = parts[name].numpy().copy()
        changed.reshape(-1)[place] = value
        parts[name] = torch.from_numpy(changed)

    return change


def copy_first(name: str) -> Change:
    return lambda parts: put(name, 1, int(parts[name][0]))(parts)


LIES: dict[str, list[tuple[Change, str]]] = {
    "bitmap": [
        (cut("order"), "wrong length"),
        (cut("mask"), "wrong length"),
        (cut("values"), "disagree"),
        (cut("scales"), "wrong length"),
        (put("order", 0, 10), "a row that does not exist"),
        (put("order", 3, -1), "a row that does not exist"),
        (copy_first("order"), "does not name each row once"),
        (lambda parts: parts.update(values=parts["values"][:8].clone()), "wrong length"),
        (lambda parts: parts.update(mask=torch.full_like(parts["mask"], 255)), "disagree"),
        (lambda parts: parts.update(mask=parts["mask"].reshape(-1, 32)), r"\[groups, words, 32\]"),
        (lambda parts: parts.update(values=parts["values"].to(torch.int32)), "none of float32"),
        (lambda parts: parts.update(order=parts["order"].long()), "order has the wrong element type"),
        (lambda parts: parts.update(scales=parts["scales"].half()), "scales has the wrong element type"),
        (put("scales", 4, float("nan")), "a scale is NaN"),
    ],
    "csr": [
        (cut("gaps"), "wrong length"),
        (cut("values"), "wrong length"),
        (cut("scales"), "wrong length"),
        (put("gaps", 0, 64), "too wide"),
        (put("gaps", -1, 255), "too wide"),
        (lambda parts: parts.update(gaps=torch.full_like(parts["gaps"], 63)), "do not end where the matrix does"),
        (lambda parts: parts.update(gaps=torch.zeros_like(parts["gaps"])), "do not end where the matrix does"),
        (lambda parts: parts.update(gaps=parts["gaps"][:9], values=parts["values"][:9]), "do not end where"),
        (lambda parts: parts.update(gaps=parts["gaps"][:0], values=parts["values"][:0]), "do not end where"),
        (lambda parts: parts.update(gaps=parts["gaps"].int()), "gaps has the wrong element type"),
        (lambda parts: parts.update(values=parts["values"].to(torch.int32)), "none of float32"),
        (put("scales", 0, float("nan")), "a scale is NaN"),
    ],
    "dense": [
        (cut("values"), "wrong length"),
        (cut("scales"), "wrong length"),
        (lambda parts: parts.update(values=parts["values"].long()), "none of float32"),
        (put("scales", 9, float("inf")), "a scale is NaN or infinite"),
    ],
}
