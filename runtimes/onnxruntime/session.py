"""ONNX Runtime sessions of untrusted directories, with our operators where they can be had."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trim_export.errors import ArtifactError, EnvironmentLacks, UsageError, choose, first_line
from trim_export.shared_library import find_library
from trim_export.storage import difference, read_json, refuse_special_files, safe_file

__all__ = [
    "LACKING",
    "LIBRARY",
    "ONNX_MANIFEST",
    "Session",
    "empty_cache",
    "open_session",
    "operator_library",
    "read_form",
    "verify_onnx",
]

LIBRARY = "libtrim_onnxruntime.so"
"""File name of the operator library, in this package and in exported directories."""

ONNX_MANIFEST = "trim_onnx.json"
"""What an exported directory says of how it was made."""

CPU = "CPUExecutionProvider"

_PROVIDERS = {"cpu": (CPU, LIBRARY), "cuda": ("CUDAExecutionProvider", "libtrim_onnxruntime_cuda.so")}
"""What executes on a device, and our operators for it; those for CUDA have the CPU's too."""

_READ = (".onnx", ".data", ".json", ".so")
"""Suffixes of what runtimes read."""

LACKING = {
    "cpu": "our ONNX operators are not installed; install a C++ compiler and trim-export again",
    "cuda": "our ONNX operators for CUDA are not installed; with nvcc: "
    "pip install . -C cmake.define.TRIM_EXPORT_CUDA=ON",
}
"""What to say where our operators for a device are not there."""


@dataclass(frozen=True)
class Session:
    """A loaded model.

    Attributes:
        native: the `onnxruntime.InferenceSession`.
        kernels: whether our operators execute; None if the model has none of them.
        inputs: shapes of what it takes by name, where a side may be a word.
        outputs: names of what it gives.
        element: the type of its keys and values.
    """

    native: Any
    kernels: bool | None
    inputs: Mapping[str, Sequence[int | str]]
    outputs: tuple[str, ...]
    element: type[np.floating[Any]] = np.float32

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs by name; `UsageError` says what ONNX Runtime, or one of our kernels, has against the inputs."""
        try:
            found = self.native.run(self.outputs, inputs)
        except Exception as error:  # of ONNX Runtime's own, which share no base
            raise UsageError(f"ONNX Runtime failed ({first_line(error)})") from error
        return dict(zip(self.outputs, found, strict=True))


def operator_library(device: str = "cpu") -> Path | None:
    """Our operators for ONNX Runtime on ``cpu`` or ``cuda``, or None where they were not compiled."""
    return find_library("runtimes", "onnxruntime", _PROVIDERS[device][1])


def read_form(directory: Path) -> Any:
    """What a directory stores its weights as: a `Form`'s fields, ``dense``, or None if nothing of ours says."""
    return _recorded(directory, "form")


def _recorded(directory: Path, key: str) -> Any:
    manifest = directory / ONNX_MANIFEST
    facts = read_json(manifest) if manifest.is_file() else {}
    return facts.get(key) if isinstance(facts, dict) else None


def verify_onnx(directory: Path) -> list[str]:
    """Compare every file of an exported directory with its recorded size and hash; returns what is wrong.

    Raises:
        ArtifactError: a file that is no regular one, or no manifest that could say anything.
    """
    refuse_special_files(directory)
    if not (directory / ONNX_MANIFEST).is_file():
        raise ArtifactError(f"{directory}: no {ONNX_MANIFEST}, which has the hashes of what trim-export wrote")
    manifest = read_json(safe_file(directory, ONNX_MANIFEST))
    try:
        recorded = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{directory / ONNX_MANIFEST}: malformed ({type(error).__name__}: {error})") from error
    problems = [difference(directory, name, *entry) for name, entry in recorded.items()]
    for file in sorted(directory.iterdir()):
        if file.suffix in _READ and file.name not in recorded and file.name != ONNX_MANIFEST:
            problems.append(f"{file}: the manifest does not list it, and a runtime may read it")
    return [problem for problem in problems if problem]


def open_session(
    directory: Path, kernels: bool | None = None, threads: int | None = None, device: str = "cpu"
) -> Session:
    """Load ``model.onnx`` of a directory.

    Args:
        directory: with the graph and its weights.
        kernels: register our operators; without them ONNX Runtime decodes what it loads and multiplies densely. None
            takes them where they are installed, and warns where they are not.
        threads: of the session; None leaves its choice.
        device: ``cpu`` or ``cuda``.

    Raises:
        EnvironmentLacks: onnxruntime, or our operators if ``kernels``, are not installed; or it cannot use the device.
        UsageError: an unknown device, or not the one for which the directory was made.
        ArtifactError: a file is missing, damaged, or leads out of the directory.
    """
    if importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("onnx") is None:
        raise EnvironmentLacks("ONNX needs its packages: pip install 'trim-export[cpu]'")
    import onnxruntime

    from trim_export.converters.onnx import DOMAIN, MODEL
    from trim_export.converters.onnx.graph import check_external, read_model

    provider, _ = choose("device of an ONNX model", device, _PROVIDERS)
    if provider not in onnxruntime.get_available_providers():
        raise EnvironmentLacks(f"this ONNX Runtime has no {provider}: pip install 'trim-export[gpu]' in its place")
    if not (directory / MODEL).is_file():
        raise ArtifactError(f"{directory}: no {MODEL}")
    refuse_special_files(directory)
    model = read_model(directory / MODEL)
    check_external(model, directory)
    ours = any(entry.domain == DOMAIN for entry in model.opset_import)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; they come as exceptions too
    if threads:
        options.intra_op_num_threads = threads
    library = operator_library(device)
    if kernels is None:
        kernels = library is not None
        if ours and not kernels:
            warnings.warn(f"{LACKING[device]}; standard operators are used instead", RuntimeWarning, stacklevel=2)
    if ours and kernels:
        if device == "cpu" and _recorded(directory, "provider") == "cuda":
            raise UsageError(f"{directory}: was made for CUDA; load it with device='cuda', or convert with --ep cpu")
        if library is None:
            raise EnvironmentLacks(LACKING[device])
        try:
            options.register_custom_ops_library(str(library))
        except Exception as error:  # of ONNX Runtime's own, which share no base
            raise EnvironmentLacks(f"{library}: ONNX Runtime cannot load it ({first_line(error)})") from error
    providers = list(dict.fromkeys([provider, CPU]))  # what CUDA has no kernel for goes to the CPU
    try:
        # Its fallback would only say the same again, on stdout.
        native = onnxruntime.InferenceSession(str(directory / MODEL), options, providers=providers, enable_fallback=0)
    except Exception as error:  # of ONNX Runtime's own, which share no base
        raise ArtifactError(f"{directory / MODEL}: ONNX Runtime cannot load it ({first_line(error)})") from error
    if native.get_providers() != providers:
        raise EnvironmentLacks(f"ONNX Runtime took {native.get_providers()} instead of {providers}; is there a GPU?")
    inputs = {value.name: tuple(value.shape) for value in native.get_inputs()}
    halves = any(value.type == "tensor(float16)" for value in native.get_inputs())
    outputs = tuple(value.name for value in native.get_outputs())
    return Session(native, kernels if ours else None, inputs, outputs, np.float16 if halves else np.float32)


def empty_cache(session: Session, batch: int, width: int) -> dict[str, NDArray[Any]]:
    """Keys and values of no tokens, by the names of the inputs; ``width`` is a head's, which a graph may leave open."""
    shapes = {name: shape for name, shape in session.inputs.items() if name.startswith("past")}
    return {name: np.zeros((batch, int(shape[1]), 0, width), session.element) for name, shape in shapes.items()}
