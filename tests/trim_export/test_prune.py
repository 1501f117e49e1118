"""The driver on every architecture: what is kept, what is stored, and that a killed run continues to the same bytes."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_tokens

import trim_export.prune
from trim_export.artifact import HEAD, JOURNAL, MANIFEST, REST, Artifact, block_shard, open_artifact, verify_files
from trim_export.artifact_writer import remove_artifact
from trim_export.errors import ArtifactError, ModelError, UsageError
from trim_export.forward import Compute, block_calls, embed, run_block
from trim_export.layer_budgets import AlphaPruning, Owl
from trim_export.models import DenseModel, decoder_blocks, load_model, projections
from trim_export.prune import prune, prune_matrix
from trim_export.recipe import Recipe, make_recipe
from trim_export.statistics import collect_inputs, input_statistics
from trim_export.storage import sha256_file
from trim_export.updates import UPDATES

Tiny = Callable[..., Path]

CPU = Compute(torch.device("cpu"), autocast=False)
TOKENS = tiny_tokens()
RECIPE = Recipe(0.5, rows="trim", update="none", context_length=0)


def dense_model(tiny: Tiny, kind: str = "llama", dtype: torch.dtype = torch.float32) -> DenseModel:
    return load_model(str(tiny(kind, dtype)))


def hashes(directory: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in directory.iterdir()}


def copied(directory: Path, destination: Path) -> Path:
    return Path(shutil.copytree(directory, destination))


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the product may catch it."""


@contextmanager
def killed_at(file: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process dies when ``file`` is about to get its name."""
    replace_file = Path.replace

    def die(self: Path, target: Path) -> Path:
        if target.name == file:
            raise Killed
        return replace_file(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(Killed):
            yield


def kill_after(blocks: int, call: Callable[[], Any]) -> None:
    """Run ``call``, which is killed when it is about to write block ``blocks``."""
    write_unit = trim_export.prune.write_unit

    def write_or_die(journal: Any, shard: str, *rest: Any) -> Any:
        if shard == block_shard(blocks):
            raise Killed
        return write_unit(journal, shard, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trim_export.prune, "write_unit", write_or_die)
        with pytest.raises(Killed):
            call()


@pytest.mark.parametrize(
    ("rows", "sparsity", "dtype"),
    [
        ("trim", 0.5, torch.float32),
        ("trim", 0.8, torch.float32),
        ("uniform", 0.5, torch.float32),
        ("uniform", 0.8, torch.float32),
        ("trim", 0.8, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_kept_weights_are_the_dense_ones_and_counts_are_exact(
    kind: str, sparsity: float, rows: str, dtype: torch.dtype, tiny: Tiny, tmp_path: Path
) -> None:
    dense = dense_model(tiny, kind, dtype)
    before = {name: tensor.clone() for name, tensor in dense.model.state_dict().items()}
    artifact = prune(dense, Recipe(sparsity, rows=rows, update="none", context_length=0), TOKENS, tmp_path / "out", CPU)
    after = dense.model.state_dict()

    expected_modules = {
        f"{name}.{path}" for name, block in decoder_blocks(dense.model).items() for path in projections(block)
    }
    assert set(artifact.modules) == expected_modules
    kept = total = 0
    for name, matrix in artifact.matrices():
        weight = before.pop(f"{name}.weight")
        assert matrix.values.dtype == dtype
        assert torch.equal(matrix.values, weight[matrix.mask])
        assert torch.equal(matrix.to_dense(), after[f"{name}.weight"])
        assert weight.numel() - matrix.nnz == round(sparsity * weight.numel())
        if rows == "uniform":
            assert matrix.row_counts.max() - matrix.row_counts.min() <= 1
        kept, total = kept + matrix.nnz, total + weight.numel()
    assert artifact.manifest["sparsity"] == {"target": sparsity, "achieved": 1 - kept / total}
    assert abs(1 - kept / total - sparsity) <= 0.5 * len(expected_modules) / total
    # Embeddings, head, norms and biases.
    stored = {name: value for shard in artifact.shards for name, value in artifact.dense_tensors(shard).items()}
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor)
        tied = name == "lm_head.weight" and dense.model.config.tie_word_embeddings
        assert tied if name not in stored else torch.equal(stored[name], tensor)
    assert set(stored) <= set(before)
    assert verify_files(artifact) == []


@pytest.mark.parametrize("sparsity", [0.0, 0.95, 0.97])
def test_extreme_sparsities(sparsity: float, tiny: Tiny, tmp_path: Path) -> None:
    recipe = Recipe(sparsity, rows="uniform" if sparsity > 0.95 else "trim", update="none", context_length=0)
    artifact = prune(dense_model(tiny), recipe, TOKENS, tmp_path / "out", CPU)
    for entry in artifact.modules.values():
        rows, columns = entry["shape"]
        assert rows * columns - entry["nnz"] == round(sparsity * rows * columns)


def test_trim_rows_differ_and_are_no_worse_on_the_calibration_text(tiny: Tiny, tmp_path: Path) -> None:
    artifact = prune(dense_model(tiny), RECIPE, TOKENS, tmp_path / "out", CPU)
    moved = [entry for entry in artifact.modules.values() if entry["learning_rate"] is not None]
    assert len(moved) > len(artifact.modules) / 2
    for entry in moved:
        assert entry["cosine"] > entry["cosine_uniform"]
        assert entry["row_sparsity"]["max"] > entry["row_sparsity"]["min"] + 0.1
    assert all(entry["row_sparsity"]["max"] <= 0.95 for entry in artifact.modules.values())


def test_whole_matrix_rows_by_magnitude_keep_the_largest_weights(tiny: Tiny, tmp_path: Path) -> None:
    dense = dense_model(tiny)
    recipe = Recipe(0.7, rows="matrix", score="magnitude", update="none", context_length=0)
    before = {name: tensor.clone() for name, tensor in dense.model.state_dict().items()}
    for name, matrix in prune(dense, recipe, TOKENS, tmp_path / "out", CPU).matrices():
        weight = before[f"{name}.weight"].abs()
        assert weight[matrix.mask].min() >= weight[~matrix.mask].max()


def test_a_block_sees_what_the_pruned_blocks_before_it_put_out(tiny: Tiny, tmp_path: Path) -> None:
    recipe = replace(RECIPE, sparsity=0.8)
    dense = dense_model(tiny)
    artifact = prune(dense, recipe, TOKENS, tmp_path / "out", CPU)
    pruned_first = decoder_blocks(dense.model)["model.layers.0"]

    fresh = dense_model(tiny)
    first, second = decoder_blocks(fresh.model).values()
    calls = block_calls(fresh.model, [first, second], TOKENS[:1])
    hidden = embed(fresh.model, [first, second], TOKENS)

    def masks(inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        statistics = collect_inputs(second, projections(second), lambda: run_second(inputs), "second")
        return {
            path: prune_matrix(linear.weight, statistics[path], 0.8, recipe)[0].mask
            for path, linear in projections(second).items()
        }

    def run_second(inputs: torch.Tensor) -> None:
        run_block(second, calls[1], inputs, CPU)

    stored = {path: artifact.matrix(name, artifact.modules[name]).mask for path, name in second_names(second).items()}
    after_pruned = masks(run_block(pruned_first, calls[0], hidden, CPU))
    after_dense = masks(run_block(first, calls[0], hidden, CPU))
    assert all(torch.equal(after_pruned[path], stored[path]) for path in stored)
    assert not any(torch.equal(after_dense[path], stored[path]) for path in stored)


def second_names(block: torch.nn.Module) -> dict[str, str]:
    return {path: f"model.layers.1.{path}" for path in projections(block)}


@pytest.mark.parametrize("budget", [Owl(), AlphaPruning()], ids=lambda budget: budget.name)
@pytest.mark.parametrize("kind", ["gemma3", "opt"])
def test_block_budgets_spread_around_the_target(
    kind: str, budget: Owl | AlphaPruning, tiny: Tiny, tmp_path: Path
) -> None:
    dense = dense_model(tiny, kind)
    artifact = prune(dense, replace(RECIPE, sparsity=0.6, layers=budget), TOKENS, tmp_path / "out", CPU)
    of_block: dict[str, set[float]] = {}
    for entry in artifact.modules.values():
        of_block.setdefault(entry["file"], set()).add(entry["target_sparsity"])
    assert all(len(targets) == 1 for targets in of_block.values())
    targets = [targets.pop() for targets in of_block.values()]
    assert len(set(targets)) == len(targets)
    assert max(targets) - min(targets) > 0.05
    assert sum(targets) / len(targets) == pytest.approx(0.6, abs=1e-9)
    assert artifact.manifest["sparsity"]["achieved"] == pytest.approx(0.6, abs=1e-3)
    assert artifact.manifest["run"]["recipe"]["layers"]["name"] == budget.name


def test_autocast_and_the_paper_recipe_run(tiny: Tiny, tmp_path: Path) -> None:
    autocast = Compute(torch.device("cpu"), autocast=True)
    artifact = prune(dense_model(tiny), make_recipe("paper", 0.5), TOKENS, tmp_path / "out", autocast)
    assert artifact.manifest["sparsity"]["achieved"] == pytest.approx(0.5, abs=0.03)
    assert artifact.manifest["run"]["compute"] == {"device": "cpu", "autocast_bfloat16": True}


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("tensor", "named"),
    [
        ("model.layers.0.self_attn.v_proj.weight", "model.layers.0.self_attn.v_proj"),
        ("model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.gate_proj"),
        ("model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.down_proj"),  # nothing runs after it
        ("model.layers.1.input_layernorm.weight", "model.layers.1.self_attn.q_proj"),
        ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj"),
    ],
)
def test_numbers_that_are_not_finite_are_refused_where_they_arise(
    tensor: str, named: str, number: float, tiny: Tiny, tmp_path: Path
) -> None:
    dense = dense_model(tiny)
    damaged = dense.model.state_dict()[tensor]
    damaged[..., 3] = number
    with pytest.raises(ModelError, match=rf"^{named}: NaN or infinity") as caught:
        prune(dense, RECIPE, TOKENS, tmp_path / "out", CPU)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_a_model_without_linear_modules_is_refused_and_nothing_written(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nothing to prune.*attn\.c_attn\.weight") as caught:
        prune(dense_model(tiny, "gpt2"), RECIPE, TOKENS, tmp_path / "out", CPU)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_stacked_experts_stay_dense(tiny: Tiny, tmp_path: Path) -> None:
    dense = dense_model(tiny, "mixtral")
    before = {name: tensor.clone() for name, tensor in dense.model.state_dict().items()}
    artifact = prune(dense, RECIPE, TOKENS, tmp_path / "out", CPU)
    assert all(".self_attn." in name for name in artifact.modules)
    stored = artifact.dense_tensors(block_shard(0))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(stored[name], before[name])


# ---- updated weights ---------------------------------------------------------------------------------------------

UPDATED = [name for name in UPDATES if name != "none"]
MORE_TOKENS = tiny_tokens(16, 12)


@pytest.mark.parametrize(
    ("kind", "update"), [*((kind, "refit") for kind in ARCHITECTURES), *(("opt", update) for update in UPDATED[1:])]
)
def test_updated_weights_are_as_many_and_stored_as_they_run(kind: str, update: str, tiny: Tiny, tmp_path: Path) -> None:
    dense = dense_model(tiny, kind)
    before = {name: tensor.clone() for name, tensor in dense.model.state_dict().items()}
    artifact = prune(dense, replace(RECIPE, update=update), MORE_TOKENS, tmp_path / "out", CPU)
    after = dense.model.state_dict()
    assert artifact.manifest["weights_updated"] is True
    for name, matrix in artifact.matrices():
        weight = before.pop(f"{name}.weight")
        assert weight.numel() - matrix.nnz == round(0.5 * weight.numel())
        assert torch.equal(matrix.to_dense(), after[f"{name}.weight"])
        assert not torch.equal(matrix.values, weight[matrix.mask])
        assert matrix.values.isfinite().all()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("update", UPDATED)
def test_a_killed_run_with_updates_continues_to_the_same_bytes(update: str, tiny: Tiny, tmp_path: Path) -> None:
    recipe = replace(RECIPE, update=update)
    prune(dense_model(tiny, "gemma3"), recipe, MORE_TOKENS, tmp_path / "whole", CPU)
    out = tmp_path / "out"
    kill_after(2, lambda: prune(dense_model(tiny, "gemma3"), recipe, MORE_TOKENS, out, CPU))
    prune(dense_model(tiny, "gemma3"), recipe, MORE_TOKENS, out, CPU, resume=True)
    assert hashes(out) == hashes(tmp_path / "whole")


# ---- the LM head -------------------------------------------------------------------------------------------------

WITH_HEAD = replace(RECIPE, head=True)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gemma3", "opt", "gpt-neox"])
def test_the_head_is_pruned_when_asked_for(kind: str, tiny: Tiny, tmp_path: Path) -> None:
    dense = dense_model(tiny, kind)
    head, embeddings = dense.model.get_output_embeddings(), dense.model.get_input_embeddings()
    before, embedded = head.weight.clone(), embeddings.weight.clone()
    artifact = prune(dense, WITH_HEAD, TOKENS, tmp_path / "out", CPU)
    entry = artifact.modules["lm_head"]
    matrix = artifact.matrix("lm_head", entry)
    assert entry["file"] == HEAD
    assert before.numel() - matrix.nnz == round(0.5 * before.numel())
    assert torch.equal(matrix.values, before[matrix.mask])
    assert torch.equal(head.weight, matrix.to_dense())
    # The embedding it may have been tied to stays whole.
    assert torch.equal(embeddings.weight, embedded)
    (name,) = (name for name, module in dense.model.named_modules() if module is embeddings)
    assert torch.equal(artifact.dense_tensors(REST)[f"{name}.weight"], embedded)
    assert json.loads((artifact.path / "config.json").read_text())["tie_word_embeddings"] is False
    assert verify_files(artifact) == []


def test_the_head_is_scored_on_what_the_pruned_model_gives_it(tiny: Tiny, tmp_path: Path) -> None:
    dense = dense_model(tiny)
    untouched = dense.model.lm_head.weight.clone()
    artifact = prune(dense, WITH_HEAD, TOKENS, tmp_path / "out", CPU)
    with torch.no_grad():
        inputs = dense.model.base_model(TOKENS).last_hidden_state
        inputs_of_dense = dense_model(tiny).model.base_model(TOKENS).last_hidden_state
    stored = artifact.matrix("lm_head", artifact.modules["lm_head"]).mask
    expected, other = (
        prune_matrix(untouched, input_statistics(states, "lm_head"), 0.5, WITH_HEAD)[0].mask
        for states in (inputs, inputs_of_dense)
    )
    assert torch.equal(stored, expected)
    assert not torch.equal(stored, other)


def test_the_blocks_are_pruned_alike_with_and_without_the_head(tiny: Tiny, tmp_path: Path) -> None:
    for recipe in (RECIPE, WITH_HEAD):
        prune(dense_model(tiny, "llama-tied"), recipe, TOKENS, tmp_path / str(recipe.head), CPU)
    for index in range(2):
        assert sha256_file(tmp_path / "True" / block_shard(index)) == sha256_file(
            tmp_path / "False" / block_shard(index)
        )


def test_a_head_that_is_not_finite_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    dense = dense_model(tiny)
    dense.model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(ModelError, match=r"^lm_head: NaN or infinity"):
        prune(dense, WITH_HEAD, TOKENS, tmp_path / "out", CPU)


def test_a_run_killed_around_the_head_continues_to_the_same_bytes(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune(dense_model(tiny, "llama-tied"), WITH_HEAD, TOKENS, tmp_path / "whole", CPU)
    for file in (HEAD, REST):
        out = tmp_path / file
        with killed_at(file, monkeypatch):
            prune(dense_model(tiny, "llama-tied"), WITH_HEAD, TOKENS, out, CPU)
        with pytest.raises(ArtifactError, match="unfinished, 2 of 2 blocks"):
            open_artifact(out)
        prune(dense_model(tiny, "llama-tied"), WITH_HEAD, TOKENS, out, CPU, resume=True)
        assert hashes(out) == hashes(tmp_path / "whole")


# ---- killed and continued ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """An uninterrupted run of a recipe."""
    made: dict[tuple[str, Recipe], Path] = {}

    def run(kind: str = "llama", recipe: Recipe = RECIPE) -> Path:
        if (kind, recipe) not in made:
            out = tmp_path_factory.mktemp("whole") / "out"
            prune(dense_model(tiny, kind), recipe, TOKENS, out, CPU)
            made[kind, recipe] = out
        return made[kind, recipe]

    return run


@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("budget", ["uniform", "owl"])
def test_a_killed_run_continues_to_the_same_bytes(
    blocks: int,
    budget: str,
    tiny: Tiny,
    tmp_path: Path,
    whole: Callable[..., Path],
) -> None:
    recipe = RECIPE if budget == "uniform" else replace(RECIPE, layers=Owl())
    out = tmp_path / "out"
    kill_after(blocks, lambda: prune(dense_model(tiny, "gemma3"), recipe, TOKENS, out, CPU))
    assert sorted(path.name for path in out.glob("*.safetensors")) == [block_shard(index) for index in range(blocks)]
    with pytest.raises(ArtifactError, match=f"unfinished, {blocks} of 3 blocks"):
        open_artifact(out)
    dense = dense_model(tiny, "gemma3")
    resumed = prune(dense, recipe, TOKENS, out, CPU, resume=True)
    assert hashes(out) == hashes(whole("gemma3", recipe))
    assert not (out / JOURNAL).exists()
    for name, matrix in resumed.matrices():
        assert torch.equal(matrix.to_dense(), dense.model.get_submodule(name).weight)


def test_killed_after_every_block(tiny: Tiny, tmp_path: Path, whole: Callable[..., Path]) -> None:
    out = tmp_path / "out"
    for blocks in (0, 1, 1, 2):
        kill_after(blocks, lambda: prune(dense_model(tiny, "gemma3"), RECIPE, TOKENS, out, CPU, resume=True))
    prune(dense_model(tiny, "gemma3"), RECIPE, TOKENS, out, CPU, resume=True)
    assert hashes(out) == hashes(whole("gemma3"))


@pytest.mark.parametrize("blocks", [0, 1])
@pytest.mark.parametrize("update", ["none", "refit"])
def test_a_killed_run_scored_by_gradients_continues_to_the_same_bytes(
    update: str, blocks: int, tiny: Tiny, tmp_path: Path, whole: Callable[..., Path]
) -> None:
    recipe = replace(RECIPE, score="gblm", rows="lagrangian", update=update)
    out = tmp_path / "out"
    kill_after(blocks, lambda: prune(dense_model(tiny), recipe, TOKENS, out, CPU))
    prune(dense_model(tiny), recipe, TOKENS, out, CPU, resume=True)
    assert hashes(out) == hashes(whole(recipe=recipe))


def test_gradients_are_not_measured_again_when_no_block_is_left(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, score="gblm")
    with killed_at(REST, monkeypatch):
        prune(dense_model(tiny), recipe, TOKENS, tmp_path / "out", CPU)
    monkeypatch.setattr(trim_export.prune, "gradient_norms", None)
    prune(dense_model(tiny), recipe, TOKENS, tmp_path / "out", CPU, resume=True)


def test_rows_that_anticipate_are_chosen_for_the_problem_of_the_update(tiny: Tiny, tmp_path: Path) -> None:
    counts = {}
    for rows in ("uniform", "lagrangian", "anticipating"):
        recipe = replace(RECIPE, rows=rows, update="refit")
        artifact = prune(dense_model(tiny), recipe, MORE_TOKENS, tmp_path / rows, CPU)
        counts[rows] = [matrix.row_counts.tolist() for _, matrix in artifact.matrices()]
    assert counts["anticipating"] not in (counts["uniform"], counts["lagrangian"])


@pytest.mark.parametrize("file", [REST, "config.json", "README.md", MANIFEST])
def test_killed_while_finishing(
    file: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Callable[..., Path]
) -> None:
    out = tmp_path / "out"
    with killed_at(file, monkeypatch):
        prune(dense_model(tiny), RECIPE, TOKENS, out, CPU)
    with pytest.raises(ArtifactError, match="unfinished, 2 of 2 blocks"):
        open_artifact(out)
    prune(dense_model(tiny), RECIPE, TOKENS, out, CPU, resume=True)
    assert hashes(out) == hashes(whole())


def test_killed_between_manifest_and_journal(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Callable[..., Path]
) -> None:
    out = tmp_path / "out"
    unlink = Path.unlink

    def die(self: Path, missing_ok: bool = False) -> None:
        if self.name == JOURNAL:
            raise Killed
        unlink(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", die)
        with pytest.raises(Killed):
            prune(dense_model(tiny), RECIPE, TOKENS, out, CPU)
    assert verify_files(open_artifact(out)) == []
    prune(dense_model(tiny), RECIPE, TOKENS, out, CPU, resume=True)
    assert hashes(out) == hashes(whole())


def test_leftover_temporary_files_do_not_matter(tiny: Tiny, tmp_path: Path, whole: Callable[..., Path]) -> None:
    out = tmp_path / "out"
    kill_after(1, lambda: prune(dense_model(tiny), RECIPE, TOKENS, out, CPU))
    for name in (block_shard(1), REST, JOURNAL, MANIFEST, "config.json"):
        (out / f".{name}.tmp").write_bytes(b"half a file")
    prune(dense_model(tiny), RECIPE, TOKENS, out, CPU, resume=True)
    assert hashes(out) == hashes(whole())


def test_a_run_killed_before_its_first_journal_can_start_again(
    tiny: Tiny, tmp_path: Path, whole: Callable[..., Path]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / f".{JOURNAL}.tmp").write_bytes(b"half a jour")
    prune(dense_model(tiny), RECIPE, TOKENS, out, CPU)
    assert hashes(out) == hashes(whole())


def test_the_time_of_day_leaves_no_trace(
    tiny: Tiny, tmp_path: Path, whole: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, clock = time.time(), time.time
    monkeypatch.setattr(time, "time", lambda: clock() + 10 * 365.25 * 86400)
    prune(dense_model(tiny), RECIPE, TOKENS, tmp_path / "later", CPU)
    assert hashes(tmp_path / "later") == hashes(whole())
    years = "|".join(time.strftime("%Y", time.localtime(when)) for when in (now, time.time()))
    for file in (tmp_path / "later").iterdir():
        head = file.read_bytes()
        if file.suffix == ".safetensors":
            head = head[8 : 8 + int.from_bytes(head[:8], "little")]
        assert not re.search(rf"({years})-\d\d|\b{int(now) // 10**5}\d{{5}}".encode(), head), file


def test_resuming_a_finished_run_changes_nothing(tiny: Tiny, tmp_path: Path, whole: Callable[..., Path]) -> None:
    out = copied(whole(), tmp_path / "out")
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    artifact = prune(dense_model(tiny), RECIPE, TOKENS, out, CPU, resume=True)
    assert isinstance(artifact, Artifact)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == times


@pytest.fixture(scope="module")
def killed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after one of two blocks."""
    out = tmp_path_factory.mktemp("killed") / "out"
    kill_after(1, lambda: prune(dense_model(tiny), RECIPE, TOKENS, out, CPU))
    return out


@pytest.fixture
def started(killed: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    return copied(killed, tmp_path / "started")


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("recipe.sparsity", {"recipe": replace(RECIPE, sparsity=0.6)}),
        ("recipe.seed", {"recipe": replace(RECIPE, seed=1)}),
        ("recipe.rows", {"recipe": replace(RECIPE, rows="uniform")}),
        ("recipe.update", {"recipe": replace(RECIPE, update="refit")}),
        ("recipe.head", {"recipe": replace(RECIPE, head=True)}),
        ("recipe.layers", {"recipe": replace(RECIPE, layers=Owl())}),
        ("calibration_sha256", {"tokens": TOKENS + 1}),
        ("compute.autocast_bfloat16", {"compute": Compute(torch.device("cpu"), autocast=True)}),
        ("source.", {"dtype": torch.bfloat16}),
        ("source.", {"kind": "qwen2"}),
    ],
)
def test_another_run_is_not_continued(
    field: str,
    other: dict[str, Any],
    finished: bool,
    tiny: Tiny,
    tmp_path: Path,
    started: Path,
    whole: Callable[..., Path],
) -> None:
    out = copied(whole(), tmp_path / "out") if finished else started
    before = hashes(out)
    dense = dense_model(tiny, other.get("kind", "llama"), other.get("dtype", torch.float32))
    settings = {"recipe": RECIPE, "tokens": TOKENS, "compute": CPU} | other
    with pytest.raises(UsageError, match=rf"differs in {field}") as caught:
        prune(dense, settings["recipe"], settings["tokens"], out, settings["compute"], resume=True)
    assert "\n" not in str(caught.value)
    assert hashes(out) == before


def test_another_version_of_the_tool_is_not_continued(
    tiny: Tiny, started: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trim_export, "__version__", "9.9")
    with pytest.raises(UsageError, match=r"differs in tool_version \(there '.*', here '9\.9'\)"):
        prune(dense_model(tiny), RECIPE, TOKENS, started, CPU, resume=True)


def test_a_finished_shard_that_changed_is_refused(tiny: Tiny, started: Path) -> None:
    shard = started / block_shard(0)
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x00")
    with pytest.raises(ArtifactError, match=r"block-00000\.safetensors: not as the journal recorded it"):
        prune(dense_model(tiny), RECIPE, TOKENS, started, CPU, resume=True)


def test_a_finished_shard_that_vanished_is_refused(tiny: Tiny, started: Path) -> None:
    (started / block_shard(0)).unlink()
    with pytest.raises(ArtifactError, match=r"block-00000\.safetensors: not as the journal recorded it"):
        prune(dense_model(tiny), RECIPE, TOKENS, started, CPU, resume=True)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"run": 1}', b"null", b"\xff"])
def test_a_damaged_journal_is_refused(content: bytes, tiny: Tiny, started: Path) -> None:
    (started / JOURNAL).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        prune(dense_model(tiny), RECIPE, TOKENS, started, CPU, resume=True)
    assert "\n" not in str(caught.value)
    assert str(started) in str(caught.value)


def test_a_journal_without_its_state_is_refused(tiny: Tiny, started: Path) -> None:
    run = json.loads((started / JOURNAL).read_text())["run"]
    whole: dict[str, Any] = {"run": run, "sparsities": None, "layer_choice": None, "shards": {}}
    damages: list[dict[str, Any]] = [
        {"shards": []},
        {"sparsities": 0.5},
        {"sparsities": [0.5]},
        {"layer_choice": "owl"},
    ]
    missing = [{"run": run}, *({key: whole[key] for key in whole if key != left_out} for left_out in whole)]
    for state in [*missing, *(whole | damage for damage in damages)]:
        (started / JOURNAL).write_text(json.dumps(state))
        with pytest.raises(ArtifactError, match=JOURNAL):
            prune(dense_model(tiny), RECIPE, TOKENS, started, CPU, resume=True)


def test_existing_directories_are_refused_untouched(
    tiny: Tiny, tmp_path: Path, started: Path, whole: Callable[..., Path]
) -> None:
    finished = copied(whole(), tmp_path / "finished")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    for out, state in ((finished, "a finished artifact"), (started, "an unfinished run"), (foreign, "not an artifact")):
        before = hashes(out)
        with pytest.raises(UsageError, match=state):
            prune(dense_model(tiny), RECIPE, TOKENS, out, CPU)
        assert hashes(out) == before
    with pytest.raises(UsageError, match="not an artifact"):
        prune(dense_model(tiny), RECIPE, TOKENS, foreign, CPU, resume=True)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UsageError, match="a file is in the way"):
        prune(dense_model(tiny), RECIPE, TOKENS, file, CPU)


def test_only_artifacts_are_removed_to_be_overwritten(tmp_path: Path, started: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    remove_artifact(foreign)
    remove_artifact(started)
    remove_artifact(tmp_path / "absent")
    assert (foreign / "thesis.txt").exists()
    assert not started.exists()


def test_an_empty_directory_and_missing_parents_are_fine(
    tiny: Tiny, tmp_path: Path, whole: Callable[..., Path]
) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "some" / "where" / "deep"):
        prune(dense_model(tiny), RECIPE, TOKENS, out, CPU)
        assert hashes(out) == hashes(whole())
