"""Small ONNX graphs and sessions for the tests of export and operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper
from torch import Tensor

from trim_export.converters import SparseMatrix
from trim_export.converters.onnx import DOMAIN
from trim_export.converters.onnx.graph import MODEL, DataFile
from trim_export.converters.onnx.operators import Operator, with_values
from trim_export.runtimes.onnxruntime import Session, open_session, operator_library

OPSET = 21

needs_operators = pytest.mark.skipif(operator_library() is None, reason="our ONNX operators are not compiled")


def constants(operator: Operator, matrix: SparseMatrix, values: str) -> dict[str, Tensor]:
    """What the operator stores of a matrix."""
    stored, scales = with_values(matrix, values)
    return operator.encode(stored) | {"scales": scales}


def write_operator(
    folder: Path,
    operator: Operator,
    shape: tuple[int, int],
    parts: dict[str, Tensor],
    function: bool = True,
    element: int = TensorProto.FLOAT,
) -> None:
    """A model of one node: ``A`` in, ``Y`` out."""
    rows, columns = shape
    with DataFile(folder / f"{MODEL}.data") as file:
        stored = [file.add(f"w.{name}", parts[name]) for name in operator.constants]
    node = helper.make_node(
        operator.name,
        ["A", *(f"w.{name}" for name in operator.constants)],
        ["Y"],
        domain=DOMAIN,
        rows=rows,
        columns=columns,
    )
    write_graph(folder, [node], stored, columns, rows, [operator.function(OPSET)] if function else [], element)


def write_graph(
    folder: Path,
    nodes: list[Any],
    stored: list[Any],
    columns: int,
    rows: int,
    functions: list[Any],
    element: int = TensorProto.FLOAT,
) -> ModelProto:
    """A model with ``A [tokens, columns]`` in and ``Y [tokens, rows]`` out."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("A", element, ["tokens", columns])],
        [helper.make_tensor_value_info("Y", element, ["tokens", rows])],
        stored,
    )
    opsets = [
        helper.make_opsetid("", OPSET),
        *([helper.make_opsetid(DOMAIN, 1)] if functions or nodes[0].domain else []),
    ]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)
    (folder / MODEL).write_bytes(model.SerializeToString())
    onnx.checker.check_model(onnx.load(folder / MODEL))
    return model


def product(folder: Path, inputs: Tensor, kernels: bool) -> Tensor:
    """``Y`` of a model for ``A``, with our operators or without."""
    return torch.from_numpy(run(open_session(folder, kernels, 2), inputs.numpy()))


def run(session: Session, inputs: NDArray[Any]) -> NDArray[np.float32]:
    """``Y`` of a session for ``A``."""
    return session.run({"A": inputs})["Y"]
