"""SPP adapters: the published formula, zeros that stay, and a training that can be stopped at any step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scarce import fails_at
from scipy.special import log_softmax
from tiny_models import tiny_tokens

import trim_export.spp
from trim_export.artifact import Artifact
from trim_export.errors import ArtifactError, ModelError
from trim_export.forward import Compute
from trim_export.models import load_model
from trim_export.runtimes import load
from trim_export.spp import SppAdapter, fine_tune, kl_divergence
from trim_export.training import Fit, Training, held_out_windows

CPU = Compute(torch.device("cpu"), autocast=False)
TOKENS = tiny_tokens(16, 12)


def trained_adapter(rows: int, columns: int, seed: int = 0) -> SppAdapter:
    draw = torch.Generator().manual_seed(seed)
    adapter = SppAdapter(rows, columns, draw).requires_grad_(False)
    adapter.columns.normal_(generator=draw)
    adapter.rows.normal_(generator=draw)
    return adapter


@given(groups=st.integers(1, 4), columns=st.integers(1, 9), seed=st.integers(0, 99))
def test_the_weight_is_the_papers(groups: int, columns: int, seed: int) -> None:
    rows = 16 * groups
    adapter = trained_adapter(rows, columns, seed)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    w, a, b = (tensor.double().numpy() for tensor in (weight, adapter.columns, adapter.rows))
    expected = w + 2.0 * w * np.repeat(a, rows // 16, axis=0) * b
    np.testing.assert_allclose(adapter(weight).numpy(), expected, rtol=1e-5, atol=1e-5)


@given(rows=st.integers(1, 70))
def test_rows_that_sixteen_does_not_divide_are_grouped_evenly(rows: int) -> None:
    groups = SppAdapter(rows, 3, torch.Generator()).groups
    assert torch.equal(groups.sum(dim=1), torch.ones(rows))
    sizes = groups.sum(dim=0)
    assert sizes.max() - sizes.min() <= 1
    numbers = groups.argmax(dim=1).tolist()
    assert numbers == sorted(numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_stay_and_an_untrained_adapter_changes_nothing(dtype: torch.dtype) -> None:
    weight = torch.randn(20, 11, generator=torch.Generator().manual_seed(1)).relu().to(dtype)
    assert torch.equal(SppAdapter(20, 11, torch.Generator())(weight), weight)
    changed = trained_adapter(20, 11)(weight)
    assert changed.dtype == dtype
    assert torch.equal(changed != 0, weight != 0)
    assert not torch.equal(changed, weight)


def test_divergence_is_that_of_the_definition() -> None:
    draw = np.random.default_rng(0)
    given_, reference = draw.normal(size=(2, 5, 30)) * 3, draw.normal(size=(2, 5, 30)) * 3
    p, q = log_softmax(reference, axis=-1), log_softmax(given_, axis=-1)
    expected = (np.exp(p) * (p - q)).sum(-1).mean()
    assert float(kl_divergence(torch.tensor(given_), torch.tensor(reference))) == pytest.approx(expected, rel=1e-5)


# ---- training ----------------------------------------------------------------------------------------------------


class Run:
    """A sparse model beside its dense one."""

    def __init__(self, artifact: Artifact, dense: Path, state: Path) -> None:
        self.modules = list(artifact.modules)
        self.student = load(artifact.path, "dense").requires_grad_(False)
        self.teacher = load_model(str(dense)).model
        self.state = state

    def train(self, steps: int = 20, rate: float = 0.02, checkpointing: bool = False) -> Fit:
        training = Training(steps, rate, seed=0)
        return fine_tune(self.student, self.teacher, self.modules, TOKENS, training, CPU, self.state, checkpointing)

    def held_out_loss(self) -> float:
        windows = TOKENS[-held_out_windows(len(TOKENS)) :]
        with torch.no_grad():
            return float(kl_divergence(self.student(windows).logits, self.teacher(windows).logits))

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.student.state_dict().items()}


@pytest.fixture
def make(pruned: Callable[..., Artifact], tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., Run]:
    def run(name: str = "state", kind: str = "llama", dtype: torch.dtype = torch.float32) -> Run:
        return Run(pruned(kind, dtype), tiny(kind, dtype), tmp_path / name)

    return run


@pytest.mark.parametrize(("kind", "dtype"), [("llama-tied", torch.float32), ("opt", torch.bfloat16)])
def test_the_merged_model_is_the_one_that_was_measured(kind: str, dtype: torch.dtype, make: Callable[..., Run]) -> None:
    run = make(kind=kind, dtype=dtype)
    before, start = run.weights(), run.held_out_loss()
    fit = run.train()
    after = run.weights()
    assert fit.before == pytest.approx(start, rel=1e-4)
    assert fit.after == pytest.approx(run.held_out_loss(), rel=1e-4)
    assert fit.after < 0.97 * fit.before
    assert before.keys() == after.keys()
    for name, weight in before.items():
        trained = name.removesuffix(".weight") in run.modules
        assert torch.equal(weight, after[name]) != trained
        assert after[name].dtype == dtype
        if trained:
            assert torch.equal(weight != 0, after[name] != 0)
    assert not any(parameter.requires_grad for parameter in run.student.parameters())


def test_training_that_only_harms_leaves_every_bit_as_it_was(make: Callable[..., Run]) -> None:
    run = make()
    before = run.weights()
    fit = run.train(steps=3, rate=1e4)
    assert fit.step == 0
    assert fit.after == fit.before
    assert all(torch.equal(weight, before[name]) for name, weight in run.weights().items())


@pytest.mark.parametrize("kind", ["opt", "gemma3"])  # the second has two kinds of attention masks
def test_checkpointing_changes_nothing_but_memory(kind: str, make: Callable[..., Run]) -> None:
    kept, recomputed = make("one", kind), make("two", kind)
    assert kept.train(steps=4) == recomputed.train(steps=4, checkpointing=True)
    assert all(torch.equal(weight, recomputed.weights()[name]) for name, weight in kept.weights().items())
    assert not any("forward" in vars(module) for module in recomputed.student.modules())


@pytest.mark.parametrize("call", [1, 4])  # on the held-out windows, and in a step
def test_out_of_memory_changes_no_more_than_rounding(
    call: int, make: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    expected, found = make("expected"), make("found")
    undisturbed = expected.train(steps=6)
    assert caplog.text == ""
    with fails_at(found.student.get_submodule(found.modules[-1]), call):
        fit = found.train(steps=6)
    assert caplog.text.count("out of memory: trying again") == 1
    assert fit.after == pytest.approx(undisturbed.after, rel=1e-3)
    torch.testing.assert_close(found.weights(), expected.weights(), rtol=1e-3, atol=1e-3)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the product may catch it."""


@pytest.mark.parametrize("saved", [0, 2])
def test_a_killed_training_continues_to_the_same_bits(
    saved: int, make: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trim_export.spp, "EVALUATE_EVERY", 4)
    whole = make("whole")
    fit = whole.train(steps=10)
    save, count = trim_export.spp._save_state, 0

    def save_or_die(*arguments: Any) -> None:
        nonlocal count
        if count == saved:
            raise Killed
        count += 1
        save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trim_export.spp, "_save_state", save_or_die)
        with pytest.raises(Killed):
            make("cut").train(steps=10)
    resumed = make("cut")
    assert resumed.train(steps=10) == fit
    assert all(torch.equal(weight, resumed.weights()[name]) for name, weight in whole.weights().items())
    assert make("cut").state.read_bytes() == whole.state.read_bytes()


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00" * 64])
def test_a_damaged_state_is_refused(content: bytes, make: Callable[..., Run]) -> None:
    run = make()
    run.state.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"state: damaged") as caught:
        run.train()
    assert "\n" not in str(caught.value)


def test_a_state_of_another_model_is_refused(make: Callable[..., Run]) -> None:
    make(kind="opt").train(steps=1)
    with pytest.raises(ArtifactError, match=r"state: damaged"):
        make(kind="llama").train(steps=1)


def test_predictions_that_are_not_finite_are_refused(make: Callable[..., Run]) -> None:
    run = make()
    run.student.get_input_embeddings().weight[:] = float("nan")
    with pytest.raises(ModelError, match="NaN or infinity"):
        run.train(steps=1)
