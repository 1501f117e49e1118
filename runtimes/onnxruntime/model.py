"""An ONNX model as a transformers model, so that whatever takes one (generate, perplexity, lm-eval) takes the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from trim_export.errors import ArtifactError, UsageError, choose, first_line
from trim_export.runtimes.onnxruntime.session import Session, empty_cache, open_session
from trim_export.storage import read_json

__all__ = ["EXECUTIONS", "OnnxCausalLM", "is_onnx", "load_onnx"]

EXECUTIONS = {"onnxruntime": True, "onnxruntime-functions": False}
"""Runtimes of an ONNX directory: with our operators, and without (standard operators in their place)."""


class OnnxCache(DynamicCache):
    """Keys and values as a graph takes and gives them, so that none is copied on its way from one token to the next.

    Attributes:
        arrays: ``[batch, heads, tokens, width]`` by the names of the graph's inputs.
    """

    def __init__(self, arrays: dict[str, NDArray[Any]]) -> None:
        super().__init__()
        self.arrays = arrays

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that it holds."""
        return int(next(iter(self.arrays.values())).shape[2])


class OnnxCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model that ONNX Runtime executes; it has no parameters of its own.

    Attributes:
        session: what executes.
        head_width: of keys and values.
        weight_bytes: of its files.
    """

    main_input_name = "input_ids"
    _is_stateful = False

    def __init__(self, config: PreTrainedConfig, session: Session, weight_bytes: int) -> None:
        super().__init__(config)
        self.session = session
        self.head_width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.weight_bytes = weight_bytes

    @property
    def device(self) -> torch.device:
        """The CPU, where inputs and outputs are, whatever executes."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return torch.float32

    @classmethod
    def can_generate(cls) -> bool:
        """It can."""
        return True

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """``[batch, tokens]`` to logits ``[batch, tokens, vocabulary]``; a given cache grows. The rest is ignored.

        Raises:
            UsageError: foreign caches; or the graph has the logits of the last token only, and more are asked for.
        """
        batch, tokens = input_ids.shape
        if isinstance(past_key_values, OnnxCache):
            past = past_key_values
        elif past_key_values is None or past_key_values.get_seq_length() == 0:
            past = OnnxCache(empty_cache(self.session, batch, self.head_width))
        else:
            raise UsageError("an ONNX model goes on from its own key-value cache only")
        if attention_mask is None:
            attention_mask = torch.ones(batch, past.get_seq_length() + tokens, dtype=torch.int64)
        found = self.session.run(
            {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.long().numpy()} | past.arrays
        )
        logits = torch.from_numpy(found.pop("logits"))[:, -logits_to_keep:].float()
        if logits.shape[1] != (logits_to_keep or tokens):
            raise UsageError(
                f"the ONNX graph gives logits of {logits.shape[1]} of {tokens} tokens (--last-logits): it generates, "
                "but verify and eval need one that was exported without"
            )
        past.arrays = {name.replace("present", "past_key_values", 1): array for name, array in found.items()}
        return CausalLMOutputWithPast(logits=logits, past_key_values=None if use_cache is False else past)


def is_onnx(directory: Path | str) -> bool:
    """Whether a directory holds an ONNX model."""
    return (Path(directory) / "model.onnx").is_file()


def load_onnx(
    directory: Path | str, runtime: str = "auto", threads: int | None = None, device: str = "cpu"
) -> OnnxCausalLM:
    """Load a directory that ``trim-export convert --to onnx`` or onnxruntime-genai's model builder wrote.

    Args:
        directory: with ``model.onnx`` and ``config.json`` or ``genai_config.json``.
        runtime: a name in `EXECUTIONS`, or ``auto`` for our operators if they are installed.
        threads: of the session; None is torch's number.
        device: that executes, ``cpu`` or ``cuda``; inputs and outputs are on the CPU either way.

    Raises:
        UsageError: unknown runtime.
        ArtifactError, EnvironmentLacks: as `open_session`.
    """
    root = Path(directory)
    kernels = None if runtime == "auto" else choose("runtime of an ONNX model", runtime, EXECUTIONS)
    session = open_session(root, kernels, threads or torch.get_num_threads(), device)
    missing = {"input_ids", "attention_mask"} - set(session.inputs)
    if missing:
        raise ArtifactError(f"{root}: its graph is no decoder with a key-value cache; it lacks {min(missing)}")
    config = _read_config(root)
    files = sum(file.stat().st_size for file in root.glob("model.onnx*"))
    model = OnnxCausalLM(config, session, files)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _read_config(root: Path) -> PreTrainedConfig:
    """What a model's own directory says, or onnxruntime-genai's where that is all there is."""
    try:
        if (root / "config.json").is_file():
            config: PreTrainedConfig = AutoConfig.from_pretrained(root, local_files_only=True, trust_remote_code=False)
            return config
        genai = read_json(root / "genai_config.json")["model"]
        decoder = genai["decoder"]
        names = {name: decoder[name] for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")}
        tokens = {name: genai[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
        return PreTrainedConfig.from_dict(names | tokens | {"head_dim": decoder["head_size"]})
    except ArtifactError:
        raise
    except Exception as error:  # a damaged configuration is answered with nearly any exception
        raise ArtifactError(f"{root}: its configuration cannot be read ({first_line(error)})") from error
