"""SPP: fine-tuning that keeps every zero, by scaling the kept weights with a product of low rank.

A weight W ``[rows, columns]`` becomes ``W * (1 + s B A)`` (* element by element): A is ``[16, columns]``, and row i of
B holds one trained number, in the place of the group of rows that i belongs to. Where W is zero it stays zero, whatever
is trained; training ends by multiplying out. Method, initialisation, scale, learning rate and weight decay are those
of SPP (Lu et al., ICML 2024, arXiv 2405.16057, and its code); the teacher is ours: where the authors train on
instructions, here the model learns the dense model's predictions, so that nothing but text is needed.

Both models are on the compute device as a whole, in the artifact's dtype. Adapters, the best ones, and AdamW's two
moments are float32, four times ``16 columns + rows`` numbers for each matrix; and of every multiplied matrix a dense
copy waits for the backward pass, beside the activations of a batch of a thousand tokens. Gradient checkpointing keeps
those of one block at a time, for one more forward pass in each step. Logits of both models for one batch are in memory
as well (tokens x vocabulary in float32, several times); none are stored.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, parametrize
from torch.utils.checkpoint import checkpoint

from trim_export.errors import ArtifactError, ModelError, first_line
from trim_export.forward import Compute
from trim_export.models import decoder_blocks
from trim_export.storage import write_tensors
from trim_export.training import (
    EVALUATE_EVERY,
    Fit,
    Training,
    backward,
    held_out_windows,
    learning_rate,
    mean_loss,
    window_batches,
    windows_per_step,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["SppAdapter", "fine_tune", "kl_divergence"]

RANK = 16
SCALE = 2.0
WEIGHT_DECAY = 1e-3


class SppAdapter(nn.Module):
    """The factor of one weight, as a parametrization of `nn.Linear.weight`.

    Attributes:
        columns: A, ``[RANK, columns]``, at random at first.
        rows: what B holds, ``[rows, 1]``, zero at first, so that an untrained adapter changes nothing.
        groups: ``[rows, RANK]``, 1 where a row belongs to a group: neighbours share one, as far as it goes evenly.
    """

    groups: Tensor

    def __init__(self, rows: int, columns: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = columns**-0.5  # what Kaiming's initialisation with a = sqrt(5) comes to
        self.columns = nn.Parameter(torch.empty(RANK, columns).uniform_(-bound, bound, generator=generator))
        self.rows = nn.Parameter(torch.zeros(rows, 1))
        groups = nn.functional.one_hot(torch.arange(rows) * RANK // rows, RANK).float()
        self.register_buffer("groups", groups, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight ``[rows, columns]`` as it is multiplied, in its own dtype."""
        with torch.autocast(weight.device.type, enabled=False):
            factor = 1 + SCALE * (self.groups * self.rows) @ self.columns
            return (weight.float() * factor).to(weight.dtype)


def fine_tune(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    modules: Sequence[str],
    tokens: Tensor,
    training: Training,
    compute: Compute,
    state: Path,
    checkpointing: bool = False,
    track: Callable[[Iterable[int], str], Iterable[int]] = lambda steps, description: steps,
) -> Fit:
    """Train a sparse model's kept weights in place; they end as those that did best on the held-out windows.

    Args:
        student: the sparse model, with exact zeros in its weights.
        teacher: the dense model.
        modules: names of the student's linear layers to train.
        tokens: int64 ``[windows, tokens]``; the last ones are held out.
        training: steps, rate and seed.
        compute: where both models run, and in which arithmetic.
        state: file that holds the training while it is under way; continued from there if it exists.
        checkpointing: whether blocks run again for the backward pass instead of keeping their activations.
        track: shows progress.

    Returns:
        `kl_divergence` on the held-out windows, in nats.

    Raises:
        ModelError: the loss is not finite before anything is trained.
        ArtifactError: the file ``state`` is damaged.
    """
    generator = torch.Generator().manual_seed(training.seed)
    adapters = {}
    for name in modules:
        linear = student.get_submodule(name)
        rows, columns = linear.get_parameter("weight").shape
        adapters[name] = SppAdapter(rows, columns, generator)
        parametrize.register_parametrization(linear, "weight", adapters[name])
    parameters = {f"{name}.{key}": p for name, adapter in adapters.items() for key, p in adapter.named_parameters()}
    for model in (student, teacher):
        model.to(compute.device)  # type: ignore[arg-type]
    with _checkpointing(student) if checkpointing else nullcontext():
        fit, best = _train(student, teacher, parameters, tokens, training, compute, state, track)
    for name, parameter in parameters.items():
        parameter.data = best[name]
    for name in modules:
        parametrize.remove_parametrizations(student.get_submodule(name), "weight")
    for model in (student, teacher):
        model.to("cpu")  # type: ignore[arg-type]
    return fit


def kl_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """Mean over positions of KL(reference || model) in nats, both logits ``[..., vocabulary]``, in float32."""
    given, expected = (x.float().flatten(0, -2).log_softmax(-1) for x in (logits, reference))
    return nn.functional.kl_div(given, expected, reduction="batchmean", log_target=True)


def _train(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    parameters: Mapping[str, nn.Parameter],
    tokens: Tensor,
    training: Training,
    compute: Compute,
    state: Path,
    track: Callable[[Iterable[int], str], Iterable[int]],
) -> tuple[Fit, dict[str, Tensor]]:
    """Train ``parameters``; returns the loss and the values that did best."""
    trained = len(tokens) - held_out_windows(len(tokens))
    held = torch.arange(trained, len(tokens), device=tokens.device)

    def loss(windows: Tensor) -> Tensor:
        ids = tokens[windows].to(compute.device)
        with compute.context():
            with torch.no_grad():
                reference = teacher(ids, use_cache=False).logits
            return kl_divergence(student(ids, use_cache=False).logits, reference)

    def held_out_loss() -> float:
        return mean_loss(loss, held, windows_per_step(tokens.shape[1]), compute.device)

    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=WEIGHT_DECAY)
    if state.exists():
        done, fit, best = _load_state(state, parameters, optimizer)
    else:
        start = held_out_loss()
        if not start < float("inf"):
            raise ModelError("NaN or infinity in the predictions on the held-out text; nothing can be recovered on it")
        done, fit, best = 0, Fit(start, start, 0), _values(parameters)
    batches = window_batches(trained, tokens.shape[1], training)
    for step in track(range(done + 1, training.steps + 1), "fine-tuning"):
        optimizer.param_groups[0]["lr"] = learning_rate(training, step)
        backward(loss, batches[step - 1], optimizer, compute.device)
        clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        if step % EVALUATE_EVERY and step < training.steps:
            continue
        reached = held_out_loss()
        if reached < fit.after:
            fit, best = Fit(fit.before, reached, step), _values(parameters)
        _save_state(state, step, fit, best, parameters, optimizer)
    return fit, best


def _values(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def _save_state(
    file: Path,
    step: int,
    fit: Fit,
    best: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write everything that the next step depends on."""
    tensors = {
        "steps": torch.tensor([step, fit.step]),
        "losses": torch.tensor([fit.before, fit.after], dtype=torch.float64),
    }
    for name, parameter in parameters.items():
        tensors |= {f"now.{name}": parameter, f"best.{name}": best[name]}
        tensors |= {f"{key}.{name}": value for key, value in optimizer.state[parameter].items()}
    write_tensors(file, tensors)


def _load_state(
    file: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[int, Fit, dict[str, Tensor]]:
    """Put a saved training back: the step it had done, its losses, and the best values; the rest in place."""
    best = {}
    try:
        tensors = load_file(file)
        (step, best_step), (before, after) = tensors["steps"].tolist(), tensors["losses"].tolist()
        for name, parameter in parameters.items():
            device = parameter.device
            parameter.data.copy_(tensors[f"now.{name}"])
            best[name] = tensors[f"best.{name}"].to(device)
            moments = {key: tensors[f"{key}.{name}"].to(device) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": tensors[f"step.{name}"], **moments}
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{file}: damaged ({first_line(error)}); recover again with --overwrite") from error
    return step, Fit(before, after, best_step), best


@contextmanager
def _checkpointing(model: PreTrainedModel) -> Iterator[None]:
    """Have every decoder block run again for its backward pass.

    Transformers' own switch works only in training mode, which would turn on dropout as well.
    """
    blocks = decoder_blocks(model).values()
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
