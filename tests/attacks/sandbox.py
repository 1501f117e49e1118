"""A process of its own for whatever may crash, hang or eat memory, forked from a server that has everything imported.

A segmentation fault kills the worker and not the test; an answer that does not come in time is a hang; memory beyond a
limit is refused to it; and any attempt to use the network fails.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import huggingface_hub.constants
import torch
from forked import forking, limit_memory

from trim_export.artifact import open_artifact, verify_files
from trim_export.errors import TrimExportError
from trim_export.models import load_model, quiet_transformers
from trim_export.runtimes import load

__all__ = ["Answer", "Sandbox", "sandbox"]

TIMEOUT_S = 120
"""Of one task, which takes a tenth of a second; machines under load are slow."""

SPARE_BYTES = 3 * 2**30
"""What a task may allocate. A decoder may take a credible claim of 2**28 weights at its word."""

TOKENS = torch.arange(4, 20)[None]


@dataclass(frozen=True)
class Answer:
    """How a task ended.

    Attributes:
        kind: ``done``, ``refused`` (an error of our tree), ``unusable`` (the model that was loaded cannot compute),
            ``error`` (any other exception), ``crash`` or ``hang``.
        text: the message, if there is one.
        value: what the task returned.
        error: name of the exception's class.
    """

    kind: str
    text: str = ""
    value: Any = None
    error: str = ""


class Unusable(Exception):
    """A model that loads, and cannot compute."""


def compute(directory: str, runtime: str, check_hashes: bool) -> bytes:
    """Logits of an artifact for some fixed tokens, as bytes."""
    model = load(directory, runtime, check_hashes=check_hashes)
    try:
        with torch.no_grad():
            return model(TOKENS).logits.float().numpy().tobytes()
    except Exception as error:
        raise Unusable(f"{type(error).__name__}: {error}") from error


def check(directory: str) -> list[str]:
    """What `trim-export check` finds."""
    return verify_files(open_artifact(directory))


def load_dense(source: str) -> str:
    """The hash of a dense model."""
    return load_model(source).sha256


TASKS: dict[str, Callable[..., Any]] = {"compute": compute, "check": check, "load_dense": load_dense}


def _no_network(*_: object) -> None:
    raise ConnectionRefusedError("attempt to use the network")


def _work(channel: Connection) -> None:
    """Answer tasks until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    quiet_transformers()
    huggingface_hub.constants.HF_HUB_OFFLINE = False  # nothing but our own code keeps it off the network here
    socket.socket.connect = _no_network  # type: ignore[method-assign, assignment]
    limit_memory(SPARE_BYTES)
    while True:
        try:
            task, arguments = channel.recv()
        except EOFError:
            return
        try:
            answer = Answer("done", value=TASKS[task](*arguments))
        except TrimExportError as error:
            answer = Answer("refused", str(error), error=type(error).__name__)
        except Unusable as error:
            answer = Answer("unusable", str(error))
        except BaseException as error:
            answer = Answer("error", f"{type(error).__name__}: {error}", error=type(error).__name__)
        channel.send(answer)


class Sandbox:
    """One worker, replaced when it dies."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._channel, theirs = forking().Pipe()
        self._worker = forking().Process(target=_work, args=(theirs,), daemon=True)
        self._worker.start()
        theirs.close()

    def ask(self, task: str, *arguments: object) -> None:
        """Give it something to do."""
        self._channel.send((task, arguments))

    def answer(self) -> Answer:
        """Wait for how that ended."""
        if not self._channel.poll(TIMEOUT_S):
            self.close()
            self._start()
            return Answer("hang", f"no answer for {TIMEOUT_S} s")
        try:
            answer: Answer = self._channel.recv()
            return answer
        except (EOFError, ConnectionResetError):
            self._worker.join()
            code = self._worker.exitcode
            self._start()
            return Answer("crash", f"the process ended with {code}")

    def run(self, task: str, *arguments: object) -> Answer:
        """Ask and wait."""
        self.ask(task, *arguments)
        return self.answer()

    def close(self) -> None:
        """End the worker."""
        self._worker.kill()
        self._worker.join()
        self._channel.close()


@contextmanager
def sandbox() -> Iterator[Sandbox]:
    """A worker for as long as it is needed."""
    worker = Sandbox()
    try:
        yield worker
    finally:
        worker.close()
