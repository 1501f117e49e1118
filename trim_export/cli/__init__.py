"""The command line: one thin function for each command. Results go to stdout, progress and errors to stderr."""

from __future__ import annotations

import atexit
import errno
import gc
import os
import sys
from typing import Annotated, NoReturn

import typer

import trim_export
from trim_export.cli.common import app, err, out

# Each module adds its commands to `app`; --help lists them in this order.
from trim_export.cli import prune, recover, artifact, measure, evaluate, generate  # isort: skip  # noqa: F401
from trim_export.errors import TrimExportError

INTERRUPTED = 130
"""By which typer ends, without a word, when a command is interrupted."""
OUT_OF_MEMORY = "out of memory; free some, then an unfinished run continues with --resume"

debug = False


def main() -> None:
    """Entry point: run a command and turn every failure into one sentence and an exit code."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; our own bars know when to be silent
    # A process that ends need not search torch's objects for cycles first: that takes half a second.
    atexit.register(gc.freeze)
    try:
        app()
    except TrimExportError as error:
        _fail(str(error), error.exit_code, error)
    except (KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code != INTERRUPTED:
            raise
        _fail("interrupted; an unfinished run continues with --resume", INTERRUPTED, error)
    except MemoryError as error:
        _fail(OUT_OF_MEMORY, 3, error)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _fail(f"no space left on the disk ({error.filename}); free some, then continue with --resume", 3, error)
        _fail(str(error), 3, error)
    except Exception as error:
        if _out_of_memory(error):
            _fail(OUT_OF_MEMORY, 3, error)
        _fail(f"internal error: {type(error).__name__}: {error} (--debug shows where)", 70, error)


def _out_of_memory(error: Exception) -> bool:
    """Whether torch says so, which has an exception of its own for a GPU only, or a thread that cannot be had."""
    said = str(error)
    return (
        type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in said
        or "can't start new thread" in said
    )


def version(value: bool) -> None:
    """Print the version and stop."""
    if value:
        out.print(trim_export.__version__)
        raise typer.Exit


@app.callback()
def common(
    show_trace: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False,
    show_version: Annotated[bool, typer.Option("--version", callback=version, is_eager=True)] = False,
) -> None:
    """Prune large language models and run the result sparse."""
    global debug
    debug = show_trace


def _fail(sentence: str, code: int, error: BaseException) -> NoReturn:
    if debug:
        err.print_exception()
    err.print(f"error: {sentence}", markup=False, soft_wrap=True)
    sys.exit(code)
