"""Artifacts through plain transformers: loading, generating, saving, densifying, and refusing what is damaged."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, tiny_model, tiny_tokens
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import trim_export.runtimes
from trim_export.artifact import REST, Artifact, block_shard, open_artifact, verify_files
from trim_export.convert import convert
from trim_export.converters import ENCODINGS, SparseMatrix
from trim_export.errors import ArtifactError, EnvironmentLacks, UsageError
from trim_export.forward import Compute
from trim_export.models import load_model
from trim_export.prune import prune
from trim_export.recipe import Recipe
from trim_export.runtimes import RUNTIMES, SparseLinear, load, pick_runtime
from trim_export.runtimes.transformers import TrimSparseConfig

Pruned = Callable[..., Artifact]

TOKENS = tiny_tokens(3, 12, seed=1)
MODULE = "model.layers.1.mlp.down_proj"  # 32 x 44, which 8 does not divide
SHARD = block_shard(1)
KINDS = [*ARCHITECTURES, "mixtral"]


def masked(artifact: Artifact, kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The dense model with the artifact's zeros, made without any of our loading code."""
    model = tiny_model(kind, dtype)
    for name, matrix in artifact.matrices():
        weight = model.get_submodule(name).weight
        weight.data = weight.data * matrix.mask
    return model


def logits(model: PreTrainedModel, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


def sparse_modules(model: nn.Module) -> dict[str, SparseLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def assert_same_weights(model: PreTrainedModel, expected: PreTrainedModel) -> None:
    theirs = expected.state_dict()
    assert model.state_dict().keys() == theirs.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture(scope="module")
def encoded(pruned: Pruned, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Artifact]:
    """A pruned tiny Llama, its matrices stored in a named encoding."""

    @functools.cache
    def make(encoding: str, dtype: torch.dtype = torch.float32) -> Artifact:
        original = pruned("llama", dtype)
        if encoding == original.encoding.name:
            return original
        out = tmp_path_factory.mktemp("encoded") / encoding
        if encoding != "dense":
            convert(original, encoding, out)
            return open_artifact(out)
        # `convert` makes a plain model of it; as an artifact's encoding it is possible all the same.
        convert(original, "csr", out)
        for file in [*out.glob("*.safetensors"), out / "config.json", out / "trim_manifest.json"]:
            rewrite_as_dense(original, file)
        return open_artifact(out)

    return make


def rewrite_as_dense(original: Artifact, file: Path) -> None:
    if file.suffix == ".safetensors":
        tensors = original.dense_tensors(file.name)
        for name, entry in original.modules.items():
            if entry["file"] == file.name:
                tensors[f"{name}.weight"] = original.matrix(name, entry).to_dense()
        save_file(tensors, file, {"format": "pt"})
    else:
        file.write_text(file.read_text().replace('"encoding": "csr"', '"encoding": "dense"'))


@pytest.fixture
def damaged(pruned: Pruned, tmp_path: Path) -> Path:
    """A copy of an artifact to damage."""
    return Path(shutil.copytree(pruned("llama").path, tmp_path / "damaged"))


# ---- loading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_plain_from_pretrained_gives_the_masked_model_in_sparse_layers(kind: str, pruned: Pruned) -> None:
    artifact = pruned(kind)
    model, report = AutoModelForCausalLM.from_pretrained(artifact.path, output_loading_info=True)
    assert not any(report.values())
    assert sparse_modules(model).keys() == artifact.modules.keys()
    for name, matrix in artifact.matrices():
        ours = model.get_submodule(name).matrix()
        assert torch.equal(ours.mask, matrix.mask)
        assert torch.equal(ours.values, matrix.values)
    torch.testing.assert_close(logits(model), logits(masked(artifact, kind)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama-tied", "gemma3", "opt", "gpt-neox"])
def test_greedy_text_with_the_cache_is_that_of_the_dense_runtime(kind: str, pruned: Pruned) -> None:
    path = pruned(kind).path
    prompt = TOKENS[:2, :5]
    options = {"do_sample": False, "min_new_tokens": 16, "max_new_tokens": 16, "pad_token_id": 0}
    ours, theirs = (
        load(path, runtime).generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=True, **options)
        for runtime in ("torch-sparse", "dense")
    )
    assert ours.shape == (2, 21)
    assert torch.equal(ours, theirs)
    # And the cache changes nothing.
    again = load(path, "torch-sparse").generate(
        prompt, attention_mask=torch.ones_like(prompt), use_cache=False, **options
    )
    assert torch.equal(again, ours)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_base_model_loads_too(kind: str, pruned: Pruned) -> None:
    artifact = pruned(kind)
    model = AutoModel.from_pretrained(artifact.path)
    assert len(sparse_modules(model)) == len(artifact.modules)
    with torch.no_grad():
        ours = model(TOKENS).last_hidden_state
        theirs = masked(artifact, kind).base_model(TOKENS).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_and_dtype(encoding: str, dtype: torch.dtype, encoded: Callable[..., Artifact]) -> None:
    artifact = encoded(encoding, dtype)
    assert artifact.encoding.name == encoding
    assert verify_files(artifact) == [] or encoding == "dense"
    model = load(artifact.path)
    assert model.dtype == dtype
    assert sparse_modules(model).keys() == artifact.modules.keys()
    expected = masked(artifact, "llama", dtype)
    for name, module in sparse_modules(model).items():
        assert torch.equal(module.matrix().to_dense(), expected.get_submodule(name).weight)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(logits(model), logits(expected), rtol=64 * eps, atol=max(1e-4, 64 * eps))
    assert_same_weights(load(artifact.path, "dense"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loading_in_another_dtype(dtype: torch.dtype, pruned: Pruned) -> None:
    artifact = pruned("llama")
    expected = masked(artifact, "llama").to(dtype)
    assert_same_weights(load(artifact.path, "dense", dtype=dtype), expected)
    model = load(artifact.path, dtype=dtype)
    assert model.dtype == dtype
    for name, module in sparse_modules(model).items():
        assert torch.equal(module.matrix().to_dense(), expected.get_submodule(name).weight)


@pytest.mark.parametrize("runtime", ["auto", *(name for name in RUNTIMES if "cpu" in RUNTIMES[name].devices)])
def test_runtimes_by_name(runtime: str, pruned: Pruned) -> None:
    reason = None if runtime == "auto" else RUNTIMES[runtime].unavailable()
    if reason:
        with pytest.raises(EnvironmentLacks, match=f"runtime {runtime}: "):
            load(pruned("llama").path, runtime)
        return
    artifact = pruned("llama")
    model = load(artifact.path, runtime)
    assert not model.training
    torch.testing.assert_close(logits(model), logits(masked(artifact, "llama")), rtol=0, atol=1e-4)


def test_an_unknown_runtime_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown runtime 'torch-spares' \(did you mean torch-sparse\?\)"):
        load(tmp_path, "torch-spares")


def test_a_runtime_that_is_not_there(monkeypatch: pytest.MonkeyPatch, pruned: Pruned) -> None:
    monkeypatch.setattr(type(RUNTIMES["torch-sparse"]), "unavailable", lambda self: "needs another machine")
    assert pick_runtime("auto").name != "torch-sparse"
    with pytest.raises(EnvironmentLacks, match="runtime torch-sparse: needs another machine"):
        load(pruned("llama").path, "torch-sparse")


def test_a_copy_of_a_loaded_model_computes_the_same(pruned: Pruned) -> None:
    model = load(pruned("llama").path, "torch-sparse")
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_a_loaded_model_is_not_trainable(pruned: Pruned) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned("llama").path)
    assert not model.hf_quantizer.is_trainable
    assert not any(
        parameter.requires_grad for module in sparse_modules(model).values() for parameter in module.parameters()
    )


# ---- a pruned LM head --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_head(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Artifact]:
    """An artifact whose LM head is pruned too, and untied if it was tied."""

    @functools.cache
    def make(kind: str) -> Artifact:
        recipe = Recipe(0.6, update="none", head=True, context_length=0)
        out = tmp_path_factory.mktemp("with-head") / kind
        return prune(load_model(str(tiny(kind))), recipe, TOKENS, out, Compute(torch.device("cpu"), autocast=False))

    return make


def masked_with_head(artifact: Artifact, kind: str) -> PreTrainedModel:
    model = tiny_model(kind)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    for name, matrix in artifact.matrices():
        weight = model.get_submodule(name).weight
        weight.data = weight.data * matrix.mask
    return model


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gemma3", "opt", "gpt-neox"])
def test_a_pruned_head(kind: str, with_head: Callable[[str], Artifact], tmp_path: Path) -> None:
    artifact = with_head(kind)
    expected = masked_with_head(artifact, kind)
    model, report = AutoModelForCausalLM.from_pretrained(artifact.path, output_loading_info=True)
    assert not any(report.values())
    assert "lm_head" in sparse_modules(model)
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-4)
    options = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8, "pad_token_id": 0}
    assert torch.equal(
        model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), **options),
        expected.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), **options),
    )
    # Saved and densified like any other.
    model.save_pretrained(tmp_path / "once")
    load(tmp_path / "once").save_pretrained(tmp_path / "twice")
    for file in (tmp_path / "once").iterdir():
        assert file.read_bytes() == (tmp_path / "twice" / file.name).read_bytes()
    assert_same_weights(load(artifact.path, "dense"), expected)
    densified = load(artifact.path).dequantize()
    densified.save_pretrained(tmp_path / "dense")
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), expected)


@pytest.mark.parametrize("kind", ["llama-tied", "opt"])
def test_the_base_model_leaves_a_pruned_head_out(kind: str, with_head: Callable[[str], Artifact]) -> None:
    artifact = with_head(kind)
    model = AutoModel.from_pretrained(artifact.path)
    assert len(sparse_modules(model)) == len(artifact.modules) - 1
    with torch.no_grad():
        ours = model(TOKENS).last_hidden_state
        theirs = masked_with_head(artifact, kind).base_model(TOKENS).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


# ---- saving and densifying ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_saving_what_was_loaded_is_stable_to_the_byte(kind: str, pruned: Pruned, tmp_path: Path) -> None:
    artifact = pruned(kind)
    AutoModelForCausalLM.from_pretrained(artifact.path).save_pretrained(tmp_path / "once")
    once = AutoModelForCausalLM.from_pretrained(tmp_path / "once")
    once.save_pretrained(tmp_path / "twice")
    names = {path.name for path in (tmp_path / "once").iterdir()}
    assert {"config.json", "model.safetensors"} <= names == {path.name for path in (tmp_path / "twice").iterdir()}
    for name in names:
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()
    assert torch.equal(logits(once), logits(load(artifact.path)))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_saved_tensors_are_the_artifacts_own(encoding: str, encoded: Callable[..., Artifact], tmp_path: Path) -> None:
    artifact = encoded(encoding)
    AutoModelForCausalLM.from_pretrained(artifact.path).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    original = {name: tensor for shard in artifact.shards for name, tensor in load_file(artifact.path / shard).items()}
    assert saved.keys() == original.keys()
    for name, tensor in saved.items():
        assert tensor.dtype == original[name].dtype
        assert torch.equal(tensor, original[name])
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert settings == json.loads((artifact.path / "config.json").read_text())["quantization_config"]


def test_saving_in_many_shards(pruned: Pruned, tmp_path: Path) -> None:
    model = load(pruned("llama").path)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path)), logits(model))


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("way", ["dequantize", "dense runtime"])
def test_a_densified_model_is_the_masked_one_and_ordinary(kind: str, way: str, pruned: Pruned, tmp_path: Path) -> None:
    artifact = pruned(kind)
    model = load(artifact.path, "dense") if way == "dense runtime" else load(artifact.path).dequantize()
    expected = masked(artifact, kind)
    assert_same_weights(model, expected)
    assert {type(model.get_submodule(name)) for name in artifact.modules} == {nn.Linear}
    assert torch.equal(logits(model), logits(expected))
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert_same_weights(again, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_densifying_keeps_half_precision(dtype: torch.dtype, pruned: Pruned) -> None:
    artifact = pruned("llama", dtype)
    assert_same_weights(load(artifact.path).dequantize(), masked(artifact, "llama", dtype))


def test_a_densified_model_can_be_cast(pruned: Pruned) -> None:
    artifact = pruned("llama")
    expected = masked(artifact, "llama").half()
    assert_same_weights(load(artifact.path, "dense").half(), expected)
    assert_same_weights(load(artifact.path).dequantize().half(), expected)


# ---- damage ------------------------------------------------------------------------------------------------------


def refused(directory: Path, *words: str) -> None:
    """Every way to load it ends in an `ArtifactError` of one line that says each of ``words``."""
    for way in (load, lambda path: load(path, "dense"), AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ArtifactError) as caught:
            way(directory)
        message = str(caught.value)
        assert "\n" not in message
        assert all(word in message for word in words), message


def change(directory: Path, shard: str, changes: dict[str, Any]) -> None:
    """Replace tensors of a shard by what a function makes of them; by nothing where it is None."""
    tensors = load_file(directory / shard)
    for name, make in changes.items():
        tensor = tensors.pop(name, None)
        if make is not None:
            tensors[name] = make(tensor).contiguous()
    save_file(tensors, directory / shard, {"format": "pt"})


def at(place: int, number: float) -> Callable[[Tensor], Tensor]:
    def put(tensor: Tensor) -> Tensor:
        result = tensor.clone()
        result.view(-1)[place] = number
        return result

    return put


HOSTILE = [
    ("bitmap", "weight_mask", lambda t: t ^ 1, "keeps"),
    ("bitmap", "weight_mask", at(5, 255), "bits set beyond column 43"),
    ("bitmap", "weight_mask", lambda t: t[:-1], "shape"),
    ("bitmap", "weight_mask", lambda t: t.T, "shape"),
    ("bitmap", "weight_mask", lambda t: t.float(), "weight_mask"),
    ("bitmap", "weight_mask", lambda t: t.int(), "holds int32"),
    ("bitmap", "weight_mask", lambda t: t.view(torch.int8), "I8"),
    ("bitmap", "weight_values", lambda t: t[:-1], "keeps"),
    ("bitmap", "weight_values", lambda t: torch.cat([t, t[:1]]), "keeps"),
    ("bitmap", "weight_values", lambda t: t[:0], "keeps"),
    ("bitmap", "weight_values", lambda t: t[None], "shape"),
    ("bitmap", "weight_values", lambda t: t.double(), "F64"),
    ("bitmap", "weight_values", lambda t: t.long(), "holds int64"),
    ("bitmap", "weight_values", lambda t: t.bool(), "BOOL"),
    ("csr", "weight_columns", at(0, 44), "outside 0..43"),
    ("csr", "weight_columns", at(0, -1), "outside 0..43"),
    ("csr", "weight_columns", lambda t: t.flip(0), "not strictly increasing"),
    ("csr", "weight_columns", lambda t: t.int(), "holds int32"),
    ("csr", "weight_columns", lambda t: t[:-1], "weight_row_ptr ends at"),
    ("csr", "weight_row_ptr", at(3, 0), "decreases"),
    ("csr", "weight_row_ptr", at(0, 1), "starts at 1"),
    ("csr", "weight_row_ptr", at(-1, 10**6), "ends at 1000000"),
    ("csr", "weight_row_ptr", at(-1, -1), "decreases"),
    ("csr", "weight_row_ptr", lambda t: t[1:], "shape"),
    ("csr", "weight_values", lambda t: t[:-1], "weight_values has"),
    ("bsr", "weight_columns", at(0, 11), "outside 0..10"),
    ("bsr", "weight_row_ptr", at(2, -5), "decreases"),
    ("bsr", "weight_values", lambda t: t[:-1], "weight_values has"),
    ("bsr", "weight_values", lambda t: t[:, :, :0], "blocks of 4 x 0"),
    ("bsr", "weight_values", lambda t: t.reshape(-1, 2, 8), "weight_"),
    ("bsr", "weight_values", lambda t: t.flatten(), "shape"),
    ("dense", "weight", lambda t: t.T, "shape"),
    ("dense", "weight", lambda t: t[:-1], "shape"),
]


@pytest.mark.parametrize(("encoding", "suffix", "make", "reason"), HOSTILE)
def test_one_damaged_tensor_of_one_module(
    encoding: str, suffix: str, make: Callable[[Tensor], Tensor], reason: str, encoded: Any, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(encoded(encoding).path, tmp_path / "damaged"))
    change(directory, SHARD, {f"{MODULE}.{suffix}": make})
    refused(directory, SHARD, MODULE, reason)


@pytest.mark.parametrize(
    ("encoding", "suffix"), [(name, suffix) for name, encoding in ENCODINGS.items() for suffix in encoding.tensors]
)
def test_a_missing_tensor_of_a_pruned_module(encoding: str, suffix: str, encoded: Any, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(encoded(encoding).path, tmp_path / "damaged"))
    change(directory, SHARD, {f"{MODULE}.{suffix}": None})
    refused(directory, MODULE, suffix, "none of the artifact's files")


@pytest.mark.parametrize(
    ("shard", "name"),
    [
        (SHARD, "model.layers.1.input_layernorm.weight"),
        (REST, "model.norm.weight"),
        (REST, "model.embed_tokens.weight"),
        (REST, "lm_head.weight"),
    ],
)
def test_a_missing_dense_tensor(shard: str, name: str, damaged: Path) -> None:
    change(damaged, shard, {name: None})
    refused(damaged, name, "none of the artifact's files")


def test_a_missing_bias(pruned: Pruned, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(pruned("qwen2").path, tmp_path / "damaged"))
    change(directory, SHARD, {"model.layers.1.self_attn.q_proj.bias": None})
    refused(directory, "model.layers.1.self_attn.q_proj.bias")


@pytest.mark.parametrize("make", [lambda t: t[:-1], lambda t: t[None], lambda t: t[:0], lambda t: torch.cat([t, t])])
@pytest.mark.parametrize(
    ("shard", "name"), [(SHARD, "model.layers.1.input_layernorm.weight"), (REST, "model.embed_tokens.weight")]
)
def test_a_dense_tensor_of_another_shape(
    shard: str, name: str, make: Callable[[Tensor], Tensor], damaged: Path
) -> None:
    change(damaged, shard, {name: make})
    refused(damaged, shard, name, "shape")


def test_a_bias_of_another_shape(pruned: Pruned, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(pruned("qwen2").path, tmp_path / "damaged"))
    change(directory, SHARD, {"model.layers.1.self_attn.q_proj.bias": lambda t: t[:1]})
    refused(directory, "model.layers.1.self_attn.q_proj.bias", "shape")


@pytest.mark.parametrize(
    "name", ["model.layers.7.self_attn.q_proj.weight", f"{MODULE}.weight", f"{MODULE}.bias", "stowaway"]
)
def test_an_extra_tensor_changes_nothing(name: str, damaged: Path) -> None:
    expected = logits(load(damaged))
    change(damaged, SHARD, {name: lambda _: torch.full((32, 44), 9.0)})
    index = damaged / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][name] = SHARD
    index.write_text(json.dumps(content))
    assert torch.equal(logits(load(damaged)), expected)


def settings_of(directory: Path, **changes: Any) -> None:
    """Change the artifact's own part of config.json; None removes a key."""
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"].update(changes)
    config["quantization_config"] = {
        key: value for key, value in config["quantization_config"].items() if value is not None
    }
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"encoding": "zip"}, "unknown encoding 'zip'"),
        ({"encoding": 3}, "encoding"),
        ({"encoding": ["bitmap"]}, "encoding"),
        ({"format_version": 2}, "newer than this trim-export reads"),
        ({"format_version": "1"}, "format_version"),
        ({"compression": "zstd"}, "unknown keys"),
        ({"modules": "all"}, "modules"),
        ({"modules": [1, 2]}, "modules"),
        ({"modules": {"a": 1}}, "modules"),
        ({"modules": 7}, "modules"),
        ({"modules": []}, "none of the artifact's files"),
        ({"modules": ["model.layers.9.mlp.up_proj"]}, "no linear module of that name"),
        ({"modules": [""]}, "no linear module of that name"),
        ({"modules": ["model.embed_tokens"]}, "no linear module of that name"),
    ],
)
def test_a_hostile_configuration(changes: dict[str, Any], reason: str, damaged: Path) -> None:
    settings_of(damaged, **changes)
    refused(damaged, reason)


def test_a_runtime_in_the_configuration_is_no_match_for_the_callers(damaged: Path) -> None:
    settings_of(damaged, runtime="nonsense")
    assert sparse_modules(load(damaged, "torch-sparse"))
    with pytest.raises(UsageError, match="unknown runtime 'nonsense'"):
        AutoModelForCausalLM.from_pretrained(damaged)


def test_another_encoding_than_the_files_have(damaged: Path) -> None:
    settings_of(damaged, encoding="csr")
    refused(damaged, "weight_columns is in none of the artifact's files")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
@pytest.mark.parametrize("shard", [SHARD, REST])
def test_a_truncated_shard(shard: str, keep: int, damaged: Path) -> None:
    (damaged / shard).write_bytes((damaged / shard).read_bytes()[:keep])
    refused(damaged, shard)


def test_a_header_that_claims_too_much(damaged: Path) -> None:
    data = (damaged / SHARD).read_bytes()
    (damaged / SHARD).write_bytes((2**62).to_bytes(8, "little") + data[8:])
    refused(damaged, SHARD)


def test_swapped_shards_load_the_same_model(damaged: Path) -> None:
    # Tensors are found by their names; `check` reports the swap.
    expected = logits(load(damaged))
    first, second = damaged / block_shard(0), damaged / SHARD
    aside = first.rename(damaged / "aside.safetensors")
    second.rename(first)
    aside.rename(second)
    assert torch.equal(logits(load(damaged)), expected)


@pytest.mark.parametrize("name", ["config.json", SHARD, REST])
def test_load_refuses_a_directory_that_lacks_a_file(name: str, damaged: Path) -> None:
    (damaged / name).unlink()
    with pytest.raises(ArtifactError) as caught:
        load(damaged)
    assert "\n" not in str(caught.value)
    assert str(damaged) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"null", b'{"model_type": "no-such-type"}', b"\xff"])
def test_load_refuses_a_damaged_config(content: bytes, damaged: Path) -> None:
    (damaged / "config.json").write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        load(damaged)
    assert "\n" not in str(caught.value)
    assert str(damaged) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b'{"weight_map": {}}', b'{"weight_map": {"a": "absent"}}'])
def test_load_refuses_a_damaged_index(content: bytes, damaged: Path) -> None:
    (damaged / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        load(damaged)
    assert "\n" not in str(caught.value)


def test_load_refuses_what_is_no_artifact(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    for directory in (tmp_path, tmp_path / "absent", tiny("llama")):
        with pytest.raises(ArtifactError, match=str(directory)) as caught:
            load(directory)
        assert "\n" not in str(caught.value)


def test_a_mask_of_ones_and_one_of_zeros_load(damaged: Path) -> None:
    """Extremes that are valid: nothing pruned, nothing kept."""
    full = SparseMatrix.from_dense(torch.randn(32, 44), torch.ones(32, 44, dtype=torch.bool))
    empty = SparseMatrix.from_dense(torch.randn(44, 32), torch.zeros(44, 32, dtype=torch.bool))
    stored = {MODULE: full, "model.layers.1.mlp.up_proj": empty}
    encoding = ENCODINGS["bitmap"]
    changes = {
        f"{name}.{suffix}": (lambda _, tensor=tensor: tensor)
        for name, matrix in stored.items()
        for suffix, tensor in encoding.encode(matrix).items()
    }
    change(damaged, SHARD, changes)
    sparse, dense = load(damaged, "torch-sparse"), load(damaged, "dense")
    for name, matrix in stored.items():
        assert torch.equal(sparse.get_submodule(name).matrix().to_dense(), matrix.to_dense())
    torch.testing.assert_close(logits(sparse), logits(dense), rtol=0, atol=1e-4)


def test_the_settings_are_strict_and_their_runtime_is_never_stored() -> None:
    settings = TrimSparseConfig(encoding="csr", modules=("a", "b"), runtime="dense", values="int8")
    assert settings.to_dict() == {
        "quant_method": "trim-sparse",
        "format_version": 1,
        "encoding": "csr",
        "modules": ["a", "b"],
        "how_to_load": "",
    }
    assert trim_export.runtimes.RUNTIMES is RUNTIMES
