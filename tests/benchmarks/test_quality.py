"""The quality benchmark: what is measured once, what survives a kill or a failure, and what its bytes count."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tiny_models import tiny_model

from benchmarks.quality.__main__ import main
from benchmarks.quality.cells import (
    BEST,
    DENSE,
    TABLE,
    Cell,
    Protocol,
    Row,
    Sources,
    declare,
    recipe_settings,
)
from benchmarks.quality.fill import fill
from benchmarks.quality.measure import measure, measure_apart
from benchmarks.quality.plots import plots
from benchmarks.quality.store import Store, open_store
from benchmarks.quality.stored import FORMS, Form, stored_as
from benchmarks.quality.tables import Contestant, beaten_by, tables
from trim_export.artifact import open_artifact
from trim_export.calibration import consecutive_windows, token_stream
from trim_export.converters import ENCODINGS, SparseMatrix
from trim_export.errors import CheckFailed, UsageError
from trim_export.models import decoder_blocks, load_model, projections

Tiny = Callable[..., Path]

PROTOCOL = Protocol("tiny", "valid.txt", "0" * 64, "test.txt", "1" * 64)
TEXT = "The quick brown fox jumps over the lazy dog; 0123456789 times, or more often than that!\n" * 20
SKIPPED = Row("layers=none-such", "best", {"layers": "none-such"})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "quality.json", PROTOCOL)


@pytest.fixture
def sources(tiny: Tiny, tmp_path: Path) -> Sources:
    (tmp_path / "valid.txt").write_text(TEXT.upper())
    (tmp_path / "test.txt").write_text(TEXT)
    return Sources(str(tiny("llama")), str(tmp_path / "valid.txt"), str(tmp_path / "test.txt"))


def small(sources: Sources) -> Protocol:
    return replace(Protocol.of(sources), samples=4, length=12, windows=2, window=16)


def two_seeds() -> list[Cell]:
    return declare(PROTOCOL, ["table"], [0, 1], [0.5])[0]


class Counter:
    """Measures nothing: gives a figure of its own to each cell and remembers which were asked for."""

    def __init__(self, failing: str = "", killed_at: int | None = None) -> None:
        self.failing, self.killed_at = failing, killed_at
        self.asked: list[str] = []

    def __call__(self, cell: Cell) -> dict[str, Any]:
        if len(self.asked) == self.killed_at:
            raise KeyboardInterrupt
        self.asked.append(str(cell))
        if str(cell) == self.failing:
            return {"failed": "it broke"}
        value = 10.0 + len(self.asked)
        figures: dict[str, Any] = {"perplexity": value, "later_perplexity": value / 2}
        if cell.row is not DENSE:
            figures |= {"prune_seconds": 1.0, "peak_memory_bytes": 10**9, "sparsity": cell.sparsity}
        return figures


def silent(line: str) -> None:
    pass


def printed(store: Store) -> str:
    console = Console(width=240, file=io.StringIO(), record=True)
    for part in tables(store):
        console.print(part, soft_wrap=isinstance(part, str))
    return console.export_text()


def test_seed_0_of_everything_comes_first_and_no_measurement_is_declared_twice() -> None:
    cells, _ = declare(PROTOCOL, ["table", "frontier"], [0, 1, 2])
    assert cells[0].row is DENSE
    seeds = [cell.seed for cell in cells[1:]]
    assert seeds == sorted(seeds, key=lambda seed: -1 if seed is None else seed)
    settings = [json.dumps(recipe_settings(cell, PROTOCOL), sort_keys=True) for cell in cells]
    assert len(set(settings)) == len(settings)
    # One pruning with `best` serves the table and both forms of the frontier; other seeds are not stored.
    best = [cell for cell in cells if cell.row is BEST and cell.sparsity == 0.8]
    assert [cell.stored for cell in best] == [("bf16", "int8"), (), ()]


def test_a_name_that_is_not_installed_is_skipped_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Row("none-such=1", "best", {"none_such": "1"})
    monkeypatch.setattr("benchmarks.quality.cells.TABLE", (*TABLE, SKIPPED, setting))
    cells, notes = declare(PROTOCOL, ["table"], [0, 1])
    assert {cell.row.name for cell in cells} == {"dense", "wanda", "trim", "fast", "best"}
    assert [note.split(":")[0] for note in notes] == ["layers=none-such skipped", "none-such=1 skipped"]
    assert "none_such" in notes[1]


def test_only_picks_rows_and_refuses_names_that_no_suite_has() -> None:
    cells, _ = declare(PROTOCOL, ["table"], [0], [0.8], only=["wanda"])
    assert [str(cell) for cell in cells] == ["dense", "wanda at 0.8, seed 0"]
    with pytest.raises(UsageError, match="did you mean wanda"):
        declare(PROTOCOL, ["table"], [0], only=["wnda"])


def test_finished_cells_are_not_measured_again(store: Store) -> None:
    first, second, third = Counter(), Counter(), Counter()
    fill(store, two_seeds(), first, say=silent)
    fill(store, two_seeds(), second, say=silent)
    fill(store, two_seeds()[:3], third, again=True, say=silent)
    assert len(first.asked) == 1 + 2 * len(TABLE)
    assert second.asked == []
    assert third.asked == first.asked[:3]
    assert len(store.records) == len(first.asked)


def test_a_killed_run_continues_where_it_was(store: Store) -> None:
    whole, killed, rest = Counter(), Counter(killed_at=3), Counter()
    with pytest.raises(KeyboardInterrupt):
        fill(store, two_seeds(), killed, say=silent)
    assert len(json.loads(store.path.read_bytes())["cells"]) == 3
    fill(open_store(store.path, PROTOCOL), two_seeds(), rest, say=silent)
    fill(Store(store.path.with_name("other.json"), PROTOCOL), two_seeds(), whole, say=silent)
    assert killed.asked + rest.asked == whole.asked


def test_no_cell_is_started_after_the_limit(store: Store) -> None:
    counter, lines = Counter(), list[str]()
    fill(store, two_seeds(), counter, minutes=-1.0, say=lines.append)
    assert counter.asked == []
    assert "other 9" in lines[-1]


def test_a_failing_cell_is_recorded_and_the_rest_goes_on(store: Store) -> None:
    counter, again = Counter(failing="fast at 0.5, seed 0"), Counter()
    fill(store, two_seeds(), counter, say=silent)
    assert len(counter.asked) == 1 + 2 * len(TABLE)
    assert [record["failed"] for record in store.records if "failed" in record] == ["it broke"]
    text = printed(store)
    assert "Failed: fast at 0.5, seed 0: it broke" in text
    assert "1 + 1 failed" in text
    fill(store, two_seeds(), again, say=silent)
    assert again.asked == []


def test_without_a_dense_model_there_is_nothing_to_compare_with(store: Store) -> None:
    with pytest.raises(CheckFailed, match="it broke"):
        fill(store, two_seeds(), Counter(failing="dense"), say=silent)
    assert not store.path.exists()


def test_a_changed_recipe_is_another_cell_and_a_new_setting_counts_as_its_default(store: Store) -> None:
    cell = Cell(BEST, 0.5, 0)
    settings = recipe_settings(cell, PROTOCOL)
    assert settings is not None
    older = {key: value for key, value in settings.items() if key != "head"}
    store.add({"recipe": older, "perplexity": 1.0})
    assert store.find(cell) is not None
    assert store.find(Cell(Row("head", "best", {"head": "yes"}), 0.5, 0)) is None
    store.add({"recipe": settings | {"update": "refit"}, "perplexity": 2.0})
    found = store.find(cell)
    assert found is not None
    assert found["perplexity"] == 1.0


def test_a_cell_that_lacks_a_stored_form_is_measured_again(store: Store) -> None:
    store.add({"recipe": None, "perplexity": 1.0, "stored": {"bf16": {}}})
    assert store.find(Cell(DENSE, stored=("bf16",))) is not None
    assert store.find(Cell(DENSE, stored=("bf16", "int8"))) is None


def test_a_store_of_another_protocol_is_refused(store: Store) -> None:
    store.add({"recipe": None, "perplexity": 1.0})
    assert open_store(store.path, None).protocol == PROTOCOL
    with pytest.raises(UsageError, match="data_sha256"):
        open_store(store.path, replace(PROTOCOL, data_sha256="2" * 64))
    with pytest.raises(UsageError, match="--calibration"):
        open_store(store.path.with_name("none.json"), None)


def test_a_worker_that_dies_or_raises_is_a_failure_with_its_reason(sources: Sources) -> None:
    def outcome(code: str) -> dict[str, Any]:
        return measure_apart(Cell(BEST, 0.5, 0), small(sources), sources, [sys.executable, "-c", code])

    assert outcome("import os; os.kill(os.getpid(), 9)") == {"failed": "its process was killed by SIGKILL"}
    assert outcome("import sys; sys.exit(3)") == {"failed": "its process ended with status 3"}
    assert outcome("int('x')")["failed"].startswith("ValueError: invalid literal")


def test_a_cell_in_its_own_process_gives_what_it_gives_here(sources: Sources, tmp_path: Path) -> None:
    cell, protocol = Cell(Row("refit", "best", {"update": "refit", "layers": "owl"}), 0.5, 1), small(sources)
    apart = measure_apart(cell, protocol, sources)
    here = measure(cell, protocol, sources, tmp_path)
    assert apart["perplexity"] == pytest.approx(here["perplexity"], rel=1e-5)
    assert apart["later_perplexity"] == pytest.approx(here["later_perplexity"], rel=1e-5)
    assert apart["sparsity"] == here["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert {"cpu", "threads", "torch", "transformers", "trim_export"} <= apart["machine"].keys()


def test_perplexity_is_that_of_the_dense_model_on_both_halves(sources: Sources, tmp_path: Path) -> None:
    found = measure(Cell(DENSE), small(sources), sources, tmp_path)
    dense = load_model(sources.model)
    windows = consecutive_windows(token_stream(TEXT, dense.tokenizer), 16, 4)
    with torch.no_grad():
        predicted = dense.model.double()(windows).logits[:, :-1].log_softmax(-1)
    losses = -predicted.gather(2, windows[:, 1:, None]).squeeze(2).mean(dim=1)
    assert found["perplexity"] == pytest.approx(math.exp(losses[:2].mean()), rel=1e-4)
    assert found["later_perplexity"] == pytest.approx(math.exp(losses[2:].mean()), rel=1e-4)


def test_stored_bytes_of_a_pruned_model_are_those_of_its_arrays(sources: Sources, tmp_path: Path) -> None:
    protocol = small(sources)
    cell = Cell(Row("matrix", "best", {"rows": "matrix", "update": "refit"}), 0.7, 0, ("bf16", "int8"))
    found = measure(cell, protocol, sources, tmp_path)["stored"]
    artifact = open_artifact(tmp_path / "artifact")
    counted = {"bf16": 0, "int8": 0}
    for _, matrix in artifact.matrices():
        encoded = ENCODINGS["bitmap"].encode(SparseMatrix(matrix.mask, matrix.values.bfloat16()))
        counted["bf16"] += sum(tensor.numel() * tensor.element_size() for tensor in encoded.values())
        arrays = (
            np.packbits(matrix.mask.numpy(), axis=1),
            np.zeros(int(matrix.mask.sum()), np.int8),
            np.zeros(matrix.shape[0], np.float32),
        )
        counted["int8"] += sum(array.nbytes for array in arrays)
    rest = sum(value.numel() for shard in artifact.shards for value in artifact.dense_tensors(shard).values())
    for form, matrix_bytes in counted.items():
        assert found[form]["matrix_bytes"] == matrix_bytes
        assert found[form]["bytes"] == matrix_bytes + 2 * rest


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_the_model_holds_each_stored_form_in_turn(kind: str) -> None:
    model, original = tiny_model(kind), tiny_model(kind)
    exact = dict(original.named_parameters())
    names = [f"{block}.{path}" for block, module in decoder_blocks(model).items() for path in projections(module)]
    rest = sum(value.numel() for name, value in exact.items() if name.removesuffix(".weight") not in names)
    for form, matrix_bytes, total in stored_as(("bf16", "int3", "int8"), model, dict.fromkeys(names), "tiny"):
        assert total == matrix_bytes + 2 * rest
        for name, value in model.named_parameters():
            stored = FORMS[form].read_back if name.removesuffix(".weight") in names else torch.Tensor.bfloat16
            assert torch.equal(value, stored(exact[name]).float()), (form, name)


@settings(max_examples=40)
@given(
    st.sampled_from(sorted(FORMS)),
    st.integers(1, 4),
    st.integers(1, 150),
    st.integers(0, 2**31 - 1),
    st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_round_to_nearest_takes_the_nearest_of_the_levels_that_its_bytes_can_name(
    name: str, rows: int, columns: int, seed: int, size: float
) -> None:
    form = FORMS[name]
    weight = size * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.3] = 0
    read, count = form.read_back(weight), rows * columns
    assert bool((read[weight == 0] == 0).all())
    if form.scale is None:
        assert torch.equal(read, weight.bfloat16().float())
        assert form.nbytes(rows, columns, count) == 2 * count
        return
    top = {"int8": 127, "int4": 7, "int3": 3}[name]
    width = 64 if name != "int8" else columns
    exact, given_back, scales = weight.double().numpy(), read.double().numpy(), []
    for row in range(rows):
        for begin in range(0, columns, width):
            group = exact[row, begin : begin + width]
            scale = np.float32(np.abs(group).max() / top)
            scales.append(scale if name == "int8" else np.float16(scale))
            levels = np.arange(-top, top + 1) * float(scales[-1])
            nearest = np.abs(group[:, None] - levels).min(axis=1)
            taken = np.abs(group - given_back[row, begin : begin + width])
            assert np.allclose(taken, nearest, rtol=0, atol=1e-6 * np.abs(group).max() + 1e-12)
    bits = "".join(format(0, f"0{form.bits}b") for _ in range(count))
    assert form.nbytes(rows, columns, count) == math.ceil(len(bits) / 8) + np.array(scales).nbytes


def test_eight_bits_of_a_row_by_hand() -> None:
    weight = torch.tensor([[127.0, -63.6, 0.0, 0.4], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(
        Form(8, torch.float32).read_back(weight), torch.tensor([[127.0, -64.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    )


def test_the_tables_say_seed_0_mean_and_ratios(store: Store) -> None:
    store.add({"recipe": None, "perplexity": 20.0, "later_perplexity": 10.0})
    for row, seed, value in [(BEST, 0, 30.0), (BEST, 1, 50.0), (BEST, 2, 70.0)]:
        record = {"prune_seconds": 12.0, "peak_memory_bytes": 2 * 10**9, "sparsity": 0.80001}
        recipe = recipe_settings(Cell(row, 0.8, seed), PROTOCOL)
        store.add({"recipe": recipe, "perplexity": value, "later_perplexity": value / 2} | record)
    lines = [line.split() for line in printed(store).splitlines()]
    expected = ["best", "0.8", "30.00", "50.00", "2.50", "15.00", "25.00", "2.50", "0.8000", "12", "2,000", "3"]
    assert expected in lines


def test_a_contestant_is_beaten_by_the_other_kind_if_it_is_no_larger_and_better_on_both_halves() -> None:
    pruned = Contestant(0.5, "bf16", 100, 200, 30.0, 20.0)
    better = Contestant(None, "int8", 90, 190, 24.0, 16.0)
    best = Contestant(None, "int4", 80, 200, 23.0, 17.0)
    larger = Contestant(None, "bf16", 200, 300, 20.0, 15.0)
    one_half = Contestant(None, "int3", 80, 180, 22.0, 21.0)
    same_kind = Contestant(0.6, "int8", 50, 150, 10.0, 10.0)
    assert beaten_by(pruned, [better, best, larger, one_half, same_kind]) == best
    assert beaten_by(pruned, [larger, one_half, same_kind, pruned]) is None
    assert beaten_by(better, [same_kind]) == same_kind


def test_the_command_measures_what_is_missing_and_prints(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counter = Counter()
    monkeypatch.setattr("benchmarks.quality.__main__.measure_apart", lambda cell, protocol, sources: counter(cell))
    monkeypatch.setattr("benchmarks.quality.__main__.signal.signal", lambda *_: None)
    where = ["--store", str(tmp_path / "quality.json")]
    command = [*where, "--model", sources.model, "--suite", "table", "--seeds", "0", "--sparsities", "0.6"]
    assert main(command) == 2
    assert "--calibration" in capsys.readouterr().err
    assert main([*command, "--calibration", sources.calibration, "--data", str(tmp_path / "none.txt")]) == 2
    texts = ["--calibration", sources.calibration, "--data", sources.data]
    assert main([*command, *texts, "--only", "best"]) == 0
    assert counter.asked == ["dense", "best at 0.6, seed 0"]
    capsys.readouterr()
    assert main([*where, "--print", "--markdown"]) == 0
    out = capsys.readouterr().out
    assert ["best", "0.6", "12.00"] in [[cell.strip() for cell in line.split("|")][1:4] for line in out.splitlines()]
    assert len(counter.asked) == 2


def test_without_matplotlib_there_is_a_sentence_and_no_plot(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store, two_seeds(), Counter(), say=silent)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (sentence,) = plots(store)
    assert "trim-export[bench]" in sentence
    assert list(store.path.parent.glob("*.svg")) == []


def test_the_plots_name_every_recipe_and_every_stored_form(store: Store) -> None:
    pytest.importorskip("matplotlib")

    def with_forms(cell: Cell) -> dict[str, Any]:
        forms = {form: {"bytes": 10**6 * len(form), "matrix_bytes": 10**5} for form in cell.stored}
        halves = {"perplexity": 30.0, "later_perplexity": 20.0}
        return Counter()(cell) | ({"stored": {form: sizes | halves for form, sizes in forms.items()}} if forms else {})

    cells, _ = declare(PROTOCOL, ["table", "frontier"], [0, 1], [0.5, 0.8])
    fill(store, cells, with_forms, say=silent)
    assert len(plots(store)) == 2
    quality, frontier = store.path.with_suffix(".svg").read_text(), store.path.with_name("frontier.svg").read_text()
    assert all(name in quality for name in ("wanda", "trim", "fast", "best", "dense 11.0"))
    assert all(name in frontier for name in ("sparse, bf16", "sparse, int8", "dense int3", "dense int8"))
