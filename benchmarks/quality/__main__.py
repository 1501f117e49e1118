"""The command line of the quality benchmark."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

import rich.box
from rich.console import Console
from rich.table import Table

import benchmarks.quality
from benchmarks.quality.cells import SUITES, Protocol, Sources, declare
from benchmarks.quality.fill import fill
from benchmarks.quality.measure import measure_apart
from benchmarks.quality.plots import plots
from benchmarks.quality.store import Store, open_store
from benchmarks.quality.stored import GGUF, gguf_file
from benchmarks.quality.tables import tables
from trim_export.errors import TrimExportError, UsageError

STORE = Path(__file__).parents[1] / "results" / "quality.json"


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing, then print and draw what there is; the exit code is that of `trim-export`."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # leaves no worker and no files behind
    try:
        store = open_store(options.store, None) if options.print else _measure(options)
        _show(store, options.markdown)
    except TrimExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _measure(options: argparse.Namespace) -> Store:
    if options.calibration is None or options.data is None:
        raise UsageError("measuring needs --calibration FILE and --data FILE; --print shows what there is")
    sources = Sources(options.model, options.calibration, options.data)
    protocol = Protocol.of(sources, options.device)
    store = open_store(options.store, protocol)
    suites = SUITES if options.suite == "all" else (options.suite,)
    file_forms = (GGUF,) if gguf_file(options.model) else ()
    cells, notes = declare(protocol, suites, options.seeds, options.sparsities, options.only, file_forms)
    for note in notes:
        _say(note)
    fill(
        store, cells, lambda cell: measure_apart(cell, protocol, sources), options.again, options.limit_minutes, _say
    )  # fmt: skip
    return store


def _show(store: Store, markdown: bool) -> None:
    # Where nobody looks at a screen the tables are as wide as they need to be.
    out = Console(width=None if sys.stdout.isatty() and not markdown else 240)
    for part in tables(store):
        if isinstance(part, Table) and markdown:
            part.box = rich.box.MARKDOWN
        out.print(part, markup=False, soft_wrap=isinstance(part, str))
    for sentence in plots(store):
        out.print(sentence, markup=False, soft_wrap=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=benchmarks.quality.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--calibration", metavar="FILE", help="text that pruning sees")
    parser.add_argument("--data", metavar="FILE", help="text that perplexity is measured on")
    parser.add_argument("--model", default="smollm2-135m", help="directory, .gguf file, hub id or bundled name")
    parser.add_argument("--suite", choices=(*SUITES, "all"), default="all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the calibration draws")
    parser.add_argument("--sparsities", type=float, nargs="+", help="instead of .5, .6, .7 and .8")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows, such as best or wanda")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--limit-minutes", type=float, metavar="M", help="start no cell later than this")
    parser.add_argument("--again", action="store_true", help="measure cells that are there, too")
    parser.add_argument("--print", action="store_true", help="measure nothing, show what there is")
    parser.add_argument("--markdown", action="store_true", help="tables as Markdown")
    parser.add_argument("--store", type=Path, default=STORE, help="file of results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
