"""What a wheel holds, built from a checkout, from the sdist and without a compiler, and that it runs."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from trim_export.artifact import Artifact
from trim_export.convert import convert

ROOT = Path(__file__).parents[1]
SOURCES = ["pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "trim_export", "converters", "runtimes"]
LIBRARIES = [
    "trim_export/native/libtrim_curves.so",
    "trim_export/runtimes/native/libtrim_native.so",
    "trim_export/runtimes/onnxruntime/libtrim_onnxruntime.so",
]
COMPILERS = [os.environ.get("CXX", "c++"), "g++", "clang++"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy without .venv, caches and built libraries, so that nothing is found by accident."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.so")
            )
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(checkout, tmp_path_factory.mktemp("wheel"), "--wheel")


def build_wheel(checkout: Path, out: Path, *options: str, environment: Mapping[str, str] | None = None) -> Path:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *options, str(checkout)]
    run = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **(environment or {})}
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = out.glob("*.whl")
    return path


def contents(wheel: Path) -> list[str]:
    """Names in the wheel, each as often as it occurs, apart from its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return sorted(name for name in archive.namelist() if ".dist-info/" not in name)


def expected(checkout: Path, *, library: bool) -> list[str]:
    """Each module of the three directories once, under the one package."""
    names = [*LIBRARIES] if library else []
    for source, target in [
        ("trim_export", "trim_export"),
        ("converters", "trim_export/converters"),
        ("runtimes", "trim_export/runtimes"),
    ]:
        for folder, _, files in os.walk(checkout / source, followlinks=False):
            names += [
                f"{target}/{Path(folder, file).relative_to(checkout / source).as_posix()}"
                for file in files
                if file.endswith((".py", ".typed", ".html"))
            ]
    return sorted(names)


def test_wheel_holds_every_module_once_in_one_package(checkout: Path, wheel: Path) -> None:
    names = contents(wheel)
    assert names == expected(checkout, library=any(map(shutil.which, COMPILERS)))
    assert {name.split("/")[0] for name in names} == {"trim_export"}
    assert {"trim_export/py.typed", "trim_export/converters/matrix.py"} <= set(names)


def test_wheel_from_sdist_is_the_same(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    from_sdist = build_wheel(checkout, tmp_path)
    assert contents(from_sdist) == contents(wheel)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        links = {member.name.split("/", 1)[1]: member.linkname for member in archive if member.issym()}
    assert links == {"trim_export/converters": "../converters", "trim_export/runtimes": "../runtimes"}


def test_wheel_builds_without_a_compiler(checkout: Path, tmp_path: Path) -> None:
    wheel = build_wheel(checkout, tmp_path, "--wheel", environment={"CXX": "/no/such/compiler"})
    assert contents(wheel) == expected(checkout, library=False)


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def with_wheel(unpacked: Path, script: str, *arguments: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script with the unpacked wheel instead of the checkout."""
    # -S ignores .pth files, hence an editable install of the checkout; the dependencies come from this very path.
    search_path = os.pathsep.join([str(unpacked), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, "-S", "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=unpacked,
        env={**os.environ, "PYTHONPATH": search_path, **environment},
    )


@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="needs a C++ compiler")
def test_unpacked_wheel_runs_with_its_library(unpacked: Path) -> None:
    script = (
        "import trim_export.converters.matrix as matrix, trim_export.curves as curves;"
        "from trim_export.runtimes import pick_runtime;"
        "print(matrix.__file__, curves.__file__, curves.native_available(), pick_runtime('native').name, sep='\\n')"
    )
    done = with_wheel(unpacked, script)
    package = unpacked / "trim_export"
    assert done.stdout.splitlines() == [
        str(package / "converters" / "matrix.py"),
        str(package / "curves.py"),
        "True",
        "native",
    ], done.stderr


# ---- autoloading, which needs the metadata of an installed package ---------------------------------------------------

STRANGER = """
import sys
import torch
assert "trim_export.autoload" in sys.modules, "torch did not call our entry point"
assert not {"transformers", "trim_export.runtimes"} & set(sys.modules), "importing torch became slower"
import transformers
kind = getattr(transformers, sys.argv[3])
assert "trim_export.runtimes" not in sys.modules, "and so did importing transformers"
expected = kind.from_pretrained(sys.argv[2]).eval()
if sys.argv[3] == "LlamaForCausalLM":
    import trim_export.runtimes  # by hand as well
try:
    model = kind.from_pretrained(sys.argv[1]).eval()
except RuntimeError:
    sys.exit("refused")
print(type(model.model.layers[0].mlp.up_proj).__module__.split(".")[0])
tokens = torch.arange(4, 20)[None]
with torch.no_grad():
    torch.testing.assert_close(model(tokens).logits, expected(tokens).logits)
"""


@pytest.mark.parametrize("name", ["AutoModelForCausalLM", "LlamaForCausalLM"])
def test_an_artifact_loads_without_us_being_imported_if_that_is_wished(
    name: str, unpacked: Path, pruned: Callable[..., Artifact], tmp_path: Path
) -> None:
    convert(pruned("llama"), "dense", tmp_path / "dense")
    done = with_wheel(
        unpacked, STRANGER, pruned("llama").path, tmp_path / "dense", Path(name), TRIM_EXPORT_AUTOLOAD="1"
    )
    assert done.stdout.split() == ["trim_export"], done.stderr


@pytest.mark.parametrize("switch", ["", "0"])
def test_it_is_refused_if_that_is_not_wished(
    switch: str, unpacked: Path, pruned: Callable[..., Artifact], tmp_path: Path
) -> None:
    convert(pruned("llama"), "dense", tmp_path / "dense")
    name = Path("AutoModelForCausalLM")
    done = with_wheel(unpacked, STRANGER, pruned("llama").path, tmp_path / "dense", name, TRIM_EXPORT_AUTOLOAD=switch)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip().endswith("refused")
    assert "size mismatch" in done.stderr
