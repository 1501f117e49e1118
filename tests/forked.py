"""The command line in processes that start at once, because a server with everything imported forks them."""

from __future__ import annotations

import functools
import multiprocessing
import os
import resource
import sys
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import NamedTuple

import torch

from trim_export.cli import main

__all__ = ["Ended", "finish", "forking", "limit_memory", "start"]

PRELOADED = [
    "trim_export.convert",
    "trim_export.prune",
    "trim_export.report",
    "trim_export.runtimes",
    "transformers.generation",
    "transformers.models.llama.modeling_llama",
]
"""What commands import late, so that a forked process has it when it begins."""


class Ended(NamedTuple):
    """How a command ended: exit code (negative: the signal that killed it) and what it said on stderr."""

    code: int
    said: str


def start(words: list[str], log: Path, spare_bytes: int | None = None) -> ForkServerProcess:
    """Start ``trim-export WORDS``; ``log`` receives its stderr, ``spare_bytes`` is what it may allocate."""
    process = forking().Process(target=_command, args=(words, str(log), spare_bytes))
    process.start()
    return process


def finish(words: list[str], log: Path, spare_bytes: int | None = None) -> Ended:
    """Run a command to its end."""
    process = start(words, log, spare_bytes)
    process.join()
    assert process.exitcode is not None
    return Ended(process.exitcode, log.read_text())


@functools.cache
def forking() -> ForkServerContext:
    """Processes forked from a server that has `PRELOADED` and no threads; started at the first call."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # the server does not get it otherwise in Python 3.11
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def limit_memory(spare_bytes: int) -> None:
    """Let this process allocate so much more than it has, and nothing beyond."""
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + spare_bytes, resource.RLIM_INFINITY))


def _command(words: list[str], log: str, spare_bytes: int | None) -> None:
    with open(os.devnull, "w") as nowhere, open(log, "w") as file:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    if spare_bytes is not None:
        limit_memory(spare_bytes)
    sys.argv = ["trim-export", *words]
    main()
