"""Layers and operator of the runtime triton, on the CPU: what is computed, traced, joined and given back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import row_variable
from strategies import assert_same
from tiny_models import tiny_tokens
from torch import Tensor, nn

from trim_export.artifact import Artifact
from trim_export.converters import SparseMatrix
from trim_export.errors import EnvironmentLacks, UsageError
from trim_export.runtimes import RUNTIMES, available_runtimes, load, pick_runtime
from trim_export.runtimes.linear import Layout
from trim_export.runtimes.native import MaskedLinear
from trim_export.runtimes.triton import PackedRows, TritonLinear, TritonRuntime, grouped_linear, join_siblings, tuning
from trim_export.runtimes.triton import launch as launches
from trim_export.runtimes.triton import linear as layers

CPU = Layout(torch.device("cpu"))


def sparse(rows: int, columns: int, sparsity: float, seed: int = 0) -> SparseMatrix:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) >= sparsity
    return SparseMatrix(mask, torch.randn(int(mask.sum()), generator=generator))


def layer(rows: int, columns: int, sparsity: float = 0.7, seed: int = 0, bias: bool = False) -> TritonLinear:
    made = TritonRuntime().linear(
        sparse(rows, columns, sparsity, seed), torch.arange(rows * 1.0) if bias else None, CPU
    )
    assert isinstance(made, TritonLinear)
    return made


class Attention(nn.Module):
    """Three linears of one input, and one of another, as a decoder block calls them."""

    def __init__(self, sparsities: tuple[float, ...] = (0.6, 0.7, 0.8)) -> None:
        super().__init__()
        self.q_proj = layer(12, 40, sparsities[0], 1, bias=True)
        self.k_proj, self.v_proj = (layer(6, 40, s, i) for i, s in enumerate(sparsities[1:], 2))
        self.o_proj = layer(40, 12, 0.6, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        mixed: Tensor = self.o_proj(q * torch.cat((k, v), dim=-1))
        return mixed


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each product that layers make, in their order."""
    seen: list[int] = []

    def counted(*args: Tensor) -> Tensor:
        seen.append(args[1].shape[0])
        output: Tensor = grouped_linear(*args)
        return output

    monkeypatch.setattr(layers, "grouped_linear", counted)
    return seen


@pytest.mark.parametrize("shape", [(40,), (1, 40), (2, 3, 40)])
@pytest.mark.parametrize("sparsity", [0.45, 0.97, 1.0])
def test_a_layer_multiplies_by_its_matrix(sparsity: float, shape: tuple[int, ...]) -> None:
    made, dense = layer(12, 40, sparsity, bias=True), sparse(12, 40, sparsity).to_dense().double()
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = inputs.double() @ dense.T + torch.arange(12)
    torch.testing.assert_close(made(inputs).double(), expected, rtol=1e-5, atol=1e-5)
    assert made(inputs.half()).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_matrix_comes_back_to_the_bit(dtype: torch.dtype, seed: int) -> None:
    matrix = row_variable(9, 333, dtype, seed)
    packed = PackedRows.pack(matrix, CPU.device)
    assert_same(TritonLinear(packed, 0, None, CPU).matrix(), matrix)


def test_the_encoding_is_the_smaller_one() -> None:
    assert layer(64, 4096, 0.7).packed.gaps is not None
    assert layer(64, 4096, 0.96).packed.gaps is None


def test_a_matrix_that_is_hardly_sparse_stays_dense() -> None:
    assert isinstance(TritonRuntime().linear(sparse(12, 40, 0.3), None, CPU), MaskedLinear)


@pytest.mark.parametrize("sparsity", [0.7, 0.97])
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_operator_is_what_torch_expects(sparsity: float, tokens: int) -> None:
    packed = layer(12, 400, sparsity).packed
    arguments = (torch.randn(tokens, 400), packed.order, packed.ptr, packed.index, packed.gaps, packed.values)
    torch.library.opcheck(grouped_linear, arguments)


@pytest.mark.parametrize("joined", [False, True])
def test_compiled_whole_and_exported(joined: bool) -> None:
    block = Attention()
    if joined:
        join_siblings(block)
    x = torch.randn(2, 40)
    expected = block(x)
    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        exported = torch.export.export(block, (x,))
        torch.testing.assert_close(exported.module()(x), expected)
    calls = [node for node in exported.graph.nodes if "grouped_linear" in str(node.target)]
    assert len(calls) == (2 if joined else 4)


def test_siblings_share_a_launch_and_nothing_else_changes(launched: list[int]) -> None:
    apart, joined = Attention(), Attention()
    join_siblings(joined)
    x, y = torch.randn(1, 40), torch.randn(1, 40)
    torch.testing.assert_close(joined(x), apart(x))
    assert launched == [24, 40, 12, 6, 6, 40]
    for name in ("q_proj", "k_proj", "v_proj"):
        assert_same(joined.get_submodule(name).matrix(), apart.get_submodule(name).matrix())  # type: ignore[operator]
    # Whoever is asked out of turn, or with another tensor, still gives its own product.
    for one, other in ((joined.v_proj, apart.v_proj), (joined.q_proj, apart.q_proj), (joined.k_proj, apart.k_proj)):
        for inputs in (x, y):
            torch.testing.assert_close(one(inputs), other(inputs))
    assert sum(t.numel() for t in joined.buffers()) == sum(t.numel() for t in apart.buffers()) - 2


def test_a_tensor_is_not_kept_beyond_its_round() -> None:
    block = Attention()
    join_siblings(block)
    block(torch.randn(1, 40))
    assert block.q_proj.packed._last == (None, ())


def test_siblings_in_different_encodings_stay_apart() -> None:
    block = nn.Module()
    block.gate_proj, block.up_proj = layer(8, 4096, 0.7), layer(8, 4096, 0.97)
    join_siblings(block)
    assert block.gate_proj.packed is not block.up_proj.packed


def test_siblings_whose_offsets_would_overflow_together_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    block = Attention()
    monkeypatch.setattr(layers, "MOST_SLOTS", block.q_proj.packed.values.numel() + 1)
    join_siblings(block)
    assert block.q_proj.packed is not block.k_proj.packed


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the runtime take CPU tensors, which its operator decodes."""
    monkeypatch.setattr(TritonRuntime, "devices", ("cpu",))
    monkeypatch.setattr(TritonRuntime, "unavailable", lambda self: None)


@pytest.mark.usefixtures("on_cpu")
def test_a_whole_artifact_loads_computes_and_saves(pruned: Callable[..., Artifact], tmp_path: Path) -> None:
    artifact = pruned("llama")
    model, dense = load(artifact.path, "triton"), load(artifact.path, "dense")
    tokens = tiny_tokens(2)
    torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-4)
    assert sum(isinstance(m, TritonLinear) for m in model.modules()) == len(artifact.modules)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", "dense")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), dense.parameters(), strict=True))


def test_it_is_offered_on_gpus_only() -> None:
    assert next(iter(RUNTIMES)) == "triton"
    assert "triton" not in available_runtimes("cpu")
    with pytest.raises(UsageError, match="runtime triton executes on cuda, not on cpu; choose another"):
        pick_runtime("triton", "cpu")


def pretend(monkeypatch: pytest.MonkeyPatch, cuda: bool, triton: bool = True, capability: Any = (9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(layers.importlib.util, "find_spec", lambda name: object() if triton else None)


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        ({"cuda": False}, "no CUDA device here; use --runtime torch-sparse or native with --device cpu"),
        ({"cuda": True, "triton": False}, r"Triton is not installed .*; use --runtime torch-sparse"),
        (
            {"cuda": True, "capability": (7, 5)},
            "needs compute capability 8.0 and this GPU has 7.5; use --runtime torch",
        ),
    ],
)
def test_what_is_missing_is_said_with_a_way_out(
    machine: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, **machine)
    with pytest.raises(EnvironmentLacks, match=f"^runtime triton: {reason}"):
        pick_runtime("triton", "cuda")


def test_on_a_gpu_it_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda=True)
    assert pick_runtime("auto", "cuda").name == "triton"


def test_too_wide_a_matrix_names_what_to_use_instead() -> None:
    mask = torch.zeros(1, 2**16 + 1, dtype=torch.bool)
    with pytest.raises(UsageError, match="use CSR"):
        TritonRuntime().linear(SparseMatrix(mask, torch.empty(0)), None, CPU)


@pytest.mark.parametrize(
    ("tokens", "gathered", "kernel"),
    [(1, 8, "by_gathering"), (8, 8, "by_gathering_few"), (9, 8, "by_expanding"), (2, 1, "by_expanding")],
)
def test_the_kernel_is_chosen_by_tokens(
    tokens: int, gathered: int, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("by_gathering", "by_gathering_few", "by_expanding"):
        monkeypatch.setattr(launches, name, lambda *_, name=name: name)
    monkeypatch.setattr(launches, "choice_for", lambda _: tuning.Choice(gathered))
    packed = layer(12, 40).packed
    rows = launches.Packed(packed.order, packed.ptr, packed.index, packed.gaps, packed.values, 40)
    assert launches.multiply(rows, torch.zeros(tokens, 40)) == kernel


@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 40])
def test_a_launch_asks_the_device_nothing(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a CUDA graph can record it: every tensor is a shape without values here, and whoever reads one fails."""
    ran: list[str] = []

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *_, **__: ran.append(f"{self.name} {grid}")

    names = ("spmv", "reduce_splits", "spmm", "expand")
    monkeypatch.setattr(launches, "_kernels", lambda: SimpleNamespace(**{name: Kernel(name) for name in names}))
    monkeypatch.setattr(launches, "_multiprocessors", lambda _: 132)
    packed = PackedRows.pack(sparse(30, 4096, 0.7), CPU.device).to("meta").tensors()
    output = launches.multiply(packed, torch.empty(tokens, 4096, device="meta"))
    assert output.shape == (tokens, 30)
    assert ran == {1: ["spmv (8, 4)", "reduce_splits (1,)"], 40: ["expand (8,)"]}.get(tokens, ["spmm (8,)"])


def test_rows_come_in_the_order_of_their_groups() -> None:
    packed = PackedRows.pack(row_variable(40, 333, torch.float16, 0), CPU.device)
    counts = packed.ptr.diff()[packed.order.long()]
    assert counts.max() > counts.min()
    assert torch.equal(counts, counts.sort(descending=True).values)
    assert torch.equal(packed.order.sort().values, torch.arange(40, dtype=torch.int32))


@pytest.mark.parametrize(("rows", "parts"), [(4096, 4), (1024, 8), (16384, 1)])
def test_rows_are_cut_until_they_fill_the_gpu(rows: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "_multiprocessors", lambda _: 132)
    # 11008 columns at 70 %: about 413 groups in a row, 12 turns of a warp.
    shaped = SimpleNamespace(gaps=torch.empty(0), rows=rows, index=torch.empty(rows * 413, device="meta"))
    assert launches.splits(shaped, CPU.device, tuning.Choice(8)) == parts  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("capability", "tokens"), [((8, 0), 8), ((9, 0), 8), ((8, 6), 16), ((8, 9), 16), ((12, 0), 16), (None, 8)]
)
def test_the_predicted_break_even(capability: tuple[int, int] | None, tokens: int) -> None:
    assert tuning.predicted(capability).gathered_tokens == tokens


def test_measured_choices_are_kept_by_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "t.json"
    monkeypatch.setenv("TRIM_EXPORT_TUNING", str(path))
    tuning.write_choice(path, "A", tuning.Choice(4, 1))
    tuning.write_choice(path, "B", tuning.Choice(16, 4))
    assert json.loads(path.read_text()) == {
        "A": {"gathered_tokens": 4, "waves": 1}, "B": {"gathered_tokens": 16, "waves": 4},
    }  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "B")
    assert tuning.choice_for(torch.device("cuda:0")) == tuning.Choice(16, 4)
    tuning.choice_for.cache_clear()


@pytest.mark.parametrize("text", ["{", "[]", '{"A": {}}', '{"A": {"gathered_tokens": 99}}', '{"A": {"rows": 1}}'])
def test_a_damaged_table_says_so(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(UsageError, match=r"t\.json: not a table of GPU choices .*delete it or tune again"):
        tuning.write_choice(tmp_path / "t.json", "A", tuning.Choice(8))
