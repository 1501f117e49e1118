"""Calibration text as windows of token ids: from a file, a data set, or written by the model itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trim_export.errors import EnvironmentLacks, UsageError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "calibration_windows",
    "consecutive_windows",
    "read_text",
    "source_name",
    "token_stream",
    "training_windows",
]

DATA_SETS = {
    "c4": ("allenai/c4", "en", "train"),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
}
"""Data sets by name: repository, configuration, split. Fetched only when the user names one."""

GENERATION_TOKENS = 16384
"""Tokens written side by side, which bounds the key-value cache."""


def calibration_windows(
    source: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: int,
) -> Tensor:
    """Windows to calibrate on, int64 ``[samples, length]``.

    Args:
        source: a text or JSONL file, a name in `DATA_SETS`, or ``self``.
        model: writes the text when ``source`` is ``self``.
        tokenizer: the model's.
        samples: number of windows.
        length: tokens of each.
        seed: of the windows' places, or of the sampling.

    Raises:
        UsageError: no such source, or too little text in it.
    """
    if source == "self":
        return self_generated(model, tokenizer, samples, length, seed)
    stream = token_stream(read_text(source, samples * length), tokenizer)
    return _draw_windows(stream, source, samples, length, seed)


def training_windows(
    source: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: int,
    held_out: int,
) -> Tensor:
    """As `calibration_windows`, but the last ``held_out`` windows come from another part of the text, its last eighth.

    So nothing that is trained on is measured on. Windows that the model writes itself overlap in no case.
    """
    if source == "self":
        return self_generated(model, tokenizer, samples, length, seed)
    stream = token_stream(read_text(source, samples * length), tokenizer)
    cut = len(stream) - len(stream) // 8
    trained_on = _draw_windows(stream[:cut], source, samples - held_out, length, seed)
    return torch.cat([trained_on, _draw_windows(stream[cut:], f"{source}, last eighth", held_out, length, seed)])


def consecutive_windows(stream: Tensor, length: int, count: int, first: int = 0) -> Tensor:
    """Windows ``first .. first + count - 1`` of a token stream cut into equal pieces, int64 ``[count, length]``."""
    available = len(stream) // length
    if first + count > available:
        raise UsageError(f"the text has {available} windows of {length} tokens; {first + count} are asked for")
    return stream[first * length : (first + count) * length].view(count, length)


def source_name(source: str) -> str:
    """How a source is named in an artifact: a file by its name alone, since artifacts travel and paths do not."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else source


def read_text(source: str, tokens: int) -> str:
    """The text behind a calibration or evaluation source; ``tokens`` bounds how much of a data set is read."""
    path = Path(source).expanduser()
    if source in DATA_SETS:
        return _data_set(source, tokens)
    if not path.is_file():
        raise UsageError(f"{source}: no such text file (known besides files: self, {', '.join(DATA_SETS)})")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{source}: not UTF-8 text") from error
    if path.suffix == ".jsonl":
        text = _jsonl_text(text, source)
    if not text.strip():
        raise UsageError(f"{source}: empty")
    return text


def token_stream(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Token ids of a text without special tokens, int64 ``[tokens]``."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


@torch.inference_mode()
def self_generated(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: int, length: int, seed: int
) -> Tensor:
    """Text sampled from the model itself at temperature 1, starting from its first token.

    The idea of calibrating without data on the model's own samples is LLM-QAT's (arXiv 2305.17888).
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise UsageError("self calibration needs a tokenizer with a beginning or end token; give a text file")
    windows = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        batch = max(1, GENERATION_TOKENS // length)
        for begin in range(0, samples, batch):
            prompt = torch.full((min(batch, samples - begin), 1), first, device=model.device)
            text = model.generate(  # type: ignore[operator]
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                min_new_tokens=length,
                max_new_tokens=length,
                pad_token_id=first,
            )
            windows.append(text[:, 1:].cpu())
    return torch.cat(windows)


def _draw_windows(stream: Tensor, source: str, samples: int, length: int, seed: int) -> Tensor:
    if len(stream) < length + 2:
        raise UsageError(f"{source}: {len(stream)} tokens are too few for a window of {length}")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(stream) - length - 1, (samples,), generator=generator)
    return torch.stack([stream[start : start + length] for start in starts.tolist()])


def _jsonl_text(lines: str, source: str) -> str:
    documents = []
    # Not splitlines: JSON strings may hold other line separators raw.
    for number, line in enumerate(lines.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f'{source}, line {number}: not a JSON object with a "text" field') from error
        if not isinstance(document, str):
            raise UsageError(f'{source}, line {number}: its "text" is not a string')
        documents.append(document)
    return "\n\n".join(documents)


def _data_set(name: str, tokens: int) -> str:
    try:
        import datasets
    except ImportError as error:
        raise EnvironmentLacks(
            f"calibration on {name} needs the data extra: pip install 'trim-export[data]'"
        ) from error
    repository, configuration, split = DATA_SETS[name]
    texts: list[str] = []
    characters = 0
    try:
        for row in datasets.load_dataset(repository, configuration, split=split, streaming=True):
            texts.append(row["text"])
            characters += len(row["text"])
            if characters > 40 * tokens:  # some 10 times the tokens asked for, to draw windows from
                break
    except (OSError, ValueError) as error:
        raise UsageError(f"{name}: cannot be fetched ({first_line(error)})") from error
    return "\n\n".join(texts)
