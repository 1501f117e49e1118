"""Loading an artifact with transformers: our entry in its table of quantisation methods.

    import trim_export.runtimes
    model = AutoModelForCausalLM.from_pretrained(directory)

Before any weight is read, each pruned `nn.Linear` is replaced by a placeholder whose parameters have exactly the
stored shapes (taken from the files' headers); once they are filled, every matrix is decoded, which checks its structure
in full, and the placeholder gives way to a layer of the chosen runtime. Saving goes the other way, byte for byte.

`load` guards more than `from_pretrained` can: it looks at the directory before transformers opens anything in it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from trim_export.artifact import CONFIG, INDEX, open_artifact, refuse_unfinished, verify_hashes
from trim_export.converters import ENCODINGS, Bsr, Encoding, SparseMatrix
from trim_export.converters._checks import check_shape
from trim_export.errors import ArtifactError, EnvironmentLacks, TrimExportError, UsageError, choose, first_line
from trim_export.format import FORMAT_VERSION, METHOD, guard
from trim_export.memory import return_freed
from trim_export.runtimes.dense import DenseRuntime, dense_linear
from trim_export.runtimes.linear import Layout, Runtime, SparseLinear, have_siblings
from trim_export.runtimes.native import NativeRuntime, QuantizedLinear, quantize_head
from trim_export.runtimes.onnxruntime import is_onnx, load_onnx, verify_onnx
from trim_export.runtimes.torch_sparse import TorchSparseRuntime
from trim_export.runtimes.triton import TritonRuntime
from trim_export.storage import read_json, refuse_special_files, safe_file, tensor_names

__all__ = [
    "METHOD",
    "RUNTIMES",
    "TrimSparseConfig",
    "TrimSparseQuantizer",
    "available_runtimes",
    "load",
    "pick_runtime",
]

# On a GPU triton is preferred by prediction, not by measurement; it does not execute on the CPU. There native is the
# faster one in decode and prefill (benchmarks/results/smollm2_0.8_bench.json).
_RETURN_BYTES = 2**24
"""Stored bytes that are freed before memory is given back, which takes some milliseconds."""

_KNOWN: tuple[Runtime, ...] = (TritonRuntime(), NativeRuntime(), TorchSparseRuntime(), DenseRuntime())

RUNTIMES: dict[str, Runtime] = {runtime.name: runtime for runtime in _KNOWN}
"""Runtimes by name, the preferred one first."""

LM_HEADS = {"stored": "stored", "int8": "int8"}
"""Forms in which an LM head can be held."""

VALUES = {"stored": None, "bfloat16": torch.bfloat16, "int8": torch.int8}
"""Forms in which kept weights can be held: their dtypes."""

_ROUNDS_VALUES = NativeRuntime.name  # the one that can hold them in another form than they are stored in

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
    *,
    check_hashes: bool = False,
    lm_head: str = "stored",
    values: str = "stored",
) -> PreTrainedModel:
    """Load an artifact for execution; never touches the network, runs no code of the artifact's and no pickle.

    Args:
        directory: the artifact, or an ONNX directory made of one (`trim_export.runtimes.onnxruntime`).
        runtime: a name in `RUNTIMES`, or ``auto`` for the best that is available; ``dense`` gives an ordinary model.
            Of an ONNX directory a name in `trim_export.runtimes.onnxruntime.EXECUTIONS`.
        dtype: to compute in; the stored one if None.
        device: to load to.
        check_hashes: compare every file with the manifest before it is read. The structure of every matrix is
            checked anyway; only this finds a value that became another. NaN is found by ``trim-export check``.
        lm_head: a name in `LM_HEADS`: as it is stored, or with the embedding tied to it in ``int8`` (not exact).
        values: a name in `VALUES`: kept weights as they are stored, or rounded (not exact); runtime ``native`` only.

    Raises:
        ArtifactError: unfinished, damaged or inconsistent; names file, module and reason.
        UsageError: unknown runtime, or one that does not execute on ``device``.
        EnvironmentLacks: a runtime that is not available here.
    """
    root = Path(directory)
    if is_onnx(root):
        return _load_onnx(root, runtime, device, (lm_head, values), check_hashes)
    choose("LM head", lm_head, LM_HEADS)
    _pick_runtime_for(values, runtime, torch.device(device).type)
    _refuse_foreign_directory(root)
    if check_hashes:
        problems = verify_hashes(open_artifact(root))
        if problems:
            raise ArtifactError(problems[0])
    with _reading(root):
        config = AutoConfig.from_pretrained(root, local_files_only=True, trust_remote_code=False)
        settings = getattr(config, "quantization_config", None)
        if not isinstance(settings, dict) or settings.get("quant_method") != METHOD:
            raise ArtifactError(f"{directory}: config.json does not describe a trim-export artifact")
        _refuse_incredible_depth(root, config)
        settings["runtime"], settings["values"] = runtime, values
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            root,
            config=config,
            dtype=dtype or "auto",
            device_map={"": device} if device != "cpu" else None,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    model.eval()
    if lm_head == "int8":
        quantize_head(model)
    return model


def _load_onnx(root: Path, runtime: str, device: str, forms: tuple[str, str], check_hashes: bool) -> PreTrainedModel:
    """What an ONNX directory is was decided when it was made; only how it executes is left to choose."""
    for option, what, form in zip(("--lm-head", "--values"), ("the LM head", "values"), forms, strict=True):
        if form != "stored":
            raise UsageError(f"{root}: convert --to onnx decides on {what}; leave {option} out")
    if check_hashes:
        problems = verify_onnx(root)
        if problems:
            raise ArtifactError(problems[0])
    return load_onnx(root, runtime, device=torch.device(device).type)


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


def _pick_runtime_for(values: str, name: str, device: str) -> Runtime:
    """`pick_runtime`, and `UsageError` where it cannot hold values in that form."""
    choose("form of values", values, VALUES)
    runtime = pick_runtime(name, device)
    if values != "stored" and runtime.name != _ROUNDS_VALUES:
        raise UsageError(
            f"runtime {runtime.name} holds values as they are stored; choose {_ROUNDS_VALUES} or leave --values out"
        )
    return runtime


def available_runtimes(device: str = "cpu") -> list[str]:
    """Names of the runtimes that can be used here on this type of device, the preferred one first."""
    return [name for name, runtime in RUNTIMES.items() if device in runtime.devices and runtime.unavailable() is None]


def _refuse_foreign_directory(root: Path) -> None:
    """What is no finished artifact, or leads out of itself, before transformers opens a file of it."""
    if not root.is_dir():
        raise ArtifactError(f"{root}: no such directory")
    refuse_unfinished(root)
    refuse_special_files(root)
    if not (root / CONFIG).is_file():
        raise ArtifactError(f"{root}: no {CONFIG}, so not a finished artifact")
    read_json(root / CONFIG)
    if (root / INDEX).is_file():
        index = read_json(root / INDEX)
        places = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(places, dict):
            raise ArtifactError(f"{root / INDEX}: no weight_map")
        for name in sorted(set(map(str, places.values()))):
            safe_file(root, name)


def _refuse_incredible_depth(root: Path, config: PreTrainedConfig) -> None:
    """More decoder blocks than stored tensors: transformers would make them all before it looked for their weights."""
    depth = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)
    stored = sum(len(tensor_names(file)) for file in sorted(root.glob("*.safetensors")))
    if not isinstance(depth, int) or depth > stored:
        raise ArtifactError(f"{root / CONFIG}: {depth} decoder blocks cannot be made of {stored} stored tensors")


@contextmanager
def _reading(root: Path) -> Iterator[None]:
    """Turn what transformers raises over a directory that it cannot read into one line of ours."""
    try:
        yield
    except (TrimExportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged file is answered with nearly any exception
        raise ArtifactError(f"{root}: cannot be loaded ({first_line(error)})") from error


AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)  # the place that `trim_export.autoload` has kept


@register_quantization_config(METHOD)
class TrimSparseConfig(QuantizationConfigMixin):
    """The `quantization_config` of an artifact's config.json.

    Attributes:
        format_version: of the artifact.
        encoding: name in `ENCODINGS`.
        modules: names of the pruned linear modules.
        runtime, values: chosen at load, never stored.
    """

    def __init__(
        self,
        format_version: int = FORMAT_VERSION,
        encoding: str = "bitmap",
        modules: Sequence[str] = (),
        runtime: str = "auto",
        values: str = "stored",
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
        self.values = values
        self.how_to_load = how_to_load

    def to_dict(self) -> dict[str, Any]:
        """What is written to config.json."""
        return {name: value for name, value in super().to_dict().items() if name not in ("runtime", "values")}


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
        self.stored_bytes = 0
        for suffix, header in headers.items():
            dtype = STORED_DTYPES[header.dtype]
            self.stored_bytes += math.prod(header.shape) * dtype.itemsize
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
        files = [Path(file) for file in checkpoint_files or []]
        _refuse_foreign_files(Path(str(model.config.name_or_path)), files)
        headers = _read_headers(map(str, files))
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
            placeholder = _StoredLinear(linears[path], found)
            try:
                check_shape(placeholder.shape, placeholder.stored_bytes)
            except ArtifactError as error:
                raise ArtifactError(f"{placeholder.file}: {name}: {error}") from error
            model.set_submodule(path, placeholder)
        _refuse_incomplete(model, headers)
        # The guard is for those who load without us.
        names = [name.removeprefix(f"{model.base_model_prefix}.") for name in guard(self.quantization_config.modules)]
        ignored = {rf"(^|\.){re.escape(name)}$" for name in names}
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | ignored

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        runtime, freed = None, 0
        # Names only: what is stored of a module is to be freed when a layer takes its place, not when all have.
        for name in [name for name, module in model.named_modules() if isinstance(module, _StoredLinear)]:
            module = model.get_submodule(name)
            assert isinstance(module, _StoredLinear)
            device = next(module.parameters()).device
            if device.type == "meta":
                raise EnvironmentLacks(f"{name}: sparse layers cannot be offloaded; load the model to one device")
            settings = self.quantization_config
            runtime = _pick_runtime_for(settings.values, settings.runtime, device.type)
            try:
                matrix = module.decode(self.encoding)
            except ArtifactError as error:
                raise ArtifactError(f"{module.file}: {name}: {error}") from error
            values = VALUES[settings.values]
            if values is torch.int8 and not matrix.values.isfinite().all():
                raise ArtifactError(f"{module.file}: {name}: holds NaN or infinity, which cannot be rounded to int8")
            block = _block_of(module) if isinstance(self.encoding, Bsr) else None
            path, _, leaf = name.rpartition(".")
            parent = model.get_submodule(path)
            siblings = have_siblings(parent, leaf, (_StoredLinear, SparseLinear))
            setattr(parent, leaf, runtime.linear(matrix, module.bias, Layout(device, block, siblings, values)))
            runtime.finish(parent)
            freed += module.stored_bytes
            if freed >= _RETURN_BYTES:
                freed = 0
                return_freed()
        if runtime is not None:
            runtime.finish(model)
            return_freed()
        if isinstance(runtime, DenseRuntime):
            self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The model's tensors with every sparse layer in the artifact's encoding again."""
        if isinstance(model.get_output_embeddings(), QuantizedLinear):
            raise UsageError("a model with an 8-bit LM head is not what was stored; load it without to save it")
        if self.quantization_config.values != "stored":
            raise UsageError("a model with rounded values is not what was stored; load it without to save it")
        state = dict(model.state_dict())
        for name, module in model.named_modules():
            if isinstance(module, SparseLinear):
                encoding = Bsr(module.block) if module.block else self.encoding
                encoded = encoding.encode(module.matrix())
                state |= {f"{name}.{suffix}": tensor for suffix, tensor in encoded.items()}
        return guard(self.quantization_config.modules) | state, {}

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


def _refuse_foreign_files(source: Path, files: Sequence[Path]) -> None:
    """Shards that an index names outside the directory that is loaded, or that are no plain files in it."""
    folders = {os.path.abspath(file.parent) for file in files}
    if source.is_dir():
        outside = sorted(folder for folder in folders if not Path(folder).is_relative_to(os.path.abspath(source)))
    else:  # an id on the hub, whose files lie in one folder of its cache
        outside = sorted(folders)[1:]
    if outside:
        raise ArtifactError(f"{source}: its index names files outside of it, in {outside[0]}")
    for file in files:
        refuse_unfinished(file.parent)
        safe_file(file.parent, file.name)


def _read_headers(files: Iterable[str]) -> dict[str, _Header]:
    headers: dict[str, _Header] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as shard:
                for name in tensor_names(Path(file)):
                    if name in headers:
                        raise ArtifactError(f"{file}: {name} is stored a second time; it is in {headers[name].file}")
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
