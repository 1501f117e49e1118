"""From a dense ONNX graph whose weights hold zeros to one that stores and multiplies what is not zero.

Nothing is said of where the graph comes from: each constant that is the right side of a `MatMul` or `Gemm` is looked
at, so that projections an exporter has joined (q, k and v in one) need no map of names. Sparse products of the same
input that it left apart (gate and up) become one, since at one token a product costs about as much to start as to
compute.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from onnx import NodeProto, TensorProto, helper
from torch import Tensor

from trim_export.converters.int8 import column_scales, divide_columns
from trim_export.converters.matrix import SparseMatrix
from trim_export.converters.onnx.graph import MODEL, DataFile, read_model, read_tensor
from trim_export.converters.onnx.head import dense_matrix, find_head, rewrite_lookup
from trim_export.converters.onnx.operators import DENSE, DOMAIN, Operator, pick_encoding, with_values
from trim_export.converters.onnx.products import (
    find_feeds,
    find_products,
    find_siblings,
    insert_behind,
    join,
    separate_biases,
)
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
        ModelError: no constant of a `MatMul` or `Gemm` is sparse enough.
        ArtifactError: the source cannot be read.
    """
    model = read_model(source / MODEL)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    products = find_products(model, weights)
    element = model.graph.output[0].type.tensor_type.elem_type  # of the logits, and of what is multiplied
    head = find_head(model, source) if form.head is not None else None
    if head is not None and _sparsity(read_tensor(source, weights[head.name])) >= form.least_sparsity:
        head = None  # it was pruned, and is a sparse product like the others
    skipped = set() if head is None else head.weights
    sparse = {
        name: product
        for name, product in products.items()
        if name not in skipped and _sparsity(product.weight(source)) >= form.least_sparsity
    }
    inserted = separate_biases(node for product in sparse.values() for node in product.nodes)
    siblings = find_siblings(model, sparse)
    # Large inputs of the last product of a gated MLP meet small weights, which steps for a whole row would round away.
    feeds = find_feeds(model, sparse) if form.values == "int8" else {}
    fed = {name for name in feeds.values() if len(siblings[name]) == 1}

    @functools.cache
    def scales_of(name: str) -> Tensor:
        return column_scales(SparseMatrix.from_dense(sparse[name].weight(source)))

    def factors(name: str) -> Tensor:
        return scales_of(feeds[name]) if feeds.get(name) in fed else torch.ones(sparse[name].rows)

    counts: list[tuple[int, int, int]] = []
    used: dict[str, Operator] = {}
    made: list[TensorProto] = []
    with DataFile(out / f"{MODEL}.data") as file:

        def store(name: str, operator: Operator, matrix: SparseMatrix, values: str, rows: Tensor | float = 1) -> None:
            stored, scales = with_values(matrix, values)
            constants = operator.encode(stored) | {"scales": scales * rows}
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
            if name not in sparse:
                made.append(file.add(name, read_tensor(source, tensor)))
                continue
            names = siblings[name]
            if name != names[0]:
                continue
            parts = [sparse[part].weight(source) for part in names]
            matrix = SparseMatrix.from_dense(torch.cat(parts))
            if name in fed:
                matrix = divide_columns(matrix, scales_of(name))
            operator, joined = pick_encoding(form.encoding, matrix.shape[1]), "+".join(names)
            store(joined, operator, matrix, form.values, torch.cat([factors(part) for part in names]))
            if len(names) > 1:
                made.append(file.add(f"{joined}.rows", torch.tensor([len(part) for part in parts])))
                inserted.append(join([sparse[part].nodes[0] for part in names], f"{joined}.rows"))
            for node in sparse[name].nodes:
                multiply(node, operator, joined, matrix.shape)
            counts.append((len(names), matrix.mask.numel(), matrix.nnz))
        if head is not None and form.head is not None:
            for name, weight in head.matrices(source, weights):
                store(name, DENSE, dense_matrix(weight), form.head)
                if name == head.name:
                    multiply(head.product, DENSE, name, (weight.shape[0], weight.shape[1]))
            rewrite_lookup(model, head, form.head == "int8", element)
    insert_behind(model, inserted)
    if not counts:
        raise ModelError(f"{source / MODEL}: none of its {len(products)} constant MatMul or Gemm weights is sparse")
    del model.graph.initializer[:]
    model.graph.initializer.extend(made)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    model.functions.extend(operator.function(opset, element) for operator in used.values())
    (out / MODEL).write_bytes(model.SerializeToString())
    return Sparsified(*(sum(column) for column in zip(*counts, strict=True)))


def _sparsity(weight: Tensor) -> float:
    return 1 - int(weight.count_nonzero()) / max(weight.numel(), 1)
