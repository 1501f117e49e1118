"""The ONNX operators under address and undefined-behaviour sanitizers, fed with lies by a stand-in for ONNX Runtime.

The stand-in (host.cpp) gives each constant memory of exactly its size, which ONNX Runtime, mapping files, does not.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from attacks.onnx_lies import LIES, OPERATORS, SHAPE
from attacks.sanitized import CASES, EXTREMES, OPERATOR_SOURCES, damage, has_avx2, program, run
from onnx_graphs import constants
from torch import Tensor

from trim_export.converters import SparseMatrix
from trim_export.converters.onnx.graph import TYPES
from trim_export.converters.onnx.operators import VALUES

WIDTHS = {number: dtype.itemsize for dtype, (number, _) in TYPES.items() if dtype != torch.float64}
"""Bytes of a number by ONNX's type, of the types that the stand-in knows."""


@dataclass(frozen=True)
class Constant:
    """An initializer: its type is ONNX's number; data is as long as the sides say."""

    type: int
    sides: list[int]
    data: bytes
    constant: bool = True
    misaligned: int = 0

    def resized(self, sides: list[int]) -> Constant:
        """Other sides, and data that goes with them."""
        size = int(np.prod(sides)) * WIDTHS[self.type]
        return replace(self, sides=sides, data=self.data[:size] + bytes(max(0, size - len(self.data))))


@dataclass
class Node:
    """One node, sound or not, and the sum of what it computes if it is."""

    operator: int
    rows: int
    columns: int
    tokens: int
    width: int
    constants: list[Constant]
    total: float = 0.0
    has_attributes: bool = True
    size: float = field(default=0.0, repr=False)

    def written(self) -> bytes:
        numbers = (self.operator, self.rows, self.columns, self.has_attributes, self.tokens, self.width)
        parts = [struct.pack("<7q", *numbers, len(self.constants))]
        for part in self.constants:
            about = (part.type, part.constant, part.misaligned, len(part.sides), *part.sides)
            parts += [struct.pack(f"<{len(about)}q", *about), part.data]
        return b"".join(parts)


@pytest.fixture(scope="module")
def host(sanitized_engine: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in with operators and engine in it."""
    sources = Path(__file__).parent / "host.cpp", OPERATOR_SOURCES / "ops.cpp"
    return program(tmp_path_factory.mktemp("host"), *sources, engine=sanitized_engine)


def executed(host: Path, nodes: list[Node], isa: str, folder: Path) -> list[str]:
    (folder / "nodes").write_bytes(b"".join(node.written() for node in nodes))
    lines = run([str(host), str(folder / "nodes"), isa]).splitlines()
    assert len(lines) == len(nodes)
    return lines


def stored(tensor: Tensor) -> Constant:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return Constant(TYPES[tensor.dtype][0], list(tensor.shape), data)


def node(name: str, parts: dict[str, Tensor], shape: tuple[int, int], tokens: int) -> Node:
    operator = list(OPERATORS).index(name)
    return Node(operator, *shape, tokens, shape[1], [stored(parts[key]) for key in OPERATORS[name].constants])


def sound(chance: random.Random) -> Node:
    rows, columns = chance.choice([(1, 1), (5, 63), (4, 64), (14, 150), (33, 200)])
    generator = torch.Generator().manual_seed(chance.getrandbits(30))
    mask = torch.rand(rows, columns, generator=generator) < chance.choice([0.0, 0.1, 0.5, 1.0])
    matrix = SparseMatrix(mask, torch.randn(int(mask.sum()), generator=generator))
    name, values, tokens = chance.choice(list(OPERATORS)), chance.choice(list(VALUES)), chance.choice([0, 1, 2, 5, 40])
    parts = constants(OPERATORS[name], matrix, values)
    made = node(name, parts, (rows, columns), tokens)
    # In float64, of the values as they were rounded: what `constants` stores of a dense matrix is just that.
    weight = constants(OPERATORS["dense"], matrix, values)
    exact = weight["values"].double() * weight["scales"].double()[:, None]
    inputs = (torch.arange(tokens * columns).reshape(tokens, columns) % 7 - 3).double() * 0.25
    made.total, made.size = float((inputs @ exact.T).sum()), float((inputs.abs() @ exact.abs().T).sum())
    return made


def lied(chance: random.Random, victim: Node) -> None:
    """One change: of an attribute, of the input, or of a constant."""
    what = chance.random()
    if what < 0.1:
        side = chance.choice(["rows", "columns"])
        right = getattr(victim, side)
        setattr(victim, side, chance.choice([*EXTREMES, right + 1, right - 1]))
    elif what < 0.13:
        victim.has_attributes = False
    elif what < 0.2:
        victim.width = max(0, victim.width + chance.choice([-1, 1, -victim.width]))
    else:
        place = chance.randrange(len(victim.constants))
        victim.constants[place] = changed(chance, victim.constants[place])


def changed(chance: random.Random, part: Constant) -> Constant:
    how = chance.choice(["data", "data", "data", "side", "side", "rank", "type", "place", "variable"])
    if how == "data":
        return replace(part, data=damage(chance, part.data, WIDTHS[part.type], lengths=False))
    if how == "side" and part.sides:
        sides = list(part.sides)
        which = chance.randrange(len(sides))
        sides[which] = max(0, sides[which] + chance.choice([-1, 1, 8, -sides[which]]))
        return part.resized(sides)
    if how == "rank":
        flat = int(np.prod(part.sides))
        return part.resized(chance.choice([[], [flat], [1, *part.sides], part.sides[::-1], [flat, 0]]))
    if how == "type":
        return replace(part, type=chance.choice(list(WIDTHS))).resized(part.sides)
    if how == "place":
        return replace(part, misaligned=chance.choice([1, 2, 4]))
    return replace(part, constant=False)


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_operators_touch_nothing_that_is_not_theirs(isa: str, host: Path, tmp_path: Path) -> None:
    if isa == "avx2" and not has_avx2():
        pytest.skip("needs AVX2")
    chance = random.Random(f"operators {isa}")
    nodes = [sound(chance) for _ in range(CASES)]
    for victim in nodes:
        for _ in range(chance.randint(1, 3)):
            lied(chance, victim)
    ends = "".join(line[0] for line in executed(host, nodes, isa, tmp_path))
    # Damage to values is none to the structure; most of the rest is refused before anything is computed.
    assert ends.count("T") > CASES // 20
    assert ends.count("L") > CASES // 2
    assert ends.count("R") > 0


@pytest.mark.parametrize("encoding", LIES)
def test_every_known_lie_is_refused_when_loaded(encoding: str, host: Path, tmp_path: Path) -> None:
    nodes = []
    mask = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) < 0.4
    matrix = SparseMatrix(mask, torch.randn(int(mask.sum())))
    for change, _ in LIES[encoding]:
        parts = constants(OPERATORS[encoding], matrix, "float32")
        change(parts)
        nodes.append(node(encoding, parts, SHAPE, 4))
    assert executed(host, nodes, "portable", tmp_path) == ["L"] * len(nodes)


def test_the_stand_in_multiplies_what_is_sound(host: Path, tmp_path: Path) -> None:
    chance = random.Random(0)
    nodes = [sound(chance) for _ in range(100)]
    for line, right in zip(executed(host, nodes, "portable", tmp_path), nodes, strict=True):
        assert line[0] == "T", right
        assert abs(float(line[2:]) - right.total) <= 1e-5 * right.size + 1e-7
