"""From a dense ONNX graph whose weights hold zeros to one that stores and multiplies what is not zero.

Nothing is said of where the graph comes from: each constant that is the right side of a `MatMul` is looked at, so that
projections an exporter has joined (q, k and v in one) need no map of names. Sparse products of the same input that it
left apart (gate and up) become one, since at one token a product costs about as much to start as to compute.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from onnx import ModelProto, NodeProto, TensorProto, helper
from torch import Tensor

from trim_export.converters.int8 import balance_columns
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
    element = model.graph.output[0].type.tensor_type.elem_type  # of the logits, and of what is multiplied
    head = find_head(model, source) if form.head is not None else None
    if head is not None and _sparsity(read_tensor(source, weights[head.name])) >= form.least_sparsity:
        head = None  # it was pruned, and is a sparse product like the others
    skipped = set() if head is None else head.weights
    sparse = {
        name: nodes
        for name, nodes in products.items()
        if name not in skipped and _sparsity(read_tensor(source, weights[name])) >= form.least_sparsity
    }
    siblings = _siblings(model, sparse)
    # Large inputs of the last product of a gated MLP meet small weights, which steps for a whole row would round away.
    feeds = _feeds(model, sparse) if form.values == "int8" else {}
    fed = {name for name in feeds.values() if len(siblings[name]) == 1}

    def balanced(name: str) -> tuple[SparseMatrix, Tensor]:
        return balance_columns(SparseMatrix.from_dense(read_tensor(source, weights[name]).T))

    def factors(name: str) -> Tensor:
        return balanced(feeds[name])[1] if feeds.get(name) in fed else torch.ones(weights[name].dims[1])

    counts: list[tuple[int, int, int]] = []
    used: dict[str, Operator] = {}
    made: list[TensorProto] = []
    splits: list[NodeProto] = []
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
            parts = [read_tensor(source, weights[part]).T for part in names]
            matrix = balanced(name)[0] if name in fed else SparseMatrix.from_dense(torch.cat(parts))
            operator, joined = pick_encoding(form.encoding, matrix.shape[1]), "+".join(names)
            store(joined, operator, matrix, form.values, torch.cat([factors(part) for part in names]))
            if len(names) > 1:
                made.append(file.add(f"{joined}.rows", torch.tensor([len(part) for part in parts])))
                splits.append(_join([sparse[part][0] for part in names], f"{joined}.rows"))
            for node in sparse[name]:
                multiply(node, operator, joined, matrix.shape)
            counts.append((len(names), matrix.mask.numel(), matrix.nnz))
        if head is not None and form.head is not None:
            for name, weight in head.matrices(source, weights):
                store(name, DENSE, dense_matrix(weight), form.head)
                if name == head.name:
                    multiply(head.product, DENSE, name, (weight.shape[0], weight.shape[1]))
            rewrite_lookup(model, head, form.head == "int8", element)
    _insert(model, splits)
    if not counts:
        raise ModelError(f"{source / MODEL}: none of its {len(products)} constant MatMul weights is sparse")
    del model.graph.initializer[:]
    model.graph.initializer.extend(made)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    model.functions.extend(operator.function(opset, element) for operator in used.values())
    (out / MODEL).write_bytes(model.SerializeToString())
    return Sparsified(*(sum(column) for column in zip(*counts, strict=True)))


def _sparsity(weight: Tensor) -> float:
    return 1 - int(weight.count_nonzero()) / max(weight.numel(), 1)


def _siblings(model: ModelProto, products: Mapping[str, Sequence[NodeProto]]) -> dict[str, list[str]]:
    """For each weight those that are multiplied with the same input, itself included, in the order of the graph."""
    by_input: dict[str, list[str]] = {}
    for node in model.graph.node:
        name = node.input[1] if len(node.input) > 1 else ""
        if any(node is product for product in products.get(name, ())):
            alone = len(products[name]) > 1  # several products of one weight
            by_input.setdefault(name if alone else f"input {node.input[0]}", []).append(name)
    return {name: list(dict.fromkeys(names)) for names in by_input.values() for name in names}


def _feeds(model: ModelProto, products: Mapping[str, Sequence[NodeProto]]) -> dict[str, str]:
    """Weights whose outputs, each multiplied by something, are all inputs of another's: up feeds down, in a gated MLP.

    A factor for a row of the one is then a factor for a column of the other, and nothing is left to do in between.
    """
    made_by = {output: node for node in model.graph.node for output in node.output}
    uses = Counter(name for node in model.graph.node for name in node.input)
    uses.update(value.name for value in model.graph.output)
    alone = {nodes[0].output[0]: name for name, nodes in products.items() if len(nodes) == 1}
    found = {}
    for name in alone.values():
        between = made_by.get(products[name][0].input[0])
        if between is not None and between.op_type == "Mul" and uses[between.output[0]] == 1:
            first = [alone[side] for side in between.input if side in alone and uses[side] == 1]
            found.update(dict.fromkeys(first[:1], name))
    return found


def _join(nodes: Sequence[NodeProto], rows: str) -> NodeProto:
    """Have the first of some products give the outputs of all; the `Split` into so many ``rows`` each."""
    outputs = [node.output[0] for node in nodes]
    nodes[0].output[0] = f"{outputs[0]}/joined"
    return helper.make_node("Split", [nodes[0].output[0], rows], outputs, axis=-1)


def _insert(model: ModelProto, splits: Sequence[NodeProto]) -> None:
    """Put each `Split` behind what it divides, in place of the products whose outputs it gives."""
    behind = {split.input[0]: split for split in splits}
    replaced = {output for split in splits for output in split.output}
    kept = [node for node in model.graph.node if node.output[0] not in replaced]
    del model.graph.node[:]
    for node in kept:
        model.graph.node.append(node)
        if node.output[0] in behind:
            model.graph.node.append(behind[node.output[0]])


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
