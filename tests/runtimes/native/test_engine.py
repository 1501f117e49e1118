"""The C++ engine through its C interface, under sanitizers, on every instruction set; AVX-512 in emulation."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ENGINE = Path(__file__).parents[3] / "runtimes" / "native"
COMPILER = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
FLAGS = ("-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{ENGINE}")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mpopcnt")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


def has_avx2() -> bool:
    cpus = Path("/proc/cpuinfo")
    return cpus.is_file() and {"avx2", "fma", "f16c"} <= set(cpus.read_text().split())


def build(folder: Path, instruction_sets: list[str]) -> Path:
    """The driver, linked with the engine; AVX-512 is compiled against our emulation of its intrinsics."""
    claims = ["-DTRIM_NATIVE_AVX2", "-DTRIM_NATIVE_AVX512", "-D__builtin_cpu_supports(feature)=true"]
    options = {"avx2.cpp": AVX2, "avx512.cpp": (f"-I{HERE / 'emulated'}",)}
    sources = [ENGINE / "engine.cpp", ENGINE / "layout.cpp", HERE / "driver.cpp"]
    sources += [ENGINE / f"{name}.cpp" for name in instruction_sets]
    objects = []
    for source in sources:
        objects.append(folder / f"{source.stem}.o")
        extra = options.get(source.name, claims if source.name == "engine.cpp" and len(instruction_sets) > 1 else ())
        run([str(COMPILER), *FLAGS, *SANITIZERS, *extra, "-c", str(source), "-o", str(objects[-1])])
    driver = folder / "driver"
    run([str(COMPILER), *SANITIZERS, *map(str, objects), "-o", str(driver)])
    return driver


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_sums_are_right_and_memory_is_safe_whatever_a_matrix_holds(tmp_path: Path) -> None:
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}")
    try:
        run([str(COMPILER), *SANITIZERS, str(probe), "-o", str(tmp_path / "probe")])
    except AssertionError:
        pytest.skip("the compiler has no sanitizers")
    x86 = platform.machine() in ("x86_64", "AMD64") and has_avx2()
    instruction_sets = ["portable", "avx2", "avx512"] if x86 else ["portable"]
    assert run([str(build(tmp_path, instruction_sets)), *instruction_sets]).endswith(" checks held\n")
