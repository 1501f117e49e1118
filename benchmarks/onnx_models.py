"""One artifact in every ONNX form beside the dense model and its int4, and single layers: sizes, load, memory, speed.

    python -m benchmarks.onnx_models ARTIFACT --model MODEL --work DIRECTORY [--json FILE]

Models are made once, in ``--work``, and kept. The int4 rival is onnxruntime-genai's own of the *dense* model; fidelity
is the KL divergence from that model, from the pruned one, and from the one of the two that a form rounds (its parent),
on the prompts of ``verify``. Some forms, the dense one and int4 are there again with the logits of the last token only.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.onnx_layers import SIDE, SPARSITY, layers
from trim_export.artifact import open_artifact
from trim_export.bench import Workload, bench, contestants, onnx_contestants
from trim_export.convert_onnx import convert_to_onnx
from trim_export.converters.onnx import Form, build
from trim_export.evaluate import divergence
from trim_export.models import load_model, quiet_transformers
from trim_export.report import bench_table, megabytes, table
from trim_export.runtimes import load
from trim_export.verify import PROMPTS

FORMS = {
    "dense": None,
    "csr-fp32": Form("csr", "float32", "float32"),
    "bitmap-fp32": Form("bitmap", "float32", "float32"),
    "csr-bf16-int8head": Form("csr", "bfloat16", "int8"),
    "bitmap-bf16-int8head": Form("bitmap", "bfloat16", "int8"),
    "csr-int8-int8head": Form("csr", "int8", "int8"),
}
LAST = ("dense", "csr-bf16-int8head", "csr-int8-int8head")
"""Forms that are made once more with the logits of the last token only, and int4."""


def main() -> None:
    """Make what is missing, measure everything, print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--model", required=True, help="the dense model that the artifact was made of")
    parser.add_argument("--work", type=Path, required=True, help="directory for the ONNX models")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    quiet_transformers()
    options.work.mkdir(parents=True, exist_ok=True)
    made = {name: _make(open_artifact(options.artifact), options.work / name, form) for name, form in FORMS.items()}
    int4 = _make_int4(options.model, options.work / "int4")
    last = [_make(open_artifact(options.artifact), options.work / f"{name}-last", FORMS[name], True) for name in LAST]
    last.append(_make_int4(options.model, options.work / "int4-last", last_logits=True))
    products = layers(options.work / "layers", options.threads, options.rounds)
    fidelity = _fidelity(options.model, options.artifact, made | {"int4": int4})
    entries = [entry for name in FORMS for entry in onnx_contestants(made[name], ["onnxruntime"])]
    entries += onnx_contestants(made["csr-fp32"], ["onnxruntime-functions"]) + onnx_contestants(int4, ["onnxruntime"])
    entries += contestants(open_artifact(options.artifact), ["native"])[2:]
    workload = Workload(prompt=options.prompt, repeats=options.rounds, threads=options.threads)
    result = bench(entries, workload) | {"layers": products, "fidelity": fidelity}
    console = Console(width=180)
    console.print(bench_table(result))
    served = bench([entry for folder in last for entry in onnx_contestants(folder, ["onnxruntime"])], workload)
    console.print(bench_table(served))
    result["last_logits"] = served["rows"]
    console.print(
        table(
            f"{SIDE} x {SIDE} at {SPARSITY:.0%}, {options.threads} threads, median (minimum) ms",
            ("form", "file", "1 token", "x dense", "32 tokens", "x dense"),
            [
                (name, megabytes(row["bytes"]), *_layer_cells(products, name, "1"), *_layer_cells(products, name, "32"))
                for name, row in products.items()
            ],
        )
    )
    console.print(
        table(
            "KL divergence on the prompts of verify, and the same most likely token",
            (
                "form",
                "to the dense model",
                "agreement",
                "to the pruned model",
                "agreement",
                "to its parent",
                "agreement",
            ),
            [(name, *(f"{value:.3g}" for value in row.values())) for name, row in fidelity.items()],
        )
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def _make(artifact: Any, folder: Path, form: Form | None, last_logits: bool = False) -> Path:
    if not folder.exists():
        convert_to_onnx(artifact, folder, form, last_logits=last_logits)
    return folder


def _make_int4(model: str, folder: Path, last_logits: bool = False) -> Path:
    if not folder.exists():
        plain = folder.with_name("dense-model")
        dense = load_model(model)
        dense.model.save_pretrained(plain)
        dense.tokenizer.save_pretrained(plain)
        build(plain, folder, "int4", last_logits)
    return folder


@torch.inference_mode()
def _fidelity(model: str, artifact: Path, folders: dict[str, Path]) -> dict[str, dict[str, float]]:
    dense = load_model(model)
    prompts = [torch.tensor(dense.tokenizer(text)["input_ids"])[None] for text in PROMPTS]

    def logits(loaded: Any) -> torch.Tensor:
        return torch.cat([loaded(prompt).logits[0].float() for prompt in prompts])

    expected, pruned = logits(dense.model), logits(load(artifact, "dense", dtype=torch.float32))
    rows = {}
    for name, folder in folders.items():
        given = logits(load(folder))
        to_dense, to_pruned = divergence(expected, given), divergence(pruned, given)
        to_parent = to_dense if name == "int4" else to_pruned
        rows[name] = {
            "kl_to_dense": to_dense.kl,
            "agreement_with_dense": to_dense.argmax_agreement,
            "kl_to_pruned": to_pruned.kl,
            "agreement_with_pruned": to_pruned.argmax_agreement,
            "kl_to_parent": to_parent.kl,
            "agreement_with_parent": to_parent.argmax_agreement,
        }
    return rows


def _layer_cells(products: dict[str, dict[str, Any]], name: str, tokens: str) -> tuple[str, str]:
    mine, dense = products[name][tokens], products["dense"][tokens]
    return f"{mine['median_ms']:.2f} ({mine['min_ms']:.2f})", f"{dense['median_ms'] / mine['median_ms']:.2f}"


if __name__ == "__main__":
    main()
