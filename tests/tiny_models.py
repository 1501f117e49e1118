"""Tiny randomly initialised models of every architecture that we prune, and of two that we cannot."""

from __future__ import annotations

import functools
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

__all__ = [
    "ARCHITECTURES",
    "EXPORTABLE",
    "SPECIAL",
    "UNPRUNABLE",
    "VOCABULARY",
    "save_tiny",
    "tiny_model",
    "tiny_tokenizer",
    "tiny_tokens",
]

VOCABULARY = 128
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]

# hidden_size 32; 4 heads of 8, of which 2 for keys and values (GQA); an intermediate size that 8 does not divide.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_GQA = _COMMON | {"num_key_value_heads": 2, "head_dim": 8}
_WIDE = _GQA | {"head_dim": 16, "max_position_embeddings": 256}

_OPT = {name: value for name, value in _COMMON.items() if name != "intermediate_size"} | {
    "ffn_dim": 44,
    "word_embed_proj_dim": 32,
    "do_layer_norm_before": True,
    "dropout": 0.0,
}

_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_GQA),
    "llama-tied": lambda: LlamaConfig(**_GQA | {"tie_word_embeddings": True}),
    "qwen2": lambda: Qwen2Config(**_GQA),
    "qwen3": lambda: Qwen3Config(**_GQA | {"tie_word_embeddings": True}),
    "mistral": lambda: MistralConfig(**_GQA | {"sliding_window": 6}),
    "gemma3": lambda: Gemma3TextConfig(
        **_GQA
        | {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 6,
            "query_pre_attn_scalar": 8,
            "tie_word_embeddings": True,
        }
    ),
    "llama-16": lambda: LlamaConfig(**_WIDE),
    "llama-16-tied": lambda: LlamaConfig(**_WIDE | {"tie_word_embeddings": True}),
    "qwen2-16": lambda: Qwen2Config(**_WIDE | {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "opt": lambda: OPTConfig(**_OPT),
    "opt-long": lambda: OPTConfig(**_OPT | {"max_position_embeddings": 256}),
    "gpt-neox": lambda: GPTNeoXConfig(**_COMMON | {"num_hidden_layers": 3}),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "mixtral": lambda: MixtralConfig(**_GQA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}

UNPRUNABLE = ("gpt2", "mixtral")
"""GPT-2 has no `nn.Linear` in its blocks at all, Mixtral none for its experts."""

EXPORTABLE = ("llama-16", "llama-16-tied", "qwen2-16", "opt-long")
"""Like those of the same names, with positions for a whole prompt and heads as wide as ONNX Runtime wants them."""

ARCHITECTURES = tuple(kind for kind in _CONFIGS if kind not in (*UNPRUNABLE, *EXPORTABLE))


def tiny_model(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A model whose every tensor is random and none is 0 or 1 throughout: biases and norms are random as well."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(_CONFIGS[kind](), attn_implementation="sdpa")
        for name, parameter in model.named_parameters():
            # Weights large enough that the blocks matter beside the residual stream.
            spread = 0.1 if parameter.dim() == 1 else 0.2
            centre = 1.0 if parameter.dim() == 1 and name.endswith("weight") and kind != "gemma3" else 0.0
            torch.nn.init.normal_(parameter, centre, spread)
    return model.to(dtype).eval().requires_grad_(False)


@functools.cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each printable character; built in memory."""
    characters = string.ascii_letters + string.digits + string.punctuation + " \n"
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_tokens(windows: int = 3, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token ids without special ones, int64 ``[windows, length]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL), 100, (windows, length), generator=generator)


def save_tiny(kind: str, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a tiny model with its tokenizer as a Hugging Face directory."""
    tiny_model(kind, dtype).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
