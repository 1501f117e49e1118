"""Products with constant weights in a graph: which there are, which share an input, and which feed one another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto, NodeProto, TensorProto, helper
from torch import Tensor

from trim_export.converters.onnx.graph import read_tensor

__all__ = ["Product", "find_feeds", "find_products", "find_siblings", "insert_behind", "join", "separate_biases"]


@dataclass(frozen=True)
class Product:
    """``Y = A W^T`` for a constant that has no other use.

    Attributes:
        constant: W^T, or W where a `Gemm` turns it.
        turned: whether it is W.
        nodes: each `MatMul` or `Gemm` with it, one or more.
    """

    constant: TensorProto
    turned: bool
    nodes: list[NodeProto]

    @property
    def rows(self) -> int:
        """Of W."""
        return int(self.constant.dims[0 if self.turned else 1])

    def weight(self, folder: Path) -> Tensor:
        """W, ``[rows, columns]``, of a model in ``folder``."""
        stored = read_tensor(folder, self.constant)
        return stored if self.turned else stored.T


def find_products(model: ModelProto, weights: Mapping[str, TensorProto]) -> dict[str, Product]:
    """The weights that are nothing but the right side of products, by name."""
    found: dict[str, Product] = {}
    other = {value.name for value in model.graph.output}
    for node in model.graph.node:
        turned = _orientation(node, weights)
        for place, name in enumerate(node.input):
            if name not in weights:
                continue
            if turned is None or place != 1 or len(weights[name].dims) != 2:
                other.add(name)
            elif found.setdefault(name, Product(weights[name], turned, [])).turned == turned:
                found[name].nodes.append(node)
            else:
                other.add(name)
    return {name: product for name, product in found.items() if name not in other}


def _orientation(node: NodeProto, weights: Mapping[str, TensorProto]) -> bool | None:
    """Whether a node turns its right side before it multiplies; None if it is no plain product with a constant bias."""
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "MatMul":
        return False
    given = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    plain = given.get("alpha", 1) == given.get("beta", 1) == 1 and not given.get("transA", 0)
    if node.op_type != "Gemm" or not plain or any(name and name not in weights for name in node.input[2:]):
        return None
    return bool(given.get("transB", 0))


def separate_biases(nodes: Iterable[NodeProto]) -> list[NodeProto]:
    """Have each `Gemm` give the product alone; the `Add` of every bias, to be inserted behind."""
    made = []
    for node in nodes:
        if node.op_type == "Gemm":
            bias, output = node.input[2] if len(node.input) > 2 else "", node.output[0]
            del node.input[2:], node.attribute[:]
            if bias:
                node.output[0] = f"{output}/product"
                made.append(helper.make_node("Add", [node.output[0], bias], [output]))
    return made


def find_siblings(model: ModelProto, products: Mapping[str, Product]) -> dict[str, list[str]]:
    """For each weight those that are multiplied with the same input, itself included, in the order of the graph."""
    by_input: dict[str, list[str]] = {}
    for node in model.graph.node:
        name = node.input[1] if len(node.input) > 1 else ""
        if name in products and any(node is product for product in products[name].nodes):
            alone = len(products[name].nodes) > 1  # several products of one weight
            by_input.setdefault(name if alone else f"input {node.input[0]}", []).append(name)
    return {name: list(dict.fromkeys(names)) for names in by_input.values() for name in names}


def find_feeds(model: ModelProto, products: Mapping[str, Product]) -> dict[str, str]:
    """Weights whose outputs, each multiplied by something, are all inputs of another's: up feeds down, in a gated MLP.

    A factor for a row of the one is then a factor for a column of the other, and nothing is left to do in between.
    """
    made_by = {output: node for node in model.graph.node for output in node.output}
    uses = Counter(name for node in model.graph.node for name in node.input)
    uses.update(value.name for value in model.graph.output)
    alone = {product.nodes[0].output[0]: name for name, product in products.items() if len(product.nodes) == 1}
    found = {}
    for name in alone.values():
        between = made_by.get(products[name].nodes[0].input[0])
        if between is not None and between.op_type == "Mul" and uses[between.output[0]] == 1:
            first = [alone[side] for side in between.input if side in alone and uses[side] == 1]
            found.update(dict.fromkeys(first[:1], name))
    return found


def join(nodes: Sequence[NodeProto], rows: str) -> NodeProto:
    """Have the first of some products give the outputs of all; the `Split` into so many ``rows`` each."""
    outputs = [node.output[0] for node in nodes]
    nodes[0].output[0] = f"{outputs[0]}/joined"
    return helper.make_node("Split", [nodes[0].output[0], rows], outputs, axis=-1)


def insert_behind(model: ModelProto, made: Collection[NodeProto]) -> None:
    """Put each node behind what gives its first input, in place of nodes whose outputs it gives itself."""
    behind = {node.input[0]: node for node in made}
    replaced = {output for node in made for output in node.output}
    waiting = [node for node in model.graph.node if node.output[0] not in replaced][::-1]
    del model.graph.node[:]
    while waiting:
        node = waiting.pop()
        model.graph.node.append(node)
        waiting += [behind[output] for output in node.output if output in behind]
