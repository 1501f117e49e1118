"""``trim-export prune`` and ``plan``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trim_export.cli.common import Device, Json, app, cost, err, measure_data, out, read_texts, track, write_json
from trim_export.cli.structured import Step, require_vacant, store_reduced, structured_step
from trim_export.errors import UsageError, choose

if TYPE_CHECKING:
    from trim_export.recipe import Recipe


@app.command()
def prune(
    model: Annotated[str, typer.Option(help="Model directory, hub id, .gguf file, or smollm2-135m (bundled).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Artifact directory to write.")],
    sparsity: Annotated[
        float | None,
        typer.Option(help="Share of weights to prune, in [0, 1); may be left out with --structured or an N:M pattern."),
    ] = None,
    structured: Annotated[
        str | None, typer.Option(help="First remove blocks or channels: pip, shortgpt, flap, last, random.")
    ] = None,
    remove: Annotated[float | None, typer.Option(help="Share of all parameters that --structured removes.")] = None,
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
    update: Annotated[
        str | None, typer.Option(help="Weight update: none, refit, admm, admm-10 (10 iterations), sparsegpt, fista.")
    ] = None,
    targets: Annotated[
        str | None, typer.Option(help="What an update fits to: own, dense, residual (makes up for earlier losses).")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="Where kept weights may lie: none, N:M (as 2:4) or block:RxC (as block:16x16).")
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

    if sparsity is None and pattern is not None:
        sparsity = _own_sparsity(pattern)
    step = structured_step(structured, remove, sparsity)
    plan = make_recipe(
        recipe,
        sparsity or 0.0,
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
        pattern=pattern,
        head=head,
        calibration=calibration,
        samples=samples,
        sequence_length=sequence_length,
        context_length=context_length,
        seed=seed,
    )
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    result = _prune(model, plan, step, sparsity is None, output, device, dtype, resume, overwrite, data)
    write_json(json_file, result)


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="As for prune.")],
    sparsity: Annotated[float, typer.Option(help="Share of weights to prune, in [0, 1).")],
    recipe: Annotated[str, typer.Option(help="As for prune.")] = "best",
    score: Annotated[str | None, typer.Option(help="As for prune.")] = None,
    layers: Annotated[str | None, typer.Option(help="As for prune.")] = None,
    rows: Annotated[str | None, typer.Option(help="As for prune.")] = None,
    update: Annotated[str | None, typer.Option(help="As for prune.")] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens of each window.")] = None,
    context_length: Annotated[int | None, typer.Option(min=0, help="As for prune.")] = None,
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
    chosen = make_recipe(
        recipe,
        sparsity,
        score=score,
        layers=_layer_budget(layers, {}),
        rows=rows,
        update=update,
        samples=samples,
        sequence_length=sequence_length,
        context_length=context_length,
    )
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
                (
                    "pruning time",
                    f"{prediction.seconds:,.0f} s on an idle machine; --calibration self writes its text first",
                ),
            ],
        )
    )
    write_json(json_file, prediction.as_json())


def _own_sparsity(text: str) -> float | None:
    """The sparsity of a pattern that has only one."""
    from trim_export.patterns import NofM, parse_pattern

    pattern = parse_pattern(text)
    return pattern.sparsity if isinstance(pattern, NofM) else None


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
    source: str,
    recipe: Recipe,
    step: Step | None,
    only_step: bool,
    output: Path,
    device: str,
    dtype: str,
    resume: bool,
    overwrite: bool,
    data: Path | None,
) -> dict[str, Any]:
    from trim_export.artifact_writer import remove_artifact, require_room
    from trim_export.calibration import calibration_windows
    from trim_export.forward import choose_compute, choose_device
    from trim_export.models import decoder_blocks, load_model, quiet_transformers, unprunable_matrices
    from trim_export.prune import prune as prune_model
    from trim_export.report import block_table, choice_sentence, choice_table, facts, summary_table

    quiet_transformers()
    begin = time.perf_counter()
    if only_step:
        require_vacant(output, overwrite)
    else:
        require_room(output, resume, overwrite)
    choose_device(device)
    text = read_texts(recipe.calibration, recipe.samples * recipe.sequence_length, data)
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
    if step is not None:
        dense = step.run(dense, tokens, compute, recipe.seed)
        if only_step:
            return store_reduced(dense, output, overwrite, text, cost("prune", begin, calibrated))
    if overwrite:
        remove_artifact(output)
    artifact = prune_model(dense, recipe, tokens, output, compute, resume, track)
    measured, rows = cost("prune", begin, calibrated)
    manifest = artifact.manifest
    choice = manifest.get("layer_choice")
    if choice is not None:
        out.print(choice_sentence(choice))
        out.print(choice_table(choice))
    out.print(block_table(manifest))
    out.print(summary_table(manifest))
    if text is not None:
        measured["perplexity"], row = measure_data(dense.model, dense.tokenizer, text)
        rows.append(row)
    out.print(facts("this run", rows))
    about = {"artifact": str(output), "sparsity": manifest["sparsity"], "bytes": manifest["bytes"]}
    return {**about, "layer_choice": choice, **measured}
