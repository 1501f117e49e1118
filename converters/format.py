"""By what name and version a stored artifact is known, to those who write it and to those who load it."""

__all__ = ["FORMAT_VERSION", "METHOD"]

METHOD = "trim-sparse"
"""The `quant_method` in config.json by which transformers finds our loader."""

FORMAT_VERSION = 1
"""The newest layout of an artifact that this version writes and reads."""
