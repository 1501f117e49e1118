"""Recipes: what they validate, what overrides what, and how two runs are told apart."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from trim_export.errors import UsageError
from trim_export.layer_budgets import AlphaPruning, Auto, LayerBudget, LsaProjection, Owl, Uniform
from trim_export.recipe import RECIPES, Recipe, fingerprint, first_difference, make_recipe
from trim_export.storage import canonical_json
from trim_export.trim import EXACT, PAPER

# ---- options ---------------------------------------------------------------------------------------------------------


def test_the_best_recipe_updates_the_kept_weights_and_counts_exactly() -> None:
    recipe = make_recipe("best", 0.7)
    assert (recipe.score, recipe.rows, recipe.update, recipe.counts) == ("wanda", "matrix", "admm", "exact")
    assert recipe == Recipe(0.7, rows="matrix", layers=Owl())
    assert recipe.policy is EXACT


def test_the_paper_recipe_counts_as_the_authors_do() -> None:
    recipe = make_recipe("paper", 0.7)
    assert (recipe.score, recipe.rows, recipe.layers) == ("wanda", "trim", Uniform())
    assert recipe.policy is PAPER


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("score", "magnitude"),
        ("rows", "uniform"),
        ("layers", Owl(0.05)),
        ("counts", "exact"),
        ("counts", "paper"),
        ("update", "refit"),
        ("update", "none"),
        ("head", True),
        ("head", False),
        ("calibration", "corpus.txt"),
        ("samples", 3),
        ("sequence_length", 7),
        ("seed", 9),
        ("seed", 0),
    ],
)
def test_an_option_overrides_the_recipe(name: str, option: str, value: object) -> None:
    recipe, plain = make_recipe(name, 0.7, **{option: value}), make_recipe(name, 0.7)
    assert getattr(recipe, option) == value
    assert recipe.as_json() == plain.as_json() | {option: recipe.as_json()[option]}


def test_options_not_given_change_nothing() -> None:
    options = dict.fromkeys(["score", "rows", "layers", "update", "counts", "head", "calibration", "samples", "seed"])
    assert make_recipe("paper", 0.7, **options) == make_recipe("paper", 0.7)


def test_making_a_recipe_leaves_the_named_one_alone() -> None:
    make_recipe("paper", 0.7, rows="uniform", samples=3)
    assert make_recipe("paper", 0.7).rows == "trim"
    assert make_recipe("paper", 0.7).samples == 128


# ---- validation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, 70.0, math.nan, math.inf, -math.inf])
def test_sparsity_outside_its_range_is_refused(sparsity: float) -> None:
    with pytest.raises(UsageError, match=rf"^sparsity {sparsity} is outside \[0, 1\)$"):
        make_recipe("best", sparsity, rows="uniform")


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95])
def test_sparsity_within_its_range_is_taken(sparsity: float) -> None:
    assert make_recipe("best", sparsity).sparsity == sparsity


def test_sparsity_above_the_cap_of_trim_is_refused_with_a_way_out() -> None:
    with pytest.raises(UsageError, match=r"0\.97 is above TRIM's cap of 0\.95 on each row; use --rows uniform"):
        make_recipe("paper", 0.97)
    assert make_recipe("best", 0.97, rows="uniform", layers=Uniform()).sparsity == 0.97
    assert make_recipe("best", 0.97, layers=Uniform()).sparsity == 0.97


@pytest.mark.parametrize("rows", ["lagrangian", "anticipating"])
def test_the_cap_holds_for_every_budget_that_promises_it(rows: str) -> None:
    with pytest.raises(UsageError, match=r"^sparsity 0\.97 is above TRIM's cap of 0\.95"):
        make_recipe("best", 0.97, rows=rows, layers=Uniform())


def test_rows_that_anticipate_an_update_need_one() -> None:
    with pytest.raises(UsageError, match=r"^rows anticipating needs a weight update; give one with --update"):
        make_recipe("paper", 0.7, rows="anticipating")
    assert make_recipe("paper", 0.7, rows="anticipating", update="refit").rows == "anticipating"


@pytest.mark.parametrize("options", [{"score": "gblm"}, {"rows": "anticipating"}], ids=str)
def test_what_knows_only_blocks_is_refused_for_the_head(options: dict[str, str]) -> None:
    (choice,) = options.values()
    with pytest.raises(UsageError, match=rf"^\w+ {choice} is for decoder blocks only; leave out --head"):
        make_recipe("best", 0.7, head=True, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        pytest.param(
            "papr", {}, r"unknown recipe 'papr' \(did you mean paper\?\); known: best, fast, paper", id="recipe"
        ),
        pytest.param("best", {"score": "wnda"}, r"unknown score 'wnda' \(did you mean wanda\?\)", id="score"),
        pytest.param("best", {"rows": "unifrm"}, r"unknown row budget 'unifrm' \(did you mean uniform\?\)", id="rows"),
        pytest.param("best", {"counts": "exakt"}, r"unknown counts 'exakt' \(did you mean exact\?\)", id="counts"),
        pytest.param(
            "best", {"layers": Owl(name="owls")}, r"unknown layer budget 'owls' \(did you mean owl\?\)", id="layers"
        ),
        pytest.param(
            "best", {"update": "refitx"}, r"unknown weight update 'refitx' \(did you mean refit\?\)", id="update"
        ),
        pytest.param("best", {"layers": Auto(), "samples": 7}, "needs 8 calibration sequences", id="auto-samples"),
        pytest.param("best", {"score": "gblm", "sequence_length": 1}, "^score gblm needs windows of at", id="gblm"),
        pytest.param("best", {"samples": 0}, "^samples must be at least 1$", id="samples"),
        pytest.param("best", {"sequence_length": 0}, "^sequence length must be at least 1$", id="sequence-length"),
        pytest.param("best", {"sequence_length": -5}, "^sequence length must be at least 1$", id="negative-length"),
    ],
)
def test_what_cannot_be_is_refused_by_name(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_recipe(name, 0.7, **options)


# ---- writing down and comparing --------------------------------------------------------------------------------------


def test_a_sparsity_above_the_cap_leaves_no_room_for_layers_to_differ() -> None:
    for layers in (Owl(), LsaProjection(), Auto()):
        with pytest.raises(UsageError, match=r"0\.97 is above the cap of 0\.95 .*; use --layers uniform"):
            make_recipe("best", 0.97, layers=layers)
        assert make_recipe("best", 0.95, layers=layers).layers == layers


@pytest.mark.parametrize("layers", [Uniform(), Owl(), AlphaPruning(0.2), LsaProjection(0.05), Auto((Owl(0.05),))])
def test_a_recipe_survives_json(layers: LayerBudget | Auto) -> None:
    recipe = make_recipe("paper", 0.7, layers=layers)
    stored = json.loads(canonical_json(recipe.as_json()))
    assert stored == recipe.as_json()
    assert stored["layers"]["name"] == layers.name
    assert stored["sparsity"] == 0.7


def test_budgets_of_different_parameters_are_different_recipes() -> None:
    one, other = make_recipe("best", 0.7, layers=Owl(0.08)), make_recipe("best", 0.7, layers=Owl(0.12))
    assert one != other
    assert first_difference(one.as_json(), other.as_json()) == "layers.strength (there 0.12, here 0.08)"


RUN = {
    "b": 1,
    "a": {"x": [1, 2], "y": {"deep": None}},
    "recipe": make_recipe("best", 0.7).as_json(),
}


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [
        pytest.param(RUN, RUN | {"b": 2}, "b (there 2, here 1)", id="top"),
        pytest.param(RUN, RUN | {"b": 2, "a": 0}, "a (there 0, here {'x': [1, 2], 'y': {'deep': None}})", id="first"),
        pytest.param({"a": {"x": 1, "y": 2}}, {"a": {"x": 1, "y": 3}}, "a.y (there 3, here 2)", id="nested"),
        pytest.param({"a": {"b": {"c": 1}}}, {"a": {"b": {"c": "1"}}}, "a.b.c (there '1', here 1)", id="type"),
        pytest.param({"a": [1, 2]}, {"a": [2, 1]}, "a (there [2, 1], here [1, 2])", id="list"),
        pytest.param({"a": 1}, {}, "a (there None, here 1)", id="missing-there"),
        pytest.param({}, {"a": 1}, "a (there 1, here None)", id="missing-here"),
        pytest.param({"z": 1, "a": 1}, {"z": 2, "a": 2}, "a (there 2, here 1)", id="order-of-names"),
    ],
)
def test_first_difference_names_the_field_and_both_values(mine: object, theirs: object, expected: str) -> None:
    assert first_difference(mine, theirs) == expected


def test_first_difference_with_something_that_is_no_run_at_all() -> None:
    assert first_difference(RUN, None) is not None


@pytest.mark.parametrize("value", [{}, RUN, [1, {"a": 2}], None, "text"])
def test_equal_values_do_not_differ(value: object) -> None:
    assert first_difference(value, json.loads(json.dumps(value))) is None


def test_fingerprint_is_stable_across_versions_and_orders() -> None:
    assert fingerprint({"b": [1, 2.5], "a": {"d": None, "c": "é"}}) == "42e4239dc7343a32"
    assert fingerprint({"a": {"c": "é", "d": None}, "b": [1, 2.5]}) == "42e4239dc7343a32"


@pytest.mark.parametrize("option", [{"seed": 1}, {"samples": 127}, {"layers": Uniform()}, {"counts": "paper"}])
def test_fingerprint_tells_runs_apart(option: dict[str, Any]) -> None:
    plain, other = make_recipe("best", 0.7), make_recipe("best", 0.7, **option)
    assert fingerprint(plain.as_json()) != fingerprint(other.as_json())
