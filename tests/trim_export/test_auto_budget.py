"""The choice by trial: what it measures, what it prefers, and that it leaves nothing behind but its decision."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_tokens

import trim_export.prune
from trim_export.artifact import JOURNAL, Artifact, block_shard
from trim_export.auto_budget import choose_budget
from trim_export.errors import UsageError
from trim_export.forward import Compute, block_calls, embed
from trim_export.layer_budgets import Auto, LayerBudget, Lsa, Owl, Uniform
from trim_export.models import DenseModel, decoder_blocks, load_model, projections
from trim_export.progress import silently
from trim_export.prune import prune
from trim_export.recipe import Recipe
from trim_export.statistics import InputStatistics
from trim_export.storage import sha256_file

Tiny = Callable[..., Path]
CPU = Compute(torch.device("cpu"), autocast=False)
TOKENS = tiny_tokens(12, 10)
TRIAL, HELD_OUT = TOKENS[:4], TOKENS[-4:]


@dataclass(frozen=True)
class Fixed(LayerBudget):
    """Blocks alternate between two sparsities around the target, whatever is in them."""

    first: float = 0.0
    name: str = "fixed"
    needs_inputs: bool = False

    def measure(self, weights: Mapping[str, torch.Tensor], inputs: Mapping[str, InputStatistics]) -> float:
        return 0.0

    def allocate(self, measures: Sequence[float], sizes: Sequence[int], target: float) -> list[float]:
        return [self.first if index % 2 == 0 else 2 * target - self.first for index in range(len(measures))]


GOOD, BAD = Fixed(first=0.8), Fixed(first=0.2)
RECIPE = Recipe(0.5, rows="uniform", update="none", samples=len(TOKENS), context_length=0)


def mostly_empty_first_block(tiny: Tiny) -> DenseModel:
    """A model of two blocks; the first can lose 80 % of its weights for nothing, the second cannot."""
    dense = load_model(str(tiny("llama")))
    first = next(iter(decoder_blocks(dense.model).values()))
    for seed, linear in enumerate(projections(first).values()):
        generator = torch.Generator().manual_seed(seed)
        rank = torch.rand(linear.weight.shape, generator=generator).argsort(dim=1)
        linear.weight.masked_fill_(rank >= 0.18 * linear.weight.shape[1], 0)
    return dense


def choose(dense: DenseModel, recipe: Recipe, tokens: torch.Tensor = TOKENS) -> tuple[LayerBudget, dict[str, object]]:
    assert isinstance(recipe.layers, Auto)
    blocks = decoder_blocks(dense.model)
    calls = block_calls(dense.model, list(blocks.values()), tokens[:1])
    hidden = embed(dense.model, list(blocks.values()), tokens)
    return choose_budget(recipe.layers, dense.model, recipe, blocks, calls, tokens, hidden, {}, CPU, silently)


def direct_divergence(pruned: DenseModel, dense: DenseModel) -> float:
    """Mean KL(dense || pruned) over every held-out position, from whole forward passes in one go."""
    with torch.no_grad():
        expected, given = (side.model(HELD_OUT).logits.double().log_softmax(-1) for side in (dense, pruned))
    return float((expected.exp() * (expected - given)).sum(-1).mean())


@pytest.mark.parametrize("update", ["none", "refit"])
@pytest.mark.parametrize("kind", ["gemma3", "opt"])
def test_a_candidate_is_judged_by_what_its_recipe_makes_of_the_trial_sequences(
    kind: str, update: str, tiny: Tiny, tmp_path: Path
) -> None:
    recipe = replace(RECIPE, update=update, layers=Auto((Owl(), Lsa())))
    _, choice = choose(load_model(str(tiny(kind))), recipe)
    assert (choice["trial_sequences"], choice["held_out_sequences"]) == (4, 4)
    for candidate, budget in zip(choice["candidates"], (Uniform(), Owl(), Lsa()), strict=True):
        pruned = load_model(str(tiny(kind)))
        prune(pruned, replace(recipe, layers=budget), TRIAL, tmp_path / budget.name, CPU)
        assert candidate["budget"]["name"] == budget.name
        assert candidate["kl"] == pytest.approx(direct_divergence(pruned, load_model(str(tiny(kind)))), rel=1e-3)


def test_another_budget_is_chosen_where_it_is_better(tiny: Tiny) -> None:
    chosen, choice = choose(mostly_empty_first_block(tiny), replace(RECIPE, layers=Auto((BAD, GOOD))))
    uniform, bad, good = (candidate["kl"] for candidate in choice["candidates"])
    assert good < 0.5 * uniform < 0.5 * bad
    assert chosen == GOOD
    assert choice["chosen"] == {"first": 0.8, "name": "fixed", "needs_inputs": False}


def test_uniform_stays_where_every_other_budget_is_worse(tiny: Tiny) -> None:
    chosen, choice = choose(mostly_empty_first_block(tiny), replace(RECIPE, layers=Auto((BAD, Fixed(first=0.3)))))
    uniform, *others = (candidate["kl"] for candidate in choice["candidates"])
    assert min(others) > uniform
    assert chosen == Uniform()


def test_uniform_stays_where_another_budget_is_as_good(tiny: Tiny) -> None:
    chosen, choice = choose(load_model(str(tiny("llama"))), replace(RECIPE, layers=Auto((Fixed(first=0.5),))))
    assert choice["candidates"][0]["kl"] == choice["candidates"][1]["kl"] > 0
    assert chosen == Uniform()


@pytest.mark.parametrize("update", ["none", "refit"])
def test_trials_leave_the_dense_model_as_it_was(update: str, tiny: Tiny) -> None:
    dense = load_model(str(tiny("opt")))
    before = {name: tensor.clone() for name, tensor in dense.model.state_dict().items()}
    choose(dense, replace(RECIPE, update=update, layers=Auto((GOOD, Lsa()))))
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.model.state_dict().items())


# ---- in a run --------------------------------------------------------------------------------------------------------

AUTO = replace(RECIPE, layers=Auto((BAD, GOOD)))


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An uninterrupted run that chooses for itself."""
    return prune(mostly_empty_first_block(tiny), AUTO, TOKENS, tmp_path_factory.mktemp("auto") / "out", CPU)


def hashes(directory: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in directory.iterdir()}


def test_the_run_itself_uses_the_choice_on_all_windows(whole: Artifact, tiny: Tiny, tmp_path: Path) -> None:
    named = prune(mostly_empty_first_block(tiny), replace(AUTO, layers=GOOD), TOKENS, tmp_path / "out", CPU)
    assert {shard: sha256_file(whole.path / shard) for shard in whole.shards} == {
        shard: sha256_file(named.path / shard) for shard in named.shards
    }


def test_the_manifest_says_what_was_asked_for_and_what_was_chosen(whole: Artifact) -> None:
    asked, choice = whole.manifest["run"]["recipe"]["layers"], whole.manifest["layer_choice"]
    assert asked["name"] == "auto"
    assert [budget["first"] for budget in asked["alternatives"]] == [0.2, 0.8]
    assert choice["chosen"]["first"] == 0.8
    assert [candidate["budget"]["name"] for candidate in choice["candidates"]] == ["uniform", "fixed", "fixed"]
    assert "fixed (by trial) block budgets" in (whole.path / "README.md").read_text()


def test_without_trials_the_manifest_says_nothing_of_a_choice(tiny: Tiny, tmp_path: Path) -> None:
    assert "layer_choice" not in prune(load_model(str(tiny("llama"))), RECIPE, TOKENS, tmp_path / "out", CPU).manifest


class Killed(BaseException):
    """Stands for SIGKILL."""


def start_and_kill(tiny: Tiny, out: Path) -> None:
    """Run until the second block is about to be written."""
    write_unit = trim_export.prune.write_unit

    def write_or_die(journal: object, shard: str, *rest: object) -> object:
        if shard == block_shard(1):
            raise Killed
        return write_unit(journal, shard, *rest)

    dense = mostly_empty_first_block(tiny)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trim_export.prune, "write_unit", write_or_die)
        with pytest.raises(Killed):
            prune(dense, AUTO, TOKENS, out, CPU)


def test_a_killed_run_keeps_its_choice_and_continues_to_the_same_bytes(
    whole: Artifact, tiny: Tiny, tmp_path: Path
) -> None:
    start_and_kill(tiny, tmp_path / "out")
    prune(mostly_empty_first_block(tiny), AUTO, TOKENS, tmp_path / "out", CPU, resume=True)
    assert hashes(tmp_path / "out") == hashes(whole.path)


def test_a_continued_run_does_not_choose_again(tiny: Tiny, tmp_path: Path) -> None:
    start_and_kill(tiny, tmp_path / "out")
    journal = tmp_path / "out" / JOURNAL
    state = json.loads(journal.read_text())
    state["layer_choice"]["candidates"][0]["kl"] = 123.0  # what another choice would overwrite
    journal.write_text(json.dumps(state))
    resumed = prune(mostly_empty_first_block(tiny), AUTO, TOKENS, tmp_path / "out", CPU, resume=True)
    assert resumed.manifest["layer_choice"] == state["layer_choice"]


def test_a_run_that_would_choose_among_others_is_not_continued(tiny: Tiny, tmp_path: Path) -> None:
    start_and_kill(tiny, tmp_path / "out")
    other = replace(AUTO, layers=Auto((BAD, Fixed(first=0.7))))
    with pytest.raises(UsageError, match=r"differs in recipe\.layers\.alternatives"):
        prune(mostly_empty_first_block(tiny), other, TOKENS, tmp_path / "out", CPU, resume=True)


def test_too_few_windows_are_refused_before_anything_is_written(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs 8 calibration sequences or more"):
        prune(load_model(str(tiny("llama"))), AUTO, TOKENS[:7], tmp_path / "out", CPU)
    assert not (tmp_path / "out").exists()
