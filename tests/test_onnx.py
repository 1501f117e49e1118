"""ONNX end to end, as a user does it: convert, verify, generate, evaluate, measure, and leave this package behind."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked import start
from onnx_graphs import needs_operators
from test_cli import run, sentence
from tiny_models import EXPORTABLE

from trim_export.artifact import Artifact
from trim_export.errors import ArtifactError
from trim_export.runtimes import load
from trim_export.runtimes.onnxruntime import LIBRARY, operator_library

pytestmark = pytest.mark.filterwarnings("ignore:our ONNX operators")

PLAIN = """
import sys
import numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
if sys.argv[2]:
    options.register_custom_ops_library(sys.argv[2])
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx", options, providers=["CPUExecutionProvider"])
tokens = np.array([[5, 9, 44, 17]])
past = {i.name: np.zeros((1, i.shape[1], 0, 16), np.float32) for i in session.get_inputs() if "past" in i.name}
found = session.run(["logits"], {"input_ids": tokens, "attention_mask": np.ones_like(tokens)} | past)
np.save(sys.argv[3], found[0])
assert not any(name.startswith(("trim_export", "torch", "transformers")) for name in sys.modules)
"""

GENAI = """
import sys
import onnxruntime_genai as genai
model = genai.Model(sys.argv[1])
settings = genai.GeneratorParams(model)
settings.set_search_options(max_length=12, do_sample=False)
generator = genai.Generator(model, settings)
generator.append_tokens([5, 9, 44, 17])
while not generator.is_done():
    generator.generate_next_token()
print(*generator.get_sequence(0))
"""


@pytest.fixture(scope="module")
def exported(pruned: Callable[..., Artifact], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``exported(kind, *options)``: an ONNX directory, made once; not to be changed."""

    @functools.cache
    def make(kind: str, *options: str) -> Path:
        out = tmp_path_factory.mktemp("onnx") / kind
        run("convert", pruned(kind).path, "--to", "onnx", "-o", out, *options)
        return out

    return make


def alone(script: str, *arguments: object) -> str:
    """What a script prints that runs in an interpreter of its own, in an empty directory."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_operators
@pytest.mark.parametrize(("kind", "encoding"), [*((kind, "csr") for kind in EXPORTABLE), ("qwen2-16", "bitmap")])
def test_an_exported_model_computes_what_the_artifact_does(
    kind: str, encoding: str, exported: Callable[..., Path], pruned: Callable[..., Artifact], tmp_path: Path
) -> None:
    result = tmp_path / "verify.json"
    run("verify", exported(kind, "--encoding", encoding), "--reference", pruned(kind).path, "--json", result)
    rows = json.loads(result.read_text())["runtimes"]
    assert [row["name"] for row in rows] == ["onnxruntime", "onnxruntime-functions"]
    assert all(row["passed"] and row["max_abs_diff"] < 1e-3 and row["argmax_agreement"] == 1 for row in rows)


@needs_operators
@pytest.mark.parametrize("library", [True, False])
def test_it_runs_in_plain_onnxruntime(
    library: bool, exported: Callable[..., Path], pruned: Callable[..., Artifact], tmp_path: Path
) -> None:
    import numpy as np

    folder = exported("llama-16-tied")
    alone(PLAIN, folder, folder / LIBRARY if library else "", tmp_path / "logits.npy")
    with torch.inference_mode():
        expected = load(pruned("llama-16-tied").path, "dense")(torch.tensor([[5, 9, 44, 17]])).logits
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "logits.npy")), expected, rtol=1e-3, atol=1e-4)


@needs_operators
def test_it_runs_in_onnxruntime_genai(exported: Callable[..., Path], pruned: Callable[..., Artifact]) -> None:
    folder = exported("llama-16-tied")
    assert (folder / LIBRARY).read_bytes() == (operator_library() or Path()).read_bytes()
    tokens = [int(word) for word in alone(GENAI, folder).split()]
    model = load(pruned("llama-16-tied").path, "dense")
    expected = model.generate(torch.tensor([[5, 9, 44, 17]]), do_sample=False, max_new_tokens=len(tokens) - 4)  # type: ignore[operator]
    assert len(tokens) > 6
    assert tokens == expected[0].tolist()


@needs_operators
def test_the_commands_take_it_like_an_artifact(
    exported: Callable[..., Path], pruned: Callable[..., Artifact], tmp_path: Path
) -> None:
    folder, artifact, result = exported("llama-16"), pruned("llama-16").path, tmp_path / "result.json"
    spoken = [run("generate", path, "--prompt", "abc", "--max-new-tokens", 6).stdout for path in (folder, artifact)]
    assert spoken[0] == spoken[1]
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 50)
    scores = []
    for path in (folder, artifact):
        run("eval", path, "--data", text, "--sequence-length", 16, "--windows", 4, "--json", result)
        scores.append(json.loads(result.read_text())["tasks"]["perplexity"]["value"])
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    dense = exported("llama-16", "--portable")
    run("bench", folder, "--beside", dense, "--prompt", 4, "--generate", 2, "--repeats", 1, "--json", result)
    rows = json.loads(result.read_text())["rows"]
    names = ["onnxruntime", "onnxruntime-functions", f"onnxruntime {dense.name}"]
    assert [row["runtime"] for row in rows] == names * 2
    assert [row["ratio_to_dense"] for row in rows if row["runtime"] == names[2]] == [1, 1]
    assert "passed" in run("verify", folder).stdout


@needs_operators
def test_values_and_head_in_fewer_bits_take_less_and_are_near(
    exported: Callable[..., Path], pruned: Callable[..., Artifact]
) -> None:
    exact = exported("llama-16-tied")
    small = exported("llama-16-tied", "--dtype", "bfloat16", "--lm-head", "int8")
    sizes = [(folder / "model.onnx.data").stat().st_size for folder in (exact, small)]
    assert sizes[1] < 0.7 * sizes[0]
    run("verify", small, "--reference", pruned("llama-16-tied").path)
    form = json.loads((small / "trim_onnx.json").read_text())["form"]
    assert (form["values"], form["head"], form["encoding"]) == ("bfloat16", "int8", "csr")


@needs_operators
def test_a_cache_grows_with_what_is_read(exported: Callable[..., Path]) -> None:
    model, tokens = load(exported("llama-16")), torch.tensor([[5, 9, 44, 17], [8, 8, 31, 60]])
    whole = model(tokens, use_cache=False)
    assert whole.past_key_values is None
    output = model(tokens[:, :2], use_cache=True)
    cache = output.past_key_values
    for place in (2, 3):
        output = model(tokens[:, place : place + 1], past_key_values=cache, use_cache=True)
        assert output.past_key_values is cache
        assert cache.get_seq_length() == place + 1
        torch.testing.assert_close(output.logits[:, 0], whole.logits[:, place], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "options"), [("llama-16-tied", ("--lm-head", "int8")), ("opt-long", ("--portable",))])
def test_with_the_last_logits_only_it_generates_the_same_and_is_not_evaluated(
    kind: str, options: tuple[str, ...], exported: Callable[..., Path], tmp_path: Path
) -> None:
    whole, last = exported(kind, *options), exported(kind, *options, "--last-logits")
    tokens = torch.tensor([[5, 9, 44, 17], [8, 8, 31, 60]])
    models = [load(folder, "onnxruntime-functions") for folder in (whole, last)]
    assert models[0](tokens).logits.shape[1] == 4
    given, expected = (model(tokens, logits_to_keep=1).logits for model in reversed(models))
    assert given.shape[1] == 1
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
    spoken = [model.generate(tokens, do_sample=False, max_new_tokens=8, pad_token_id=0) for model in models]  # type: ignore[operator]
    assert torch.equal(*spoken)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 50)
    failed = run("eval", last, "--data", text, "--sequence-length", 16, "--windows", 2, check=2)
    assert "verify and eval need one that was exported without" in sentence(failed)
    assert json.loads((last / "trim_onnx.json").read_text())["logits"] == "last"


def test_products_that_torch_exports_as_gemm_are_sparse_too(
    exported: Callable[..., Path], pruned: Callable[..., Artifact]
) -> None:
    facts = json.loads((exported("opt-long", "--encoding", "csr") / "trim_onnx.json").read_text())
    assert facts["matrices"] == len(pruned("opt-long").modules)


@pytest.mark.parametrize("lm_head", ["stored", "int8"])
def test_a_directory_for_cuda_is_made_without_a_gpu(
    lm_head: str, exported: Callable[..., Path], pruned: Callable[..., Artifact], tmp_path: Path
) -> None:
    folder = exported("llama-16-tied", "--ep", "cuda", "--lm-head", lm_head)
    assert json.loads((folder / "trim_onnx.json").read_text())["provider"] == "cuda"
    session = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["session_options"]
    assert [list(provider) for provider in session["provider_options"]] == [["cuda"]]
    ours = operator_library("cuda")
    assert session.get("custom_ops_library") == (ours.name if ours else None)
    assert sorted(file.name for file in folder.glob("*.so")) == ([ours.name] if ours else [])
    tokens = torch.tensor([[5, 9, 44, 17]])
    with torch.inference_mode():  # standard operators compute in float16 on a CPU too
        logits = load(folder, "onnxruntime-functions")(tokens).logits
        expected = load(pruned("llama-16-tied").path, "dense")(tokens).logits
    assert (logits - expected).abs().max() <= (0.002 if lm_head == "stored" else 0.05) * expected.abs().max()


@needs_operators
def test_a_directory_for_cuda_says_so_where_kernels_of_the_cpu_would_take_it(exported: Callable[..., Path]) -> None:
    folder = exported("llama-16-tied", "--ep", "cuda", "--lm-head", "stored")
    assert "was made for CUDA" in sentence(run("generate", folder, "--prompt", "abc", check=2))


def test_a_graph_for_cuda_needs_an_architecture_of_the_builder(pruned: Callable[..., Artifact], tmp_path: Path) -> None:
    failed = run("convert", pruned("opt").path, "--to", "onnx", "--ep", "cuda", "-o", tmp_path / "out", check=2)
    assert "only onnxruntime-genai's model builder makes fp16 for cuda" in sentence(failed)
    assert list(tmp_path.iterdir()) == []


def test_the_portable_form_needs_nothing_of_ours(exported: Callable[..., Path]) -> None:
    folder = exported("llama-16", "--portable")
    assert not (folder / LIBRARY).exists()
    assert b"trim_export" not in (folder / "model.onnx").read_bytes()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--to", "onnx", "--encoding", "coo"), "unknown encoding of onnx 'coo'"),
        (("--to", "onnx", "--dtype", "int3"), "unknown dtype 'int3'"),
        (("--to", "onnx", "--lm-head", "int4"), "unknown LM head 'int4'"),
        (("--to", "onnx", "--block", "4x4"), "--block belongs to --to bsr"),
        (("--to", "onnx", "--portable", "--dtype", "int8"), "--portable is dense"),
        (("--to", "csr", "--dtype", "int8"), "--dtype belongs to --to onnx"),
        (("--to", "bsr", "--portable"), "--portable belongs to --to onnx"),
        (("--to", "csr", "--last-logits"), "--last-logits belongs to --to onnx"),
        (("--to", "dense", "--ep", "cuda"), "--ep belongs to --to onnx"),
        (("--to", "onnx", "--ep", "rocm"), "unknown execution provider 'rocm'"),
        (("--to", "onnx", "--ep", "cuda", "--dtype", "float32"), "--ep cuda computes in float16"),
    ],
)
def test_options_that_do_not_go_together_are_one_sentence(
    options: tuple[str, ...], reason: str, pruned: Callable[..., Artifact], tmp_path: Path
) -> None:
    failed = run("convert", pruned("llama").path, *options, "-o", tmp_path / "out", check=2)
    assert reason in sentence(failed)
    assert list(tmp_path.iterdir()) == []


@needs_operators
@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        ("model.onnx.data", lambda data: data[: len(data) // 2], "beyond its end"),
        ("model.onnx.data", None, "missing"),
        ("model.onnx", lambda data: data[: len(data) // 2], "not readable as ONNX"),
        ("config.json", lambda data: data[:20], "config.json"),
    ],
)
def test_damage_is_one_sentence(
    file: str,
    damage: Callable[[bytes], bytes] | None,
    reason: str,
    exported: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(exported("llama-16"), folder)
    if damage is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(damage((folder / file).read_bytes()))
    failed = run("generate", folder, "--prompt", "abc", check=2)
    assert reason in sentence(failed)


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("model.onnx.data", lambda data: bytes([data[0] ^ 1]) + data[1:], "sha256 differs"),
        ("model.onnx", lambda data: data + b"\0", "bytes, the manifest says"),
        ("genai_config.json", None, "missing"),
        ("other.onnx", lambda _: b"", "does not list it"),
        ("trim_onnx.json", lambda _: b"{}", "malformed"),
        ("trim_onnx.json", None, "no trim_onnx.json"),
    ],
)
def test_hashes_at_load_and_check_find_what_changed(
    file: str, change: Callable[[bytes], bytes] | None, reason: str, exported: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(exported("llama-16", "--portable"), folder)
    assert "its files are intact" in run("check", folder).stdout
    load(folder, check_hashes=True)
    if change is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(change((folder / file).read_bytes() if (folder / file).exists() else b""))
    with pytest.raises(ArtifactError, match=reason):
        load(folder, check_hashes=True)
    assert reason in sentence(run("check", folder, check=1))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_export_leaves_no_process_and_the_next_one_gives_the_same_bytes(
    exported: Callable[..., Path], pruned: Callable[..., Artifact], tmp_path: Path
) -> None:
    words = ["convert", str(pruned("llama-16").path), "--to", "onnx", "-o", str(tmp_path / "out")]
    staging = str(tmp_path / ".out.partial").encode()
    process = start(words, tmp_path / "log")
    while process.exitcode is None and not mentioning(staging):
        time.sleep(0.05)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    for _ in range(200):
        if not mentioning(staging):
            break
        time.sleep(0.05)
    assert not mentioning(staging)
    assert not (tmp_path / "out").exists()
    run(*words)
    for file in sorted(exported("llama-16").iterdir()):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def mentioning(words: bytes) -> list[str]:
    """Processes whose command line has these words."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may end in the meantime
            if words in (process / "cmdline").read_bytes():
                found.append(process.name)
    return found


@needs_operators
def test_a_link_out_of_the_directory_is_refused(exported: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "linked"
    shutil.copytree(exported("llama-16"), folder)
    (folder / "model.onnx.data").rename(tmp_path / "elsewhere")
    (folder / "model.onnx.data").symlink_to(tmp_path / "elsewhere")
    assert "not a regular file" in sentence(run("generate", folder, "--prompt", "abc", check=2))


def test_without_the_library_standard_operators_are_used_and_that_is_said(
    exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trim_export.errors import EnvironmentLacks
    from trim_export.runtimes.onnxruntime import open_session, session

    monkeypatch.setattr(session, "operator_library", lambda _: None)
    folder = exported("llama-16")
    with pytest.warns(RuntimeWarning, match="standard operators are used instead"):
        assert open_session(folder).kernels is False
    with pytest.raises(EnvironmentLacks, match="not installed"):
        open_session(folder, kernels=True)
    assert open_session(exported("llama-16", "--portable")).kernels is None


def test_what_a_device_lacks_is_one_sentence(
    exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No CUDA, or of three things one: our library, a library that loads, a GPU."""
    import onnxruntime

    from trim_export.errors import EnvironmentLacks, UsageError
    from trim_export.runtimes.onnxruntime import open_session, session

    folder, junk = exported("llama-16"), tmp_path / "libtrim_onnxruntime_cuda.so"
    junk.write_bytes(b"\x7fELF")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EnvironmentLacks, match=r"no CUDAExecutionProvider: pip install 'trim-export\[gpu\]'"):
        load(folder, device="cuda")
    with pytest.raises(UsageError, match="unknown device of an ONNX model 'meta'"):
        load(folder, device="meta")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(session, "operator_library", {"cuda": None}.get)
    with pytest.raises(EnvironmentLacks, match="operators for CUDA are not installed; with nvcc"):
        open_session(folder, kernels=True, device="cuda")
    monkeypatch.setattr(session, "operator_library", {"cuda": junk}.get)
    with pytest.raises(EnvironmentLacks, match=r"cuda\.so: ONNX Runtime cannot load it"):
        open_session(folder, device="cuda")
    if not torch.cuda.is_available():
        monkeypatch.setattr(session, "operator_library", {"cuda": None}.get)
        with (
            pytest.warns(RuntimeWarning, match="CUDA are not installed.* standard operators are used instead"),
            pytest.warns(UserWarning, match="CUDAExecutionProvider"),  # ONNX Runtime's own, where it was built without
            pytest.raises(EnvironmentLacks, match="is there a GPU"),
        ):
            open_session(folder, device="cuda")


def test_an_unknown_runtime_of_an_onnx_directory_names_the_known_ones(exported: Callable[..., Path]) -> None:
    failed = run("generate", exported("llama-16", "--portable"), "--prompt", "a", "--runtime", "native", check=2)
    assert "onnxruntime, onnxruntime-functions" in sentence(failed)
