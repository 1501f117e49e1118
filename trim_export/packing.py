"""Short calibration windows joined into longer sequences, with an eighth of the tokens as beginnings of texts.

A model that is fitted to 128-token windows has mostly seen how texts begin, and does worse at all that comes later.
Joined, the same windows cost about the same, and most tokens stand where most tokens stand in use.

But how the very first token of a text is read decides over everything after it: models turn it into the one huge
activation that attention rests on (attention sinks, arXiv 2309.17453; massive activations, arXiv 2402.17762). A pruned
model that saw few first tokens fails to do so at others, and with that at the whole text. So the first eighth of every
sequence is cut into pieces of a few tokens each, which the model reads as texts of their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trim_export.forward import BlockCall

__all__ = ["Packed", "pack_windows", "read_apart", "unpacked"]

BEGINNING = 4
"""Tokens of a piece."""
SHARE = 8
"""One token of so many is in a piece."""


@dataclass(frozen=True)
class Packed:
    """Calibration windows as the model reads them.

    Attributes:
        tokens: int64 ``[sequences, tokens]``.
        positions: int64 ``[1, tokens]``, from 0 anew where another text begins; None if each sequence is one text.
        joined: windows that make up one sequence.
    """

    tokens: Tensor
    positions: Tensor | None
    joined: int


def unpacked(tokens: Tensor) -> Packed:
    """Windows ``[windows, tokens]`` as they are, each a text."""
    return Packed(tokens, None, 1)


def pack_windows(tokens: Tensor, context: int, model: PreTrainedModel) -> Packed:
    """Join as many windows as fit into ``context`` tokens and leave no remainder.

    Args:
        tokens: int64 ``[windows, tokens]``.
        context: tokens of a sequence, unless the model reads fewer or the windows are longer; 0 leaves all as it is.
        model: what will read them.
    """
    if context == 0 or "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        return unpacked(tokens)
    windows, length = tokens.shape
    limit: int = getattr(model.config.get_text_config(), "max_position_embeddings", context)
    most = max(1, min(context, limit) // length)
    joined = max(count for count in range(1, most + 1) if windows % count == 0)
    sequences = tokens.reshape(windows // joined, joined * length)
    cut = joined * length // SHARE // BEGINNING * BEGINNING
    if cut == 0:
        return Packed(sequences, None, joined)
    positions = torch.cat([torch.arange(cut) % BEGINNING, torch.arange(joined * length - cut)])
    return Packed(sequences, positions[None], joined)


def read_apart(calls: Sequence[BlockCall], positions: Tensor) -> bool:
    """Whether the model kept the texts of a sequence apart, judged by the attention mask that its blocks are given.

    Most of transformers' models see from the positions that a text begins, and mask what stands before it; models with
    learned positions (OPT) do not look.
    """
    mask = calls[0].kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return False
    last_begin = int((positions[0] == 0).nonzero()[-1])
    seen = mask[0, 0, last_begin, :last_begin]
    return not bool(seen.any() if seen.dtype == torch.bool else (seen > torch.finfo(seen.dtype).min / 2).any())
