"""Removing whole decoder blocks, so that the rest is an ordinary shallower model."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from torch import nn

from trim_export.errors import UsageError
from trim_export.models import decoder_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["blocks_to_remove", "remove_blocks"]


def blocks_to_remove(model: PreTrainedModel, share: float) -> int:
    """The number of blocks whose parameters come closest to ``share`` of the model's.

    Raises:
        UsageError: that is none, or leaves no block.
    """
    blocks = decoder_blocks(model)
    total = sum(parameter.numel() for parameter in model.parameters())  # yields tied ones once
    inside = sum(parameter.numel() for block in blocks.values() for parameter in block.parameters())
    count = round(share * total * len(blocks) / inside)
    if count >= len(blocks):
        most = inside * (len(blocks) - 1) / len(blocks) / total
        raise UsageError(
            f"--remove {share:g} asks for {count} of {len(blocks)} decoder blocks; at most {len(blocks) - 1} can go "
            f"(--remove {most:.3f})"
        )
    if count < 1:
        raise UsageError(
            f"--remove {share:g} is less than half a decoder block ({inside / len(blocks) / total:.3f} of the model)"
        )
    return count


def remove_blocks(model: PreTrainedModel, removed: Collection[int]) -> None:
    """Take decoder blocks out of a model, renumber the others, and let its configuration say so.

    Settings that the configuration lists block by block (Gemma's ``layer_types``) lose the same entries.
    """
    names = list(decoder_blocks(model))
    parent = names[0].rpartition(".")[0]
    kept = [index for index in range(len(names)) if index not in removed]
    survivors = nn.ModuleList(model.get_submodule(names[index]) for index in kept)
    model.set_submodule(parent, survivors)
    for index, block in enumerate(survivors):
        for module in block.modules():
            if "layer_idx" in vars(module):  # the place of its keys and values in the cache
                vars(module)["layer_idx"] = index
    config = model.config.get_text_config(decoder=True)
    for setting, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == len(names):
            setattr(config, setting, [value[index] for index in kept])
    config.num_hidden_layers = len(kept)
