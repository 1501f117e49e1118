"""Loading an artifact with transformers: our entry in its table of quantisation methods.

    import trim_export.runtimes
    model = AutoModelForCausalLM.from_pretrained(directory)

Before any weight is read, each pruned `nn.Linear` is replaced by a placeholder whose parameters have exactly the
stored shapes (taken from the files' headers); once they are filled, every matrix is decoded, which checks its structure
in full, and the placeholder gives way to a layer of the chosen runtime. Saving goes the other way, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from trim_export.converters import ENCODINGS, Bsr, Encoding, SparseMatrix
from trim_export.converters.format import FORMAT_VERSION, METHOD
from trim_export.errors import ArtifactError, EnvironmentLacks, UsageError, choose, first_line
from trim_export.runtimes.dense import DenseRuntime, dense_linear
from trim_export.runtimes.linear import Layout, Runtime, SparseLinear
from trim_export.runtimes.native import NativeRuntime, QuantizedLinear, fuse, quantize_head
from trim_export.runtimes.torch_sparse import TorchSparseRuntime

__all__ = [
    "METHOD",
    "RUNTIMES",
    "TrimSparseConfig",
    "TrimSparseQuantizer",
    "available_runtimes",
    "load",
    "pick_runtime",
]

# Native is the faster one in decode and prefill (benchmarks/results/smollm2_0.8_bench.json).
_KNOWN: tuple[Runtime, ...] = (NativeRuntime(), TorchSparseRuntime(), DenseRuntime())

RUNTIMES: dict[str, Runtime] = {runtime.name: runtime for runtime in _KNOWN}
"""Runtimes by name, the preferred one first."""

LM_HEADS = {"stored": "stored", "int8": "int8"}
"""Forms in which an LM head can be held."""

STORED_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}


def load(
    directory: Path | str,
    runtime: str = "auto",
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    lm_head: str = "stored",
) -> PreTrainedModel:
    """Load an artifact for execution; never touches the network.

    Args:
        directory: the artifact.
        runtime: a name in `RUNTIMES`, or ``auto`` for the best that is available. ``dense`` gives an ordinary model.
        dtype: to compute in; the stored one if None.
        device: to load to.
        lm_head: a name in `LM_HEADS`: as it is stored, or with the embedding tied to it in ``int8`` (not exact).

    Raises:
        ArtifactError: damaged or inconsistent; names file, module and reason.
        UsageError: unknown runtime, or one that does not execute on ``device``.
        EnvironmentLacks: a runtime that is not available here.
    """
    pick_runtime(runtime, torch.device(device).type)
    choose("LM head", lm_head, LM_HEADS)
    if not (Path(directory) / "config.json").is_file():
        raise ArtifactError(f"{directory}: no config.json, so not a finished artifact")
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        settings = getattr(config, "quantization_config", None)
        if not isinstance(settings, dict) or settings.get("quant_method") != METHOD:
            raise ArtifactError(f"{directory}: config.json does not describe a trim-export artifact")
        settings["runtime"] = runtime
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype or "auto",
            device_map={"": device} if device != "cpu" else None,
            local_files_only=True,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:  # what transformers says to damaged JSON
        raise ArtifactError(f"{directory}: cannot be loaded ({first_line(error)})") from error
    model.eval()
    if lm_head == "int8":
        quantize_head(model)
    return model


def pick_runtime(name: str, device: str = "cpu") -> Runtime:
    """The runtime of that name, or for ``auto`` the first available one for this type of device.

    Raises:
        UsageError: unknown runtime, or one that does not execute on the device.
        EnvironmentLacks: it is not available here.
    """
    if name == "auto":
        return RUNTIMES[available_runtimes(device)[0]]
    runtime = choose("runtime", name, RUNTIMES)
    if device not in runtime.devices:
        raise UsageError(f"runtime {name} executes on {' and '.join(runtime.devices)}, not on {device}; choose another")
    reason = runtime.unavailable()
    if reason:
        raise EnvironmentLacks(f"runtime {name}: {reason}")
    return runtime


def available_runtimes(device: str = "cpu") -> list[str]:
    """Names of the runtimes that can be used here on this type of device, the preferred one first."""
    return [name for name, runtime in RUNTIMES.items() if device in runtime.devices and runtime.unavailable() is None]


@register_quantization_config(METHOD)
class TrimSparseConfig(QuantizationConfigMixin):
    """The `quantization_config` of an artifact's config.json.

    Attributes:
        format_version: of the artifact.
        encoding: name in `ENCODINGS`.
        modules: names of the pruned linear modules.
        runtime: chosen at load, never stored.
    """

    def __init__(
        self,
        format_version: int = FORMAT_VERSION,
        encoding: str = "bitmap",
        modules: Sequence[str] = (),
        runtime: str = "auto",
        how_to_load: str = "",
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if not isinstance(format_version, int):
            raise ArtifactError(f"config.json: format_version {format_version!r} is not a number")
        if format_version > FORMAT_VERSION:
            raise ArtifactError(f"artifact format {format_version} is newer than this trim-export reads; upgrade it")
        if unknown:
            raise ArtifactError(f"config.json: unknown keys in quantization_config: {sorted(unknown)}")
        if not isinstance(encoding, str) or encoding not in ENCODINGS:
            raise ArtifactError(f"config.json: unknown encoding {encoding!r}")
        if not isinstance(modules, list | tuple) or not all(isinstance(name, str) for name in modules):
            raise ArtifactError("config.json: modules in quantization_config is not a list of names")
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format_version = format_version
        self.encoding = encoding
        self.modules = list(modules)
        self.runtime = runtime
        self.how_to_load = how_to_load

    def to_dict(self) -> dict[str, Any]:
        """What is written to config.json."""
        return {name: value for name, value in super().to_dict().items() if name != "runtime"}


@dataclass(frozen=True)
class _Header:
    """Where a tensor is stored and what its file's header says of it."""

    file: str
    shape: tuple[int, ...]
    dtype: str


class _StoredLinear(nn.Module):
    """Placeholder while weights are read: parameters named and shaped as they are stored."""

    def __init__(self, linear: nn.Linear, headers: Mapping[str, _Header]) -> None:
        super().__init__()
        self.shape = (linear.out_features, linear.in_features)
        self.file = next(iter(headers.values())).file
        for suffix, header in headers.items():
            dtype = STORED_DTYPES[header.dtype]
            if dtype.is_floating_point:
                dtype = linear.weight.dtype
            self.register_parameter(
                suffix, nn.Parameter(torch.empty(header.shape, dtype=dtype, device="meta"), requires_grad=False)
            )
        self.bias = linear.bias

    def decode(self, encoding: Encoding) -> SparseMatrix:
        stored = {suffix: getattr(self, suffix).data.cpu() for suffix in encoding.tensors}
        return encoding.decode(stored, self.shape)


@register_quantizer(METHOD)
class TrimSparseQuantizer(HfQuantizer):
    """The hooks that transformers calls while it loads and saves an artifact."""

    requires_calibration = True  # transformers cannot prune on the fly; it only loads what is already pruned
    quantization_config: TrimSparseConfig

    @property
    def encoding(self) -> Encoding:
        """How the artifact stores its matrices."""
        return ENCODINGS[self.quantization_config.encoding]

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        headers = _read_headers(checkpoint_files or [])
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        for name in self.quantization_config.modules:
            path = _name_in(model, name, linears)
            if path is None and model.base_model is model and not name.startswith(f"{model.base_model_prefix}."):
                continue  # a pruned LM head, which the base model does without
            if path is None:
                raise ArtifactError(f"{name}: {type(model).__name__} has no linear module of that name")
            stored = {suffix: headers.get(f"{name}.{suffix}") for suffix in self.encoding.tensors}
            missing = [suffix for suffix, header in stored.items() if header is None]
            if missing:
                raise ArtifactError(f"{name}: {missing[0]} is in none of the artifact's files")
            found = {suffix: header for suffix, header in stored.items() if header is not None}
            odd = [suffix for suffix, header in found.items() if header.dtype not in STORED_DTYPES]
            if odd:
                raise ArtifactError(f"{found[odd[0]].file}: {name}.{odd[0]} has dtype {found[odd[0]].dtype}")
            model.set_submodule(path, _StoredLinear(linears[path], found))
        _refuse_incomplete(model, headers)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        runtime = None
        # Names only: what is stored of a module is to be freed when a layer takes its place, not when all have.
        for name in [name for name, module in model.named_modules() if isinstance(module, _StoredLinear)]:
            module = model.get_submodule(name)
            assert isinstance(module, _StoredLinear)
            device = next(module.parameters()).device
            if device.type == "meta":
                raise EnvironmentLacks(f"{name}: sparse layers cannot be offloaded; load the model to one device")
            runtime = pick_runtime(self.quantization_config.runtime, device.type)
            try:
                matrix = module.decode(self.encoding)
            except ArtifactError as error:
                raise ArtifactError(f"{module.file}: {name}: {error}") from error
            block = _block_of(module) if isinstance(self.encoding, Bsr) else None
            model.set_submodule(name, runtime.linear(matrix, module.bias, Layout(device, block)))
            if isinstance(runtime, NativeRuntime):
                fuse(model.get_submodule(name.rpartition(".")[0]))
        if isinstance(runtime, NativeRuntime):
            runtime.finish(model)
        if isinstance(runtime, DenseRuntime):
            self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The model's tensors with every sparse layer in the artifact's encoding again."""
        if isinstance(model.get_output_embeddings(), QuantizedLinear):
            raise UsageError("a model with an 8-bit LM head is not what was stored; load it without to save it")
        state = dict(model.state_dict())
        for name, module in model.named_modules():
            if isinstance(module, SparseLinear):
                encoding = Bsr(module.block) if module.block else self.encoding
                encoded = encoding.encode(module.matrix())
                state |= {f"{name}.{suffix}": tensor for suffix, tensor in encoded.items()}
        return state, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # transformers passes what config.json says, as a name once the model was saved
        wanted: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for name, module in list(model.named_modules()):
            if isinstance(module, SparseLinear):
                device = next(module.buffers()).device
                model.set_submodule(name, dense_linear(module.matrix(), module.bias, wanted).to(device))
        return model

    @property
    def is_trainable(self) -> bool:
        """Sparse layers have no gradient."""
        return False

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the artifact's tensors again."""
        return True


def _read_headers(files: Iterable[str]) -> dict[str, _Header]:
    headers = {}
    for file in files:
        try:
            with safe_open(file, "pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - not a dict
                    piece = shard.get_slice(name)
                    headers[name] = _Header(file, tuple(piece.get_shape()), piece.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{file}: {error}") from error
    return headers


def _name_in(model: PreTrainedModel, name: str, known: Mapping[str, Any]) -> str | None:
    """A stored name as this model says it: `AutoModel` loads the base model, without the prefix."""
    prefix = f"{model.base_model_prefix}."
    return next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in known), None)


def _refuse_incomplete(model: PreTrainedModel, headers: Mapping[str, _Header]) -> None:
    """Transformers initialises what it does not find at random, with a warning; an artifact must be whole."""
    tied = set(model.all_tied_weights_keys)
    for name, parameter in model.named_parameters():
        stored = _name_in(model, name, headers)
        if stored is not None and headers[stored].shape != parameter.shape:
            shapes = f"has shape {list(headers[stored].shape)}; expected {list(parameter.shape)}"
            raise ArtifactError(f"{headers[stored].file}: {stored} {shapes}")
        if stored is None and name not in tied:
            raise ArtifactError(f"{name} is in none of the artifact's files")


def _block_of(module: _StoredLinear) -> tuple[int, int]:
    """The block size, which only the shape of the stored values tells."""
    _, rows, columns = module.get_parameter("weight_values").shape
    return rows, columns
