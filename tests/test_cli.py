"""The command line end to end, as a user calls it: exit code, stdout, stderr and JSON."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from rich.console import Console
from torch import nn

import trim_export
from trim_export.artifact import open_artifact
from trim_export.cli import main
from trim_export.runtimes import Layout, available_runtimes
from trim_export.runtimes.triton import TritonRuntime
from trim_export.runtimes.triton.timing import SPMV

TEXT = "The quick brown fox jumps over the lazy dog. " * 200


class Result(NamedTuple):
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str


def run(*arguments: object, check: int = 0) -> Result:
    """Run the entry point in this process; ``check`` is the exit code it must end with."""
    code, stdout, stderr = 0, io.StringIO(), io.StringIO()
    words = ["trim-export", *map(str, arguments)]
    with mock.patch.object(sys, "argv", words), redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    assert code == check, stderr.getvalue()
    return Result(code, stdout.getvalue(), stderr.getvalue())


def sentence(result: Result) -> str:
    """The one line that a failure prints, and nothing on stdout."""
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Path:
    return tiny("llama")


@pytest.fixture(scope="module")
def artifact(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A tiny artifact made by the command line, and what `prune --json` said of it."""
    place = tmp_path_factory.mktemp("cli")
    run(
        *("prune", "--model", model, "--sparsity", 0.5, "-o", place / "a", "--calibration", text),
        *("--samples", 8, "--sequence-length", 16, "--json", place / "prune.json"),
    )
    return place / "a", json.loads((place / "prune.json").read_text())


def test_prune_reports_what_it_made(artifact: tuple[Path, dict[str, Any]]) -> None:
    directory, report = artifact
    assert report["sparsity"]["target"] == 0.5
    assert abs(report["sparsity"]["achieved"] - 0.5) < 1e-3
    stored = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    assert report["bytes"]["artifact"] == stored
    assert report["peak_memory_bytes"] > 0


@pytest.mark.parametrize(
    "options",
    [
        ("--score", "gblm"),
        ("--score", "ria"),
        ("--rows", "lagrangian"),
        ("--rows", "anticipating"),
        ("--score", "gblm", "--rows", "lagrangian", "--update", "none"),
    ],
    ids=" ".join,
)
def test_scores_and_row_budgets_give_artifacts_that_run(
    options: tuple[str, ...], model: Path, text: Path, tmp_path: Path
) -> None:
    out, report = tmp_path / "a", tmp_path / "i.json"
    run(
        *("prune", "--model", model, "--sparsity", 0.6, "-o", out, "--calibration", text),
        *("--samples", 8, "--sequence-length", 16, "--layers", "uniform"),
        *(options if "--rows" in options else (*options, "--rows", "uniform")),
    )
    run("verify", out, "--runtime", "torch-sparse")
    run("inspect", out, "--json", report)
    result = json.loads(report.read_text())
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert {f"--{name}": result["run"]["recipe"][name] for name in ("score", "rows", "update")}.items() >= given.items()
    for module in result["modules"]:
        size = module["shape"][0] * module["shape"][1]
        assert size - module["nnz"] == round(0.6 * size)
        assert module["row_sparsity"]["max"] <= 0.95
    spread = max(module["row_sparsity"]["max"] - module["row_sparsity"]["min"] for module in result["modules"])
    assert spread > 0.1 if "--rows" in given else spread < 0.05


def test_verify_passes_and_writes_the_promised_json(artifact: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run("verify", artifact[0], "--json", tmp_path / "v.json")
    result = json.loads((tmp_path / "v.json").read_text())
    assert result["passed"] is True
    assert [row["name"] for row in result["runtimes"]] == available_runtimes()
    for row in result["runtimes"]:
        assert {"name", "max_abs_diff", "kl", "argmax_agreement", "passed"} <= row.keys()


def test_bench_writes_the_promised_json(artifact: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run(
        *("bench", artifact[0], "--batch", 1, "--batch", 2, "--prompt", 8, "--generate", 3, "--repeats", 1),
        *("--threads", 1, "--json", tmp_path / "b.json"),
        *(("--lm-head", "int8", "--values", "int8") if "native" in available_runtimes() else ()),
    )
    result = json.loads((tmp_path / "b.json").read_text())
    assert result["machine"]["threads"] == 1
    if "native" in available_runtimes():
        held = {row["runtime"]: row["weight_bytes"] for row in result["rows"]}
        assert held["native, int8 values, int8 head"] < held["native"]
    cells = {(row["runtime"], row["dtype"], row["phase"], row["batch"]) for row in result["rows"]}
    assert ("torch-sparse", "float32", "decode", 2) in cells
    assert ("dense", "bfloat16", "prefill", 1) in cells
    promised = {"runtime", "dtype", "phase", "batch", "tokens", "median_ms", "min_ms", "tokens_per_s", "weight_bytes"}
    promised |= {"peak_memory_bytes", "ratio_to_dense"}
    for row in result["rows"]:
        assert promised <= row.keys()
        assert row["min_ms"] <= row["median_ms"]
        if (row["runtime"], row["dtype"]) == ("dense", "float32"):
            assert row["ratio_to_dense"] == 1


@pytest.mark.skipif("native" not in available_runtimes(), reason="installed without the library")
def test_rounded_values(artifact: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    for values, kl in (("int8", 0.1), ("bfloat16", 0.02)):
        run("verify", artifact[0], "--values", values, "--json", tmp_path / "v.json")
        (row,) = json.loads((tmp_path / "v.json").read_text())["runtimes"]
        assert row["name"] == "native"
        assert row["tolerance"]["kl"] == kl
        assert 1e-9 < row["kl"] < kl
    run("generate", artifact[0], "--prompt", "quick brown", "--values", "int8", "--max-new-tokens", 2)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    words = ("eval", artifact[0], "--data", text, "--sequence-length", 8, "--windows", 2, "--values", "int8")
    run(*words, "--runtime", "native", "--json", tmp_path / "e.json")
    assert json.loads((tmp_path / "e.json").read_text())["values"] == "int8"
    assert "runtime dense holds values as they are stored" in sentence(run(*words, check=2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_tuning_without_a_gpu_is_one_sentence(artifact: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    said = sentence(run("bench", artifact[0], "--tune", tmp_path / "t.json", check=3))
    assert "no CUDA device here" in said
    assert not any(tmp_path.iterdir())


def test_tuning_times_every_layer_and_adds_to_the_table(
    artifact: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "t.json"
    table.write_text('{"other": {"gathered_tokens": 2, "waves": 1}}')
    kinds: list[set[str]] = []

    def gpu_times(entries: dict[str, object], device: torch.device) -> dict[str, list[float]]:
        kinds.append(set(entries))
        return {name: [float(place)] for place, name in enumerate(sorted(entries))}

    def load(directory: Path, runtime: str, device: str) -> nn.Module:
        assert (runtime, device) == ("triton", "cuda")
        layout = Layout(torch.device("cpu"))
        layers = [TritonRuntime().linear(matrix, None, layout) for _, matrix in open_artifact(directory).matrices()]
        return nn.ModuleList(layers)

    monkeypatch.setattr("trim_export.runtimes.load", load)
    monkeypatch.setattr("trim_export.runtimes.triton.timing.gpu_times", gpu_times)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "this")
    run("bench", artifact[0], "--tune", table, "--json", tmp_path / "b.json")
    chosen = {"gathered_tokens": 1, "waves": 1}  # the names in order: expand before spmm, fewer waves before more
    assert json.loads(table.read_text()) == {"other": {"gathered_tokens": 2, "waves": 1}, "this": chosen}
    assert json.loads((tmp_path / "b.json").read_text()) == {"gpu": "this", **chosen}
    assert kinds.count({"expand", "spmm"}) == 4 * kinds.count({"expand", *SPMV}) > 0


def test_eval_measures_an_artifact_and_its_dense_model(
    artifact: tuple[Path, dict[str, Any]], model: Path, text: Path, tmp_path: Path
) -> None:
    values = {}
    for name, source in {"sparse": artifact[0], "dense": model}.items():
        run(
            *("eval", source, "--task", "perplexity", "--data", text, "--sequence-length", 32, "--windows", 3),
            *("--json", tmp_path / "e.json"),
        )
        values[name] = json.loads((tmp_path / "e.json").read_text())["tasks"]["perplexity"]
    assert values["sparse"]["windows"] == 3
    assert values["sparse"]["tokens"] == 3 * 31
    assert values["sparse"]["value"] != values["dense"]["value"]


@pytest.mark.parametrize("target", ["csr", "bsr", "bitmap", "bitmap-4x64", "g8"])
def test_convert_makes_an_artifact_that_verifies(
    artifact: tuple[Path, dict[str, Any]], target: str, tmp_path: Path
) -> None:
    run("convert", artifact[0], "--to", target, "-o", tmp_path / "b")
    run("check", tmp_path / "b")
    run("verify", tmp_path / "b")


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (("verify", "ARTIFACT", "--runtime", "dense"), "dense: reading"),
        (("eval", "ARTIFACT", "--data", "TEXT", "--sequence-length", 8, "--windows", 2), "perplexity"),
        (("convert", "ARTIFACT", "--to", "csr", "-o", "OUT"), "writing shards"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_progress_is_for_terminals(
    words: tuple[object, ...], shown: str, artifact: tuple[Path, dict[str, Any]], text: Path, tmp_path: Path
) -> None:
    places: dict[object, Path] = {"ARTIFACT": artifact[0], "TEXT": text, "OUT": tmp_path / "a"}
    assert run(*(places.get(word, word) for word in words)).stderr == ""
    places["OUT"] = tmp_path / "b"
    terminal = io.StringIO()
    with mock.patch("trim_export.cli.common.err", Console(file=terminal, force_terminal=True, width=100)):
        run(*(places.get(word, word) for word in words))
    assert shown in terminal.getvalue()
    assert "100%" in terminal.getvalue()


def test_generate_continues_the_prompt_the_same_with_every_runtime(artifact: tuple[Path, dict[str, Any]]) -> None:
    said = {
        name: run("generate", artifact[0], "--prompt", "quick brown", "--runtime", name, "--max-new-tokens", 5).stdout
        for name in available_runtimes()
    }
    assert {"dense", "torch-sparse"} <= said.keys()
    assert set(said.values()) == {said["dense"]}
    assert len(said["dense"].strip()) > 0


def test_inspect_lists_every_matrix(artifact: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    shown = run("inspect", artifact[0], "--json", tmp_path / "i.json").stdout
    result = json.loads((tmp_path / "i.json").read_text())
    assert {"sparsity", "bytes", "modules"} <= result.keys()
    assert result["bytes"].keys() == {"artifact", "dense"}
    for module in result["modules"]:
        assert module["name"] in shown


def test_check_names_a_damaged_file(artifact: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    shutil.copytree(artifact[0], tmp_path / "a")
    shard = tmp_path / "a" / "block-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert "block-00001.safetensors" in sentence(run("check", tmp_path / "a", check=1))


@pytest.mark.parametrize("method", ["blocks", "spp"])
def test_recover_makes_an_artifact_that_checks_and_verifies(
    method: str, artifact: tuple[Path, dict[str, Any]], model: Path, text: Path, tmp_path: Path
) -> None:
    shown = run(
        *("recover", artifact[0], "-o", tmp_path / "b", "--method", method, "--calibration", text, "--model", model),
        *("--samples", 16, "--sequence-length", 16, "--steps", 8, "--json", tmp_path / "r.json"),
    ).stdout
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["recovery"]["calibration"] == "text.txt"
    for loss in result["recovery"]["losses"].values():
        assert loss["after"] < loss["before"]
        assert f"{loss['before']:.5f}" in shown
    run("check", tmp_path / "b")
    run("verify", tmp_path / "b")
    assert f"{method}, 8 steps" in run("inspect", tmp_path / "b").stdout
    assert result["sparsity"] == artifact[1]["sparsity"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--method", "blocs"], 2, "did you mean blocks?"),
        (["--samples", "1"], 2, "too few"),
        (["--steps", "0"], 2, "steps must be at least 1"),
        (["--learning-rate", "-1"], 2, "not a positive number"),
        (["--calibration", "nowhere.txt"], 2, "nowhere.txt: no such text file"),
        (["--sequence-length", "2000"], 2, "too few for a window of 2000"),
        (["--model", "nowhere/at/all"], 2, "neither a model directory"),
        (["--device", "cuda"], 3, "no CUDA device"),
        (["-o", "{artifact}"], 2, "holds the artifact"),
        (["-o", "{artifact}", "--overwrite"], 2, "holds the artifact"),
        (["-o", "{model}"], 2, "not empty and not an artifact"),
        (["--resume", "--overwrite"], 2, "exclude each other"),
    ],
)
def test_bad_input_to_recover_is_one_sentence_and_writes_nothing(
    arguments: list[str],
    code: int,
    said: str,
    artifact: tuple[Path, dict[str, Any]],
    model: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    before = hashes(artifact[0])
    given = [word.format(artifact=artifact[0], model=model) for word in arguments]
    words = ["-o", tmp_path / "b", "--calibration", text, "--model", model, *given]  # the last of two values counts
    assert said in sentence(run("recover", artifact[0], *words, check=code))
    assert not (tmp_path / "b").exists()
    assert hashes(artifact[0]) == before


def test_plan_predicts_the_artifact_size(artifact: tuple[Path, dict[str, Any]], model: Path, tmp_path: Path) -> None:
    run("plan", "--model", model, "--sparsity", 0.5, "--json", tmp_path / "p.json")
    predicted = json.loads((tmp_path / "p.json").read_text())["artifact_bytes"]
    # The safetensors headers, which the prediction leaves out, weigh much in a tiny model.
    assert 0.6 * artifact[1]["bytes"]["artifact"] < predicted <= artifact[1]["bytes"]["artifact"]


def test_resume_of_a_finished_run_changes_nothing(
    artifact: tuple[Path, dict[str, Any]], model: Path, text: Path
) -> None:
    before = hashes(artifact[0])
    run(
        *("prune", "--model", model, "--sparsity", 0.5, "-o", artifact[0], "--calibration", text),
        *("--samples", 8, "--sequence-length", 16, "--resume"),
    )
    assert hashes(artifact[0]) == before


def test_layers_chosen_by_trial_from_the_command_line(model: Path, text: Path, tmp_path: Path) -> None:
    shown = run(
        *("prune", "--model", model, "--sparsity", 0.6, "-o", tmp_path / "a", "--calibration", text),
        *("--update", "refit", "--samples", 12, "--sequence-length", 16, "--context-length", 0),
        *("--layers", "auto", "--owl-strength", 0.05),
        *("--json", tmp_path / "p.json"),
    ).stdout
    choice = json.loads((tmp_path / "p.json").read_text())["layer_choice"]
    candidates = {result["budget"]["name"]: result for result in choice["candidates"]}
    assert list(candidates) == ["uniform", "owl", "alpha", "dlp", "lsa", "lsa-projection"]
    assert candidates["owl"]["budget"]["strength"] == 0.05
    best = min(candidates.values(), key=lambda result: result["kl"])
    assert choice["chosen"] == best["budget"]
    assert (choice["trial_sequences"], choice["held_out_sequences"]) == (4, 4)
    uniform = candidates["uniform"]["kl"]
    against = f" against uniform {uniform:.4g}" if best is not candidates["uniform"] else ""
    sentence = f"layer budget: {choice['chosen']['name']}, KL {best['kl']:.4g}{against} on 4 held-out sequences"
    assert sentence in shown.splitlines()
    assert "owl (strength 0.05, threshold 5)" in shown
    run("check", tmp_path / "a")


def test_a_sparsity_for_each_projection_from_the_command_line(model: Path, text: Path, tmp_path: Path) -> None:
    run(
        *("prune", "--model", model, "--sparsity", 0.6, "-o", tmp_path / "a", "--calibration", text),
        *("--update", "none", "--samples", 8, "--sequence-length", 16),
        *("--layers", "lsa-projection", "--lsa-beta", 0.05),
    )
    run("inspect", tmp_path / "a", "--json", tmp_path / "i.json")
    result = json.loads((tmp_path / "i.json").read_text())
    assert abs(result["sparsity"]["achieved"] - 0.6) < 1e-3
    manifest = json.loads((tmp_path / "a" / "trim_manifest.json").read_text())
    assert manifest["run"]["recipe"]["layers"]["beta"] == 0.05
    assert len({entry["target_sparsity"] for entry in manifest["modules"].values()}) == len(manifest["modules"])
    run("verify", tmp_path / "a")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--sparsity", "1"], 2, "outside [0, 1)"),
        (["--sparsity", "-0.1"], 2, "outside [0, 1)"),
        (["--sparsity", "0.97", "--rows", "trim"], 2, "cap"),
        (["--score", "wandaa"], 2, "did you mean wanda?"),
        (["--layers", "owls"], 2, "did you mean owl?"),
        (["--layers", "lsaprojection"], 2, "did you mean lsa-projection?"),
        (["--layers", "auto", "--samples", "7"], 2, "needs 8 calibration sequences or more"),
        (["--layers", "dlp", "--sparsity", "0.96"], 2, "use --layers uniform"),
        (["--layers", "dlp", "--dlp-alpha", "1"], 2, "DLP needs an alpha in [0, 1)"),
        (["--layers", "auto", "--lsa-beta", "-1"], 2, "LSA needs a beta in [0, 1)"),
        (["--rows", "anticipating", "--update", "none"], 2, "rows anticipating needs a weight update"),
        (["--rows", "lagrangian", "--sparsity", "0.97"], 2, "cap"),
        (["--score", "gblm", "--sequence-length", "1"], 2, "at least 2 tokens"),
        (["--rows", "x"], 2, "known: anticipating, lagrangian, matrix, trim, uniform"),
        (["--recipe", "x"], 2, "known: best, fast, paper"),
        (["--calibration", "nowhere.txt"], 2, "nowhere.txt: no such text file"),
        (["--samples", "0"], 2, "samples must be at least 1"),
        (["--device", "cuda"], 3, "no CUDA device"),
        (["--dtype", "float8"], 2, "unknown dtype"),
        (["--resume", "--overwrite"], 2, "exclude each other"),
        (["--model", "nowhere/at/all"], 2, "neither a model directory"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    arguments: list[str], code: int, said: str, model: Path, text: Path, tmp_path: Path
) -> None:
    options = {"--model": str(model), "--sparsity": "0.5", "--calibration": str(text), "-o": str(tmp_path / "a")}
    given = dict(zip(arguments[::2], arguments[1::2], strict=True)) if arguments[0] != "--resume" else {}
    flags = [] if given else arguments
    words = [word for pair in (options | given).items() for word in pair]
    assert said in sentence(run("prune", *words, *flags, check=code))
    assert not (tmp_path / "a").exists()


def test_too_short_a_text_is_refused_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    result = run(
        *("prune", "--model", model, "--sparsity", 0.5, "-o", tmp_path / "a", "--calibration", tmp_path / "short.txt"),
        check=2,
    )
    assert "too few for a window of 128" in sentence(result)
    assert not (tmp_path / "a").exists()


def test_another_directory_is_never_overwritten(model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for flags in ([], ["--overwrite"], ["--resume"]):
        result = run(
            *("prune", "--model", model, "--sparsity", 0.5, "-o", tmp_path, "--calibration", text, *flags), check=2
        )
        assert "not empty and not an artifact" in sentence(result)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("command", ["verify", "bench", "inspect", "generate", "convert", "recover"])
def test_commands_refuse_what_is_no_artifact(command: str, tmp_path: Path) -> None:
    extra = {
        "generate": ["--prompt", "x"],
        "convert": ["--to", "csr", "-o", str(tmp_path / "b")],
        "recover": ["--calibration", "self", "-o", str(tmp_path / "b")],
    }.get(command, [])
    assert "not a trim-export artifact" in sentence(run(command, tmp_path, *extra, check=2))


def test_the_module_runs_as_a_process_of_its_own() -> None:
    words = [sys.executable, "-m", "trim_export", "--version"]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip() == trim_export.__version__


def test_debug_shows_the_trace(tmp_path: Path) -> None:
    assert "Traceback" in run("--debug", "inspect", tmp_path, check=2).stderr


def hashes(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()}


def test_structured_pruning_gives_a_model_that_can_be_pruned_further(model: Path, text: Path, tmp_path: Path) -> None:
    words = ("prune", "--model", model, "--calibration", text, "--samples", 4, "--sequence-length", 16)
    run(*words, "--structured", "shortgpt", "--remove", 0.3, "-o", tmp_path / "small", "--json", tmp_path / "s.json")
    alone = json.loads((tmp_path / "s.json").read_text())["structured"]
    assert len(alone["removed"]["blocks"]) == 1
    two_steps = ("prune", "--model", tmp_path / "small", *words[3:])
    run(*two_steps, "--sparsity", 0.5, "-o", tmp_path / "two")
    run(*words, "--structured", "shortgpt", "--remove", 0.3, "--sparsity", 0.5, "-o", tmp_path / "one")
    manifests = [json.loads((tmp_path / name / "trim_manifest.json").read_text()) for name in ("one", "two")]
    assert all(manifest["source"]["structured"] == alone for manifest in manifests)
    assert [manifest["modules"] for manifest in manifests[:1]] == [manifests[1]["modules"]]
    assert "shortgpt removed decoder blocks" in run("inspect", tmp_path / "one").stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--structured", "pop", "--remove", 0.3), "unknown structured method 'pop' (did you mean pip?)"),
        (("--structured", "pip"), "--structured pip needs --remove SHARE"),
        (("--remove", 0.3), "--remove needs --structured NAME"),
        ((), "give --sparsity, or --structured with --remove, or both"),
        (("--structured", "last", "--remove", 0.9), "--remove 0.9 asks for"),
        (("--structured", "last", "--remove", 1.5), "--remove 1.5 is outside (0, 1)"),
    ],
    ids=str,
)
def test_impossible_structured_steps_write_nothing(
    options: tuple[object, ...], message: str, model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "small"
    words = ("prune", "--model", model, "--calibration", text, "--samples", 4, "--sequence-length", 16, "-o", out)
    assert message in sentence(run(*words, *options, check=2))
    assert not list(tmp_path.iterdir())


def test_inspect_writes_a_page_and_a_card(artifact: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the report extra is not installed")
    page, card = tmp_path / "r.html", tmp_path / "card.md"
    run("inspect", artifact[0], "--html", page, "--markdown", card)
    assert page.read_text().startswith("<!doctype html>")
    assert card.read_text() == (artifact[0] / "README.md").read_text()
    other = tmp_path / "bench.json"
    other.write_text("{}")
    page.unlink()
    assert "no 'machine' in it" in sentence(run("inspect", artifact[0], "--html", page, "--bench", other, check=2))
    assert not page.exists()


def test_eval_beside_a_reference(
    artifact: tuple[Path, dict[str, Any]], model: Path, text: Path, tmp_path: Path
) -> None:
    words = ("eval", artifact[0], "--reference", model, "--data", text, "--sequence-length", 32, "--windows", 3)
    run(*words, "--task", "perplexity", "--task", "divergence", "--json", tmp_path / "e.json")
    result = json.loads((tmp_path / "e.json").read_text())
    run("eval", model, "--data", text, "--sequence-length", 32, "--windows", 3, "--json", tmp_path / "d.json")
    dense = json.loads((tmp_path / "d.json").read_text())["tasks"]["perplexity"]["value"]
    assert result["tasks"]["perplexity"]["reference"] == pytest.approx(dense)
    assert result["tasks"]["divergence"]["kl"] > 1e-3
    assert 0 <= result["tasks"]["divergence"]["argmax_agreement"] < 1
    run(*words[:1], model, *words[2:], "--task", "divergence", "--json", tmp_path / "same.json")
    same = json.loads((tmp_path / "same.json").read_text())["tasks"]["divergence"]
    assert same["kl"] == pytest.approx(0, abs=1e-9)
    assert same["argmax_agreement"] == 1
    card = tmp_path / "card.md"
    run("inspect", artifact[0], "--markdown", card, "--eval", tmp_path / "e.json")
    assert f"| perplexity | {dense:.2f} |" in card.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--task", "wingrande"), "unknown task 'wingrande' (did you mean winogrande?)"),
        (("--task", "perplexity"), "perplexity needs a text: --data FILE"),
        (("--task", "divergence", "--data", "x"), "divergence needs something to be compared with"),
        (("--task", "boolq", "--data-dir", "nowhere"), "nowhere: no such directory"),
    ],
    ids=str,
)
def test_evaluations_that_cannot_be_are_one_sentence(
    options: tuple[str, ...], message: str, artifact: tuple[Path, dict[str, Any]]
) -> None:
    assert message in sentence(run("eval", artifact[0], *options, check=2))


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (("prne",), "prune"),
        (("inspect", "--htm", "x"), "--html"),
        (("convert", "a", "--to", "onx", "-o", "b"), "onnx"),
        (("convert", "a", "--to", "csv", "-o", "b"), "csr"),
    ],
)
def test_a_mistyped_word_is_answered_with_the_nearest_that_is_known(words: tuple[str, ...], nearest: str) -> None:
    said = run(*words, check=2)
    assert said.stdout == ""
    assert nearest in said.stderr


def test_a_shell_completes_commands_and_options() -> None:
    """What the function that ``--install-completion`` installs asks for when the tab key is pressed."""
    program = "import sys; sys.argv[0] = 'trim-export'; from trim_export.cli import app; app(prog_name='trim-export')"

    def offered(line: str, place: int) -> set[str]:
        asked = {"_TRIM_EXPORT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(place)}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    assert offered("trim-export re", 1) == {"recover"}
    assert offered("trim-export inspect --h", 2) == {"--html", "--help"}
