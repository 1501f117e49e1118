"""The operators for CUDA without a GPU: compiled as C++ against an emulation of CUDA, and by nvcc, then read.

Emulation shows that the arithmetic, the bounds and the operators around them are right. Whether the shuffles, memory
and streams of a GPU agree, only a GPU can say: the tests that need one have never run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from native_layers import random_matrix
from numpy.typing import NDArray
from onnx import TensorProto
from onnx_graphs import write_operator
from torch import Tensor

from trim_export.converters.onnx.graph import MODEL
from trim_export.converters.onnx.operators import DENSE, SPARSE, VALUES, Operator, with_values

HERE = Path(__file__).parent
ROOT = Path(__file__).parents[3]
OPS, ENGINE = ROOT / "runtimes" / "onnxruntime", ROOT / "runtimes" / "native"
COMPILER = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
EMULATED = ("-std=c++17", "-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-I{HERE / 'emulated'}", f"-I{OPS}", "-x", "c++")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
OPERATORS = (SPARSE["bitmap"], SPARSE["csr"], DENSE)
INPUTS = (np.float32, np.float16)
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@dataclass(frozen=True)
class Problem:
    """W as an operator's constants and, float64 ``[rows, columns]``, as what they stand for."""

    operator: Operator
    values: str
    constants: dict[str, Tensor]
    weight: NDArray[np.float64]


def draw(operator: Operator, values: str, rows: int, columns: int, density: float = 0.3, seed: int = 0) -> Problem:
    """Rows of very different density, each with a scale."""
    matrix, scales = with_values(random_matrix(rows, columns, density, seed), values)
    if values != "int8":
        scales = torch.randn(rows, generator=torch.Generator().manual_seed(seed))
    weight = matrix.to_dense().double() * scales[:, None].double()
    return Problem(operator, values, operator.encode(matrix) | {"scales": scales}, weight.numpy())


def tokens_for(problem: Problem, count: int, dtype: Any, seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).standard_normal((count, problem.weight.shape[1])).astype(dtype)


def assert_product(actual: NDArray[Any], problem: Problem, inputs: NDArray[Any]) -> None:
    """Sums within 50 roundings of float32, and one more if they are stored as float16."""
    x = inputs.astype(np.float64)
    expected, size = x @ problem.weight.T, np.abs(x) @ np.abs(problem.weight).T
    error = 50 * 2.0**-24 * size
    if actual.dtype == np.float16:
        error += 2.0**-11 * np.abs(expected) + 2.0**-25
    assert actual.shape == expected.shape
    assert actual.dtype == inputs.dtype
    assert (np.abs(actual - expected) <= error).all()


def run(command: list[str], **options: Any) -> Any:
    done = subprocess.run(command, capture_output=True, check=False, **options)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


# ---- kernels under sanitizers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("driver")
    (folder / "probe.cpp").write_text("int main() {}")
    probe = [str(COMPILER), *SANITIZERS, str(folder / "probe.cpp"), "-o", str(folder / "probe")]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("the compiler has no sanitizers")
    source = str(HERE / "driver.cpp")
    run([str(COMPILER), "-O1", "-Werror", *EMULATED, *SANITIZERS, source, "-o", str(folder / "driver")])
    return folder / "driver"


def packed(problem: Problem, inputs: NDArray[Any]) -> bytes:
    """A case for the driver."""
    (rows, columns), constants = problem.weight.shape, problem.constants
    order = constants.get("order", torch.empty(0))
    structure, start = torch.empty(0), torch.empty(0, dtype=torch.int64)
    if "mask" in constants:
        structure = constants["mask"]
        kept = np.unpackbits(structure.numpy().reshape(len(structure), -1), axis=1).sum(axis=1, dtype=np.int64)
        start = torch.from_numpy(np.concatenate([[0], kept.cumsum()]))
    elif "gaps" in constants:
        position = (constants["gaps"].long() + 1).cumsum(0) - 1
        structure = (position % columns).to(torch.uint16)
        start = torch.searchsorted(position, torch.arange(rows + 1) * columns)
    numbers = [OPERATORS.index(problem.operator), list(VALUES).index(problem.values), inputs.dtype == np.float16]
    header = np.array([*numbers, rows, columns, len(start) - 1, len(inputs)], np.int64).tobytes()
    arrays = [raw(x) for x in (order, structure, start, constants["values"], constants["scales"])] + [inputs.tobytes()]
    return header + b"".join(np.int64(len(array)).tobytes() + array for array in arrays)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@needs_compiler
def test_kernels_multiply(driver: Path) -> None:
    cases = []
    for operator in OPERATORS:
        for values in VALUES:
            for dtype in INPUTS:
                for seed, (rows, columns, density, count) in enumerate(
                    [(1, 1, 1, 1), (5, 63, 0.3, 1), (8, 64, 1, 2), (21, 300, 0.3, 1), (21, 300, 0.1, 19), (9, 70, 0, 3)]
                ):
                    problem = draw(operator, values, rows, columns, density, seed)
                    cases.append((problem, tokens_for(problem, count, dtype, seed)))
    outputs = run([str(driver)], input=b"".join(packed(*case) for case in cases))
    for problem, inputs in cases:
        shape = (len(inputs), len(problem.weight))
        size = shape[0] * shape[1] * inputs.itemsize
        assert_product(np.frombuffer(outputs[:size], inputs.dtype).reshape(shape), problem, inputs)
        outputs = outputs[size:]
    assert outputs == b""


@needs_compiler
@pytest.mark.parametrize("operator", OPERATORS[:2], ids=lambda operator: operator.name)
def test_kernels_touch_nothing_else_whatever_the_arrays_hold(driver: Path, operator: Operator) -> None:
    chance = np.random.default_rng(0)
    extremes = (0, 1, -1, 7, 21, 300, 2**16 - 1, 2**31 - 1, -(2**31), 2**62, 2**63 - 1, -(2**63))
    damaged = b""
    for number in range(300):
        values = list(VALUES)[number % 4]
        problem = draw(operator, values, 21, 300, seed=number % 16)
        case = bytearray(packed(problem, tokens_for(problem, 1 + number % 3, INPUTS[number // 4 % 2])))
        at = 7 * 8
        for width in (4, 8 if "mask" in problem.constants else 2, 8):  # order, structure, start
            size = int.from_bytes(case[at : at + 8], "little")
            for _ in range(chance.integers(4) if size else 0):
                place = at + 8 + width * int(chance.integers(size // width))
                number_there = extremes[chance.integers(len(extremes))] % 2 ** (8 * width)
                case[place : place + width] = number_there.to_bytes(width, "little")
            at += 8 + size
        damaged += bytes(case)
    run([str(driver)], input=damaged)


# ---- operators in ONNX Runtime ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The operators for CUDA in emulation, registered for the CPU."""
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    library = tmp_path_factory.mktemp("emulated") / "libtrim_emulated.so"
    engine = [ENGINE / f"{name}.cpp" for name in ("engine", "layout", "portable")]
    sources = [OPS / "ops_cuda.cu", HERE / "cpu_ops.cpp", *engine]
    flags = ("-O1", "-shared", "-fPIC", "-fvisibility=hidden", *EMULATED)
    run([str(COMPILER), *flags, *map(str, sources), "-o", str(library)])
    return library


def session(library: Path, folder: Path, problem: Problem, dtype: Any = np.float32, provider: str = CPU) -> Any:
    """A model of one node in a session that executes all of it on one provider."""
    element = TensorProto.FLOAT if dtype == np.float32 else TensorProto.FLOAT16
    write_operator(folder, problem.operator, problem.weight.shape, problem.constants, False, element)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "0" if provider == CPU else "1")
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(folder / MODEL, options, providers=[provider])


def assert_multiplies(ready: Any, problem: Problem, dtype: Any) -> None:
    for count in (1, 10, 0):
        inputs = tokens_for(problem, count, dtype)
        assert_product(ready.run(None, {"A": inputs})[0], problem, inputs)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", INPUTS)
def test_operators_multiply(emulated: Path, tmp_path: Path, operator: Operator, values: str, dtype: Any) -> None:
    problem = draw(operator, values, 21, 150)
    assert_multiplies(session(emulated, tmp_path, problem, dtype), problem, dtype)


def test_more_tokens_than_a_grid_has_blocks(emulated: Path, tmp_path: Path) -> None:
    problem = draw(DENSE, "float32", 1, 1)
    inputs = tokens_for(problem, 65535 * 8 + 9, np.float32)
    assert_product(session(emulated, tmp_path, problem).run(None, {"A": inputs})[0], problem, inputs)


def damage(name: str, change: Any) -> Any:
    return lambda constants: constants | {name: change(constants[name].clone())}


@pytest.mark.parametrize(
    ("encoding", "change", "says"),
    [
        ("bitmap", damage("order", lambda x: x.index_fill(0, torch.tensor([0]), int(x[1]))), "each row once"),
        ("bitmap", damage("order", lambda x: x - 1), "a row that does not exist"),
        ("bitmap", damage("mask", lambda x: x[1:]), "wrong length"),
        ("bitmap", damage("mask", lambda x: x | 1), "disagree"),
        ("bitmap", damage("values", lambda x: x[1:]), "disagree"),
        ("bitmap", damage("scales", lambda x: x[1:]), "wrong length"),
        ("csr", damage("gaps", lambda x: x[1:]), "wrong length"),
        ("csr", damage("values", lambda x: x[1:]), "wrong length"),
        ("csr", damage("scales", lambda x: x[1:]), "wrong length"),
        ("csr", damage("gaps", lambda x: x * 0 + 64), "too wide"),
        ("csr", damage("gaps", lambda x: x * 0), "do not end where the matrix does"),
        ("csr", damage("gaps", lambda x: x.int()), "the wrong element type"),
    ],
)
def test_constants_that_disagree_are_refused(
    emulated: Path, tmp_path: Path, encoding: str, change: Any, says: str
) -> None:
    problem = draw(SPARSE[encoding], "float32", 21, 150)
    with pytest.raises(Exception, match=says):
        session(emulated, tmp_path, replace(problem, constants=change(problem.constants)))


# ---- what nvcc makes of them -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The library as CMake makes it, the CPU's kernels not optimised, and what the compilers said."""
    if shutil.which("nvcc") is None or COMPILER is None:
        pytest.skip("needs nvcc and a C++ compiler")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cmake, ninja = shutil.which("cmake", path=path), shutil.which("ninja", path=path)
    if cmake is None or ninja is None:
        pytest.skip("needs cmake and ninja")
    build = tmp_path_factory.mktemp("cuda")
    flags = ["-DTRIM_EXPORT_CUDA=ON", "-DCMAKE_CXX_FLAGS_RELEASE=-O0", "-DCMAKE_CUDA_FLAGS=-Xptxas=-v"]
    run([cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-S", str(ROOT), "-B", str(build), *flags])
    said = run([cmake, "--build", str(build), "--target", "trim_onnxruntime_cuda"], text=True)
    return build / "libtrim_onnxruntime_cuda.so", said


@pytest.mark.compile
def test_compiled_kernels_spill_nothing(compiled: tuple[Path, str]) -> None:
    _, said = compiled
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(sm_\d+)'", said)
    assert {target for _, target in kernels} == {"sm_80", "sm_90"}
    assert len(kernels) == 2 * len(OPERATORS) * len(VALUES) * len(INPUTS) * 2  # targets; one token and several
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(memory) == len(kernels)
    assert set(memory) == {("0", "0", "0")}


@pytest.mark.compile
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_compiled_library_needs_no_library_of_cuda(compiled: tuple[Path, str]) -> None:
    library, _ = compiled
    needed = re.findall(r"NEEDED.*\[(.+)\]", run(["readelf", "-d", str(library)], text=True))
    assert needed
    assert all(name.startswith(("libc.so", "libm.so", "ld-linux")) for name in needed)


@pytest.mark.compile
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
@pytest.mark.parametrize("dtype", INPUTS)
def test_compiled_library_serves_a_session_on_the_cpu(
    compiled: tuple[Path, str], tmp_path: Path, operator: Operator, dtype: Any
) -> None:
    problem = draw(operator, "float16", 21, 150)
    assert_multiplies(session(compiled[0], tmp_path, problem, dtype), problem, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or CUDA not in onnxruntime.get_available_providers(),
    reason="needs a CUDA device and onnxruntime-gpu",
)
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", INPUTS)
def test_on_the_device(compiled: tuple[Path, str], tmp_path: Path, operator: Operator, values: str, dtype: Any) -> None:
    problem = draw(operator, values, 210, 1500)
    assert_multiplies(session(compiled[0], tmp_path, problem, dtype, CUDA), problem, dtype)
