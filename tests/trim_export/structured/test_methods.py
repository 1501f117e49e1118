"""What each method measures, against the same thing computed the long way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_tokens

from trim_export.errors import ModelError, UsageError
from trim_export.forward import Compute
from trim_export.models import DenseModel, decoder_blocks, load_model
from trim_export.progress import silently
from trim_export.structured import STRUCTURED, reduce_model, remove_blocks
from trim_export.structured.flap import fluctuations
from trim_export.structured.pip import gradient_differences, perturbed_windows
from trim_export.structured.shortgpt import block_influence

CPU = Compute(torch.device("cpu"), False)
TOKENS = tiny_tokens(6, 16)


def load(tiny: Callable[[str], Path], kind: str = "gpt-neox") -> DenseModel:
    return load_model(str(tiny(kind)))


@pytest.mark.parametrize("kind", ["llama", "gemma3", "opt", "gpt2", "gpt-neox"])
def test_a_removed_block_passes_the_residual_stream_on(kind: str, tiny: Callable[[str], Path]) -> None:
    dense, whole = load(tiny, kind), load(tiny, kind)
    skipped = next(iter(decoder_blocks(whole.model).values()))

    def skip(hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden

    skipped.forward = skip
    remove_blocks(dense.model, [0])
    assert torch.equal(dense.model(TOKENS).logits, whole.model(TOKENS, use_cache=False).logits)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt-neox"])
def test_the_cache_of_a_shallower_model_works(kind: str, tiny: Callable[[str], Path]) -> None:
    dense = load(tiny, kind)
    remove_blocks(dense.model, [0])
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    cached = dense.model.generate(TOKENS[:1], **options)
    assert torch.equal(cached, dense.model.generate(TOKENS[:1], use_cache=False, **options))


def test_block_influence_is_one_minus_the_cosine_of_the_stream(tiny: Callable[[str], Path]) -> None:
    dense = load(tiny)
    states = dense.model(TOKENS, output_hidden_states=True).hidden_states
    found = block_influence(dense, TOKENS, CPU, silently)
    # The last of transformers' hidden states has been through the final norm.
    for before, after, influence in list(zip(states, states[1:], found, strict=False))[:-1]:
        x, y = before.double(), after.double()
        cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
        assert influence == pytest.approx(float(1 - cosine.mean()), abs=1e-6)
    assert len(found) == len(decoder_blocks(dense.model))


def test_gradient_differences_are_those_of_two_separate_passes(tiny: Callable[[str], Path]) -> None:
    dense = load(tiny, "llama")
    views = perturbed_windows(TOKENS, dense.tokenizer, 1.0, 0)
    found = gradient_differences(dense.model, TOKENS, views, CPU)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in dense.model.parameters())
    blocks = list(decoder_blocks(dense.model).values())
    expected = torch.zeros(len(blocks), dtype=torch.float64)
    dense.model.requires_grad_(True)
    for window, view in zip(TOKENS, views, strict=True):
        assert not torch.equal(window[: len(view)], view)
        gradients = []
        for ids in (window[None], view[None]):
            logits = dense.model(ids).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
            inside = [list(block.parameters()) for block in blocks]
            flat = torch.autograd.grad(loss, [parameter for block in inside for parameter in block])
            gradients.append(list(flat))
        sizes = [len(list(block.parameters())) for block in blocks]
        for index, size in enumerate(sizes):
            begin = sum(sizes[:index])
            pairs = zip(*(side[begin : begin + size] for side in gradients), strict=True)
            weights = blocks[index].parameters()
            sizes_of = [(w * (a - b)).double().abs().sum() for w, (a, b) in zip(weights, pairs, strict=True)]
            expected[index] += sum(sizes_of) / len(TOKENS)
    assert found == pytest.approx(expected.tolist(), rel=1e-4)


def test_the_size_of_a_difference_is_that_of_the_function_not_of_how_its_matrices_are_scaled(
    tiny: Callable[[str], Path],
) -> None:
    dense = load(tiny, "llama")
    views = perturbed_windows(TOKENS, dense.tokenizer, 1.0, 0)
    before = gradient_differences(dense.model, TOKENS, views, CPU)
    for block in decoder_blocks(dense.model).values():
        block.get_submodule("mlp.up_proj").weight.data *= 8
        block.get_submodule("mlp.down_proj").weight.data /= 8
    assert gradient_differences(dense.model, TOKENS, views, CPU) == pytest.approx(before, rel=1e-4)


def test_pip_removes_the_least_sensitive_block_and_measures_anew(tiny: Callable[[str], Path]) -> None:
    dense, shadow = load(tiny), load(tiny)
    reduced = reduce_model(dense, STRUCTURED["pip"], 0.6, TOKENS, CPU)
    assert reduced.structured is not None
    names, steps = list(range(3)), reduced.structured["removed"]["steps"]
    views = perturbed_windows(TOKENS, shadow.tokenizer, 1 / 3, 0)
    assert len(steps) == 2
    for step in steps:
        differences = gradient_differences(shadow.model, TOKENS, views, CPU)
        least = min(range(len(names)), key=differences.__getitem__)
        assert step["difference"] == pytest.approx(differences[least])
        remove_blocks(shadow.model, [least])
        assert names.pop(least) == step["block"]


def test_flap_replaces_what_it_removes_by_its_mean(tiny: Callable[[str], Path]) -> None:
    dense, whole = load(tiny, "llama-tied"), load(tiny, "llama-tied")
    seen = fluctuations(whole, TOKENS, CPU, silently)
    reduced = reduce_model(dense, STRUCTURED["flap"], 0.25, TOKENS, CPU)
    assert reduced.structured is not None
    removed = reduced.structured["removed"]
    assert removed["key_value_groups"] == 1
    assert 0 < removed["channels"] < 44

    def averaging(mean: torch.Tensor, gone: list[int]) -> Any:
        def hook(_: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            (given,) = inputs
            given = given.clone()
            given[..., gone] = mean[gone].float()
            return (given,)

        return hook

    for name, block in decoder_blocks(whole.model).items():
        for path in ("self_attn.o_proj", "mlp.down_proj"):
            place, linear = f"{name}.{path}", block.get_submodule(path)
            score = seen[place].variance * linear.weight.double().square().sum(dim=0)
            if path.startswith("self_attn"):
                groups = score.square().view(2, -1).mean(dim=1)
                worst = int(groups.argmin())
                gone = list(range(worst * 16, worst * 16 + 16))
            else:
                gone = score.argsort()[: removed["channels"]].tolist()
            linear.register_forward_pre_hook(averaging(seen[place].mean, gone))
    torch.testing.assert_close(dense.model(TOKENS).logits, whole.model(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_fluctuations_are_mean_and_variance_over_all_tokens(tiny: Callable[[str], Path]) -> None:
    dense = load(tiny, "llama")
    name, captured = "model.layers.1.mlp.down_proj", []
    handle = dense.model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    found = fluctuations(dense, TOKENS, CPU, silently)[name]
    handle.remove()
    flat = torch.cat([batch.flatten(0, 1) for batch in captured]).double()
    torch.testing.assert_close(found.mean, flat.mean(dim=0))
    torch.testing.assert_close(found.variance, flat.var(dim=0, correction=0))


@pytest.mark.parametrize("name", sorted(STRUCTURED))
def test_more_than_there_is_cannot_be_removed(name: str, tiny: Callable[[str], Path]) -> None:
    dense = load(tiny, "llama")
    before = {key: value.clone() for key, value in dense.model.state_dict().items()}
    with pytest.raises(UsageError, match=r"--remove 0\.9"):
        reduce_model(dense, STRUCTURED[name], 0.9, TOKENS, CPU)
    with pytest.raises(UsageError, match=r"--remove 0\.0001"):
        reduce_model(dense, STRUCTURED[name], 0.0001, TOKENS, CPU)
    assert all(torch.equal(value, before[key]) for key, value in dense.model.state_dict().items())


def test_flap_refuses_an_architecture_without_the_biases(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError, match="Qwen2ForCausalLM: flap puts means into biases"):
        reduce_model(load(tiny, "qwen2"), STRUCTURED["flap"], 0.3, TOKENS, CPU)
