"""The command line: one thin function for each command. Results go to stdout, progress and errors to stderr."""

from __future__ import annotations

import errno
import json
import os
import resource
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import track as rich_track

import trim_export
from trim_export.errors import ArtifactError, CheckFailed, TrimExportError, UsageError, choose, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from trim_export.artifact import Artifact
    from trim_export.recipe import Recipe
    from trim_export.recover import Recovery

# Heavy imports (torch, transformers) happen inside the commands, so that --help and usage errors are immediate.

app = typer.Typer(
    name="trim-export",
    help="Prune large language models and run the result sparse.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(highlight=False, width=None if sys.stdout.isatty() else 160)  # a pipe has no width to fit
err = Console(stderr=True, highlight=False)
debug = False

Directory = Annotated[Path, typer.Argument(help="Artifact directory.", show_default=False)]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this JSON file.")]
Runtimes = Annotated[list[str] | None, typer.Option("--runtime", help="Runtime to use; repeat for several.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


def main() -> None:
    """Entry point: run a command and turn every failure into one sentence and an exit code."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; our own bars know when to be silent
    try:
        app()
    except TrimExportError as error:
        _fail(str(error), error.exit_code, error)
    except KeyboardInterrupt as error:
        _fail("interrupted; an unfinished run continues with --resume", 130, error)
    except MemoryError as error:
        _fail("out of memory; an unfinished run continues with --resume, perhaps with fewer --samples", 3, error)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _fail(f"no space left on the disk ({error.filename}); free some, then continue with --resume", 3, error)
        _fail(str(error), 3, error)
    except Exception as error:
        _fail(f"internal error: {type(error).__name__}: {error} (--debug shows where)", 70, error)


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


@app.command()
def prune(
    model: Annotated[str, typer.Option(help="Model directory, hub id, .gguf file, or smollm2-135m (bundled).")],
    sparsity: Annotated[float, typer.Option(help="Share of weights to prune, in [0, 1).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Artifact directory to write.")],
    recipe: Annotated[
        str, typer.Option(help="Starting point: best, fast, or paper (TRIM as published, to the bit).")
    ] = "best",
    score: Annotated[str | None, typer.Option(help="Importance: wanda, magnitude, ria, gblm (with gradients).")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layer budget: uniform, owl, alpha, dlp, lsa, lsa-projection, auto (by trial).")
    ] = None,
    rows: Annotated[
        str | None, typer.Option(help="Row budget: trim, uniform, matrix, lagrangian, anticipating (the update).")
    ] = None,
    update: Annotated[str | None, typer.Option(help="Weight update: none, refit, admm, sparsegpt, fista.")] = None,
    targets: Annotated[
        str | None, typer.Option(help="What an update fits to: own, dense, residual (makes up for earlier losses).")
    ] = None,
    head: Annotated[
        bool, typer.Option("--head", help="Prune the LM head too (an embedding tied to it stays dense).")
    ] = False,
    calibration: Annotated[
        str | None, typer.Option(help="Text or JSONL file, c4, wikitext2, or self (the model's own text).")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens of each window.")] = None,
    context_length: Annotated[
        int | None, typer.Option(min=0, help="Join short windows into sequences of up to this many tokens; 0: do not.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the calibration draw.")] = None,
    owl_strength: Annotated[float, typer.Option(help="OWL's lambda: half the spread of densities.")] = 0.08,
    owl_threshold: Annotated[float, typer.Option(help="OWL's M: outliers are above M times the mean.")] = 5.0,
    alpha_epsilon: Annotated[float, typer.Option(help="AlphaPruning's epsilon: half the relative spread.")] = 0.1,
    dlp_alpha: Annotated[float, typer.Option(help="DLP's alpha: half the spread of sparsities.")] = 0.1,
    lsa_beta: Annotated[float, typer.Option(help="LSA's beta: half the spread of sparsities.")] = 0.1,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished run of the same settings.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an artifact that is there.")] = False,
    data: Annotated[Path | None, typer.Option(help="Text to measure the pruned model's perplexity on.")] = None,
    json_file: Json = None,
) -> None:
    """Prune a model into a sparse artifact that `from_pretrained` loads."""
    from trim_export.recipe import make_recipe

    plan = make_recipe(
        recipe,
        sparsity,
        score=score,
        layers=_layer_budget(
            layers,
            {
                "owl": {"strength": owl_strength, "threshold": owl_threshold},
                "alpha": {"epsilon": alpha_epsilon},
                "dlp": {"alpha": dlp_alpha},
                "lsa": {"beta": lsa_beta},
                "lsa-projection": {"beta": lsa_beta},
            },
        ),
        rows=rows,
        update=update,
        targets=targets,
        head=head,
        calibration=calibration,
        samples=samples,
        sequence_length=sequence_length,
        context_length=context_length,
        seed=seed,
    )
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    result = _prune(model, plan, output, device, dtype, resume, overwrite, data)
    _write_json(json_file, result)


@app.command()
def recover(
    directory: Directory,
    output: Annotated[Path, typer.Option("--output", "-o", help="Artifact directory to write.")],
    calibration: Annotated[
        str, typer.Option(help="Text or JSONL file, c4, wikitext2, or self (the dense model's own text).")
    ],
    method: Annotated[
        str, typer.Option(help="blocks (one decoder block at a time), or spp (adapters of the whole model).")
    ] = "blocks",
    model: Annotated[
        str | None, typer.Option(help="The dense model, where prune cannot have it from the same place again.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Windows, of which an eighth is held out.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens of each window.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of the optimizer: for each block, or for the model.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="At its highest.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the windows and the adapters.")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory and more time, for spp.")
    ] = False,
    device: Device = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished run of the same settings.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an artifact that is there.")] = False,
    data: Annotated[Path | None, typer.Option(help="Text to measure perplexity on, before and after.")] = None,
    json_file: Json = None,
) -> None:
    """Train the kept weights of an artifact towards the dense model; every zero stays zero."""
    from trim_export.recover import make_recovery

    recovery = make_recovery(
        method,
        calibration,
        samples=samples,
        sequence_length=sequence_length,
        steps=steps,
        learning_rate=learning_rate,
        seed=seed,
        gradient_checkpointing=gradient_checkpointing,
    )
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    result = _recover(directory, recovery, output, model, device, resume, overwrite, data)
    _write_json(json_file, result)


@app.command()
def convert(
    directory: Directory,
    to: Annotated[str, typer.Option(help="bitmap, csr, bsr, bitmap-4x64, dense or scipy.")],
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
    _write_json(json_file, result)


@app.command()
def verify(directory: Directory, runtime: Runtimes = None, json_file: Json = None) -> None:
    """Compare every runtime with the dense masked model on real prompts; exit code 1 outside the tolerances."""
    from trim_export.report import table

    artifact = _open_quietly(directory)
    from trim_export.runtimes import available_runtimes
    from trim_export.verify import verify as verify_artifact

    result = verify_artifact(artifact, _tokenizer(directory), runtime or available_runtimes())
    out.print(
        table(
            "parity with the dense masked model in float32 (prefill and cached decode)",
            ("runtime", "dtype", "max |diff|", "KL", "argmax agreement", "tolerance", "passed"),
            [
                (
                    row["name"],
                    row["dtype"],
                    f"{row['max_abs_diff']:.2e}",
                    f"{row['kl']:.2e}",
                    f"{row['argmax_agreement']:.4f}",
                    f"KL <= {row['tolerance']['kl']:g}, agreement >= {row['tolerance']['argmax_agreement']:g}",
                    "yes" if row["passed"] else "NO",
                )
                for row in result["runtimes"]
            ],
        )
    )
    _write_json(json_file, result)
    if not result["passed"]:
        failed = [row["name"] for row in result["runtimes"] if not row["passed"]]
        raise CheckFailed(f"{directory}: outside the tolerance: {', '.join(failed)}")


@app.command()
def bench(
    directory: Directory,
    runtime: Runtimes = None,
    device: Device = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of each process.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Sequences at a time; repeat for several.")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prefill.")] = 128,
    generate: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 5,
    json_file: Json = None,
) -> None:
    """Measure latency and memory of each runtime against the dense model, interleaved, each in its own process."""
    artifact = _open_quietly(directory)

    from trim_export.bench import Workload, contestants
    from trim_export.bench import bench as bench_artifact
    from trim_export.forward import choose_device
    from trim_export.report import bench_table
    from trim_export.runtimes import available_runtimes

    place = choose_device(device).type
    workload = Workload(tuple(batch or (1,)), prompt, generate, repeats, threads, place)
    result = bench_artifact(artifact, contestants(artifact, runtime or available_runtimes(place)), workload)
    out.print(bench_table(result))
    _write_json(json_file, result)


@app.command(name="eval")
def evaluate(
    source: Annotated[str, typer.Argument(help="Artifact directory, or a model as for prune.", show_default=False)],
    data: Annotated[Path, typer.Option(help="Text or JSONL file.")],
    task: Annotated[str, typer.Option(help="perplexity.")] = "perplexity",
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens of each window.")] = 1024,
    windows: Annotated[int, typer.Option(min=1, help="Consecutive windows to score.")] = 8,
    first_window: Annotated[int, typer.Option(min=0, help="Windows to skip.")] = 0,
    runtime: Annotated[str, typer.Option(help="Runtime that executes an artifact.")] = "dense",
    json_file: Json = None,
) -> None:
    """Measure a model or an artifact on a text."""
    if task != "perplexity":
        raise UsageError(f"unknown task {task!r}; known: perplexity")
    from trim_export.calibration import read_text

    text = read_text(str(data), windows * sequence_length)
    model, tokenizer = _load_any(source, runtime)
    score = _perplexity(model, tokenizer, text, sequence_length, windows, first_window)
    result = {"tasks": {"perplexity": score}}
    from trim_export.report import table

    out.print(
        table(
            f"{source} on {data.name}",
            ("task", "value", "windows", "tokens"),
            [("perplexity", f"{score['value']:.4f}", score["windows"], score["tokens"])],
        )
    )
    _write_json(json_file, result)


@app.command()
def generate(
    directory: Directory,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    runtime: Annotated[str, typer.Option(help="Runtime to use.")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
) -> None:
    """Continue a prompt (greedy)."""
    _open_quietly(directory)
    from trim_export.runtimes import load

    tokenizer = _tokenizer(directory)
    tokens = tokenizer(prompt, return_tensors="pt")
    if tokens["input_ids"].shape[1] == 0:
        raise UsageError("the prompt is empty")
    model: Any = load(directory, runtime)
    text = model.generate(**tokens, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0)
    print(tokenizer.decode(text[0], skip_special_tokens=True))


@app.command()
def inspect(directory: Directory, json_file: Json = None) -> None:
    """Show what an artifact holds, matrix by matrix."""
    from trim_export.artifact import open_artifact
    from trim_export.report import module_table, summary_table

    manifest = open_artifact(directory).manifest
    out.print(summary_table(manifest))
    out.print(module_table(manifest))
    modules = [{"name": name, **entry} for name, entry in manifest["modules"].items()]
    _write_json(
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


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="As for prune.")],
    sparsity: Annotated[float, typer.Option(help="Share of weights to prune, in [0, 1).")],
    recipe: Annotated[str, typer.Option(help="As for prune.")] = "best",
    samples: Annotated[int | None, typer.Option(help="Calibration windows.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens of each window.")] = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    json_file: Json = None,
) -> None:
    """Predict memory, disk and time of a pruning run from the model's configuration."""
    from trim_export.forward import choose_compute
    from trim_export.models import dtype_name, load_skeleton, quiet_transformers
    from trim_export.plan import predict
    from trim_export.recipe import make_recipe
    from trim_export.report import facts, megabytes

    quiet_transformers()
    chosen = make_recipe(recipe, sparsity, samples=samples, sequence_length=sequence_length)
    skeleton, stored = load_skeleton(model, dtype)
    prediction = predict(skeleton, stored, chosen, choose_compute(device, stored))
    out.print(
        facts(
            f"prediction for {model} at sparsity {sparsity:g}, recipe {recipe} ({dtype_name(stored)})",
            [
                ("parameters", f"{prediction.parameters / 1e6:,.1f} M, {prediction.prunable / 1e6:,.1f} M prunable"),
                ("dense weight files", megabytes(prediction.dense_bytes)),
                ("artifact weight files", megabytes(prediction.artifact_bytes)),
                ("peak memory", megabytes(prediction.peak_memory_bytes)),
                ("pruning time", f"{prediction.seconds:,.0f} s, and writing its own text if --calibration self"),
            ],
        )
    )
    _write_json(json_file, prediction.as_json())


def _layer_budget(name: str | None, parameters: dict[str, dict[str, float]]) -> Any:
    """The layer budget of that name with its parameters; None when none was named."""
    from trim_export.layer_budgets import LAYER_BUDGETS, Auto

    if name is None:
        return None
    kind = choose("layer budget", name, LAYER_BUDGETS)
    if kind is Auto:
        return Auto(tuple(_layer_budget(budget.name, parameters) for budget in Auto().alternatives))
    return kind(**parameters.get(name, {}))


def _prune(
    source: str, recipe: Recipe, output: Path, device: str, dtype: str, resume: bool, overwrite: bool, data: Path | None
) -> dict[str, Any]:
    from trim_export.artifact_writer import remove_artifact, require_room
    from trim_export.calibration import calibration_windows, read_text
    from trim_export.forward import choose_compute, choose_device
    from trim_export.models import decoder_blocks, load_model, quiet_transformers, unprunable_matrices
    from trim_export.prune import prune as prune_model
    from trim_export.report import block_table, choice_sentence, choice_table, facts, summary_table

    quiet_transformers()
    begin = time.perf_counter()
    require_room(output, resume, overwrite)
    choose_device(device)
    if recipe.calibration != "self":
        read_text(recipe.calibration, recipe.samples * recipe.sequence_length)
    text = None if data is None else read_text(str(data), 8 * 1024)
    dense = load_model(source, dtype)
    skipped = [
        f"{name}.{path}" for name, block in decoder_blocks(dense.model).items() for path in unprunable_matrices(block)
    ]
    if skipped:
        err.print(f"warning: {len(skipped)} matrices are not nn.Linear and stay dense: {', '.join(skipped[:4])} ...")
    compute = choose_compute(device, dense.model.dtype)
    tokens = calibration_windows(
        recipe.calibration, dense.model, dense.tokenizer, recipe.samples, recipe.sequence_length, recipe.seed
    )
    calibrated = time.perf_counter()
    if overwrite:
        remove_artifact(output)
    artifact = prune_model(dense, recipe, tokens, output, compute, resume, _track)
    measured, rows = _cost("prune", begin, calibrated)
    manifest = artifact.manifest
    choice = manifest.get("layer_choice")
    if choice is not None:
        out.print(choice_sentence(choice))
        out.print(choice_table(choice))
    out.print(block_table(manifest))
    out.print(summary_table(manifest))
    if text is not None:
        measured["perplexity"] = _perplexity(dense.model, dense.tokenizer, text, 1024, 8, 0)
        rows.append(("perplexity, first 8 x 1024 tokens of --data", f"{measured['perplexity']['value']:.2f}"))
    out.print(facts("this run", rows))
    about = {"artifact": str(output), "sparsity": manifest["sparsity"], "bytes": manifest["bytes"]}
    return {**about, "layer_choice": choice, **measured}


def _recover(
    directory: Path,
    recovery: Recovery,
    output: Path,
    model: str | None,
    device: str,
    resume: bool,
    overwrite: bool,
    data: Path | None,
) -> dict[str, Any]:
    from trim_export.artifact_writer import remove_artifact, require_room
    from trim_export.calibration import read_text, training_windows
    from trim_export.forward import choose_compute, choose_device
    from trim_export.models import quiet_transformers
    from trim_export.recover import load_teacher, open_intact
    from trim_export.recover import recover as recover_artifact
    from trim_export.report import facts, recovery_table, summary_table
    from trim_export.runtimes import load
    from trim_export.training import held_out_windows

    quiet_transformers()
    begin = time.perf_counter()
    artifact = open_intact(directory, output)
    require_room(output, resume, overwrite)
    choose_device(device)
    if recovery.calibration != "self":
        read_text(recovery.calibration, recovery.samples * recovery.sequence_length)
    text = None if data is None else read_text(str(data), 8 * 1024)
    dense = load_teacher(artifact, model)
    tokens = training_windows(
        recovery.calibration,
        dense.model,
        dense.tokenizer,
        recovery.samples,
        recovery.sequence_length,
        recovery.seed,
        held_out_windows(recovery.samples),
    )
    calibrated = time.perf_counter()
    if overwrite:
        remove_artifact(output)
    compute = choose_compute(device, dense.model.dtype)
    recovered = recover_artifact(artifact, dense, recovery, tokens, output, compute, resume, _track)
    measured, rows = _cost("recover", begin, calibrated)
    manifest = recovered.manifest
    out.print(recovery_table(manifest))
    out.print(summary_table(manifest))
    if text is not None:
        for when, path in (("before", directory), ("after", output)):
            score = _perplexity(load(path, "dense"), dense.tokenizer, text, 1024, 8, 0)
            measured[f"perplexity_{when}"] = score
            rows.append((f"perplexity {when}, first 8 x 1024 tokens of --data", f"{score['value']:.2f}"))
    out.print(facts("this run", rows))
    return {"artifact": str(output), "sparsity": manifest["sparsity"], "recovery": manifest["recovery"], **measured}


def _cost(work: str, begin: float, calibrated: float) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """What a run took until now, as JSON and as lines of a table."""
    from trim_export.report import megabytes

    now = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": now - begin, f"{work}_seconds": now - calibrated, "peak_memory_bytes": peak}, [
        ("time", f"{now - begin:.1f} s"),
        ("of it after loading and calibration text", f"{now - calibrated:.1f} s"),
        ("peak memory of this process", megabytes(peak)),
    ]


def _perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, length: int, windows: int, first: int
) -> dict[str, Any]:
    from dataclasses import asdict

    from trim_export.calibration import consecutive_windows, token_stream
    from trim_export.evaluate import perplexity

    return asdict(perplexity(model, consecutive_windows(token_stream(text, tokenizer), length, windows, first)))


def _load_any(source: str, runtime: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An artifact through a runtime, or a dense model."""
    from trim_export.artifact import JOURNAL, MANIFEST, open_artifact
    from trim_export.models import load_model, quiet_transformers
    from trim_export.runtimes import load

    quiet_transformers()
    path = Path(source)
    if (path / MANIFEST).exists() or (path / JOURNAL).exists():
        open_artifact(path)
        return load(path, runtime), _tokenizer(path)
    dense = load_model(source)
    return dense.model, dense.tokenizer


def _open_quietly(directory: Path) -> Artifact:
    from trim_export.artifact import open_artifact
    from trim_export.models import quiet_transformers

    artifact = open_artifact(directory)
    quiet_transformers()
    return artifact


def _tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{directory}: its tokenizer cannot be read ({first_line(error)})") from error
    return tokenizer


def _parse_block(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise UsageError(f"block {text!r} is not ROWSxCOLUMNS, as in 16x16")
    return int(sides[0]), int(sides[1])


def _track(items: Iterable[Any], description: str) -> Iterable[Any]:
    """A progress bar with the time left on stderr, nothing when that is not a terminal."""
    return rich_track(list(items), description, console=err, disable=not err.is_terminal)


def _write_json(path: Path | None, value: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _fail(sentence: str, code: int, error: BaseException) -> NoReturn:
    if debug:
        err.print_exception()
    err.print(f"error: {sentence}", markup=False, soft_wrap=True)
    sys.exit(code)
