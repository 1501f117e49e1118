"""What the kernels become on real GPUs, compiled here without one: registers, spills, load widths, instructions.

The compiled code is read, not run: whether it is also correct and fast, only a GPU can say.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trim_export.runtimes.triton import kernels
from trim_export.runtimes.triton.launch import EXPAND_LANES, LANES, ROWS, few_lanes

pytestmark = pytest.mark.compile

NVIDIA = (80, 86, 89, 90, 100, 120)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ROWS_OF_GROUPS = {"order": "*i32", "ptr": "*i32", "index": "*i16", "gaps": "*i32", "rows": "i32"}


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def spmv(value: str, g8: bool = True, parts: int = 1) -> tuple[Any, dict[str, str], dict[str, Any]]:
    constants = {"SPLIT": parts, "ROWS": ROWS, "LANES": LANES, "G8": g8}
    return kernels.spmv, ROWS_OF_GROUPS | {"values": value, "x": value, "y": "*fp32"}, constants


def spmm(value: str, tokens: int, g8: bool = True) -> tuple[Any, dict[str, str], dict[str, Any]]:
    types = ROWS_OF_GROUPS | {"values": value, "xt": value, "y": value, "tokens": "i32"}
    return kernels.spmm, types, {"TOKENS": tokens, "ROWS": ROWS, "LANES": few_lanes(tokens), "G8": g8}


def expand(value: str, g8: bool = True) -> tuple[Any, dict[str, str], dict[str, Any]]:
    types = ROWS_OF_GROUPS | {"values": value, "w": value, "columns": "i32"}
    return kernels.expand, types, {"ROWS": ROWS, "LANES": EXPAND_LANES, "G8": g8}


def compiled(kernel: tuple[Any, dict[str, str], dict[str, Any]], target: GPUTarget) -> Any:
    function, types, constants = kernel
    names = function.arg_names
    source = ASTSource(
        fn=function,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        # Tensors of torch begin at multiples of 16 bytes, which the launcher finds out too.
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name, type_ in types.items() if type_[0] == "*"},
    )
    return triton.compile(source, target=target, options={"num_warps": 4})


@dataclass(frozen=True)
class Machine:
    """What a cubin holds: registers of a thread, bytes of stack, bytes of shared memory, its instructions."""

    registers: int
    stack: int
    shared: int
    instructions: list[str]
    loop: list[str]


def read(binary: Any, directory: Path) -> Machine:
    cubin = directory / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    usage, listing = (
        subprocess.run([TOOLS / tool, option, cubin], capture_output=True, text=True, check=True).stdout
        for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
    )
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))  # type: ignore[index]
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    loops = []
    for at, instruction in enumerate(instructions):
        jump = re.search(r"\bBRA\b.*?(\.L_x_\d+)", instruction)
        if jump and labels[jump[1]] < at:
            loops.append(instructions[labels[jump[1]] : at + 1])
    assert len(loops) == 1, "one loop is expected, over the groups of the rows"
    return Machine(registers, stack, binary.metadata.shared, instructions, loops[0])


def opcodes(instructions: list[str]) -> list[str]:
    return [re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0] for instruction in instructions]


def assert_lean(machine: Machine) -> None:
    assert machine.registers <= 64
    assert machine.stack == 0
    assert not [code for code in opcodes(machine.instructions) if code.startswith(("LDL", "STL"))]
    atomics = {"ATOM", "ATOMG", "ATOMS", "RED"}
    assert not atomics & {code.split(".")[0] for code in opcodes(machine.instructions)}, "sums in any order"
    assert machine.shared <= 48 * 1024


@pytest.mark.parametrize("arch", NVIDIA)
@pytest.mark.parametrize(
    ("kernel", "most"),
    [(spmv("*bf16"), 12), (spmv("*fp16", parts=4), 12), (spmv("*bf16", g8=False), 11)],
    ids=["bf16 g8", "fp16 g8 split", "bf16 csr"],
)
def test_a_token_costs_a_dozen_instructions_a_weight(kernel: Any, most: int, arch: int, tmp_path: Path) -> None:
    machine = read(compiled(kernel, GPUTarget("cuda", arch, 32)), tmp_path)
    assert_lean(machine)
    codes = opcodes(machine.loop)
    # A thread takes one group of eight in each turn, so its sums are eight products.
    products = sum(2 if code.startswith("FFMA2") else 1 for code in codes if code.startswith("FFMA"))
    assert products == 8
    # Values, structure (base and gaps, or columns) and eight gathers.
    assert sum(code.startswith("LDG") for code in codes) == (11 if kernel[2]["G8"] else 10)
    assert [code for code in codes if re.match(r"LDG\.E(\.\w+)*\.128", code)], "values come in loads of 128 bits"
    assert not [code for code in codes if code.startswith(("SHFL", "BAR"))], "no thread waits for another"
    assert len(codes) / 8 <= most


@pytest.mark.parametrize("arch", NVIDIA)
@pytest.mark.parametrize(
    "kernel", [spmm("*bf16", 2), spmm("*bf16", 16), spmm("*fp16", 16, g8=False), expand("*bf16")],
    ids=["2 tokens", "16 tokens", "16 tokens csr", "expand"],
)  # fmt: skip
def test_the_other_kernels_are_lean(kernel: Any, arch: int, tmp_path: Path) -> None:
    assert_lean(read(compiled(kernel, GPUTarget("cuda", arch, 32)), tmp_path))


@pytest.mark.parametrize("kernel", [spmv("*bf16"), spmm("*bf16", 16), expand("*bf16")], ids=["spmv", "spmm", "expand"])
def test_amd_compiles_without_spills(kernel: Any) -> None:
    binary = compiled(kernel, GPUTarget("hip", "gfx942", 64))
    facts = dict(re.findall(r"\.(\w+):\s+(\d+)\n", binary.asm["amdgcn"]))
    assert (facts["vgpr_spill_count"], facts["sgpr_spill_count"], facts["private_segment_fixed_size"]) == ("0",) * 3
    assert int(facts["vgpr_count"]) <= 128
    assert binary.metadata.shared <= 64 * 1024
