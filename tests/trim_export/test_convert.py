"""Converting: every target holds the same weights, and a failure leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import scipy.sparse
import torch
from tiny_models import tiny_tokens
from transformers import AutoModelForCausalLM

from trim_export import convert as convert_module
from trim_export.artifact import Artifact, open_artifact, verify_files
from trim_export.convert import convert
from trim_export.converters import Bsr
from trim_export.errors import UsageError
from trim_export.forward import choose_compute
from trim_export.models import load_model
from trim_export.prune import prune
from trim_export.recipe import Recipe
from trim_export.runtimes import load


def same_weights(artifact: Artifact, model: torch.nn.Module) -> None:
    weights = model.state_dict()
    for name, matrix in artifact.matrices():
        assert torch.equal(weights[f"{name}.weight"], matrix.to_dense()), name


@pytest.mark.parametrize(("target", "block"), [("csr", None), ("bitmap", None), ("bsr", None), ("bsr", (3, 5))])
def test_an_encoding_is_an_artifact_with_the_same_weights(
    pruned: Callable[..., Artifact], target: str, block: tuple[int, int] | None, tmp_path: Path
) -> None:
    artifact = pruned("llama")
    report = convert(artifact, target, tmp_path / "out", block)
    converted = open_artifact(tmp_path / "out")
    assert verify_files(converted) == []
    assert converted.encoding.name == target
    assert report["bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    same_weights(artifact, load(tmp_path / "out", "dense"))


def test_there_and_back_is_the_same_shards(pruned: Callable[..., Artifact], tmp_path: Path) -> None:
    artifact = pruned("opt")
    convert(artifact, "csr", tmp_path / "csr")
    convert(open_artifact(tmp_path / "csr"), "bitmap", tmp_path / "back")
    for shard in artifact.shards:
        assert (tmp_path / "back" / shard).read_bytes() == (artifact.path / shard).read_bytes()


def test_dense_is_an_ordinary_model(pruned: Callable[..., Artifact], tmp_path: Path) -> None:
    artifact = pruned("qwen2")
    convert(artifact, "dense", tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not hasattr(model.config, "quantization_config")
    same_weights(artifact, model)
    load_model(str(tmp_path / "dense"))  # and can be pruned again


def test_scipy_files_hold_each_matrix(pruned: Callable[..., Artifact], tmp_path: Path) -> None:
    artifact = pruned("llama")
    convert(artifact, "scipy", tmp_path / "scipy")
    for name, matrix in artifact.matrices():
        stored = scipy.sparse.load_npz(tmp_path / "scipy" / f"{name}.npz")
        assert stored.nnz == matrix.nnz
        assert torch.equal(torch.from_numpy(stored.toarray()), matrix.to_dense())


def test_blocks_count_no_weight_that_is_exactly_zero(tiny: Callable[..., Path], tmp_path: Path) -> None:
    dense = load_model(str(tiny("llama")))
    weight = dense.model.model.layers[0].mlp.up_proj.weight  # type: ignore[union-attr]
    weight[:, ::4] = 0
    weight[:, 1::4] = 0
    weight[:, 2::4] = 0
    recipe = Recipe(0.5, rows="uniform", update="none", context_length=0)
    artifact = prune(dense, recipe, tiny_tokens(), tmp_path / "a", choose_compute("cpu", torch.float32))
    convert(artifact, "bsr", tmp_path / "bsr")
    converted = open_artifact(tmp_path / "bsr")
    assert verify_files(converted) == []
    name = "model.layers.0.mlp.up_proj"
    assert converted.modules[name]["nnz"] < artifact.modules[name]["nnz"]
    assert converted.manifest["sparsity"]["achieved"] > artifact.manifest["sparsity"]["achieved"]


@pytest.mark.parametrize(("target", "block"), [("nothing", None), ("csr", (4, 4))])
def test_bad_targets_write_nothing(
    pruned: Callable[..., Artifact], target: str, block: tuple[int, int] | None, tmp_path: Path
) -> None:
    with pytest.raises(UsageError):
        convert(pruned("llama"), target, tmp_path / "out", block)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_never_touched(pruned: Callable[..., Artifact], tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        convert(pruned("llama"), "csr", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_failure_half_way_leaves_nothing(
    pruned: Callable[..., Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert_module, "write_index", full)
    with pytest.raises(OSError, match="No space"):
        convert(pruned("llama"), "csr", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_block_size_decides_the_bytes(pruned: Callable[..., Artifact], tmp_path: Path) -> None:
    sizes = {side: convert(pruned("llama"), "bsr", tmp_path / str(side), (side, side))["bytes"] for side in (2, 8)}
    assert sizes[8] > sizes[2]  # on an unstructured mask larger blocks hold more zeros
    assert Bsr((8, 8)).name == "bsr"
