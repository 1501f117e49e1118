"""``trim-export convert``, ``inspect`` and ``check``: an artifact's files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trim_export.cli.common import Directory, Json, app, out, write_json
from trim_export.errors import ArtifactError, CheckFailed, UsageError


@app.command()
def convert(
    directory: Directory,
    to: Annotated[str, typer.Option(help="bitmap, csr, bsr, bitmap-4x64, g8, csr-interleaved, dense or scipy.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")],
    block: Annotated[str | None, typer.Option(help="Block of bsr as ROWSxCOLUMNS.", metavar="RxC")] = None,
    json_file: Json = None,
) -> None:
    """Rewrite an artifact in another encoding, as a dense model, or as scipy files."""
    from trim_export.artifact import open_artifact
    from trim_export.convert import convert as convert_artifact
    from trim_export.report import megabytes, table

    result = convert_artifact(open_artifact(directory), to, output, _parse_block(block))
    out.print(
        table(
            f"{to} in {output}",
            ("", "weight files", "of dense"),
            [
                (label, megabytes(size), f"{size / result['bytes_dense']:.3f}")
                for label, size in (("before", result["bytes_before"]), ("now", result["bytes"]))
            ],
        )
    )
    write_json(json_file, result)


def _parse_block(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise UsageError(f"block {text!r} is not ROWSxCOLUMNS, as in 16x16")
    return int(sides[0]), int(sides[1])


@app.command()
def inspect(directory: Directory, json_file: Json = None) -> None:
    """Show what an artifact holds, matrix by matrix."""
    from trim_export.artifact import open_artifact
    from trim_export.report import module_table, summary_table

    manifest = open_artifact(directory).manifest
    out.print(summary_table(manifest))
    out.print(module_table(manifest))
    modules = [{"name": name, **entry} for name, entry in manifest["modules"].items()]
    write_json(
        json_file, {key: manifest[key] for key in ("sparsity", "bytes", "encoding", "run")} | {"modules": modules}
    )


@app.command()
def check(directory: Directory) -> None:
    """Verify every file's hash and every matrix's structure; exit code 1 names what is wrong."""
    from trim_export.artifact import open_artifact, verify_files

    try:
        artifact = open_artifact(directory)
    except ArtifactError as error:
        raise CheckFailed(str(error)) from error
    problems = verify_files(artifact)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckFailed(problems[0] + more)
    out.print(f"{directory}: {len(artifact.manifest['files'])} files and {len(artifact.modules)} matrices are intact")
