"""Recovered artifacts: the same masks, better weights, the same bytes after a kill; and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, save_tiny, tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM

import trim_export.recover
import trim_export.spp
from trim_export.artifact import HEAD, JOURNAL, MANIFEST, Artifact, block_shard, open_artifact, verify_files
from trim_export.convert import convert
from trim_export.errors import ArtifactError, ModelError, UsageError
from trim_export.forward import Compute, block_calls, embed
from trim_export.models import decoder_blocks, load_model
from trim_export.prune import prune
from trim_export.recipe import Recipe
from trim_export.recover import METHODS, Recovery, load_teacher, make_recovery, open_intact, recover
from trim_export.statistics import collect_inputs
from trim_export.storage import sha256_file

Tiny = Callable[..., Path]
Pruned = Callable[..., Artifact]

CPU = Compute(torch.device("cpu"), autocast=False)
TOKENS = tiny_tokens(24, 12)
BLOCKS = make_recovery("blocks", "text.txt", steps=12, learning_rate=5e-3)
SPP = make_recovery("spp", "text.txt", steps=12, learning_rate=3e-2)

each_method = pytest.mark.parametrize("recovery", [BLOCKS, SPP], ids=["blocks", "spp"])


def hashes(directory: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in directory.iterdir()}


def run(artifact: Artifact, dense: Path, recovery: Recovery, out: Path, resume: bool = False) -> Artifact:
    return recover(artifact, load_teacher(artifact, str(dense)), recovery, TOKENS, out, CPU, resume)


@pytest.mark.parametrize(
    ("recovery", "kind", "dtype"),
    [
        *((BLOCKS, kind, torch.float32) for kind in ARCHITECTURES),
        (BLOCKS, "llama", torch.bfloat16),
        (SPP, "qwen3", torch.float32),
        (SPP, "opt", torch.bfloat16),
    ],
    ids=lambda value: getattr(value, "method", str(value)),
)
def test_masks_are_the_same_and_the_held_out_loss_is_lower(
    recovery: Recovery, kind: str, dtype: torch.dtype, tiny: Tiny, pruned: Pruned, tmp_path: Path
) -> None:
    old = pruned(kind, dtype)
    before = hashes(old.path)
    new = run(old, tiny(kind, dtype), recovery, tmp_path / "out")
    assert hashes(old.path) == before
    assert verify_files(new) == []
    assert list(new.modules) == list(old.modules)
    for name, matrix in new.matrices():
        was = old.matrix(name, old.modules[name])
        assert torch.equal(matrix.mask, was.mask)
        assert new.modules[name]["nnz"] == old.modules[name]["nnz"]
        assert matrix.values.dtype == dtype
        assert not torch.equal(matrix.values, was.values)
    assert new.shards == old.shards
    for shard in old.shards:
        one, other = old.dense_tensors(shard), new.dense_tensors(shard)
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    told = new.manifest["recovery"]
    assert told["method"] == recovery.method
    assert told["earlier"] is None
    expected = {"model"} if recovery.method == "spp" else {shard for shard in old.shards if shard.startswith("block")}
    assert told["losses"].keys() == expected
    assert all(loss["after"] < loss["before"] for loss in told["losses"].values())
    assert new.manifest["weights_updated"] is True
    assert new.manifest["source"] == old.manifest["source"]
    assert new.manifest["sparsity"] == old.manifest["sparsity"]
    assert json.loads((new.path / "config.json").read_text()) == json.loads((old.path / "config.json").read_text())
    assert recovery.method in (new.path / "README.md").read_text()


@each_method
def test_the_whole_model_comes_closer_to_the_dense_one(
    recovery: Recovery, tiny: Tiny, pruned: Pruned, tmp_path: Path
) -> None:
    old = pruned("opt")
    new = run(old, tiny("opt"), recovery, tmp_path / "out")
    fresh = tiny_tokens(16, 12, seed=9)
    with torch.no_grad():
        dense, before, after = (
            AutoModelForCausalLM.from_pretrained(path)(fresh).logits for path in (tiny("opt"), old.path, new.path)
        )
    assert (after - dense).norm() < 0.95 * (before - dense).norm()


@each_method
def test_quality_in_the_manifest_is_that_of_the_new_weights(
    recovery: Recovery, tiny: Tiny, pruned: Pruned, tmp_path: Path
) -> None:
    new = run(pruned("llama"), tiny("llama"), recovery, tmp_path / "out")
    dense = tiny_model("llama")
    blocks = list(decoder_blocks(dense).values())
    call, hidden = block_calls(dense, blocks, TOKENS[:1])[0], embed(dense, blocks, TOKENS)
    name = "model.layers.0.self_attn.q_proj"  # reads what no other pruned layer has touched
    linear = dense.get_submodule(name)
    linears = {"q": linear}
    last = collect_inputs(blocks[0], linears, lambda: call.run(blocks[0], hidden, CPU), "block")["q"].last_tokens
    one, other = linear.weight.double(), new.matrix(name, new.modules[name]).to_dense().double()
    expected = torch.cosine_similarity((one @ last.double()).flatten(), (other @ last.double()).flatten(), dim=0)
    assert new.modules[name]["cosine"] == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize(("recovery", "kind"), [(BLOCKS, "llama"), (SPP, "llama-tied")], ids=["blocks", "spp"])
def test_a_pruned_head_stays_as_sparse(
    recovery: Recovery, kind: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = prune(
        load_model(str(tiny(kind))),
        Recipe(0.5, head=True, update="none", context_length=0),
        TOKENS,
        tmp_path / "a",
        CPU,
    )
    new = run(old, tiny(kind), recovery, tmp_path / "out")
    was, matrix = (artifact.matrix("lm_head", artifact.modules["lm_head"]) for artifact in (old, new))
    assert torch.equal(was.mask, matrix.mask)
    assert torch.equal(was.values, matrix.values) == (recovery.method == "blocks")
    assert verify_files(new) == []
    AutoModelForCausalLM.from_pretrained(new.path)
    kill(recovery, HEAD, old, tiny(kind), tmp_path / "cut", monkeypatch)
    run(old, tiny(kind), recovery, tmp_path / "cut", resume=True)
    assert hashes(tmp_path / "cut") == hashes(new.path)


def test_what_was_recovered_can_be_recovered_again(tiny: Tiny, pruned: Pruned, tmp_path: Path) -> None:
    once = run(pruned("llama"), tiny("llama"), BLOCKS, tmp_path / "once")
    twice = run(once, tiny("llama"), SPP, tmp_path / "twice")
    assert twice.manifest["recovery"]["method"] == "spp"
    assert twice.manifest["recovery"]["earlier"] == once.manifest["recovery"]
    assert verify_files(twice) == []


def test_every_encoding_can_be_recovered(tiny: Tiny, pruned: Pruned, tmp_path: Path) -> None:
    convert(pruned("llama"), "csr", tmp_path / "csr")
    expected = dict(run(pruned("llama"), tiny("llama"), BLOCKS, tmp_path / "one").matrices())
    for name, matrix in run(open_artifact(tmp_path / "csr"), tiny("llama"), BLOCKS, tmp_path / "two").matrices():
        assert torch.equal(matrix.to_dense(), expected[name].to_dense())


# ---- killed and continued ----------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the product may catch it."""


def kill(
    recovery: Recovery, shard: str, artifact: Artifact, dense: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run until ``shard`` is about to be written."""
    write_unit = trim_export.recover.write_unit

    def write_or_die(journal: Any, name: str, *rest: Any) -> Any:
        if name == shard:
            raise Killed
        return write_unit(journal, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(trim_export.recover, "write_unit", write_or_die)
        with pytest.raises(Killed):
            run(artifact, dense, recovery, out)


@pytest.mark.parametrize(
    ("recovery", "kind", "dtype"),
    [(BLOCKS, "gemma3", torch.float32), (BLOCKS, "llama", torch.bfloat16), (SPP, "opt", torch.bfloat16)],
    ids=lambda value: getattr(value, "method", str(value)),
)
def test_a_run_killed_between_two_blocks_continues_to_the_same_bytes(
    recovery: Recovery,
    kind: str,
    dtype: torch.dtype,
    tiny: Tiny,
    pruned: Pruned,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    artifact, dense, out = pruned(kind, dtype), tiny(kind, dtype), tmp_path / "out"
    run(artifact, dense, recovery, tmp_path / "whole")
    kill(recovery, block_shard(1), artifact, dense, out, monkeypatch)
    with pytest.raises(ArtifactError, match=r"unfinished, 1 of \d blocks"):
        open_artifact(out)
    run(artifact, dense, recovery, out, resume=True)
    assert hashes(out) == hashes(tmp_path / "whole")


def test_a_training_killed_between_two_steps_continues_to_the_same_bytes(
    tiny: Tiny, pruned: Pruned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trim_export.spp, "EVALUATE_EVERY", 5)
    run(pruned("llama"), tiny("llama"), SPP, tmp_path / "whole")
    save = trim_export.spp._save_state

    def save_and_die(*arguments: Any) -> None:
        save(*arguments)
        raise Killed

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(trim_export.spp, "_save_state", save_and_die)
        with pytest.raises(Killed):
            run(pruned("llama"), tiny("llama"), SPP, out)
    run(pruned("llama"), tiny("llama"), SPP, out, resume=True)
    assert hashes(out) == hashes(tmp_path / "whole")


def test_a_finished_run_is_returned_and_other_settings_are_refused(
    tiny: Tiny, pruned: Pruned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, dense, out = pruned("llama"), tiny("llama"), tmp_path / "out"
    kill(BLOCKS, block_shard(1), artifact, dense, out, monkeypatch)
    unfinished = hashes(out)
    with pytest.raises(UsageError, match=r"differs in recovery\.steps \(there 12, here 13\)"):
        run(artifact, dense, replace(BLOCKS, steps=13), out, resume=True)
    with pytest.raises(UsageError, match="differs in artifact_sha256"):
        run(pruned("llama", torch.bfloat16), tiny("llama", torch.bfloat16), BLOCKS, out, resume=True)
    with pytest.raises(UsageError, match="already holds an unfinished run"):
        run(artifact, dense, BLOCKS, out)
    assert hashes(out) == unfinished
    run(artifact, dense, BLOCKS, out, resume=True)
    finished = hashes(out)
    assert not (out / JOURNAL).exists()
    assert run(artifact, dense, BLOCKS, out, resume=True).path == out
    assert hashes(out) == finished


# ---- refused -----------------------------------------------------------------------------------------------------


def copied(artifact: Artifact, destination: Path) -> Path:
    return Path(shutil.copytree(artifact.path, destination))


def test_another_dense_model_is_refused(tiny: Tiny, pruned: Pruned, tmp_path: Path) -> None:
    other = tmp_path / "other"
    save_tiny("llama", other)
    weights = tiny_model("llama", seed=1)
    weights.save_pretrained(other)
    with pytest.raises(ModelError, match=r"other: not the model that .* was made of \(sha256") as caught:
        load_teacher(pruned("llama"), str(other))
    assert "\n" not in str(caught.value)


def test_the_dense_model_is_found_by_its_name_or_asked_for(
    tiny: Tiny, pruned: Pruned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"its dense model 'llama' cannot be had from here; pass --model"):
        load_teacher(pruned("llama"))
    with pytest.raises(UsageError, match="neither a model directory"):
        load_teacher(pruned("llama"), "no/such/model")
    monkeypatch.chdir(tiny("llama").parent)
    assert load_teacher(pruned("llama")).sha256 == pruned("llama").manifest["source"]["sha256"]


def test_what_is_no_finished_and_intact_artifact_is_refused(
    tiny: Tiny, pruned: Pruned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ArtifactError, match="no such directory"):
        open_intact(tmp_path / "absent", out)
    with pytest.raises(ArtifactError, match="not a trim-export artifact"):
        open_intact(tiny("llama"), out)
    kill(BLOCKS, block_shard(1), pruned("llama"), tiny("llama"), tmp_path / "unfinished", monkeypatch)
    with pytest.raises(ArtifactError, match="unfinished, 1 of 2 blocks; run the same command with --resume"):
        open_intact(tmp_path / "unfinished", out)
    damaged = copied(pruned("llama"), tmp_path / "damaged")
    shard = damaged / block_shard(1)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ArtifactError, match=block_shard(1)):
        open_intact(damaged, out)


@pytest.mark.parametrize("change", [{"sha256": None}, {"model": 3}, {"dtype": "int8"}, {"dtype": []}, {"bytes": "1"}])
def test_a_manifest_that_does_not_name_its_model_is_refused(
    change: dict[str, Any], pruned: Pruned, tmp_path: Path
) -> None:
    directory = copied(pruned("llama"), tmp_path / "a")
    manifest = json.loads((directory / MANIFEST).read_text())
    manifest["source"] |= change
    (directory / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="does not say which dense model"):
        open_intact(directory, tmp_path / "out")


def test_the_artifact_is_never_its_own_output(pruned: Pruned, tmp_path: Path) -> None:
    directory = copied(pruned("llama"), tmp_path / "deep" / "a")
    link = tmp_path / "link"
    link.symlink_to(directory)
    for out in (directory, directory.parent, link, directory / "."):
        with pytest.raises(UsageError, match="holds the artifact that is to be recovered"):
            open_intact(directory, out)
    open_intact(directory, directory / "inside")
    open_intact(directory, tmp_path / "deep" / "ab")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": "block"}, "did you mean blocks?"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"sequence_length": 0}, "sequence length must be at least 1"),
        ({"samples": 1}, "1 windows are too few"),
        ({"learning_rate": 0.0}, "not a positive number"),
        ({"learning_rate": float("nan")}, "not a positive number"),
        ({"learning_rate": float("inf")}, "not a positive number"),
        ({"gradient_checkpointing": True}, "belongs to spp"),
    ],
)
def test_settings_that_cannot_be_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_recovery(**{"method": "blocks", "calibration": "text.txt"} | given)
    assert said in str(caught.value)


def test_settings_not_given_are_the_methods() -> None:
    for name, method in METHODS.items():
        chosen = make_recovery(name, "text.txt", steps=None, seed=7)
        assert (chosen.steps, chosen.learning_rate, chosen.seed) == (method.steps, method.learning_rate, 7)
