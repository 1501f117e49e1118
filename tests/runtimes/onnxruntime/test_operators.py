"""The operator library with models that lie: each is refused with a sentence, and none touches foreign memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from attacks.onnx_lies import LIES, OPERATORS, SHAPE, Change, random_matrix
from onnx import TensorProto, helper
from onnx_graphs import OPSET, constants, needs_operators, run, write_graph, write_operator

from trim_export.converters import SparseMatrix
from trim_export.converters.onnx.graph import MODEL
from trim_export.converters.onnx.operators import DENSE, DOMAIN, SPARSE
from trim_export.errors import ArtifactError, UsageError
from trim_export.runtimes.onnxruntime import open_session

pytestmark = needs_operators


@pytest.mark.parametrize(
    ("encoding", "change", "reason"), [(name, *case) for name, cases in LIES.items() for case in cases]
)
def test_constants_that_do_not_fit_are_refused_when_loaded(
    encoding: str, change: Change, reason: str, tmp_path: Path
) -> None:
    operator = OPERATORS[encoding]
    parts = constants(operator, random_matrix(), "float32")
    change(parts)
    write_operator(tmp_path, operator, SHAPE, parts)
    with pytest.raises(ArtifactError, match=reason):
        open_session(tmp_path)


@pytest.mark.parametrize("shift", [1, 2])
@pytest.mark.parametrize("encoding", OPERATORS)
def test_constants_that_are_not_aligned_are_refused_when_loaded(encoding: str, shift: int, tmp_path: Path) -> None:
    """ONNX Runtime maps weights wherever the graph says that they are."""
    operator = OPERATORS[encoding]
    mask = torch.rand(40, 700) < 0.4
    matrix = SparseMatrix(mask, torch.randn(int(mask.sum())))
    write_operator(tmp_path, operator, (40, 700), constants(operator, matrix, "float32"))
    data = tmp_path / f"{MODEL}.data"
    data.write_bytes(bytes(shift) + data.read_bytes())
    model = onnx.load(tmp_path / MODEL, load_external_data=False)
    for entry in (entry for tensor in model.graph.initializer for entry in tensor.external_data):
        if entry.key == "offset":
            entry.value = str(int(entry.value) + shift)
    (tmp_path / MODEL).write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="aligned"):
        open_session(tmp_path)


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
