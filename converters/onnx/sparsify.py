"""From a dense ONNX graph whose weights hold zeros to one that stores and multiplies what is not zero.

Nothing is said of where the graph comes from: each constant that is the right side of a `MatMul` is looked at, so that
projections an exporter has joined (q, k and v in one) need no map of names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto, NodeProto, TensorProto, helper
from torch import Tensor

from trim_export.converters.matrix import SparseMatrix
from trim_export.converters.onnx.graph import MODEL, DataFile, read_model, read_tensor
from trim_export.converters.onnx.head import dense_matrix, find_head, rewrite_lookup
from trim_export.converters.onnx.operators import DENSE, DOMAIN, Operator, pick_encoding, with_values
from trim_export.errors import ModelError

__all__ = ["Form", "Sparsified", "sparsify"]


@dataclass(frozen=True)
class Form:
    """What a model shall be stored as.

    Attributes:
        encoding: of sparse matrices, a name in `operators.SPARSE`.
        values: of kept weights, a name in `operators.VALUES`.
        head: the same for LM head and embedding; None leaves them as they are.
        least_sparsity: matrices with a smaller share of zeros stay dense.
    """

    encoding: str = "bitmap"
    values: str = "float32"
    head: str | None = None
    least_sparsity: float = 0.4


@dataclass(frozen=True)
class Sparsified:
    """What became sparse: how many matrices, their weights, and how many of these are not zero."""

    matrices: int
    weights: int
    nnz: int


def sparsify(source: Path, out: Path, form: Form) -> Sparsified:
    """Write the model in directory ``source`` to directory ``out``; one weight is in memory at a time.

    Raises:
        ModelError: no constant of a `MatMul` is sparse enough.
        ArtifactError: the source cannot be read.
    """
    model = read_model(source / MODEL)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    products = _products(model, weights)
    head = find_head(model, source) if form.head is not None else None
    if head is not None and _sparsity(read_tensor(source, weights[head.name])) >= form.least_sparsity:
        head = None  # it was pruned, and is a sparse product like the others
    skipped = set() if head is None else head.weights
    counts: list[tuple[int, int]] = []
    used: dict[str, Operator] = {}
    made: list[TensorProto] = []
    with DataFile(out / f"{MODEL}.data") as file:

        def store(name: str, operator: Operator, matrix: SparseMatrix, values: str) -> None:
            stored, scales = with_values(matrix, values)
            constants = operator.encode(stored) | {"scales": scales}
            made.extend(file.add(f"{name}.{part}", constants[part]) for part in operator.constants)

        def multiply(node: NodeProto, operator: Operator, name: str, shape: tuple[int, int]) -> None:
            used[operator.name] = operator
            node.op_type, node.domain = operator.name, DOMAIN
            node.input[1:] = [f"{name}.{part}" for part in operator.constants]
            sides = zip(("rows", "columns"), shape, strict=True)
            node.attribute.extend(helper.make_attribute(side, size) for side, size in sides)

        for name, tensor in weights.items():
            if name in skipped:
                continue
            weight = read_tensor(source, tensor)
            if name not in products or _sparsity(weight) < form.least_sparsity:
                made.append(file.add(name, weight))
                continue
            matrix = SparseMatrix.from_dense(weight.T)
            operator = pick_encoding(form.encoding, matrix.shape[1])
            store(name, operator, matrix, form.values)
            for node in products[name]:
                multiply(node, operator, name, matrix.shape)
            counts.append((weight.numel(), matrix.nnz))
        if head is not None and form.head is not None:
            for name, weight in head.matrices(source, weights):
                store(name, DENSE, dense_matrix(weight), form.head)
                if name == head.name:
                    multiply(head.product, DENSE, name, (weight.shape[0], weight.shape[1]))
            rewrite_lookup(model, head, form.head == "int8")
    if not counts:
        raise ModelError(f"{source / MODEL}: none of its {len(products)} constant MatMul weights is sparse")
    del model.graph.initializer[:]
    model.graph.initializer.extend(made)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    model.functions.extend(operator.function(opset) for operator in used.values())
    (out / MODEL).write_bytes(model.SerializeToString())
    return Sparsified(len(counts), *(sum(column) for column in zip(*counts, strict=True)))


def _sparsity(weight: Tensor) -> float:
    return 1 - int(weight.count_nonzero()) / max(weight.numel(), 1)


def _products(model: ModelProto, weights: dict[str, TensorProto]) -> dict[str, list[NodeProto]]:
    """The weights that are nothing but the right side of products, and the products."""
    found: dict[str, list[NodeProto]] = {}
    other = {value.name for value in model.graph.output}
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name not in weights:
                continue
            if (
                node.op_type == "MatMul"
                and node.domain in ("", "ai.onnx")
                and place == 1
                and len(weights[name].dims) == 2
            ):
                found.setdefault(name, []).append(node)
            else:
                other.add(name)
    return {name: nodes for name, nodes in found.items() if name not in other}
