"""``trim-export convert``, ``inspect`` and ``check``: an artifact's files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trim_export.cli.common import Directory, Json, app, out, track, write_json
from trim_export.errors import ArtifactError, CheckFailed, EnvironmentLacks, UsageError, choose, first_line

if TYPE_CHECKING:
    from trim_export.artifact import Artifact


@app.command()
def convert(
    directory: Directory,
    to: Annotated[str, typer.Option(help="bitmap, csr, bsr, bitmap-4x64, g8, csr-interleaved, dense, scipy or onnx.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")],
    block: Annotated[str | None, typer.Option(help="Block of bsr as ROWSxCOLUMNS.", metavar="RxC")] = None,
    encoding: Annotated[str | None, typer.Option(help="In onnx: csr (default) or bitmap.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of kept weights in onnx: float32, bfloat16, float16, int8; else as stored.")
    ] = None,
    lm_head: Annotated[str | None, typer.Option(help="Of LM head and embedding in onnx: stored or int8.")] = None,
    portable: Annotated[
        bool, typer.Option("--portable", help="A dense onnx, for runtimes without our operators.")
    ] = False,
    last_logits: Annotated[
        bool,
        typer.Option("--last-logits", help="In onnx: of a prompt the last token's only, as generation needs them."),
    ] = False,
    ep: Annotated[
        str | None,
        typer.Option("--ep", help="In onnx: what executes it, cpu (default) or cuda (in float16)."),
    ] = None,
    json_file: Json = None,
) -> None:
    """Rewrite an artifact in another encoding, as a dense model, as scipy files, or for ONNX Runtime."""
    from trim_export.artifact import open_artifact
    from trim_export.convert import TARGETS
    from trim_export.convert import convert as convert_artifact
    from trim_export.report import megabytes, table

    choose("target", to, {**TARGETS, "onnx": None})
    only_onnx = {"--encoding": encoding, "--dtype": dtype, "--lm-head": lm_head, "--portable": portable or None}
    only_onnx |= {"--last-logits": last_logits or None, "--ep": ep}
    given = [name for name, value in only_onnx.items() if value is not None]
    if given and to != "onnx":
        raise UsageError(f"{given[0]} belongs to --to onnx, not to {to}")
    if portable and given[0] != "--portable":
        raise UsageError(f"--portable is dense and as stored; leave out {given[0]}")
    artifact, blocks = open_artifact(directory), _parse_block(block)
    if to == "onnx":
        lm_head, ep = lm_head or "stored", ep or "cpu"
        if blocks is not None:
            raise UsageError("--block belongs to --to bsr, not to onnx")
        result = _to_onnx(artifact, output, encoding or "csr", dtype, lm_head, portable, last_logits, ep)
    else:
        result = convert_artifact(artifact, to, output, blocks, track)
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


def _to_onnx(
    artifact: Artifact,
    output: Path,
    encoding: str,
    dtype: str | None,
    lm_head: str,
    portable: bool,
    last_logits: bool,
    provider: str,
) -> dict[str, Any]:
    if importlib.util.find_spec("onnx") is None:
        raise EnvironmentLacks("ONNX export needs its packages: pip install 'trim-export[cpu]'")
    from trim_export.convert_onnx import convert_to_onnx
    from trim_export.converters.onnx import PROVIDERS, SPARSE, VALUES, Form
    from trim_export.runtimes import LM_HEADS

    choose("execution provider", provider, PROVIDERS)
    stored = "float16" if provider == "cuda" else artifact.manifest["source"]["dtype"]
    choose("encoding of onnx", encoding, SPARSE)
    choose("dtype", dtype or stored, VALUES)
    choose("LM head", lm_head, LM_HEADS)
    if provider == "cuda" and dtype in ("float32", "bfloat16"):
        raise UsageError(f"--ep cuda computes in float16; leave out --dtype {dtype}, or take float16 or int8")
    form = Form(encoding, dtype or stored, stored if lm_head == "stored" else lm_head)
    return convert_to_onnx(artifact, output, None if portable else form, track, last_logits, provider)


def _parse_block(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise UsageError(f"block {text!r} is not ROWSxCOLUMNS, as in 16x16")
    return int(sides[0]), int(sides[1])


@app.command()
def inspect(
    directory: Directory,
    html: Annotated[Path | None, typer.Option(help="Also write a page to look at, with pictures.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write a model card.")] = None,
    bench: Annotated[Path | None, typer.Option(help="What bench --json wrote: speed for page and card.")] = None,
    quality: Annotated[
        Path | None, typer.Option("--eval", help="What eval --json wrote: quality for page and card.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Show what an artifact holds, matrix by matrix; as a page with pictures, or as a model card."""
    from trim_export.artifact import open_artifact
    from trim_export.report import megabytes, model_card, module_table, summary_table
    from trim_export.report.headline import read_measured
    from trim_export.storage import write_bytes

    artifact, measured = open_artifact(directory), read_measured(bench, quality)
    manifest = artifact.manifest
    written: dict[Path, str] = {}
    try:
        if html is not None:
            from trim_export.report.page import page

            written[html] = page(artifact, measured)
        if markdown is not None:
            written[markdown] = model_card(manifest, measured)
        summary, modules_shown = summary_table(manifest), module_table(manifest)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ArtifactError(f"{directory}: its manifest does not say how it was made ({first_line(error)})") from error
    out.print(summary)
    for path, text in written.items():
        write_bytes(path, text.encode())
        out.print(f"{path}: {megabytes(len(text.encode()))}")
    if not written:
        out.print(modules_shown)
    modules = [{"name": name, **entry} for name, entry in manifest["modules"].items()]
    write_json(
        json_file, {key: manifest[key] for key in ("sparsity", "bytes", "encoding", "run")} | {"modules": modules}
    )


@app.command()
def check(directory: Directory) -> None:
    """Verify every file's hash and every matrix's structure; exit code 1 names what is wrong."""
    is_onnx = (directory / "model.onnx").is_file()
    problems, intact = _check_onnx(directory) if is_onnx else _check_artifact(directory)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckFailed(problems[0] + more)
    out.print(f"{directory}: {intact}")


def _check_artifact(directory: Path) -> tuple[list[str], str]:
    """What is wrong, or else what is intact."""
    from trim_export.artifact import open_artifact, verify_files

    try:
        artifact = open_artifact(directory)
    except ArtifactError as error:
        raise CheckFailed(str(error)) from error
    files, matrices = len(artifact.manifest["files"]), len(artifact.modules)
    return verify_files(artifact), f"{files} files and {matrices} matrices are intact"


def _check_onnx(directory: Path) -> tuple[list[str], str]:
    """The same of an ONNX directory, whose matrices a session checks when it is made."""
    from trim_export.runtimes.onnxruntime import open_session, verify_onnx

    try:
        problems = verify_onnx(directory)
        if not problems:
            open_session(directory)
    except ArtifactError as error:
        raise CheckFailed(str(error)) from error
    return problems, "its files are intact, and ONNX Runtime loads them"
