"""ONNX: a dense graph whose sparse weights are stored compressed, with operators that multiply them as they are.

Needs the packages of the extra ``cpu``; nothing imports it before it is asked for.
"""

from trim_export.converters.onnx.base import PRECISIONS, PROVIDERS, build
from trim_export.converters.onnx.graph import MODEL
from trim_export.converters.onnx.operators import DOMAIN, SPARSE, VALUES
from trim_export.converters.onnx.sparsify import Form, Sparsified, sparsify

__all__ = ["DOMAIN", "MODEL", "PRECISIONS", "PROVIDERS", "SPARSE", "VALUES", "Form", "Sparsified", "build", "sparsify"]
