"""What every kind of recovery training shares: how long, how fast, on which windows, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trim_export.memory import halving

__all__ = [
    "EVALUATE_EVERY",
    "Fit",
    "Loss",
    "Training",
    "backward",
    "held_out_windows",
    "learning_rate",
    "mean_loss",
    "window_batches",
    "windows_per_step",
]

TOKENS_PER_STEP = 1024
EVALUATE_EVERY = 10
"""Steps between two looks at the held-out windows; the last step is always looked at."""
WARM_UP = 0.05
"""Share of the steps in which the learning rate rises."""

Loss = Callable[[Tensor], Tensor]
"""The mean loss over some windows, whose indices int64 ``[windows]`` it gets."""


@dataclass(frozen=True)
class Training:
    """How to train.

    Attributes:
        steps: of the optimizer, for each thing that is trained.
        learning_rate: at its highest.
        seed: of the order of the windows, and of what starts at random.
    """

    steps: int
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class Fit:
    """What training did to the loss on the held-out windows.

    Attributes:
        before: the loss at the start.
        after: the loss of the state that was kept, the best one seen; never above ``before``.
        step: the step that it was seen at, 0 for the start.
    """

    before: float
    after: float
    step: int


def held_out_windows(windows: int) -> int:
    """How many of the windows, the last ones, are only ever measured on: an eighth, at least one."""
    return max(1, windows // 8)


def learning_rate(training: Training, step: int) -> float:
    """The rate of a step (the first is 1): a linear rise, then half a cosine down to zero behind the last step."""
    rise = math.ceil(WARM_UP * training.steps)
    if step <= rise:
        return training.learning_rate * step / rise
    return training.learning_rate * (1 + math.cos(math.pi * (step - rise) / (training.steps + 1 - rise))) / 2


def windows_per_step(length: int) -> int:
    """Windows of ``length`` tokens that one step trains on."""
    return max(1, TOKENS_PER_STEP // length)


def window_batches(windows: int, length: int, training: Training) -> list[Tensor]:
    """The windows to train on at each step: indices below ``windows``, all of them in a new order in each round.

    Args:
        windows: those to train on.
        length: tokens of each, which decides how many a step has.
        training: steps and seed.
    """
    size = min(windows, windows_per_step(length))
    generator = torch.Generator().manual_seed(training.seed)
    rounds = math.ceil(training.steps * size / windows)
    order = torch.cat([torch.randperm(windows, generator=generator, device=generator.device) for _ in range(rounds)])
    return list(order[: training.steps * size].split(size))


def backward(loss: Loss, windows: Tensor, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Give the optimizer's parameters the gradients of a loss over ``windows``, in parts where memory runs out."""

    def attempt(size: int) -> None:
        optimizer.zero_grad()
        for part in windows.split(size):
            (loss(part) * (len(part) / len(windows))).backward()

    halving(attempt, len(windows), 1, device, "windows")


@torch.no_grad()
def mean_loss(loss: Loss, windows: Tensor, size: int, device: torch.device) -> float:
    """A loss over ``windows`` without gradients, ``size`` of them at a time, fewer where memory runs out."""

    def attempt(size: int) -> float:
        return sum(len(part) * float(loss(part)) for part in windows.split(size)) / len(windows)

    return halving(attempt, min(size, len(windows)), 1, device, "windows")
