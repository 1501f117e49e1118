"""Quality of a model on text it has not seen, and how far it is from another model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trim_export.progress import Track, silently

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Divergence", "Perplexity", "compare", "divergence", "perplexity"]


@dataclass(frozen=True)
class Perplexity:
    """Perplexity over windows of equal length, and how much was scored."""

    value: float
    windows: int
    tokens: int


@dataclass(frozen=True)
class Divergence:
    """How far predictions are from a reference, over all positions.

    Attributes:
        max_abs_diff: largest difference of any logit.
        kl: mean Kullback-Leibler divergence from the reference, in nats.
        argmax_agreement: share of positions with the same most likely token.
    """

    max_abs_diff: float
    kl: float
    argmax_agreement: float


@torch.inference_mode()
def perplexity(model: PreTrainedModel, windows: Tensor, track: Track[Any] = silently) -> Perplexity:
    """exp of the mean negative log-likelihood of each token given those before it in its window.

    Args:
        model: a causal language model.
        windows: int64 ``[windows, tokens]``; the first token of each is context only.
        track: shows progress.
    """
    losses = []
    for window in track(windows.to(model.device), "perplexity"):
        logits = model(window[None], use_cache=False).logits[0, :-1].float()
        losses.append(float(torch.nn.functional.cross_entropy(logits, window[1:])))
    return Perplexity(math.exp(sum(losses) / len(losses)), len(windows), len(windows) * (windows.shape[1] - 1))


def divergence(reference: Tensor, logits: Tensor) -> Divergence:
    """Compare logits ``[positions, vocabulary]`` with a reference's."""
    expected = reference.double().log_softmax(-1)
    given = logits.double().log_softmax(-1)
    return Divergence(
        max_abs_diff=float((reference.double() - logits.double()).abs().max()),
        kl=max(0.0, float((expected.exp() * (expected - given)).sum(-1).mean())),
        argmax_agreement=float((reference.argmax(-1) == logits.argmax(-1)).double().mean()),
    )


@torch.inference_mode()
def compare(
    reference: PreTrainedModel, model: PreTrainedModel, windows: Tensor, track: Track[Any] = silently
) -> Divergence:
    """How far a model is from a reference on windows of text, int64 ``[windows, tokens]``; no labels are needed.

    Both models are in memory, the logits of one window at a time. Every position counts, the last too. ``track`` shows
    progress.
    """
    found = [
        divergence(
            reference(window[None].to(reference.device), use_cache=False).logits[0].float().cpu(),
            model(window[None].to(model.device), use_cache=False).logits[0].float().cpu(),
        )
        for window in track(windows, "divergence")
    ]
    return Divergence(
        max_abs_diff=max(one.max_abs_diff for one in found),
        kl=sum(one.kl for one in found) / len(found),
        argmax_agreement=sum(one.argmax_agreement for one in found) / len(found),
    )
