"""Opening artifacts good and bad, what their manifests say, and finding every kind of damage to their files."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, tiny_tokenizer

import trim_export
from trim_export.artifact import (
    FORMAT_VERSION,
    JOURNAL,
    MANIFEST,
    REST,
    Artifact,
    block_shard,
    open_artifact,
    verify_files,
)
from trim_export.converters import SparseMatrix
from trim_export.errors import ArtifactError
from trim_export.models import decoder_blocks, projections
from trim_export.recipe import fingerprint

KIND = "llama"
MODULE = "model.layers.1.mlp.down_proj"


@pytest.fixture
def artifact(pruned: Callable[..., Artifact], tmp_path: Path) -> Artifact:
    """A finished artifact to damage."""
    return open_artifact(shutil.copytree(pruned(KIND).path, tmp_path / "artifact"))


def refusal(directory: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        open_artifact(directory)
    message = str(caught.value)
    assert "\n" not in message
    assert str(directory) in message
    return message


def rewrite(artifact: Artifact, change: Callable[[dict[str, Any]], object]) -> Path:
    manifest = json.loads((artifact.path / MANIFEST).read_text())
    change(manifest)
    (artifact.path / MANIFEST).write_text(json.dumps(manifest))
    return artifact.path


# ---- opening -----------------------------------------------------------------------------------------------------


def test_no_such_directory(tmp_path: Path) -> None:
    assert "no such directory" in refusal(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    assert "no such directory" in refusal(tmp_path / "file")


def test_a_directory_that_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "not a trim-export artifact" in refusal(tmp_path)


def test_an_unfinished_artifact_says_how_far_it_got(artifact: Artifact) -> None:
    (artifact.path / MANIFEST).unlink()
    (artifact.path / JOURNAL).write_text(json.dumps({"blocks": 2, "shards": {block_shard(0): {}}}))
    message = refusal(artifact.path)
    assert "unfinished, 1 of 2 blocks" in message
    assert "--resume" in message


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "3", '{"shards": 1}', '{"shards": null, "blocks": 2}'])
def test_an_unfinished_artifact_with_a_damaged_journal(artifact: Artifact, content: str) -> None:
    (artifact.path / MANIFEST).unlink()
    (artifact.path / JOURNAL).write_text(content)
    refusal(artifact.path)


def test_a_newer_format_asks_for_a_newer_tool(artifact: Artifact) -> None:
    message = refusal(rewrite(artifact, lambda m: m.update(format_version=FORMAT_VERSION + 1)))
    assert "is newer than this trim-export reads" in message
    assert "upgrade" in message


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", b'{"format_version": "1"}'])
def test_a_manifest_that_is_none(artifact: Artifact, content: bytes) -> None:
    (artifact.path / MANIFEST).write_bytes(content)
    assert MANIFEST in refusal(artifact.path)


def test_a_manifest_nested_too_deep_to_parse(artifact: Artifact) -> None:
    (artifact.path / MANIFEST).write_text("[" * 200_000)
    assert MANIFEST in refusal(artifact.path)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("encoding"),
        lambda m: m.pop("files"),
        lambda m: m.pop("modules"),
        lambda m: m.pop("run"),
        lambda m: m.pop("source"),
        lambda m: m.pop("bytes"),
        lambda m: m.pop("sparsity"),
        lambda m: m.update(run=[]),
        lambda m: m.update(source="llama"),
        lambda m: m["run"].pop("recipe"),
        lambda m: m["bytes"].pop("dense"),
        lambda m: m["sparsity"].update(achieved="0.5"),
        lambda m: m.update(encoding="zip"),
        lambda m: m.update(encoding=None),
        lambda m: m.update(encoding=["bitmap"]),
        lambda m: m.update(files=[]),
        lambda m: m.update(files=None),
        lambda m: m.update(modules=[1]),
        lambda m: m.update(modules={"x": None}),
        lambda m: m["files"][REST].pop("size"),
        lambda m: m["files"][REST].update(size="10"),
        lambda m: m["files"][REST].update(sha256=None),
        lambda m: m["files"].update({REST: 1}),
        lambda m: m["modules"][MODULE].pop("shape"),
        lambda m: m["modules"][MODULE].pop("nnz"),
        lambda m: m["modules"][MODULE].pop("file"),
        lambda m: m["modules"][MODULE].update(shape=[32]),
        lambda m: m["modules"][MODULE].update(shape=[32, 44, 1]),
        lambda m: m["modules"][MODULE].update(shape=[32, 0]),
        lambda m: m["modules"][MODULE].update(shape=[32, -44]),
        lambda m: m["modules"][MODULE].update(shape=[32, 44.0]),
        lambda m: m["modules"][MODULE].update(shape=[32, True]),
        lambda m: m["modules"][MODULE].update(shape="32"),
        lambda m: m["modules"][MODULE].update(nnz=-1),
        lambda m: m["modules"][MODULE].update(nnz=32 * 44 + 1),
        lambda m: m["modules"][MODULE].update(nnz=1.5),
        lambda m: m["modules"][MODULE].update(file="other.safetensors"),
        lambda m: m["modules"][MODULE].update(file=["block-00001.safetensors"]),
        lambda m: m["modules"][MODULE].update(file=None),
    ],
)
def test_a_malformed_manifest(artifact: Artifact, change: Callable[[dict[str, Any]], object]) -> None:
    assert MANIFEST in refusal(rewrite(artifact, change))


@pytest.mark.parametrize(
    "name", ["../rest.safetensors", "/etc/passwd", "a/b", "..", ".hidden", "", "a\x00b", "x" * 300]
)
def test_a_manifest_cannot_point_out_of_its_directory(artifact: Artifact, name: str) -> None:
    (artifact.path.parent / REST).write_bytes((artifact.path / REST).read_bytes())

    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"][REST]
        manifest["modules"][MODULE]["file"] = name

    opened = open_artifact(rewrite(artifact, change))
    with pytest.raises(ArtifactError, match="unsafe file name"):
        opened.matrix(MODULE, opened.modules[MODULE])
    with pytest.raises(ArtifactError, match="unsafe file name"):
        opened.dense_tensors(name)
    assert sum("unsafe file name" in problem for problem in verify_files(opened)) == 2


def test_a_link_is_not_followed(artifact: Artifact) -> None:
    (artifact.path / REST).rename(artifact.path.parent / "elsewhere")
    (artifact.path / REST).symlink_to(artifact.path.parent / "elsewhere")
    assert verify_files(artifact) == [f"{artifact.path / REST}: not a regular file"]


# ---- what is in it -----------------------------------------------------------------------------------------------


def test_an_undamaged_artifact_verifies(artifact: Artifact) -> None:
    assert verify_files(artifact) == []


def test_every_file_is_listed_with_its_size_and_hash(artifact: Artifact) -> None:
    listed = artifact.manifest["files"]
    assert set(listed) == {path.name for path in artifact.path.iterdir()} - {MANIFEST}
    for name, entry in listed.items():
        data = (artifact.path / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_modules_are_listed_with_shape_counts_and_file(artifact: Artifact) -> None:
    model = tiny_model(KIND)
    expected = {
        f"{name}.{path}": (block_shard(index), [linear.out_features, linear.in_features])
        for index, (name, block) in enumerate(decoder_blocks(model).items())
        for path, linear in projections(block).items()
    }
    assert {name: (entry["file"], entry["shape"]) for name, entry in artifact.modules.items()} == expected
    for name, matrix in artifact.matrices():
        entry = artifact.modules[name]
        rows, columns = entry["shape"]
        assert entry["nnz"] == int(matrix.mask.sum()) == matrix.nnz
        assert sum(entry["row_sparsity"]["histogram"]) == rows
        sparsities = 1 - matrix.row_counts / columns
        assert entry["row_sparsity"]["min"] == pytest.approx(float(sparsities.min()))
        assert entry["row_sparsity"]["max"] == pytest.approx(float(sparsities.max()))
        assert entry["row_sparsity"]["median"] == pytest.approx(float(sparsities.median()))
        assert entry["target_sparsity"] == 0.6


def test_bytes_and_sparsity_of_the_whole(artifact: Artifact) -> None:
    manifest, model = artifact.manifest, tiny_model(KIND)
    assert artifact.shards == [block_shard(0), block_shard(1), REST]
    stored = sum((artifact.path / shard).stat().st_size for shard in artifact.shards)
    assert manifest["bytes"] == {"artifact": stored, "dense": 4 * sum(p.numel() for p in model.parameters())}
    assert stored < manifest["bytes"]["dense"]
    total = sum(entry["shape"][0] * entry["shape"][1] for entry in artifact.modules.values())
    kept = sum(entry["nnz"] for entry in artifact.modules.values())
    assert manifest["sparsity"] == {"target": 0.6, "achieved": 1 - kept / total}


def test_a_tied_head_is_stored_and_counted_once(pruned: Callable[..., Artifact]) -> None:
    tied, untied = pruned("llama-tied"), pruned("llama")
    head = 128 * 32 * 4
    assert tied.manifest["bytes"]["dense"] == untied.manifest["bytes"]["dense"] - head
    assert "lm_head.weight" in untied.dense_tensors(REST)
    assert "lm_head.weight" not in tied.dense_tensors(REST)


def test_the_run_is_described(artifact: Artifact, tiny: Callable[..., Path]) -> None:
    manifest = artifact.manifest
    assert manifest["format_version"] == FORMAT_VERSION
    assert manifest["tool_version"] == trim_export.__version__
    assert manifest["encoding"] == artifact.encoding.name == "bitmap"
    assert manifest["fingerprint"] == fingerprint(manifest["run"])
    weights = tiny(KIND) / "model.safetensors"
    assert manifest["source"] == {
        "model": KIND,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "dtype": "float32",
        "bytes": manifest["bytes"]["dense"],
        "architecture": "LlamaForCausalLM",
    }
    assert manifest["run"]["recipe"]["sparsity"] == 0.6
    assert manifest["run"]["recipe"]["layers"]["name"] == "uniform"


def test_no_path_of_this_machine_is_stored(artifact: Artifact, tiny: Callable[..., Path]) -> None:
    private = str(tiny(KIND).parent).encode()
    assert not any(private in file.read_bytes() for file in artifact.path.iterdir())


def test_matrices_are_the_masked_dense_weights(artifact: Artifact) -> None:
    model = tiny_model(KIND)
    decoded = dict(artifact.matrices())
    assert list(decoded) == list(artifact.modules)
    for name, matrix in decoded.items():
        weight = model.get_submodule(name).weight
        assert torch.equal(matrix.values, weight[matrix.mask])


def test_dense_tensors_are_the_rest_of_the_model(artifact: Artifact) -> None:
    rest: dict[str, torch.Tensor] = {}
    for shard in artifact.shards:
        rest |= artifact.dense_tensors(shard)
    model = tiny_model(KIND).state_dict()
    assert set(rest) == {name for name in model if name.removesuffix(".weight") not in artifact.modules}
    assert all(torch.equal(tensor, model[name]) for name, tensor in rest.items())


def test_the_tokenizer_travels_along(artifact: Artifact) -> None:
    from transformers import AutoTokenizer

    text = "A pruned model reads (and writes) the same text.\n"
    assert AutoTokenizer.from_pretrained(artifact.path)(text).input_ids == tiny_tokenizer()(text).input_ids


def test_the_index_names_every_tensors_shard(artifact: Artifact) -> None:
    index = json.loads((artifact.path / "model.safetensors.index.json").read_text())
    expected = {name: shard for shard in artifact.shards for name in load_file(artifact.path / shard)}
    assert index["weight_map"] == expected


def test_files_are_readable_by_everyone(artifact: Artifact) -> None:
    assert {path.stat().st_mode & 0o777 for path in artifact.path.iterdir()} == {0o644}


# ---- damage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [block_shard(0), REST, "config.json", "tokenizer.json", "README.md"])
@pytest.mark.parametrize("place", [0, 0.5, -1])
def test_a_flipped_bit_is_found(artifact: Artifact, name: str, place: float) -> None:
    file = artifact.path / name
    data = bytearray(file.read_bytes())
    data[-1 if place < 0 else int(place * len(data))] ^= 1
    file.write_bytes(data)
    assert any(problem.startswith(f"{file}: ") and "sha256" in problem for problem in verify_files(artifact))


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_a_truncated_shard_is_found(artifact: Artifact, keep: int) -> None:
    file = artifact.path / block_shard(1)
    file.write_bytes(file.read_bytes()[:keep])
    problems = verify_files(artifact)
    assert f"{file}: {file.stat().st_size} bytes, the manifest says" in problems[0]
    assert len(problems) == 1 + 7
    assert all("\n" not in problem for problem in problems)
    with pytest.raises(ArtifactError, match=MODULE):
        artifact.matrix(MODULE, artifact.modules[MODULE])
    with pytest.raises(ArtifactError, match=block_shard(1)):
        artifact.dense_tensors(block_shard(1))


def test_a_missing_file_is_found(artifact: Artifact) -> None:
    for name in (block_shard(0), "config.json"):
        (artifact.path / name).unlink()
    problems = verify_files(artifact)
    assert f"{artifact.path / 'config.json'}: missing" in problems
    assert problems.count(f"{artifact.path / block_shard(0)}: missing") == 1 + 7


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "block-00002.safetensors"])
def test_weights_that_nobody_listed_are_found(artifact: Artifact, name: str) -> None:
    # transformers prefers model.safetensors to the index and its shards.
    shutil.copy(artifact.path / REST, artifact.path / name)
    assert verify_files(artifact) == [
        f"{artifact.path / name}: weights that the manifest does not list, which transformers may load instead"
    ]


def test_swapped_shards_are_found(artifact: Artifact) -> None:
    first, second = (artifact.path / block_shard(index) for index in range(2))
    aside = first.rename(artifact.path / "aside")
    second.rename(first)
    aside.rename(second)
    problems = verify_files(artifact)
    for file in (first, second):
        assert any(problem.startswith(f"{file}: ") and "manifest" in problem for problem in problems)
    assert any(problem.startswith(f"{second}: {MODULE}: ") for problem in problems)


def test_damage_under_a_matching_hash_is_found_by_decoding(artifact: Artifact) -> None:
    shard = artifact.path / block_shard(1)
    tensors = load_file(shard)
    tensors[f"{MODULE}.weight_values"] = tensors[f"{MODULE}.weight_values"][:-1].clone()
    save_file(tensors, shard)

    def rehash(manifest: dict[str, Any]) -> None:
        data = shard.read_bytes()
        manifest["files"][shard.name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    problems = verify_files(open_artifact(rewrite(artifact, rehash)))
    assert len(problems) == 1
    assert problems[0].startswith(f"{shard}: {MODULE}: tensor weight_mask keeps")


@pytest.mark.parametrize("suffix", ["weight_mask", "weight_values"])
def test_a_missing_tensor(artifact: Artifact, suffix: str) -> None:
    shard = artifact.path / block_shard(1)
    tensors = load_file(shard)
    del tensors[f"{MODULE}.{suffix}"]
    save_file(tensors, shard)
    with pytest.raises(ArtifactError, match=rf"block-00001\.safetensors: {MODULE}: tensor {suffix} is missing"):
        artifact.matrix(MODULE, artifact.modules[MODULE])


def test_counts_that_the_manifest_does_not_know(artifact: Artifact) -> None:
    shard = artifact.path / block_shard(1)
    tensors = load_file(shard)
    matrix = artifact.matrix(MODULE, artifact.modules[MODULE])
    row, column = (~matrix.mask).nonzero()[0].tolist()
    mask, weight = matrix.mask.clone(), matrix.to_dense()
    mask[row, column] = True
    encoded = artifact.encoding.encode(SparseMatrix.from_dense(weight, mask))
    save_file(tensors | {f"{MODULE}.{suffix}": tensor for suffix, tensor in encoded.items()}, shard)
    with pytest.raises(ArtifactError, match=f"holds {matrix.nnz + 1} weights, the manifest says {matrix.nnz}"):
        artifact.matrix(MODULE, artifact.modules[MODULE])
