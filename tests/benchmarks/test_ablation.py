"""The ablation: what it measures, what it leaves behind, and that it goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks import ablation

Tiny = Callable[..., Path]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog; 0123456789 times, or more often than that!\n" * 400)
    return file


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "HELD_OUT", 2)
    monkeypatch.setattr(ablation, "LENGTH", 16)


def subject_of(tiny: Tiny, text: Path) -> ablation.Subject:
    return ablation.load_subject(str(tiny("llama")), text, count=1)


@pytest.mark.usefixtures("small")
def test_the_divergence_of_the_dense_model_is_zero_and_of_another_the_closed_form(tiny: Tiny, text: Path) -> None:
    subject = subject_of(tiny, text)
    assert abs(subject.apart()) < 1e-3  # log-probabilities are kept in float16
    model = subject.dense.model
    with torch.no_grad():
        wanted = model(subject.held_out).logits.double().log_softmax(-1)
        for block in subject.blocks.values():
            for parameter in block.parameters():
                parameter.mul_(0.5)
        given = model(subject.held_out).logits.double().log_softmax(-1)
    expected = float((wanted.exp() * (wanted - given)).sum(-1).mean())
    assert subject.apart() == pytest.approx(expected, abs=2e-3)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["best", "update none, rows trim", "score gblm", "best, then block reconstruction"])
def test_a_variant_prunes_the_first_blocks_only_and_the_model_is_restored(tiny: Tiny, text: Path, name: str) -> None:
    subject = subject_of(tiny, text)
    before = {key: value.clone() for key, value in subject.dense.model.state_dict().items()}
    during: dict[str, torch.Tensor] = {}

    def note(self: ablation.Subject) -> float:
        during.update({key: value.clone() for key, value in self.dense.model.state_dict().items()})
        return 0.0

    recipe = {"samples": 4, "sequence_length": 8, "context_length": 16}
    variant = ablation.VARIANTS[name]
    variant = ablation.Variant({**variant.settings, **recipe}, variant.reconstruct)
    with mock.patch.object(ablation.Subject, "apart", note):
        ablation.measure(subject, variant, text, 0.5, seed=0)
    changed = {key for key in before if not torch.equal(before[key], during[key])}
    (block,) = subject.blocks
    assert changed
    assert all(key.startswith(f"{block}.") for key in changed)
    pruned = [during[key] for key in changed]
    assert sum(int((weight == 0).sum()) for weight in pruned) >= 0.49 * sum(weight.numel() for weight in pruned)
    after = subject.dense.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.usefixtures("small")
def test_finished_cells_are_kept_and_the_table_compares_with_best(
    tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "ablation.json"
    asked: list[tuple[str, int]] = []

    def measure(subject: object, variant: ablation.Variant, text: Path, sparsity: float, seed: int) -> float:
        name = next(name for name, known in ablation.VARIANTS.items() if known is variant)
        asked.append((name, seed))
        return 0.25 if name == "best" else 0.5

    monkeypatch.setattr(ablation, "measure", measure)
    command = ["ablation", "--calibration", str(text), "--model", str(tiny("llama")), "--blocks", "1"]
    command += ["--json", str(results), "--only", "best", "update refit", "--seeds"]
    for seeds in (["0"], ["0", "1"]):
        monkeypatch.setattr("sys.argv", [*command, *seeds])
        assert ablation.main() == 0
    assert asked == [("best", 0), ("update refit", 0), ("best", 1), ("update refit", 1)]
    assert len(json.loads(results.read_text())["cells"]) == 4
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["update", "refit", "0.5000", "0.5000", "0.5000", "2.00", "2"] in lines
    monkeypatch.setattr("sys.argv", [*command, "0", "--sparsity", "0.6"])
    assert ablation.main() == 2
    assert "another protocol" in capsys.readouterr().err
