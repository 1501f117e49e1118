"""Perplexity and divergence against direct float64 computations."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_tokens

from trim_export.evaluate import divergence, perplexity
from trim_export.models import load_model


def test_perplexity_is_the_mean_over_windows_of_what_the_model_says(tiny: Callable[..., Path]) -> None:
    model = load_model(str(tiny("llama"))).model
    windows = tiny_tokens()[:3]
    result = perplexity(model, windows)
    with torch.no_grad():
        likely = model(windows).logits.double().log_softmax(-1)[:, :-1]
    expected = -likely.gather(2, windows[:, 1:, None]).mean()
    assert result.value == pytest.approx(math.exp(expected), rel=1e-5)
    assert result.windows == 3
    assert result.tokens == 3 * (windows.shape[1] - 1)


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large(tiny: Callable[..., Path]) -> None:
    model = load_model(str(tiny("llama"))).model
    model.get_output_embeddings().weight.zero_()
    assert perplexity(model, tiny_tokens()[:1]).value == pytest.approx(model.config.vocab_size, rel=1e-4)


def test_divergence_against_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    reference, given = torch.randn(2, 7, 11, generator=generator)
    result = divergence(reference, given)
    p, q = reference.double().softmax(-1), given.double().softmax(-1)
    assert result.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()))
    assert result.max_abs_diff == pytest.approx(float((reference - given).abs().max()))
    assert result.argmax_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_a_shift_of_all_logits_is_no_divergence() -> None:
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(1))
    result = divergence(logits, logits + 3)
    assert result.kl == pytest.approx(0, abs=1e-9)
    assert result.argmax_agreement == 1
    assert result.max_abs_diff == pytest.approx(3)
