"""What the calibration inputs of a linear layer look like, gathered by hooks while a block runs."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trim_export.errors import ModelError
from trim_export.forward import BlockCall, Compute, in_batches, run_batches

__all__ = [
    "InputStatistics",
    "collect_inputs",
    "input_statistics",
    "observe_block",
    "require_all_seen",
    "require_finite_inputs",
]


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of one layer's inputs over the calibration windows, in float32.

    Attributes:
        mean_square: ``[columns]`` sum of x_j^2 over all tokens, divided by the number of windows (Wanda's scale).
        last_tokens: ``[columns, windows]`` the input at the last token of each window, on which TRIM measures cosines.
        gram: ``[columns, columns]`` sum of x x^T over all tokens; None where nobody asked for it.
    """

    mean_square: Tensor
    last_tokens: Tensor
    gram: Tensor | None = None


class _Accumulator:
    """Running sums for one input that one or more layers share."""

    def __init__(self, columns: int, device: torch.device, gram: bool = False) -> None:
        self.square_sum = torch.zeros(columns, device=device)
        self.gram = torch.zeros(columns, columns, device=device) if gram else None
        self.last_tokens: list[Tensor] = []

    def add(self, inputs: Tensor, windows: int) -> None:
        # OPT flattens [windows, tokens, columns] to two dimensions before its MLP: give the windows back.
        by_window = inputs.reshape(windows, -1, inputs.shape[-1]).float()
        self.square_sum += by_window.square().sum(dim=(0, 1))
        self.last_tokens.append(by_window[:, -1].clone())
        if self.gram is not None:
            rows = by_window.flatten(0, 1)
            self.gram.addmm_(rows.T, rows)

    def finish(self, name: str) -> InputStatistics:
        require_finite_inputs(self.square_sum, name)
        last = torch.cat(self.last_tokens)
        return InputStatistics(self.square_sum / len(last), last.T.contiguous(), self.gram)


def require_finite_inputs(sums: Tensor, name: str) -> None:
    """Stop (`ModelError`) where sums over a layer's inputs are not finite; ``name`` is the layer."""
    if not bool(sums.isfinite().all()):
        raise ModelError(f"{name}: NaN or infinity in its calibration inputs; nothing can be measured on them")


def require_all_seen(linears: Iterable[str], seen: Container[str], block_name: str) -> None:
    """Stop (`ModelError`) if a layer of a block never ran."""
    silent = [name for name in linears if name not in seen]
    if silent:
        raise ModelError(f"{block_name}: {silent[0]} saw no calibration input, so it cannot be scored")


def input_statistics(inputs: Tensor, name: str, joined: int = 1) -> InputStatistics:
    """Statistics of inputs that are at hand, ``[sequences, tokens, columns]``; ``name`` is the layer that reads them.

    A sequence holds ``joined`` windows.
    """
    accumulator = _Accumulator(inputs.shape[-1], inputs.device)
    accumulator.add(inputs, len(inputs) * joined)
    return accumulator.finish(name)


def collect_inputs(
    block: nn.Module,
    linears: Mapping[str, nn.Linear],
    run: Callable[[], object],
    block_name: str,
    grams: bool = False,
    joined: int = 1,
) -> dict[str, InputStatistics]:
    """Gather the input statistics of ``linears`` while ``run`` sends calibration sequences through ``block``.

    Layers that read the same tensor (q, k, v; gate, up) share one accumulation. With ``grams`` that includes the Gram
    matrices. A sequence holds ``joined`` windows.

    Raises:
        ModelError: naming the layer whose inputs are not finite, or that never ran.
    """
    accumulators: dict[str, _Accumulator] = {}
    windows = 0
    latest: tuple[Tensor, str] | None = None

    def block_starts(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        nonlocal windows, latest
        windows, latest = len(args[0] if args else kwargs["hidden_states"]) * joined, None

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def linear_starts(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal latest
            inputs = args[0]
            if latest is not None and inputs is latest[0]:
                accumulators.setdefault(name, accumulators[latest[1]])
                return
            latest = inputs, name
            if name not in accumulators:
                accumulators[name] = _Accumulator(inputs.shape[-1], inputs.device, grams)
            accumulators[name].add(inputs, windows)

        return linear_starts

    handles = [block.register_forward_pre_hook(block_starts, with_kwargs=True)]
    handles += [linear.register_forward_pre_hook(watch(name)) for name, linear in linears.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    require_all_seen(linears, accumulators, block_name)
    results: dict[_Accumulator, InputStatistics] = {}
    for name in linears:
        if accumulators[name] not in results:
            results[accumulators[name]] = accumulators[name].finish(f"{block_name}.{name}")
    return {name: results[accumulators[name]] for name in linears}


def observe_block(
    block: nn.Module,
    linears: Mapping[str, nn.Linear],
    call: BlockCall,
    hidden: Tensor,
    compute: Compute,
    name: str,
    grams: bool = False,
) -> tuple[dict[str, InputStatistics], Tensor]:
    """Send all calibration sequences through a block as it stands.

    Returns:
        Input statistics of ``linears``, as `collect_inputs` gathers them, and the block's output.
    """

    def observe(windows: int) -> tuple[dict[str, InputStatistics], Tensor]:
        outputs: list[Tensor] = []
        inputs = collect_inputs(
            block,
            linears,
            lambda: outputs.append(run_batches(block, call, hidden, compute, windows)),
            name,
            grams,
            call.joined,
        )
        return inputs, outputs[0]

    return in_batches(observe, hidden, compute)
