"""How a batch runs through a block: which layers read what, and which of them write into the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trim_export.forward import BlockCall, Compute, StopForward, move

__all__ = ["Dataflow", "Passage", "dataflow", "pass_through", "residual_after", "residual_before"]


@dataclass(frozen=True)
class Passage:
    """One batch through a block, everything on the compute device.

    Attributes:
        batch: what entered, ``[windows, tokens, features]``.
        order: the layers in the order of their calls.
        inputs: what each layer read.
        outputs: what each layer gave, and the block's larger parts, whatever that is (attention gives a tuple).
        output: what the block gave; None if the pass was stopped before.
    """

    batch: Tensor
    order: list[str]
    inputs: dict[str, Tensor]
    outputs: dict[str, Any]
    output: Tensor | None


@dataclass(frozen=True)
class Dataflow:
    """What one passage tells about all of them.

    Attributes:
        groups: layers that share an input, in the order of their calls.
        writers: layers whose outputs are added to the residual stream, in that order.
        ends_with_writer: whether the output is the last layer's output added to the residual stream, bit for bit.
        ends: larger part of the block -> the layer whose output is all that it gives, and how many values it gives,
            the others being None (attention: o_proj and 2); 0 if it gives that output itself.
    """

    groups: list[list[str]]
    writers: list[str]
    ends_with_writer: bool
    ends: dict[str, tuple[str, int]]


def pass_through(
    block: nn.Module,
    linears: Mapping[str, nn.Linear],
    call: BlockCall,
    batch: Tensor,
    compute: Compute,
    replay: Mapping[str, Any],
    stop_before: str | None = None,
) -> Passage:
    """Run one batch and note what every layer reads and gives, at most until one layer is about to run.

    Layers and other parts of the block in ``replay`` give what stands there.
    """
    parts = {path: part for path, part in block.named_children() if path not in linears and _holds(path, linears)}
    watched: dict[str, nn.Module] = {**linears, **parts}
    batch = batch.to(compute.device)
    order: list[str] = []
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Any] = {path: move(known, compute.device) for path, known in replay.items()}

    def before(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            order.append(path)
            inputs[path] = args[0]
            if path == stop_before:
                raise StopForward

        return hook

    def after(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs[path] = output

        return hook

    handles = [linear.register_forward_pre_hook(before(path)) for path, linear in linears.items()]
    handles += [module.register_forward_hook(after(path)) for path, module in watched.items()]
    for path in replay:  # hides the methods until they are deleted again
        watched[path].forward = lambda *_, given=outputs[path], **__: given
    result: Tensor | None = None
    try:
        result = call.run(block, batch, compute)
    except StopForward:
        pass
    finally:
        for handle in handles:
            handle.remove()
        for path in replay:
            del watched[path].forward
    return Passage(batch, order, inputs, outputs, result)


def dataflow(passage: Passage, linears: Mapping[str, nn.Linear], residual: bool = True) -> Dataflow:
    """Read a whole passage; without ``residual`` no layer is taken for one that writes into the residual stream."""
    assert passage.output is not None
    groups = _groups(passage)
    writers = _writers(groups, passage) if residual else []
    ends_with_writer = writers[-1:] == groups[-1] and torch.equal(
        residual_after(writers[-1], writers, passage), passage.output
    )
    return Dataflow(groups, writers, ends_with_writer, _ends(passage, linears))


def residual_before(writer: str, writers: list[str], passage: Passage) -> Tensor:
    """The residual stream just before ``writer`` adds to it, shaped like the batch; added up in the block's order."""
    batch = passage.batch
    earlier: list[Tensor] = [passage.outputs[path] for path in writers[: writers.index(writer)]]
    return sum((output.view_as(batch).to(batch.dtype) for output in earlier), batch)


def residual_after(writer: str, writers: list[str], passage: Passage) -> Tensor:
    """The residual stream just after ``writer`` added to it."""
    output: Tensor = passage.outputs[writer]
    return residual_before(writer, writers, passage) + output.view_as(passage.batch)


def _holds(part: str, linears: Mapping[str, nn.Linear]) -> bool:
    return any(path.startswith(f"{part}.") for path in linears)


def _groups(passage: Passage) -> list[list[str]]:
    """Layers in the order of their calls, those that read the very same tensor together."""
    groups: list[list[str]] = []
    for path in passage.order:
        if groups and passage.inputs[path] is passage.inputs[groups[-1][0]]:
            groups[-1].append(path)
        else:
            groups.append([path])
    return groups


def _writers(groups: list[list[str]], passage: Passage) -> list[str]:
    """The layers whose outputs the block adds to its input, if that is all it does with the residual stream.

    Candidates are layers as wide as the stream that share their input with no other (o and down in Llama). Where a norm
    follows them (Gemma) the sum does not come out, and none is returned: such a block is fitted without the residual.
    """
    batch, output = passage.batch, passage.output
    assert output is not None
    wide = [group[0] for group in groups if len(group) == 1 and passage.outputs[group[0]].shape[-1] == batch.shape[-1]]
    added = sum(
        (passage.outputs[path].reshape(batch.shape).float() for path in wide), torch.zeros((), device=batch.device)
    )
    change = output.float() - batch.float()
    fits = bool((change - added).norm() <= 0.02 * change.norm())
    return wide if wide and fits else []


def _ends(passage: Passage, linears: Mapping[str, nn.Linear]) -> dict[str, tuple[str, int]]:
    """As in `Dataflow`: parts that give the very tensor which a layer gave, and nothing else."""
    ends: dict[str, tuple[str, int]] = {}
    for part in passage.outputs.keys() - linears.keys():
        given = passage.outputs[part]
        first, *others = given if isinstance(given, tuple) else (given,)
        layer = next((path for path in linears if passage.outputs.get(path) is first), None)
        if layer is not None and all(other is None for other in others):
            ends[part] = layer, len(given) if isinstance(given, tuple) else 0
    return ends
