"""DeepSparse 1.8, the last one: it needs numpy 1 and so an environment of its own, in a process that times itself."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

__all__ = ["DeepSparse"]

# Runs where nothing of ours is installed. Shapes are static there, so each number of tokens has engines of its own.
_WORKER = """
import json, sys, time
import numpy as np
from deepsparse import Engine
from onnx import TensorProto, helper, numpy_helper, save

folder, threads, copies = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
weight = np.load(folder + "/weight.npy").T.copy()
engines = {}

def made(tokens):
    sides = zip(("x", "y"), weight.shape)
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [tokens, size])] for name, size in sides]
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "layer", *ends, [numpy_helper.from_array(weight, "w")])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), folder + "/layer.onnx")
    return [Engine(folder + "/layer.onnx", batch_size=tokens, num_cores=threads) for _ in range(copies)]

for line in sys.stdin:
    tokens, products = json.loads(line)
    if tokens not in engines:
        engines.clear()
        engines[tokens] = made(tokens)
    x, spent = np.random.default_rng(0).standard_normal((tokens, len(weight)), dtype=np.float32), []
    for _ in range(products):
        engines[tokens].append(engines[tokens].pop(0))
        begin = time.perf_counter()
        engines[tokens][-1].run([x])
        spent.append((time.perf_counter() - begin) * 1e3)
    print("\\n" + json.dumps(spent), flush=True)
"""


class DeepSparse:
    """A process with ``copies`` engines of one layer, float32 ``[rows, columns]``."""

    def __init__(self, python: Path, weight: np.ndarray[Any, Any], copies: int, threads: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        np.save(f"{self._folder.name}/weight.npy", weight)
        self._process = subprocess.Popen(
            [str(python), "-c", _WORKER, self._folder.name, str(threads), str(copies)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __enter__(self) -> DeepSparse:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()

    def turn(self, tokens: int, products: int) -> list[float]:
        """Milliseconds of so many products of as many tokens."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([tokens, products]) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("["):  # and not what the engine says of itself
                return [float(spent) for spent in json.loads(line)]
        raise RuntimeError("DeepSparse ended; does the interpreter have it?")
