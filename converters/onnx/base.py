"""The dense graph that everything starts from: onnxruntime-genai's model builder, or torch's own exporter.

The builder knows a list of architectures and fuses their attention; what it writes runs in onnxruntime-genai. What it
does not know is traced (`trim_export.converters.onnx.traced`), which takes longer and runs somewhat slower. Both run in
a process of their own: they print, warn, and hold the dense model in memory.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

from transformers import AutoConfig

from trim_export.converters.onnx.graph import MODEL, read_model
from trim_export.errors import EnvironmentLacks, ModelError, choose

__all__ = ["PRECISIONS", "PROVIDERS", "build"]

PRECISIONS = {"fp32": "float32", "int4": "int4 by round to nearest", "int8": "int8 by round to nearest"}
"""What the builder can make for a CPU; quantised ones serve as rivals."""

PROVIDERS = {"cpu": "fp32", "cuda": "fp16"}
"""Execution providers that a graph can be made for, and the precision of the builder's fused attention there."""

_BUILDER = "onnxruntime_genai.models.builder"
_HEAD_STEP = 16  # ONNX Runtime's fused attention takes heads whose width is a multiple of it
_UNKNOWN = "is not currently supported"  # what the builder says of an architecture that it does not know


def build(
    dense: Path, out: Path, precision: str | None = None, last_logits: bool = False, provider: str = "cpu"
) -> str:
    """Write the model in directory ``dense`` as ONNX to directory ``out``, with its weights beside the graph.

    Args:
        dense: a plain Hugging Face directory.
        out: must not exist.
        precision: a name in `PRECISIONS`; all but fp32 need the builder. None is the provider's own.
        last_logits: compute the logits of the last token only (``prune_lm_head`` of the builder, ``logits_to_keep`` of
            transformers): all that generation needs of a prompt, and the largest product of a small model.
        provider: a name in `PROVIDERS`, which need not be on this machine; all but ``cpu`` need the builder.

    Returns:
        What made it, with its version.

    Raises:
        EnvironmentLacks: the exporters are not installed.
        ModelError: neither of them can make a graph of this model.
        UsageError: an unknown provider.
    """
    precision = precision or choose("execution provider", provider, PROVIDERS)
    if importlib.util.find_spec("onnx_ir") is None:
        raise EnvironmentLacks("ONNX export needs its packages: pip install 'trim-export[cpu]'")
    config = AutoConfig.from_pretrained(dense, local_files_only=True, trust_remote_code=False)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if importlib.util.find_spec("onnxruntime_genai") is not None and width % _HEAD_STEP == 0:
        options = ["-i", str(dense), "-o", str(out), "-p", precision, "-e", provider, "-c", str(out / ".cache")]
        extra = {"shared_embeddings": config.tie_word_embeddings, "prune_lm_head": last_logits}
        if any(extra.values()):
            options += ["--extra_options", *(f"{name}=true" for name, wanted in extra.items() if wanted)]
        failure = _run(_BUILDER, options, out)
        if failure is None:
            version = importlib.metadata.version("onnxruntime-genai")
            _sign(out / MODEL, version)
            return f"onnxruntime-genai {version}"
        if _UNKNOWN not in failure:
            raise ModelError(f"{dense}: onnxruntime-genai's model builder failed ({failure})")
    if (precision, provider) != ("fp32", "cpu"):
        raise ModelError(
            f"{dense}: only onnxruntime-genai's model builder makes {precision} for {provider}, and not of this model"
        )
    last = ["--last-logits"] if last_logits else []
    failure = _run("trim_export.converters.onnx.traced", [str(dense), str(out), *last], out)
    if failure is not None:
        raise ModelError(f"{dense}: torch.onnx cannot export this model ({failure})")
    return f"torch.onnx of torch {importlib.metadata.version('torch')}"


def _sign(file: Path, version: str) -> None:
    """Say what made a graph; the builder adds the revision of whatever Git repository it is installed in."""
    model = read_model(file)
    model.producer_version = version
    file.write_bytes(model.SerializeToString())


_C = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded before any fork
_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """A killed command's exporter must not go on writing into the directory of the next one (prctl(2))."""
    if _C is not None:
        _C.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _run(module: str, options: list[str], out: Path) -> str | None:
    """The last line that a failing module printed; None on success."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *options],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        preexec_fn=_end_with_parent,
    )
    if done.returncode == 0 and (out / MODEL).is_file():
        return None
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"
