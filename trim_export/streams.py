"""Two streams through one block: the dense model's activations beside the pruned model's.

A weight update wants to know, for the layers that read one input, what the pruned model feeds them (the Gram matrix)
and what they should give (the target): what the dense model gives there; for the layers that write into the residual
stream, what leaves the two streams equal, so that the update also makes up for what was lost before. Layers are visited
in the order in which the block calls them, those that share an input together: q, k, v; o; gate, up; down.

Of the dense stream, one block's layer inputs are held at a time (tokens x their widths, in the host's memory); the
pruned stream is summed up batch by batch, and of its last layer what the block's output takes is held. Where a device
is out of memory both go on with smaller batches: what is held of the dense stream can be cut anywhere between windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trim_export.dataflow import Dataflow, dataflow, pass_through, residual_after, residual_before
from trim_export.forward import BlockCall, Compute, in_batches, move, run_block
from trim_export.memory import halving
from trim_export.statistics import InputStatistics, require_finite_inputs

__all__ = ["DenseStream", "GroupStatistics", "PrunedStream", "observe_dense"]

SMALLEST_TILE = 256
"""Columns below which a Gram matrix is computed whole: its symmetry saves nothing any more."""


@dataclass(frozen=True)
class DenseStream:
    """What one dense block does with the dense model's activations, in the host's memory.

    Attributes:
        flow: how they run through it.
        inputs: first layer of each group that does not write -> its inputs, ``[windows, tokens, columns]``.
        sums: writer -> the residual stream just after its output was added, ``[windows, tokens, features]``.
        output: what the block gives, ``[windows, tokens, features]``.
        windows: at a time for which the device had memory.
    """

    flow: Dataflow
    inputs: dict[str, Tensor]
    sums: dict[str, Tensor]
    output: Tensor
    windows: int


@dataclass(frozen=True)
class GroupStatistics:
    """Sums over all calibration tokens for the layers that share one input, float32.

    Attributes:
        gram: ``[columns, columns]``, the sum of x x^T over the pruned model's inputs.
        cross: ``[columns, columns]``, the sum of x_dense x^T; None for a layer that writes into the residual stream.
        target: ``[features, columns]``, for a writer the sum of (s_dense - r - b) x^T, with s_dense the dense residual
            stream after the layer's output is added, r the pruned one before, and b the layer's bias; else None.
        inputs: what scores and row budgets use, of the pruned model's inputs.
    """

    gram: Tensor
    cross: Tensor | None
    target: Tensor | None
    inputs: InputStatistics

    def targets(self, weight: Tensor) -> Tensor:
        """The sum of y x^T ``[rows, columns]``, y being what the layer should give; ``weight`` is its dense one."""
        if self.target is not None:
            return self.target
        assert self.cross is not None
        return weight @ self.cross


@torch.no_grad()
def observe_dense(
    block: nn.Module,
    linears: Mapping[str, nn.Linear],
    call: BlockCall,
    hidden: Tensor,
    compute: Compute,
    residual: bool = True,
) -> DenseStream:
    """Send the dense stream through a block that is still dense, and keep what its layers see.

    Without ``residual`` no layer is taken for one that writes into the residual stream.
    """

    def observe(windows: int) -> DenseStream:
        flow: Dataflow | None = None
        inputs: dict[str, Tensor] = {}
        sums: dict[str, Tensor] = {}
        output = torch.empty_like(hidden)

        def keep(store: dict[str, Tensor], path: str, place: slice, values: Tensor) -> None:
            columns = values.shape[-1]
            if path not in store:
                store[path] = torch.empty(*hidden.shape[:2], columns, dtype=values.dtype, device=hidden.device)
            store[path][place] = values.reshape(-1, hidden.shape[1], columns).to(hidden.device)

        for place in _places(hidden, windows):
            seen = pass_through(block, linears, call, hidden[place], compute, replay={})
            assert seen.output is not None
            flow = flow or dataflow(seen, linears, residual)
            for leader, *_ in flow.groups:
                if leader not in flow.writers:
                    keep(inputs, leader, place, seen.inputs[leader])
            for writer in flow.writers:
                keep(sums, writer, place, residual_after(writer, flow.writers, seen))
            output[place] = seen.output.to(hidden.device)
        assert flow is not None
        return DenseStream(flow, inputs, sums, output, windows)

    return in_batches(observe, hidden, compute)


@dataclass
class PrunedStream:
    """The pruned model's activations on their way through a block whose layers are being pruned, group by group.

    What one pass has computed the next ones need not compute again; it is held in the host's memory, a batch each.

    Attributes:
        block, linears, call, compute: as for `observe_dense`.
        dense: what that found.
        hidden: what the pruned model feeds the block, ``[windows, tokens, features]``.
        name: of the block, for messages.
    """

    block: nn.Module
    linears: Mapping[str, nn.Linear]
    dense: DenseStream
    call: BlockCall
    hidden: Tensor
    compute: Compute
    name: str
    _windows: int = field(init=False)
    _outputs: dict[str, list[Any]] = field(init=False, default_factory=dict)
    """Of layers, and of larger parts of the block."""
    _inputs: dict[str, list[Tensor]] = field(init=False, default_factory=dict)
    """Of layers that a pass stopped before, while they were being pruned."""
    _pending: list[tuple[Tensor, Tensor]] = field(init=False, default_factory=list)
    """The residual stream before the last layer's output is added, and that layer's input, as the block calls it."""

    def __post_init__(self) -> None:
        self._windows = self.dense.windows

    @torch.no_grad()
    def observe(self, group: list[str]) -> GroupStatistics:
        """Send the stream through the block, whose earlier layers are pruned, up to one group of layers.

        Where memory runs out nothing is left of the pass, nor of what earlier ones held, and it begins anew.

        Raises:
            ModelError: naming block and layer, if the inputs are not finite.
        """
        return halving(lambda windows: self._observe(group, windows), self._windows, 1, self.compute.device, "windows")

    @torch.no_grad()
    def finish(self) -> Tensor:
        """The block's output with all its layers as they are now, ``[windows, tokens, features]``."""
        if not self._pending:
            return run_block(self.block, self.call, self.hidden, self.compute)
        return halving(self._finish_last, self._windows, 1, self.compute.device, "windows")

    def _observe(self, group: list[str], windows: int) -> GroupStatistics:
        if windows != self._windows:
            self._windows = windows
            self._outputs, self._inputs, self._pending = {}, {}, []
        self._finish_observed()
        flow, leader, host = self.dense.flow, group[0], self.hidden.device
        layer, is_last = self.linears[leader], group == flow.groups[-1]
        columns, writes = layer.in_features, leader in flow.writers
        gram = torch.zeros(columns, columns, device=self.compute.device)
        wanted = torch.zeros(self.hidden.shape[-1] if writes else columns, columns, device=self.compute.device)
        last_tokens = []
        is_end = any(leader == last for last, _ in flow.ends.values())
        for number, place in enumerate(_places(self.hidden, windows)):
            replay = {path: outputs[number] for path, outputs in self._outputs.items() if len(outputs) > number}
            batch = self.hidden[place]
            seen = pass_through(self.block, self.linears, self.call, batch, self.compute, replay, stop_before=leader)
            if not is_last:
                for path in seen.outputs.keys() - replay.keys():
                    self._outputs.setdefault(path, []).append(move(seen.outputs[path], host))
                if is_end:
                    self._inputs.setdefault(leader, []).append(seen.inputs[leader].to(host))
            inputs = _flat(seen.inputs[leader]).float()
            _add_gram(gram, inputs)
            if writes:
                before = residual_before(leader, flow.writers, seen)
                apart = _flat(self.dense.sums[leader][place].to(self.compute.device)).float() - _flat(before).float()
                if layer.bias is not None:
                    apart -= layer.bias.float()  # the pruned layer adds it again
                wanted.addmm_(apart.T, inputs)
                if is_last and flow.ends_with_writer:
                    self._pending.append((before.to(host), seen.inputs[leader].to(host)))
            else:
                wanted.addmm_(_flat(self.dense.inputs[leader][place].to(self.compute.device)).float().T, inputs)
            last_tokens.append(inputs.reshape(len(batch) * self.call.joined, -1, columns)[:, -1].clone())
        gram = gram.tril() + gram.tril(-1).T
        require_finite_inputs(gram, f"{self.name}.{leader}")
        last = torch.cat(last_tokens)
        statistics = InputStatistics(gram.diagonal() / len(last), last.T.contiguous())
        cross, target = (None, wanted) if writes else (wanted, None)
        return GroupStatistics(gram, cross, target, statistics)

    def _finish_observed(self) -> None:
        """Turn inputs into outputs: of the layers as they are now, and of the parts that end with them."""
        for path, batches in self._inputs.items():
            given = [self._through(path, inputs).to(inputs.device) for inputs in batches]
            self._outputs[path] = given
            for part, (last, values) in self.dense.flow.ends.items():
                if last == path:
                    self._outputs[part] = [(output, *(None,) * (values - 1)) for output in given] if values else given
        self._inputs.clear()

    def _finish_last(self, windows: int) -> Tensor:
        """Add the last layer's share, as it is now; the very bits that running the block would give."""
        outputs = []
        for residuals, inputs in self._pending:
            rows = windows * (len(inputs) // len(residuals))  # more than one a window where a block flattens its tokens
            for residual, part in zip(residuals.split(windows), inputs.split(rows), strict=True):
                added = self._through(self.dense.flow.groups[-1][0], part).view_as(residual)
                outputs.append((residual.to(self.compute.device) + added).to(residual))
        return torch.cat(outputs)

    def _through(self, path: str, inputs: Tensor) -> Tensor:
        with self.compute.context():
            output: Tensor = self.linears[path](inputs.to(self.compute.device))
        return output


def _places(hidden: Tensor, windows: int) -> list[slice]:
    """The batches of ``hidden``, so many windows each."""
    return [slice(begin, begin + windows) for begin in range(0, len(hidden), windows)]


def _add_gram(gram: Tensor, inputs: Tensor) -> None:
    """Add ``inputs^T inputs`` to the lower triangle of a Gram matrix; what is above it is left undefined."""
    columns = len(gram)
    if columns <= SMALLEST_TILE:
        gram.addmm_(inputs.T, inputs)
        return
    half = columns // 2
    left, right = inputs[:, :half], inputs[:, half:]
    _add_gram(gram[:half, :half], left)
    _add_gram(gram[half:, half:], right)
    gram[half:, :half].addmm_(right.T, left)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
