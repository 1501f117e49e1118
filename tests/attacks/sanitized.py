"""Compiling with sanitizers, and damage to the bytes of an array, for what attacks C++ code past our own checks."""

from __future__ import annotations

import os
import platform
import random
import shutil
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

__all__ = ["CASES", "EXTREMES", "OPERATOR_SOURCES", "compiled_engine", "damage", "has_avx2", "program", "run"]

CASES = int(os.environ.get("TRIM_SANITIZED_CASES", "1500"))
ENGINE = Path(__file__).parents[2] / "runtimes" / "native"
OPERATOR_SOURCES = ENGINE.parent / "onnxruntime"
EXTREMES = (0, 1, -1, 2**31 - 1, -(2**31), 2**62, -(2**62))

_COMPILER = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
_SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
_FLAGS = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", *_SANITIZERS)
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mpopcnt")


def has_avx2() -> bool:
    """Whether this processor has what the AVX2 kernels need."""
    cpus = Path("/proc/cpuinfo")
    there = cpus.is_file() and {"avx2", "fma", "f16c"} <= set(cpus.read_text().split())
    return there and platform.machine() in ("x86_64", "AMD64")


def compiled(folder: Path, sources: Mapping[Path, tuple[str, ...]]) -> list[str]:
    """Object files of these sources, each with options of its own, under sanitizers; skips the test without them."""
    if _COMPILER is None:
        pytest.skip("needs a C++ compiler")
    (folder / "probe.cpp").write_text("int main() {}")
    probe = [_COMPILER, *_SANITIZERS, str(folder / "probe.cpp"), "-o", str(folder / "probe")]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("the compiler has no sanitizers")
    objects = []
    for source, more in sources.items():
        objects.append(str(folder / f"{source.stem}.o"))
        run([_COMPILER, *_FLAGS, f"-I{ENGINE}", f"-I{OPERATOR_SOURCES}", *more, "-c", str(source), "-o", objects[-1]])
    return objects


def compiled_engine(folder: Path) -> list[str]:
    """The native engine with every instruction set that this processor can run under sanitizers."""
    sources: dict[Path, tuple[str, ...]] = {ENGINE / f"{name}.cpp": () for name in ("portable", "layout", "engine")}
    if has_avx2():
        sources[ENGINE / "engine.cpp"] = ("-DTRIM_NATIVE_AVX2",)
        sources[ENGINE / "avx2.cpp"] = _AVX2
    return compiled(folder, sources)


def program(folder: Path, *sources: Path, engine: list[str]) -> Path:
    """A program of these sources and the engine."""
    objects = compiled(folder, dict.fromkeys(sources, ()))
    run([str(_COMPILER), *_SANITIZERS, *objects, *engine, "-o", str(folder / "program")])
    return folder / "program"


def run(command: list[str]) -> str:
    """What a program prints, which must end well."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def damage(chance: random.Random, data: bytes, width: int, lengths: bool = True) -> bytes:
    """One change to an array of numbers ``width`` bytes wide; to its length too, if ``lengths``."""
    changed = bytearray(data)
    how = chance.choice(["flip", "extreme", "shift", "shuffled", *(["shorter", "longer"] if lengths else [])])
    if how == "flip" and changed:
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    elif how == "extreme" and len(changed) >= width:
        at = chance.randrange(len(changed) // width) * width
        changed[at : at + width] = struct.pack("<q", chance.choice(EXTREMES))[:width]
    elif how == "shift" and len(changed) >= width:
        at = chance.randrange(len(changed) // width) * width
        number = int.from_bytes(changed[at : at + width], "little") + chance.choice([-1, 1, 64, -64])
        changed[at : at + width] = (number % 2 ** (8 * width)).to_bytes(width, "little")
    elif how == "shorter":
        changed = changed[: -width * chance.randint(1, 3)] if len(changed) >= width else changed
    elif how == "longer":
        changed += bytes(width * chance.randint(1, 3))
    else:
        words = [changed[i : i + width] for i in range(0, len(changed), width)]
        chance.shuffle(words)
        changed = bytearray(b"".join(words))
    return bytes(changed)
