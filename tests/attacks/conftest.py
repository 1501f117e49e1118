"""What every attack needs: something to attack, and a process that may die of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from attacks.sandbox import Sandbox, sandbox
from attacks.sanitized import compiled_engine

from trim_export.artifact import Artifact, open_artifact
from trim_export.convert import convert


@pytest.fixture(scope="session")
def worker() -> Iterator[Sandbox]:
    """A process in which hostile files are opened."""
    with sandbox() as process:
        yield process


@pytest.fixture(scope="session")
def stored(pruned: Callable[..., Artifact], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``stored(encoding)``: an artifact of a tiny Llama in that encoding, made once; copy it before changing it."""

    @functools.cache
    def make(encoding: str) -> Path:
        original = pruned("llama")
        if encoding == original.encoding.name:
            return original.path
        out = tmp_path_factory.mktemp("stored") / encoding
        convert(original, encoding, out)
        return open_artifact(out).path

    return make


@pytest.fixture(scope="session")
def sanitized_engine(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Object files of the native engine, compiled with sanitizers."""
    return compiled_engine(tmp_path_factory.mktemp("engine"))
