"""LM head and embedding: found in a graph, and made to share one matrix where the model ties them.

An exporter turns the head's weight round for `MatMul`, so that a tied embedding is a second copy of it, in the file or,
behind a `Transpose` that is folded when the model is loaded, in memory. On a small model that is most of what pruning
left. `DenseMatMul` reads the embedding's rows as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from onnx import ModelProto, NodeProto, TensorProto, helper
from torch import Tensor

from trim_export.converters.matrix import SparseMatrix
from trim_export.converters.onnx.graph import read_tensor

__all__ = ["Head", "dense_matrix", "find_head", "rewrite_lookup"]


@dataclass(frozen=True)
class Head:
    """The product that gives the logits, and the lookup of tokens.

    Attributes:
        product: a `MatMul` with a constant ``[columns, vocabulary]``.
        name: of that constant.
        lookup: the `Gather` of the embedding, or None if none was found.
        table: the constant ``[vocabulary, columns]`` that it looks up; ``name`` if it is the head's, turned or equal.
        weights: the constants that both replace.
    """

    product: NodeProto
    name: str
    lookup: NodeProto | None
    table: str | None
    weights: frozenset[str]

    def matrices(self, folder: Path, weights: Mapping[str, TensorProto]) -> Iterator[tuple[str, Tensor]]:
        """Each matrix that is stored, ``[vocabulary, columns]``, by the name of its constant."""
        yield self.name, read_tensor(folder, weights[self.name]).T
        if self.table is not None and self.table != self.name:
            yield self.table, read_tensor(folder, weights[self.table])


def find_head(model: ModelProto, folder: Path) -> Head | None:
    """LM head and embedding of a graph whose weights are in ``folder``; None where the logits are no plain product."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {output: node for node in model.graph.node for output in node.output}
    product = makers.get(model.graph.output[0].name)
    while product is not None and product.op_type in ("Cast", "Identity"):
        product = makers.get(product.input[0])
    if product is None or product.op_type != "MatMul" or product.input[1] not in weights:
        return None
    name = product.input[1]
    users = [node for node in model.graph.node if name in node.input and node is not product]
    turned = next((node.output[0] for node in users if node.op_type == "Transpose"), None)
    if any(node.op_type != "Transpose" for node in users):
        return None
    lookup = _find_lookup(model, {*weights, *([turned] if turned else [])})
    if lookup is None:
        return Head(product, name, None, None, frozenset([name]))
    source = lookup.input[0]
    if source == turned:
        return Head(product, name, lookup, name, frozenset([name]))
    head, table = weights[name], weights[source]
    tied = list(head.dims) == list(table.dims)[::-1] and torch.equal(
        read_tensor(folder, head).T, read_tensor(folder, table)
    )
    return Head(product, name, lookup, name if tied else source, frozenset([name, source]))


def dense_matrix(weight: Tensor) -> SparseMatrix:
    """All of a weight, zeros too."""
    return SparseMatrix(torch.ones_like(weight, dtype=torch.bool), weight.reshape(-1))


def rewrite_lookup(model: ModelProto, head: Head, scaled: bool, element: int) -> None:
    """Look tokens up in the stored matrix, as numbers of a type, and if ``scaled`` multiply by their rows' scales."""
    lookup = head.lookup
    if lookup is None:
        return
    tokens, output = lookup.input[1], lookup.output[0]
    made = [
        helper.make_node("Gather", [f"{head.table}.values", tokens], [f"{output}/stored"]),
        helper.make_node("Cast", [f"{output}/stored"], [f"{output}/steps" if scaled else output], to=element),
    ]
    if scaled:
        last = helper.make_tensor("last", TensorProto.INT64, [1], [-1])
        made += [
            helper.make_node("Gather", [f"{head.table}.scales", tokens], [f"{output}/stored_scales"]),
            helper.make_node("Cast", [f"{output}/stored_scales"], [f"{output}/scales"], to=element),
            helper.make_node("Constant", [], [f"{output}/last"], value=last),
            helper.make_node("Unsqueeze", [f"{output}/scales", f"{output}/last"], [f"{output}/scales_of_rows"]),
            helper.make_node("Mul", [f"{output}/steps", f"{output}/scales_of_rows"], [output]),
        ]
    nodes = list(model.graph.node)
    place = next(index for index, node in enumerate(nodes) if node is lookup)
    kept = [node for node in nodes if not (node.op_type == "Transpose" and node.input[0] in head.weights)]
    place -= sum(node.op_type == "Transpose" and node.input[0] in head.weights for node in nodes[:place])
    kept[place : place + 1] = made
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _find_lookup(model: ModelProto, tables: set[str]) -> NodeProto | None:
    """The `Gather` of token ids in one of the tables."""
    ids = model.graph.input[0].name
    found = [node for node in model.graph.node if node.op_type == "Gather" and node.input[0] in tables]
    return next((node for node in found if node.input[1] == ids), None)
