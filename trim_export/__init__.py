"""Prune large language models and run the result sparse: smaller on disk, in memory and per token.

The command line (``trim-export --help``) is the front door; the modules below are named after what they hold:
``prune`` (the driver), ``trim`` (the row-wise search of arXiv 2505.16743), ``artifact`` (the directory that travels),
``converters`` (encodings of one sparse matrix) and ``runtimes`` (execution). Importing this package imports no torch.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
