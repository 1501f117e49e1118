"""The smaller model on disk, and pruned further."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_tokens
from transformers import AutoModelForCausalLM

from trim_export.errors import ModelError, UsageError
from trim_export.forward import Compute
from trim_export.models import load_model
from trim_export.prune import prune
from trim_export.recipe import Recipe
from trim_export.recover import load_teacher
from trim_export.runtimes import load
from trim_export.structured import RECORD, STRUCTURED, reduce_model, save_reduced

CPU = Compute(torch.device("cpu"), False)
TOKENS = tiny_tokens(6, 16)


@pytest.mark.parametrize(("kind", "name"), [(k, "last") for k in ("llama-tied", "gemma3", "opt")] + [("llama", "flap")])
def test_any_tool_loads_the_smaller_model(kind: str, name: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    dense = reduce_model(load_model(str(tiny(kind))), STRUCTURED[name], 0.3, TOKENS, CPU)
    save_reduced(dense, tmp_path / "small")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(plain(TOKENS).logits, dense.model(TOKENS).logits)
    again = load_model(str(tmp_path / "small"))
    assert again.structured == dense.structured
    with pytest.raises(UsageError, match=f"has been through {name} already"):
        reduce_model(again, STRUCTURED["last"], 0.3, TOKENS, CPU)


def test_what_is_in_the_way_stays(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    dense = reduce_model(load_model(str(tiny("llama"))), STRUCTURED["last"], 0.3, TOKENS, CPU)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "letter.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        save_reduced(dense, taken, overwrite=True)
    assert [file.name for file in tmp_path.rglob("*")] == ["taken", "letter.txt"]
    save_reduced(dense, tmp_path / "small")
    with pytest.raises(UsageError, match="exists already"):
        save_reduced(dense, tmp_path / "small")
    save_reduced(dense, tmp_path / "small", overwrite=True)
    assert (tmp_path / "small" / RECORD).is_file()


@pytest.mark.parametrize("name", ["shortgpt", "flap"])
def test_one_artifact_and_one_manifest_hold_both_steps(name: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    dense = reduce_model(load_model(str(tiny("llama"))), STRUCTURED[name], 0.3, TOKENS, CPU, seed=3)
    artifact = prune(dense, Recipe(0.5, update="none", context_length=0), TOKENS, tmp_path / "a", CPU)
    assert artifact.manifest["source"]["structured"] == dense.structured
    assert artifact.manifest["bytes"]["dense"] == dense.structured["bytes"] < dense.structured["source_bytes"]
    sparse = load(tmp_path / "a", "dense")
    torch.testing.assert_close(sparse(TOKENS).logits, dense.model(TOKENS).logits)


def test_the_teacher_of_a_structured_artifact_lacks_the_same_blocks(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    source = str(tiny("llama"))
    for name in ("shortgpt", "flap"):
        dense = reduce_model(load_model(source), STRUCTURED[name], 0.3, TOKENS, CPU)
        small = dense.model(TOKENS).logits
        artifact = prune(dense, Recipe(0.5, update="none", context_length=0), TOKENS, tmp_path / name, CPU)
        if name == "flap":
            with pytest.raises(ModelError, match="what flap removed cannot be repeated"):
                load_teacher(artifact, source)
        else:
            assert torch.equal(load_teacher(artifact, source).model(TOKENS).logits, small)
