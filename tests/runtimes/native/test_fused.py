"""Siblings that are multiplied in one call: same numbers, whoever asks in whatever order."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from native_layers import CPU, needs_library, random_matrix
from strategies import assert_same
from torch import Tensor, nn

from trim_export.artifact import Artifact
from trim_export.converters import SparseMatrix
from trim_export.runtimes import SparseLinear, load, tensor_bytes
from trim_export.runtimes.native import DenseLinear, FusedLinear, MaskedLinear, NativeLinear, fuse
from trim_export.runtimes.native.linear import WaitingLinear

pytestmark = needs_library


class Siblings(nn.Module):
    """The same three layers each time, as the loader leaves them or each by itself."""

    def __init__(self, kind: type[NativeLinear] | type[WaitingLinear], bias: bool = False) -> None:
        super().__init__()
        for seed, (name, rows) in enumerate({"q_proj": 12, "k_proj": 5, "v_proj": 7}.items()):
            setattr(self, name, kind(random_matrix(rows, 70, 0.3, seed), torch.ones(rows) if bias else None, CPU))

    def forward(self, inputs: Tensor) -> list[Tensor]:
        return [getattr(self, name)(inputs) for name in ("q_proj", "k_proj", "v_proj")]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 70), (2, 3, 70), (70,)])
def test_siblings_give_what_they_gave_alone(bias: bool, shape: tuple[int, ...]) -> None:
    alone, together = Siblings(NativeLinear, bias), Siblings(WaitingLinear, bias)
    fuse(together)
    assert isinstance(together.q_proj, FusedLinear)
    for _ in range(2):
        inputs = torch.randn(shape)
        for found, expected in zip(together(inputs), alone(inputs), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_same(together.k_proj.matrix(), alone.k_proj.matrix())


def test_nobody_gets_the_product_of_other_inputs() -> None:
    alone, together = Siblings(NativeLinear), Siblings(WaitingLinear)
    fuse(together)
    inputs = torch.randn(1, 70)
    together.q_proj(inputs)
    inputs.neg_()  # changed in place: what waits for the others is of no use any more
    torch.testing.assert_close(together.k_proj(inputs), alone.k_proj(inputs))
    torch.testing.assert_close(together.k_proj(inputs), alone.k_proj(inputs))
    other = torch.randn(4, 70)
    torch.testing.assert_close(together.v_proj(other), alone.v_proj(other))
    torch.testing.assert_close(together.v_proj(other.bfloat16()).float(), alone.v_proj(other), rtol=0.05, atol=0.05)
    twin = copy.deepcopy(together)
    torch.testing.assert_close(twin.q_proj(inputs), alone.q_proj(inputs))


def test_a_cast_leaves_no_product_of_the_old_weights() -> None:
    together = Siblings(WaitingLinear)
    fuse(together)
    inputs = torch.randn(2, 70)
    together.q_proj(inputs)
    together.to(torch.bfloat16)
    expected = inputs @ together.k_proj.matrix().to_dense().float().T
    torch.testing.assert_close(together.k_proj(inputs), expected, rtol=1e-5, atol=1e-5)


def test_a_product_that_was_fetched_can_be_changed() -> None:
    alone, together = Siblings(NativeLinear), Siblings(WaitingLinear)
    fuse(together)
    inputs = torch.randn(2, 70)
    expected = alone(inputs)
    together.q_proj(inputs).zero_()
    torch.testing.assert_close(together.k_proj(inputs), expected[1])
    torch.testing.assert_close(together.q_proj(inputs), expected[0])


def test_they_weigh_what_they_weighed() -> None:
    alone, together = Siblings(NativeLinear), Siblings(WaitingLinear)
    fuse(together)
    assert tensor_bytes(together) <= tensor_bytes(alone) * 1.2  # rows are grouped anew


def test_unequal_layers_stay_apart() -> None:
    wide = random_matrix(7, 70)
    halves = WaitingLinear(SparseMatrix(wide.mask, wide.values.bfloat16()), None, CPU)
    for other in (halves, MaskedLinear(wide, None, CPU)):
        siblings, inputs = Siblings(WaitingLinear), torch.randn(2, 70)
        siblings.v_proj = other
        fuse(siblings)
        assert isinstance(siblings.q_proj, NativeLinear)
        torch.testing.assert_close(siblings.q_proj(inputs), Siblings(NativeLinear).q_proj(inputs), rtol=0, atol=0)
        expected = inputs @ other.matrix().to_dense().float().T
        torch.testing.assert_close(siblings.v_proj(inputs), expected, rtol=1e-5, atol=1e-5)


def test_a_layer_waits_until_its_siblings_are_there() -> None:
    siblings, last = Siblings(WaitingLinear), Siblings(WaitingLinear).v_proj
    siblings.v_proj = nn.Identity()
    fuse(siblings)
    assert isinstance(siblings.q_proj, WaitingLinear)
    siblings.v_proj = last
    fuse(siblings)
    assert isinstance(siblings.q_proj, FusedLinear)


def test_compiled_siblings_need_no_python() -> None:
    alone, together = Siblings(NativeLinear), Siblings(WaitingLinear)
    fuse(together)
    inputs = torch.randn(4, 70)
    compiled = torch.compile(together, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(inputs), alone(inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_loaded_model_is_fused_and_still_says_what_it_holds(pruned: Callable[..., Artifact]) -> None:
    native, dense = load(pruned("llama").path, "native"), load(pruned("llama").path, "dense")
    fused = [module for module in native.modules() if isinstance(module, FusedLinear)]
    assert len(fused) == 5 * native.config.num_hidden_layers
    assert isinstance(native.get_output_embeddings(), DenseLinear)
    for name, module in native.named_modules():
        if isinstance(module, SparseLinear):
            assert torch.equal(module.matrix().to_dense(), dense.get_submodule(name).weight)
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.inference_mode():
        torch.testing.assert_close(native(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(native(tokens[:, :1]).logits, dense(tokens[:, :1]).logits, rtol=1e-4, atol=1e-5)
