"""What a wheel holds, built from a checkout, from the sdist and without a compiler, and that it runs."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

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


@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="needs a C++ compiler")
def test_unpacked_wheel_runs_with_its_library(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    # -S ignores .pth files, hence an editable install of the checkout; the dependencies come from this very path.
    search_path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    script = (
        "import trim_export.converters.matrix as matrix, trim_export.curves as curves;"
        "from trim_export.runtimes import pick_runtime;"
        "print(matrix.__file__, curves.__file__, curves.native_available(), pick_runtime('native').name, sep='\\n')"
    )
    run = subprocess.run(
        [sys.executable, "-S", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": search_path},
    )
    package = tmp_path / "trim_export"
    assert run.stdout.splitlines() == [
        str(package / "converters" / "matrix.py"),
        str(package / "curves.py"),
        "True",
        "native",
    ], run.stderr
