"""ONNX Runtime: executing exported directories, and the operator library that multiplies compressed weights."""

from trim_export.runtimes.onnxruntime.model import EXECUTIONS, OnnxCausalLM, is_onnx, load_onnx
from trim_export.runtimes.onnxruntime.session import (
    LACKING,
    LIBRARY,
    ONNX_MANIFEST,
    Session,
    open_session,
    operator_library,
    read_form,
    verify_onnx,
)

__all__ = [
    "EXECUTIONS",
    "LACKING",
    "LIBRARY",
    "ONNX_MANIFEST",
    "OnnxCausalLM",
    "Session",
    "is_onnx",
    "load_onnx",
    "open_session",
    "operator_library",
    "read_form",
    "verify_onnx",
]
