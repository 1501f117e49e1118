"""FLAP: channels and heads whose inputs fluctuate least, replaced by their mean (arXiv 2312.11983).

Of an output projection, input channel j matters as much as its variance over tokens, weighted by the weights that read
it: ``Var(x_j) * |W_:j|^2``. What is removed was nearly constant, so the constant W_:j mean(x_j) goes into a bias.

The authors let every layer lose another number of heads and channels, which no ordinary model class can load. Here
every block loses the same number (their "UL-UM" structure), and key-value groups stay whole: as many of these as the
share rounds to, then channels until the parameters are reached.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trim_export.errors import ModelError, UsageError
from trim_export.forward import Compute, in_batches
from trim_export.models import DenseModel, decoder_blocks
from trim_export.progress import Track

__all__ = ["Flap", "Fluctuation", "fluctuations"]

ATTENTION, MLP = "self_attn.o_proj", "mlp.down_proj"
READ_BY = {ATTENTION: ("q_proj", "k_proj", "v_proj"), MLP: ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class Fluctuation:
    """What an output projection's inputs do over all calibration tokens.

    Attributes:
        mean: float64 ``[channels]``.
        variance: float64 ``[channels]``.
    """

    mean: Tensor
    variance: Tensor


@dataclass(frozen=True)
class Flap:
    """Remove the same number of key-value groups and of MLP channels from every block."""

    name: str = "flap"

    def __call__(
        self, dense: DenseModel, tokens: Tensor, share: float, seed: int, compute: Compute, track: Track[Any]
    ) -> dict[str, Any]:
        """Measure once, then cut all blocks."""
        model, config = dense.model, dense.model.config
        blocks = decoder_blocks(model)
        if not (hasattr(config, "mlp_bias") and hasattr(config, "attention_bias")):
            raise ModelError(
                f"{type(model).__name__}: flap puts means into biases, which this architecture has none for; "
                "use --structured pip or shortgpt"
            )
        groups, channels = _cut(dense, share)
        seen = fluctuations(dense, tokens, compute, track)
        head, heads_per_group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
        for name, block in blocks.items():
            attention, mlp = block.get_submodule(ATTENTION), block.get_submodule(MLP)
            scores = _scores(attention, seen[f"{name}.{ATTENTION}"]).square()
            by_group = scores.view(config.num_key_value_heads, -1).mean(dim=1)
            kept_groups = by_group.topk(config.num_key_value_heads - groups).indices.sort().values
            query = _spread(kept_groups, heads_per_group * head)
            key = _spread(kept_groups, head)
            kept_channels = _scores(mlp, seen[f"{name}.{MLP}"]).topk(config.intermediate_size - channels)
            for part, output, kept in (
                (block.self_attn, ATTENTION, {"q_proj": query, "k_proj": key, "v_proj": key}),
                (block.mlp, MLP, dict.fromkeys(READ_BY[MLP], kept_channels.indices.sort().values)),
            ):
                for reader in READ_BY[output]:
                    _keep_outputs(getattr(part, reader), kept[reader])
                _keep_inputs(block.get_submodule(output), kept[READ_BY[output][0]], seen[f"{name}.{output}"].mean)
        config.num_attention_heads -= groups * heads_per_group
        config.num_key_value_heads -= groups
        config.intermediate_size -= channels
        config.attention_bias = config.mlp_bias = True
        return {"key_value_groups": groups, "heads": groups * heads_per_group, "channels": channels}


def fluctuations(dense: DenseModel, tokens: Tensor, compute: Compute, track: Track[Any]) -> dict[str, Fluctuation]:
    """Mean and variance of the inputs of every block's output projections, by their names in the model."""
    places = {
        f"{name}.{path}": block.get_submodule(path)
        for name, block in decoder_blocks(dense.model).items()
        for path in (ATTENTION, MLP)
    }

    def measure(windows: int) -> dict[str, tuple[Tensor, Tensor]]:
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        with torch.no_grad(), _summing(places, sums):
            for batch in track(list(tokens.split(windows)), "fluctuations"):
                with compute.context():
                    dense.model.base_model(batch.to(compute.device), use_cache=False)
        return sums

    dense.model.to(compute.device)  # type: ignore[arg-type]  # transformers types it as if it took a module
    sums = in_batches(measure, tokens, compute)
    dense.model.to("cpu")  # type: ignore[arg-type]
    count = tokens.numel()
    return {
        name: Fluctuation(first / count, (second / count - (first / count).square()).clamp(min=0))
        for name, (first, second) in sums.items()
    }


@contextmanager
def _summing(places: Mapping[str, nn.Module], sums: dict[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Add up each module's inputs and their squares in float64."""

    def note(name: str, inputs: Tensor) -> None:
        flat = inputs.reshape(-1, inputs.shape[-1]).double()
        first, second = flat.sum(dim=0).cpu(), flat.square().sum(dim=0).cpu()
        if name in sums:
            first, second = first + sums[name][0], second + sums[name][1]
        sums[name] = first, second

    handles = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs[0]))
        for name, module in places.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cut(dense: DenseModel, share: float) -> tuple[int, int]:
    """How many key-value groups and channels every block loses."""
    config, blocks = dense.model.config, decoder_blocks(dense.model)
    total = sum(parameter.numel() for parameter in dense.model.parameters())
    wanted = share * total / len(blocks)
    inside = sum(parameter.numel() for block in blocks.values() for parameter in block.parameters()) / len(blocks)
    per_group = 2 * config.hidden_size * config.head_dim * (config.num_attention_heads / config.num_key_value_heads + 1)
    groups = min(round(wanted / inside * config.num_key_value_heads), config.num_key_value_heads - 1)
    channels = round((wanted - groups * per_group) / (3 * config.hidden_size))
    if wanted >= inside or channels >= config.intermediate_size:
        raise UsageError(f"--remove {share:g} leaves no channels; {inside * len(blocks) / total:.3f} is in the blocks")
    if channels < 0 or groups + channels == 0:
        raise UsageError(f"--remove {share:g} is too little to take a channel from every block")
    return groups, channels


def _scores(projection: nn.Module, seen: Fluctuation) -> Tensor:
    """``Var(x_j) |W_:j|^2`` (the paper's WIFV), float64 ``[channels]``."""
    assert isinstance(projection, nn.Linear)
    return seen.variance * projection.weight.double().square().sum(dim=0)


def _spread(groups: Tensor, width: int) -> Tensor:
    """The channels of whole groups of ``width``."""
    return (groups[:, None] * width + torch.arange(width)).flatten()


def _keep_outputs(linear: nn.Linear, kept: Tensor) -> None:
    """Keep some of a layer's outputs; it gets a bias, because its model class gives one to all or none."""
    bias = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.data
    linear.weight = nn.Parameter(linear.weight.data[kept].clone(), requires_grad=False)
    linear.bias = nn.Parameter(bias[kept].clone(), requires_grad=False)
    linear.out_features = len(kept)


def _keep_inputs(linear: nn.Module, kept: Tensor, mean: Tensor) -> None:
    """Keep some of a layer's inputs and put what the others gave on average into its bias."""
    assert isinstance(linear, nn.Linear)
    constant = mean.clone()
    constant[kept] = 0
    lost = linear.weight.data.double() @ constant
    bias = lost if linear.bias is None else linear.bias.data.double() + lost
    linear.bias = nn.Parameter(bias.to(linear.weight.dtype), requires_grad=False)
    linear.weight = nn.Parameter(linear.weight.data[:, kept].clone(), requires_grad=False)
    linear.in_features = len(kept)
