"""Running decoder blocks one at a time, so that only one block's activations and statistics are ever in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from trim_export.errors import EnvironmentLacks, choose
from trim_export.memory import halving

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "BlockCall",
    "Compute",
    "StopForward",
    "batch_windows",
    "block_calls",
    "choose_compute",
    "choose_device",
    "cpu_capabilities",
    "embed",
    "finish_forward",
    "in_batches",
    "move",
    "run_batches",
    "run_block",
    "window_logits",
]

TOKENS_PER_BATCH = 4096

T = TypeVar("T")


@dataclass(frozen=True)
class Compute:
    """Where and in which arithmetic the calibration forward runs; statistics and searches are always float32.

    Attributes:
        device: ``cpu`` or ``cuda``; blocks move there one at a time.
        autocast: whether float32 matrices are multiplied in bfloat16.
    """

    device: torch.device
    autocast: bool

    def context(self) -> AbstractContextManager[Any]:
        """The autocast region of a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext()


@dataclass(frozen=True)
class BlockCall:
    """How a block is called, the same for every batch.

    Attributes:
        args, kwargs: what it gets besides the hidden states (positions, masks).
        gives_tuple: whether it returns the hidden states inside a tuple.
        joined: calibration windows that make up one sequence.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    gives_tuple: bool
    joined: int = 1

    def run(self, block: Callable[..., Any], batch: Tensor, compute: Compute) -> Tensor:
        """Send one batch ``[windows, tokens, features]`` through the block; the result is on the compute device."""
        with compute.context():
            output = block(
                batch.to(compute.device), *move(self.args, compute.device), **move(self.kwargs, compute.device)
            )
        result: Tensor = output[0] if self.gives_tuple else output
        return result


class StopForward(Exception):
    """Ends a forward pass once what was wanted has been seen."""


def choose_device(device: str) -> torch.device:
    """Resolve ``auto | cpu | cuda``.

    Raises:
        UsageError: another word.
        EnvironmentLacks: CUDA asked for and not there.
    """
    choose("device", device, dict.fromkeys(("auto", "cpu", "cuda")))
    if device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentLacks("no CUDA device here (torch.cuda.is_available() is false); use --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def choose_compute(device: str, dtype: torch.dtype) -> Compute:
    """Choose the device, and the arithmetic for weights of ``dtype``: bfloat16 where it is multiplied faster.

    Raises:
        EnvironmentLacks: CUDA asked for and not there.
    """
    place = choose_device(device)
    fast_bfloat16 = place.type == "cuda" or cpu_capabilities().get("avx512_bf16", False)
    return Compute(place, dtype == torch.float32 and bool(fast_bfloat16))


def cpu_capabilities() -> dict[str, Any]:
    """What torch knows of the processor; empty in versions of torch that cannot say."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    return dict(ask()) if ask else {}


@torch.no_grad()
def embed(
    model: PreTrainedModel, blocks: Sequence[nn.Module], tokens: Tensor, positions: Tensor | None = None
) -> Tensor:
    """Hidden states that enter the first block, ``[sequences, tokens, features]``, in the host's memory."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise StopForward

    handle = blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for batch in tokens.split(batch_windows(tokens.shape[1])):
            try:
                model.base_model(batch, **_given(positions), use_cache=False)
            except StopForward:
                continue
    finally:
        handle.remove()
    return torch.cat(seen)


@torch.no_grad()
def block_calls(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    sequence: Tensor,
    positions: Tensor | None = None,
    joined: int = 1,
) -> list[BlockCall]:
    """Record how each block is called, from one dense pass of one sequence ``[1, tokens]``.

    Where ``positions`` ``[1, tokens]`` are given they begin anew with each text; the sequence holds ``joined`` windows.

    Calls differ between blocks (Gemma 3 alternates masks and rotary tables), and their tensors have a batch
    dimension of one, which broadcasts over any batch of sequences of this length.
    """
    calls: list[BlockCall] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        calls.append(BlockCall(args[1:], rest, isinstance(output, tuple), joined))

    handles = [block.register_forward_hook(record, with_kwargs=True) for block in blocks]
    try:
        model.base_model(sequence, **_given(positions), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


@torch.no_grad()
def run_block(
    block: nn.Module,
    call: BlockCall,
    hidden: Tensor,
    compute: Compute,
) -> Tensor:
    """Send all windows through one block, batch by batch; the result stays in the host's memory.

    Begins anew with smaller batches when memory is out: hooks that count what they see belong around `run_batches`.
    """
    return in_batches(lambda windows: run_batches(block, call, hidden, compute, windows), hidden, compute)


@torch.no_grad()
def run_batches(block: nn.Module, call: BlockCall, hidden: Tensor, compute: Compute, windows: int) -> Tensor:
    """As `run_block`, with so many windows at a time."""
    return torch.cat(
        [call.run(block, batch, compute).to(hidden.device, hidden.dtype) for batch in hidden.split(windows)]
    )


def in_batches(attempt: Callable[[int], T], hidden: Tensor, compute: Compute) -> T:
    """What ``attempt`` gives with the windows of ``hidden`` in batches of a size that the device has memory for."""
    return halving(attempt, min(len(hidden), batch_windows(hidden.shape[1])), 1, compute.device, "windows")


@torch.no_grad()
def finish_forward(
    model: PreTrainedModel, blocks: Sequence[nn.Module], calls: Sequence[BlockCall], tokens: Tensor, hidden: Tensor
) -> Tensor:
    """What enters the LM head when the last block gave ``hidden``: the rest of the model, its blocks left out."""
    outputs = []
    windows = batch_windows(hidden.shape[1])
    for ids, states in zip(tokens.split(windows), hidden.split(windows), strict=True):
        with _blocks_giving(states, blocks, calls):
            outputs.append(model.base_model(ids, use_cache=False).last_hidden_state)
    return torch.cat(outputs)


@torch.no_grad()
def window_logits(
    model: PreTrainedModel, blocks: Sequence[nn.Module], calls: Sequence[BlockCall], tokens: Tensor, hidden: Tensor
) -> Iterator[Tensor]:
    """Logits ``[tokens, vocabulary]`` of each window when the last block gave ``hidden``, one window at a time."""
    for ids, states in zip(tokens.split(1), hidden.split(1), strict=True):
        with _blocks_giving(states, blocks, calls):
            logits = model(ids, use_cache=False).logits[0]
        yield logits


@contextmanager
def _blocks_giving(states: Tensor, blocks: Sequence[nn.Module], calls: Sequence[BlockCall]) -> Iterator[None]:
    """Every block gives ``states``, whatever it gets: what runs of the model is all but its blocks."""
    for block, call in zip(blocks, calls, strict=True):
        given = (states,) if call.gives_tuple else states
        block.forward = lambda *_, given=given, **__: given  # hides the method until it is deleted again
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _given(positions: Tensor | None) -> dict[str, Tensor]:
    """As an argument only where there is something to say: some models number their tokens themselves."""
    return {} if positions is None else {"position_ids": positions}


def batch_windows(length: int) -> int:
    """Windows of ``length`` tokens that make up one batch."""
    return max(1, TOKENS_PER_BATCH // length)


def move(value: Any, device: torch.device) -> Any:
    """Move the tensors inside tuples and dictionaries; whatever else there is stays as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(move(item, device) for item in value)
    if isinstance(value, dict):
        return {name: move(item, device) for name, item in value.items()}
    return value
