"""Transformers in a process that never imported our loader: it must fail, not fill the matrices with random numbers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from trim_export.artifact import Artifact
from trim_export.convert import convert

STRANGER = """
import sys
from transformers import AutoModel, AutoModelForCausalLM
for directory in sys.argv[1:]:
    for kind in (AutoModelForCausalLM, AutoModel):
        try:
            kind.from_pretrained(directory)
        except RuntimeError:
            print("refused")
        else:
            print("loaded", directory)
assert "trim_export.runtimes" not in sys.modules
"""

FRIEND = """
import sys
import trim_export
assert "torch" not in sys.modules
model = trim_export.load(sys.argv[1], "torch-sparse", check_hashes=True)
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""


def run(script: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own; the guard's name stands in what transformers logs."""
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=True
    )


def test_transformers_alone_refuses_an_artifact_however_it_was_written(
    pruned: Callable[..., Artifact], tmp_path: Path
) -> None:
    from trim_export.runtimes import load

    original = pruned("llama")
    convert(original, "csr", tmp_path / "csr")
    load(original.path, "torch-sparse").save_pretrained(tmp_path / "saved")
    done = run(STRANGER, original.path, tmp_path / "csr", tmp_path / "saved", pruned("opt").path)
    assert done.stdout.split() == ["refused"] * 8
    assert "trim-sparse" in done.stderr
    assert "size mismatch" in done.stderr


def test_the_package_loads_an_artifact_with_one_import(pruned: Callable[..., Artifact]) -> None:
    assert run(FRIEND, pruned("llama").path).stdout.split() == ["TorchSparseLinear"]


def test_a_dense_copy_is_for_everyone(pruned: Callable[..., Artifact], tmp_path: Path) -> None:
    convert(pruned("llama"), "dense", tmp_path / "plain")
    script = STRANGER.replace("(AutoModelForCausalLM, AutoModel)", "(AutoModelForCausalLM,)")
    assert run(script, tmp_path / "plain").stdout.split()[0] == "loaded"
