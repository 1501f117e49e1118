"""`tune` with the kernels interpreted and a timer that makes times up: run by `test_timing`.

Prints one JSON object: the choice, and the largest relative difference between any two products of the same operands.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict

import torch
from cases import packed, row_variable

from trim_export.converters import G8, InterleavedCsr
from trim_export.runtimes.triton.timing import EXPAND, SPMM, SPMV, Product, tune


def main() -> None:
    layers = [packed(row_variable(9, 37, torch.float32, 0), G8(), "cpu"),
              packed(row_variable(5, 300, torch.float32, 1), InterleavedCsr(), "cpu")]  # fmt: skip
    worst = 0.0

    def timer(entries: Mapping[str, Product]) -> dict[str, list[float]]:
        nonlocal worst
        outputs = {name: product() for name, product in entries.items()}
        expected = outputs[EXPAND]
        assert expected.norm() > 0
        worst = max(worst, *(float((output - expected).norm() / expected.norm()) for output in outputs.values()))
        made_up = {EXPAND: 6.0, SPMM: float(len(expected))} | {name: 3.0 + (w - 2) ** 2 for name, w in SPMV.items()}
        return {name: [made_up[name]] * 3 for name in entries}

    choice = tune(layers, timer)
    print(json.dumps({"choice": asdict(choice), "worst": worst}))


if __name__ == "__main__":
    main()
