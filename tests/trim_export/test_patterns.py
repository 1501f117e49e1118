"""Masks of a pattern, against brute force; and pruning, converting and verifying with one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tiny_models import tiny_tokenizer, tiny_tokens

from trim_export.artifact import open_artifact
from trim_export.convert import convert
from trim_export.errors import UsageError
from trim_export.forward import Compute
from trim_export.models import load_model
from trim_export.patterns import Anywhere, Blocks, NofM, parse_pattern
from trim_export.prune import prune
from trim_export.recipe import make_recipe
from trim_export.verify import pattern_holds, verify

CPU = Compute(torch.device("cpu"), False)
SEEDS = st.integers(0, 2**31)


def random_scores(seed: int, rows: int, columns: int) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))


@given(SEEDS, st.integers(1, 5), st.integers(1, 4), st.integers(2, 8), st.data())
def test_n_of_m_keeps_the_best_of_every_group(seed: int, rows: int, groups: int, m: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, m - 1))
    score = random_scores(seed, rows, groups * m)
    mask = NofM(n, m).mask(score, torch.zeros(rows, dtype=torch.int64))
    assert NofM(n, m).holds(mask)
    for row in range(rows):
        for begin in range(0, groups * m, m):
            best = sorted(range(begin, begin + m), key=lambda column: -float(score[row, column]))[:n]
            assert sorted(best) == (mask[row, begin : begin + m].nonzero().flatten() + begin).tolist()


@given(SEEDS, st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.data())
def test_blocks_are_kept_whole_and_meet_the_budget(
    seed: int, lines: int, across: int, height: int, width: int, data: st.DataObject
) -> None:
    pattern, rows, columns = Blocks(height, width), lines * height, across * width
    score = random_scores(seed, rows, columns)
    pruned = torch.tensor(data.draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows)))
    mask = pattern.mask(pattern.scores(score), pruned)
    assert pattern.holds(mask)
    blocks = mask[::height, ::width]
    gone = int((~blocks).sum())
    assert abs(gone - float(pruned.sum()) / (height * width)) <= 0.5
    for line in range(lines):
        sums = [float(score[line * height : (line + 1) * height, at * width : (at + 1) * width].sum())
                for at in range(across)]  # fmt: skip
        kept = [total for total, keeps in zip(sums, blocks[line].tolist(), strict=True) if keeps]
        lost = [total for total, keeps in zip(sums, blocks[line].tolist(), strict=True) if not keeps]
        assert not kept or not lost or min(kept) >= max(lost) - 1e-5
        share = float(pruned[line * height : (line + 1) * height].sum()) / (height * width)
        assert abs(len(lost) - share) <= 1


def test_a_broken_pattern_is_noticed() -> None:
    mask = torch.tensor([[True, True, False, False], [True, False, True, False]])
    assert NofM(2, 4).holds(mask)
    assert not NofM(1, 2).holds(mask)
    assert not Blocks(2, 2).holds(mask)
    assert Blocks(1, 1).holds(mask)


def test_patterns_are_read_or_refused() -> None:
    assert parse_pattern("none") == Anywhere()
    assert parse_pattern("2:4") == NofM(2, 4)
    assert parse_pattern("block:4x8") == Blocks(4, 8)
    for text in ("4:4", "0:4", "5:4", "2:4:8", "block:0x4", "block:4", "blocks:4x4", "", "2-4"):
        with pytest.raises(UsageError, match="neither N:M"):
            parse_pattern(text)


@pytest.mark.parametrize(
    ("sparsity", "given", "message"),
    [
        (0.6, {"pattern": "2:4"}, "has sparsity 0.5, not 0.6"),
        (0.5, {"pattern": "2:4", "rows": "trim"}, "prunes all rows and layers alike"),
        (0.5, {"pattern": "2:4", "update": "admm"}, "update admm chooses its own mask"),
        (0.5, {"pattern": "block:4x4", "update": "sparsegpt"}, "update sparsegpt chooses its own mask"),
    ],
)
def test_recipes_that_a_pattern_has_no_room_for(sparsity: float, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        make_recipe("best", sparsity, **given)


def test_a_pattern_brings_an_update_that_leaves_its_mask_alone() -> None:
    assert make_recipe("best", 0.5, pattern="2:4").update == "refit"
    assert make_recipe("paper", 0.5, pattern="block:4x4").update == "none"
    assert make_recipe("best", 0.5, pattern="block:4x4").rows == "matrix"


@pytest.mark.parametrize(
    ("pattern", "sparsity", "given"),
    [
        ("2:4", 0.5, {}),
        ("1:4", 0.75, {"update": "none"}),
        ("block:4x4", 0.6, {"layers": None}),
        ("block:2x4", 0.6, {"rows": "trim"}),
        ("block:4x4", 0.5, {"rows": "uniform", "update": "none"}),
    ],
)
def test_artifacts_have_the_pattern_and_run(
    pattern: str, sparsity: float, given: dict[str, Any], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = make_recipe("best", sparsity, pattern=pattern, context_length=0, **given)
    artifact = prune(load_model(str(tiny("llama"))), recipe, tiny_tokens(8, 16), tmp_path / "a", CPU)
    form = parse_pattern(pattern)
    for name, matrix in artifact.matrices():
        assert form.holds(matrix.mask), name
    largest = 4 * 4 / (16 * 32)  # a block of the smallest matrix
    assert abs(artifact.manifest["sparsity"]["achieved"] - sparsity) < (1e-9 if ":" in pattern[:2] else largest)
    result = verify(artifact, tiny_tokenizer(), ["torch-sparse"])
    assert result["passed"]
    assert result["pattern"] == {"name": pattern, "passed": True}


def test_blocks_fill_bsr_and_an_artifact_remembers_its_block(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = make_recipe("best", 0.6, pattern="block:4x4", context_length=0)
    artifact = prune(load_model(str(tiny("llama"))), recipe, tiny_tokens(8, 16), tmp_path / "a", CPU)
    convert(artifact, "bsr", tmp_path / "b")
    stored = open_artifact(tmp_path / "b")
    values = {name: stored.matrix(name, entry).nnz for name, entry in stored.modules.items()}
    assert values == {name: entry["nnz"] for name, entry in artifact.modules.items()}
    for name, entry in stored.modules.items():  # no block is stored for the sake of a part of it
        with safe_open(stored.path / entry["file"], "pt") as shard:
            assert shard.get_tensor(f"{name}.weight_values").shape == (entry["nnz"] // 16, 4, 4)
    assert pattern_holds(stored)
    other = dataclasses.replace(artifact, manifest={**artifact.manifest, "run": {"recipe": {"pattern": "1:4"}}})
    assert not pattern_holds(other)


def test_a_matrix_that_groups_do_not_fill_is_named_and_nothing_written(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    dense = load_model(str(tiny("llama")))
    for pattern, reason in (("2:5", "32 columns are not a multiple of 5"), ("block:3x4", "32 rows are not")):
        recipe = make_recipe("best", 0.6, pattern=pattern, context_length=0)
        with pytest.raises(UsageError, match=rf"model\.layers\.0\.\S+: {reason}"):
            prune(dense, recipe, tiny_tokens(), tmp_path / "a", CPU)
    assert not (tmp_path / "a").exists()
