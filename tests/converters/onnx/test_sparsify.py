"""From dense graphs to sparse ones: what is replaced, what is left alone, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx_graphs import OPSET, needs_operators, product, write_graph
from torch import Tensor

from trim_export.converters.onnx import DOMAIN, MODEL, Form, sparsify
from trim_export.converters.onnx.graph import DataFile, read_model, read_tensor
from trim_export.errors import ArtifactError, ModelError


def sparse(rows: int, columns: int, share: float = 0.7, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight * (torch.rand(rows, columns, generator=generator) >= share)


def write(folder: Path, nodes: list[Any], weights: dict[str, Tensor], columns: int, rows: int) -> None:
    folder.mkdir(exist_ok=True)
    with DataFile(folder / f"{MODEL}.data") as file:
        stored = [file.add(name, weight) for name, weight in weights.items()]
    write_graph(folder, nodes, stored, columns, rows, [])


def chain(folder: Path) -> dict[str, Tensor]:
    """Two sparse products with a dense one between them, and a bias."""
    weights = {
        "up": sparse(70, 50).T.contiguous(),
        "dense": torch.randn(70, 60),
        "down": sparse(9, 60, 0.9).T.contiguous(),
        "bias": torch.randn(9),
    }
    nodes = [
        helper.make_node("MatMul", ["A", "up"], ["x"]),
        helper.make_node("MatMul", ["x", "dense"], ["y"]),
        helper.make_node("MatMul", ["y", "down"], ["z"]),
        helper.make_node("Add", ["z", "bias"], ["Y"]),
    ]
    write(folder, nodes, weights, 50, 9)
    return weights


@needs_operators
@pytest.mark.parametrize("encoding", ["bitmap", "csr"])
def test_sparse_products_are_replaced_and_the_model_computes_the_same(encoding: str, tmp_path: Path) -> None:
    weights = chain(tmp_path / "dense")
    out = tmp_path / "out"
    out.mkdir()
    done = sparsify(tmp_path / "dense", out, Form(encoding))
    nnz = sum(int(weights[name].count_nonzero()) for name in ("up", "down"))
    assert (done.matrices, done.weights, done.nnz) == (2, 70 * 50 + 9 * 60, nnz)
    model = read_model(out / MODEL)
    assert [node.domain for node in model.graph.node] == [DOMAIN, "", DOMAIN, ""]
    names = {tensor.name for tensor in model.graph.initializer}
    assert {"dense", "bias"} < names
    assert not {"up", "down"} & names
    inputs = torch.randn(4, 50)
    expected = inputs @ weights["up"] @ weights["dense"] @ weights["down"] + weights["bias"]
    for kernels in (True, False):
        torch.testing.assert_close(product(out, inputs, kernels), expected, rtol=1e-4, atol=1e-4)


@needs_operators
@pytest.mark.parametrize("encoding", ["bitmap", "csr"])
def test_sparse_products_of_one_input_become_one(encoding: str, tmp_path: Path) -> None:
    weights = {
        "up": sparse(70, 50).T.contiguous(),
        "dense": torch.randn(50, 70),
        "gate": sparse(70, 50, seed=1).T.contiguous(),
        "short": sparse(9, 50, seed=2).T.contiguous(),
        "other": sparse(9, 70, seed=3).T.contiguous(),
    }
    nodes = [
        helper.make_node("MatMul", ["A", "gate"], ["g"]),
        helper.make_node("MatMul", ["A", "dense"], ["d"]),
        helper.make_node("Add", ["g", "d"], ["h"]),
        helper.make_node("MatMul", ["A", "up"], ["u"]),
        helper.make_node("MatMul", ["A", "short"], ["s"]),
        helper.make_node("Mul", ["h", "u"], ["x"]),
        helper.make_node("MatMul", ["x", "other"], ["y"]),
        helper.make_node("Add", ["y", "s"], ["Y"]),
    ]
    write(tmp_path / "dense", nodes, weights, 50, 9)
    out = tmp_path / "out"
    out.mkdir()
    assert sparsify(tmp_path / "dense", out, Form(encoding)).matrices == 4
    kinds = [node.op_type for node in read_model(out / MODEL).graph.node if node.domain == DOMAIN]
    assert len(kinds) == 2
    inputs = torch.randn(4, 50)
    hidden = (inputs @ weights["gate"] + inputs @ weights["dense"]) * (inputs @ weights["up"])
    expected = hidden @ weights["other"] + inputs @ weights["short"]
    for kernels in (True, False):
        torch.testing.assert_close(product(out, inputs, kernels), expected, rtol=1e-4, atol=1e-3)


@needs_operators
@pytest.mark.parametrize("encoding", ["bitmap", "csr"])
def test_gemms_are_products_and_their_biases_are_added(encoding: str, tmp_path: Path) -> None:
    weights = {
        "first": sparse(70, 50),
        "first_bias": torch.randn(70),
        "sibling": sparse(70, 50, seed=1).T.contiguous(),
        "sibling_bias": torch.randn(1, 70),
        "third": sparse(9, 70, seed=2),
        "plain": sparse(9, 50, seed=3).T.contiguous(),
    }
    nodes = [
        helper.make_node("Gemm", ["A", "first", "first_bias"], ["f"], transB=1),
        helper.make_node("Gemm", ["A", "sibling", "sibling_bias"], ["s"], alpha=1.0, beta=1.0),
        helper.make_node("MatMul", ["A", "plain"], ["p"]),
        helper.make_node("Mul", ["f", "s"], ["x"]),
        helper.make_node("Gemm", ["x", "third"], ["t"], transB=1),
        helper.make_node("Add", ["t", "p"], ["Y"]),
    ]
    write(tmp_path / "dense", nodes, weights, 50, 9)
    out = tmp_path / "out"
    out.mkdir()
    assert sparsify(tmp_path / "dense", out, Form(encoding)).matrices == 4
    onnx.checker.check_model(onnx.load(out / MODEL))
    kinds = [node.op_type for node in read_model(out / MODEL).graph.node]
    assert "Gemm" not in kinds
    assert sum(kind.startswith("SparseMatMul") for kind in kinds) == 2  # three share an input
    inputs = torch.randn(4, 50)
    x, named = inputs.double().numpy(), {name: weight.double().numpy() for name, weight in weights.items()}
    hidden = (x @ named["first"].T + named["first_bias"]) * (x @ named["sibling"] + named["sibling_bias"])
    expected = torch.from_numpy(hidden @ named["third"].T + x @ named["plain"])
    for kernels in (True, False):
        torch.testing.assert_close(product(out, inputs, kernels).double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("given", "bias"),
    [({"alpha": 2.0}, "bias"), ({"beta": 0.5}, "bias"), ({"transA": 1}, "bias"), ({}, "computed")],
    ids=["alpha", "beta", "transA", "computed bias"],
)
def test_other_gemms_stay_as_they_are(given: dict[str, Any], bias: str, tmp_path: Path) -> None:
    weights = {"scaled": sparse(50, 50), "bias": torch.randn(50), "w": sparse(50, 50, seed=1).T.contiguous()}
    nodes = [
        helper.make_node("Add", ["bias", "bias"], ["computed"]),
        helper.make_node("Gemm", ["A", "scaled", bias], ["x"], **given),
        helper.make_node("MatMul", ["x", "w"], ["Y"]),
    ]
    write(tmp_path / "dense", nodes, weights, 50, 50)
    out = tmp_path / "out"
    out.mkdir()
    assert sparsify(tmp_path / "dense", out, Form()).matrices == 1
    assert [node.op_type for node in read_model(out / MODEL).graph.node] == ["Add", "Gemm", "SparseMatMulBitmap"]


def gated(folder: Path, nodes_behind: list[Any]) -> dict[str, Tensor]:
    """A gated MLP whose large activations meet small weights, as those of trained models do."""
    sizes = torch.arange(64).remainder(13).sub(6).float().exp2()
    weights = {
        "gate": sparse(64, 50).T.contiguous(),
        "up": (sparse(64, 50, seed=1) * sizes[:, None]).T.contiguous(),
        "down": (sparse(40, 64, seed=2) / sizes).T.contiguous(),
    }
    nodes = [
        helper.make_node("MatMul", ["A", "gate"], ["x"]),
        helper.make_node("MatMul", ["A", "up"], ["y"]),
        helper.make_node("Sigmoid", ["x"], ["open"]),
        helper.make_node("Mul", ["open", "y"], ["xy"]),
        helper.make_node("MatMul", ["xy", "down"], ["z"]),
    ]
    write(folder, nodes + nodes_behind, weights, 50, 40)
    return weights


@needs_operators
@pytest.mark.parametrize("kernels", [True, False])
def test_rounding_spares_small_weights_that_meet_large_inputs(kernels: bool, tmp_path: Path) -> None:
    alone = [helper.make_node("Identity", ["z"], ["Y"])]
    shared = [  # up has another use, so that its outputs must stay as they are
        helper.make_node("ReduceSum", ["y"], ["total"], keepdims=0),
        helper.make_node("Mul", ["total", "total"], ["square"]),
        helper.make_node("Sub", ["square", "square"], ["nothing"]),
        helper.make_node("Add", ["z", "nothing"], ["Y"]),
    ]
    inputs, errors = torch.randn(5, 50, generator=torch.Generator().manual_seed(3)), []
    for name, behind in {"alone": alone, "shared": shared}.items():
        weights = gated(tmp_path / name, behind)
        out = tmp_path / f"{name}-out"
        out.mkdir()
        sparsify(tmp_path / name, out, Form("csr", "int8"))
        gate, up, down = (weights[part].double() for part in ("gate", "up", "down"))
        expected = ((inputs.double() @ gate).sigmoid() * (inputs.double() @ up)) @ down
        errors.append(((product(out, inputs, kernels).double() - expected).norm() / expected.norm()).item())
    assert errors[0] < 0.02
    assert errors[1] > 3 * errors[0]


def test_a_weight_with_another_use_stays(tmp_path: Path) -> None:
    weights = {"twice": sparse(50, 50).T.contiguous(), "once": sparse(50, 50, seed=1).T.contiguous()}
    nodes = [
        helper.make_node("MatMul", ["A", "twice"], ["x"]),
        helper.make_node("MatMul", ["x", "once"], ["y"]),
        helper.make_node("MatMul", ["twice", "y"], ["Y"]),
    ]
    write(tmp_path / "dense", nodes, weights, 50, 50)
    out = tmp_path / "out"
    out.mkdir()
    assert sparsify(tmp_path / "dense", out, Form()).matrices == 1


def test_a_graph_without_sparse_products_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [helper.make_node("MatMul", ["A", "w"], ["Y"])], {"w": torch.randn(40, 30)}, 40, 30)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ModelError, match="none of its 1 constant MatMul or Gemm weights is sparse"):
        sparsify(tmp_path, out, Form())


def decoder(folder: Path, tied: str) -> dict[str, Tensor]:
    """Tokens to logits: lookup, a sparse product, and a head that is tied to the lookup or is not."""
    table, inner = torch.randn(33, 24), sparse(24, 24)
    head = {"no": torch.randn(33, 24), "pruned": sparse(33, 24)}.get(tied, table)
    weights = {"inner": inner.T.contiguous(), "head": head.T.contiguous()}
    nodes = []
    if tied == "turned":
        nodes.append(helper.make_node("Transpose", ["head"], ["table"], perm=[1, 0]))
    else:
        weights["table"] = table
    nodes += [
        helper.make_node("Gather", ["table", "tokens"], ["x"]),
        helper.make_node("MatMul", ["x", "inner"], ["y"]),
        helper.make_node("MatMul", ["y", "head"], ["logits"]),
    ]
    folder.mkdir()
    with DataFile(folder / f"{MODEL}.data") as file:
        stored = [file.add(name, weight) for name, weight in weights.items()]
    graph = helper.make_graph(
        nodes,
        "decoder",
        [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length", 33])],
        stored,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    (folder / MODEL).write_bytes(model.SerializeToString())
    return {"table": table, "inner": inner, "head": head}


@needs_operators
@pytest.mark.parametrize("tied", ["turned", "equal", "no"])
@pytest.mark.parametrize(("values", "tolerance"), [("float32", 1e-5), ("int8", 0.05)])
def test_head_and_embedding_are_one_matrix_where_they_are_tied(
    tied: str, values: str, tolerance: float, tmp_path: Path
) -> None:
    from trim_export.runtimes.onnxruntime import open_session

    parts = decoder(tmp_path / "dense", tied)
    out = tmp_path / "out"
    out.mkdir()
    sparsify(tmp_path / "dense", out, Form(head=values))
    model = read_model(out / MODEL)
    stored = [tensor.name for tensor in model.graph.initializer if 33 in tensor.dims and 24 in tensor.dims]
    assert len(stored) == (2 if tied == "no" else 1)
    onnx.checker.check_model(onnx.load(out / MODEL))
    tokens = torch.randint(0, 33, (2, 5))
    expected = parts["table"][tokens] @ parts["inner"].T @ parts["head"].T
    for kernels in (True, False):
        logits = open_session(out, kernels).run({"tokens": tokens.numpy()})["logits"]
        assert (torch.from_numpy(logits) - expected).abs().max() <= tolerance * expected.abs().max()


def test_a_pruned_head_is_a_sparse_product(tmp_path: Path) -> None:
    decoder(tmp_path / "dense", "pruned")
    out = tmp_path / "out"
    out.mkdir()
    assert sparsify(tmp_path / "dense", out, Form(head="float32")).matrices == 2
    names = {node.op_type for node in read_model(out / MODEL).graph.node}
    assert names == {"Gather", "SparseMatMulBitmap"}


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("location", "../secret", "unsafe file name"),
        ("location", "/etc/passwd", "unsafe file name"),
        ("location", "elsewhere.bin", "missing"),
        ("offset", str(2**40), "beyond its end"),
        ("offset", "-64", "non-negative"),
        ("offset", "first", "not readable as ONNX"),
        ("length", str(2**40), "beyond its end"),
        ("length", "64", "which its shape"),
    ],
)
def test_weights_outside_of_the_directory_or_beyond_their_file_are_refused(
    key: str, value: str, reason: str, tmp_path: Path
) -> None:
    chain(tmp_path)
    model = read_model(tmp_path / MODEL)
    tensor = model.graph.initializer[0]
    next(entry for entry in tensor.external_data if entry.key == key).value = value
    with pytest.raises(ArtifactError, match=reason):
        read_tensor(tmp_path, tensor)


def test_what_is_no_onnx_file_is_named(tmp_path: Path) -> None:
    (tmp_path / MODEL).write_bytes(b"\xff" * 100)
    with pytest.raises(ArtifactError, match=r"model\.onnx: not readable as ONNX"):
        read_model(tmp_path / MODEL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int64])
@pytest.mark.parametrize("side", [0, 1, 300])
def test_a_tensor_comes_back_bit_for_bit(dtype: torch.dtype, side: int, tmp_path: Path) -> None:
    tensor = (torch.randn(side, 7) * 50).to(dtype)
    with DataFile(tmp_path / "data") as file:
        made = [file.add("first", torch.ones(3)), file.add("second", tensor)]
    back = read_tensor(tmp_path, made[1])
    assert back.dtype == dtype
    assert torch.equal(back, tensor)
