"""Single products in ONNX Runtime, each form of one matrix beside the dense one, as they run within a model.

There a product finds its weights cold, because the other layers were read since, and its threads awake, because they
multiplied the layer before a moment ago. A session of one product has it the other way round, so each has several in a
row, each with a copy of the weights; together they are more than a cache holds.
"""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from trim_export.converters.onnx import MODEL, SPARSE, VALUES, Form, sparsify
from trim_export.converters.onnx.graph import read_model
from trim_export.runtimes.onnxruntime import open_session

__all__ = ["SIDE", "SPARSITY", "TOKENS", "layers", "repeat", "write_product"]

DATA = f"{MODEL}.data"
SIDE = 4096
SPARSITY = 0.8
TOKENS = (1, 32)

PRODUCTS = 6
PAUSE_S = 0.1
"""Idle threads of a session spin some 65 ms before they sleep, on a core that the next session needs."""


def layers(folder: Path, threads: int, rounds: int) -> dict[str, dict[str, Any]]:
    """By form: ``bytes`` of its file and, by number of tokens, milliseconds of one product, turn by turn A B A B."""
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((SIDE, SIDE), np.float32)
    weight[generator.random((SIDE, SIDE)) < SPARSITY] = 0
    folders = {"dense": folder / "dense"}
    folders["dense"].mkdir(parents=True, exist_ok=True)
    write_product(folders["dense"], weight)
    for encoding in SPARSE:
        for values in VALUES:
            name = f"{encoding} {values}"
            folders[name] = folder / name
            folders[name].mkdir(exist_ok=True)
            sparsify(folders["dense"], folders[name], Form(encoding, values))
    rows: dict[str, dict[str, Any]] = {
        name: {"bytes": sum((place / file).stat().st_size for file in (MODEL, DATA))} for name, place in folders.items()
    }
    for place in folders.values():
        repeat(place, PRODUCTS)
    sessions = {name: open_session(place, threads=threads) for name, place in folders.items()}
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for tokens in TOKENS:
            inputs = {"A": generator.standard_normal((tokens, SIDE), np.float32)}
            for name, session in sessions.items():
                time.sleep(PAUSE_S)
                session.run(inputs)  # wakes its threads
                begin = time.perf_counter()
                session.run(inputs)
                spent = (time.perf_counter() - begin) * 1000 / PRODUCTS
                times.setdefault((name, tokens), []).append(spent)
    for (name, tokens), samples in times.items():
        rows[name][str(tokens)] = {"median_ms": statistics.median(samples), "min_ms": min(samples)}
    return rows


def write_product(folder: Path, weight: NDArray[np.float32]) -> None:
    """A model that takes ``A`` ``[tokens, columns]`` and gives ``Y``, its product with ``weight`` transposed."""
    rows, columns = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["A", "W"], ["Y"])],
        "product",
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, ["tokens", columns])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["tokens", rows])],
        [numpy_helper.from_array(np.ascontiguousarray(weight.T), "W")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (folder / DATA).unlink(missing_ok=True)  # it would be added to
    onnx.save_model(model, folder / MODEL, save_as_external_data=True, location=DATA)


def repeat(folder: Path, times: int) -> None:
    """Have a model of one product with a square matrix multiply ``times`` in a row, each by a copy of the weights."""
    model = read_model(folder / MODEL)
    (product,) = model.graph.node
    constants = list(model.graph.initializer)
    stored = {constant.name for constant in constants}
    taken, given = next(name for name in product.input if name not in stored), product.output[0]
    del model.graph.node[:], model.graph.initializer[:]
    for i in range(times):
        # A file of its own, since the system has a file in memory once, however many sessions read it.
        data = f"{MODEL}.{i}.data"
        shutil.copyfile(folder / DATA, folder / data)
        for constant in constants:
            copy = model.graph.initializer.add()
            copy.CopyFrom(constant)
            copy.name = f"{constant.name}.{i}"
            for entry in copy.external_data:
                entry.value = data if entry.key == "location" else entry.value
        node = model.graph.node.add()
        node.CopyFrom(product)
        node.name = f"product.{i}"
        before = f"{given}.{i - 1}" if i else taken
        node.input[:] = [f"{name}.{i}" if name in stored else before for name in product.input]
        node.output[:] = [given if i == times - 1 else f"{given}.{i}"]
    (folder / DATA).unlink()
    onnx.save_model(model, folder / MODEL)
