"""The operator library with models that lie: each is refused with a sentence, and none touches foreign memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx_graphs import OPSET, constants, needs_operators, run, write_graph, write_operator
from torch import Tensor

from trim_export.converters import SparseMatrix
from trim_export.converters.onnx.graph import MODEL
from trim_export.converters.onnx.operators import DENSE, DOMAIN, SPARSE
from trim_export.errors import ArtifactError, UsageError
from trim_export.runtimes.onnxruntime import open_session

pytestmark = needs_operators

SHAPE = (10, 70)
Change = Callable[[dict[str, Tensor]], None]


def random_matrix() -> SparseMatrix:
    mask = torch.rand(SHAPE) < 0.4
    return SparseMatrix(mask, torch.randn(int(mask.sum())))


def cut(name: str) -> Change:
    return lambda parts: parts.update({name: parts[name][:-1].clone()})


def put(name: str, place: int, value: int) -> Change:
    def change(parts: dict[str, Tensor]) -> None:
        changed = parts[name].reshape(-1).clone()
        changed[place] = value
        parts[name] = changed.reshape(parts[name].shape)

    return change


AT_LOAD = {
    "bitmap": [
        (cut("order"), "wrong length"),
        (cut("mask"), "wrong length"),
        (cut("values"), "disagree"),
        (cut("scales"), "wrong length"),
        (put("order", 0, 10), "a row that does not exist"),
        (put("order", 3, -1), "a row that does not exist"),
        (lambda parts: parts.update(values=parts["values"][:8].clone()), "wrong length"),
        (lambda parts: parts.update(mask=torch.full_like(parts["mask"], 255)), "disagree"),
        (lambda parts: parts.update(mask=parts["mask"].reshape(-1, 32)), r"\[groups, words, 32\]"),
        (lambda parts: parts.update(values=parts["values"].to(torch.int32)), "none of float32"),
        (lambda parts: parts.update(order=parts["order"].long()), "order has the wrong element type"),
        (lambda parts: parts.update(scales=parts["scales"].half()), "scales has the wrong element type"),
    ],
    "csr": [
        (cut("start"), "wrong length"),
        (cut("columns"), "wrong length"),
        (cut("values"), "wrong length"),
        (put("start", 1, 2**40), "disagree"),
        (put("start", 1, -16), "disagree"),
        (put("start", 1, 8), "disagree"),
        (put("order", 9, 11), "a row that does not exist"),
        (lambda parts: parts.update(columns=parts["columns"].int()), "columns has the wrong element type"),
    ],
    "dense": [
        (cut("values"), "wrong length"),
        (cut("scales"), "wrong length"),
        (lambda parts: parts.update(values=parts["values"].long()), "none of float32"),
    ],
}


@pytest.mark.parametrize(
    ("encoding", "change", "reason"), [(name, *case) for name, cases in AT_LOAD.items() for case in cases]
)
def test_constants_that_do_not_fit_are_refused_when_loaded(
    encoding: str, change: Change, reason: str, tmp_path: Path
) -> None:
    operator = {**SPARSE, "dense": DENSE}[encoding]
    parts = constants(operator, random_matrix(), "float32")
    change(parts)
    write_operator(tmp_path, operator, SHAPE, parts)
    with pytest.raises(ArtifactError, match=reason):
        open_session(tmp_path)


def test_columns_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    parts = constants(SPARSE["csr"], random_matrix(), "float32")
    parts["columns"] = torch.from_numpy(np.full(parts["columns"].shape, 65535, np.uint16))
    write_operator(tmp_path, SPARSE["csr"], SHAPE, parts)
    # When the file's layout is made into another, or by the kernel that goes by it.
    with pytest.raises((ArtifactError, UsageError), match="mask or lists of the matrix"):
        run(open_session(tmp_path), np.zeros((5, 70), np.float32))


@pytest.mark.parametrize(("rows", "columns"), [(0, 70), (-1, 70), (10, 0), (2**40, 70), (11, 70), (10, 134)])
def test_sides_that_are_not_the_matrix_are_refused(rows: int, columns: int, tmp_path: Path) -> None:
    write_operator(tmp_path, SPARSE["bitmap"], SHAPE, constants(SPARSE["bitmap"], random_matrix(), "float32"))
    model = onnx.load(tmp_path / MODEL, load_external_data=False)
    for attribute, side in zip(model.graph.node[0].attribute, (rows, columns), strict=True):
        attribute.i = side
    (tmp_path / MODEL).write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="ONNX Runtime cannot load it"):
        open_session(tmp_path)


def test_an_input_of_another_width_is_refused(tmp_path: Path) -> None:
    write_operator(tmp_path, SPARSE["csr"], SHAPE, constants(SPARSE["csr"], random_matrix(), "float32"))
    model = onnx.load(tmp_path / MODEL, load_external_data=False)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "any"
    (tmp_path / MODEL).write_bytes(model.SerializeToString())
    session = open_session(tmp_path)
    with pytest.raises(UsageError, match="the input is not 70 wide"):
        run(session, np.zeros((2, 71), np.float32))
    assert run(session, np.zeros((0, 70), np.float32)).shape == (0, 10)


def test_weights_must_be_constants(tmp_path: Path) -> None:
    operator = DENSE
    nodes = [
        helper.make_node("Identity", ["A"], ["weights"]),
        helper.make_node(operator.name, ["A", "weights", "scales"], ["Y"], domain=DOMAIN, rows=4, columns=4),
    ]
    scales = helper.make_tensor("scales", TensorProto.FLOAT, [4], [1.0] * 4)
    write_graph(tmp_path, nodes, [scales], 4, 4, [operator.function(OPSET)])
    with pytest.raises(ArtifactError, match="values is not a constant"):
        open_session(tmp_path)
