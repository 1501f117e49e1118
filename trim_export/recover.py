"""Recovery: give a pruned model back some of what it lost, by training the weights it kept; no zero is touched.

Two methods. ``blocks`` reconstructs one decoder block after the other (`trim_export.reconstruction`); only one block is
ever on the device, and a killed run continues behind the last finished one. ``spp`` trains multiplicative low-rank
adapters of the whole model towards the dense model's predictions (`trim_export.spp`), and continues from its last saved
step. Both keep what did best on windows that they did not train on, the start included, so that by their own measure
they can only improve. Norms, biases and embeddings stay as they are.

Memory in the host: the dense and the sparse model, both dense matrices in the artifact's dtype, and hidden states
(windows x tokens x features) of both, three times.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import trim_export
from trim_export.artifact import HEAD, MANIFEST, Artifact, block_shard, open_artifact, verify_files
from trim_export.artifact_writer import Journal, finish_artifact, load_shard_into, open_journal, write_unit
from trim_export.calibration import source_name
from trim_export.converters import SparseMatrix
from trim_export.errors import ArtifactError, ModelError, UsageError, choose
from trim_export.forward import Compute, block_calls, embed, finish_forward, run_block
from trim_export.models import DTYPES, DenseModel, decoder_blocks, load_model, projections
from trim_export.progress import Track, silently
from trim_export.prune_block import output_cosine
from trim_export.reconstruction import reconstruct_block
from trim_export.runtimes import load
from trim_export.spp import fine_tune
from trim_export.statistics import InputStatistics, input_statistics, observe_block
from trim_export.storage import sha256_bytes, sha256_file
from trim_export.structured import replay
from trim_export.training import Training

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["METHODS", "Method", "Recovery", "load_teacher", "make_recovery", "open_intact", "recover"]

STATE = ".trim_spp.safetensors"
"""Where a training that is under way is kept, in the directory that is being written."""


SOURCE = {"model": str, "sha256": str, "dtype": str, "bytes": int}
"""What a manifest has to say of the dense model."""


@dataclass(frozen=True)
class Method:
    """A way to recover, with what it does where nothing else is asked for.

    Attributes:
        measure: its loss, in words.
        steps: of the optimizer.
        learning_rate: at its highest.
    """

    measure: str
    steps: int
    learning_rate: float


METHODS = {
    "blocks": Method("relative squared error of block outputs", 40, 5e-4),
    "spp": Method("KL divergence from the dense model in nats", 100, 4e-3),
}
"""Methods by name."""


@dataclass(frozen=True)
class Recovery:
    """The settings of a recovery.

    Attributes:
        method: name in `METHODS`.
        calibration: text file, data set or ``self``.
        steps: of the optimizer, for each block or for the whole model.
        learning_rate: at its highest.
        samples: windows, of which an eighth is held out.
        sequence_length: tokens of each.
        seed: of the windows' draw and order, and of the adapters.
        gradient_checkpointing: ``spp`` computes activations twice instead of keeping them.
    """

    method: str
    calibration: str
    steps: int
    learning_rate: float
    samples: int = 128
    sequence_length: int = 128
    seed: int = 0
    gradient_checkpointing: bool = False

    @property
    def training(self) -> Training:
        """How to train."""
        return Training(self.steps, self.learning_rate, self.seed)

    def as_json(self) -> dict[str, Any]:
        """Plain values, as the manifest stores them; a text file by its name alone."""
        return asdict(self) | {"calibration": source_name(self.calibration)}


def make_recovery(method: str, calibration: str, **given: Any) -> Recovery:
    """Start from a method's settings, replace what was ``given`` (None means not given), and validate the result.

    Raises:
        UsageError: naming the first value that cannot be.
    """
    default = choose("recovery method", method, METHODS)
    values = {key: value for key, value in given.items() if value is not None}
    recovery = replace(Recovery(method, calibration, default.steps, default.learning_rate), **values)
    for setting in ("steps", "sequence_length"):
        if getattr(recovery, setting) < 1:
            raise UsageError(f"{setting.replace('_', ' ')} must be at least 1")
    if recovery.samples < 2:
        raise UsageError(f"{recovery.samples} windows are too few: one to train on and one to measure on are needed")
    if not 0 < recovery.learning_rate < math.inf:
        raise UsageError(f"learning rate {recovery.learning_rate} is not a positive number")
    if recovery.gradient_checkpointing and method != "spp":
        raise UsageError(f"gradient checkpointing belongs to spp; {method} holds the activations of one block anyway")
    return recovery


def open_intact(directory: Path, out: Path) -> Artifact:
    """Open the artifact to recover, every file and matrix of it checked.

    Raises:
        ArtifactError: not an artifact, unfinished, or damaged.
        UsageError: ``out`` is, or holds, the artifact.
    """
    artifact = open_artifact(directory)
    if directory.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"{out}: holds the artifact that is to be recovered; give another directory")
    problems = verify_files(artifact)
    if problems:
        raise ArtifactError(problems[0])
    source = artifact.manifest["source"]
    if not all(isinstance(source.get(key), kind) for key, kind in SOURCE.items()) or source["dtype"] not in DTYPES:
        raise ArtifactError(f"{directory / MANIFEST}: does not say which dense model was pruned")
    return artifact


def load_teacher(artifact: Artifact, model: str | None = None) -> DenseModel:
    """Load the dense model that an artifact was made of, in the artifact's dtype.

    Args:
        artifact: says which model, and its hash.
        model: where that model is, as for `trim_export.models.load_model`; by default where `prune` had it from.

    Raises:
        UsageError: not to be found; ModelError: another one.
    """
    source = artifact.manifest["source"]
    try:
        dense = load_model(model or source["model"], source["dtype"])
    except UsageError as error:
        if model is not None:
            raise
        name = source["model"]
        raise UsageError(f"{artifact.path}: its dense model {name!r} cannot be had from here; pass --model") from error
    if dense.sha256 != source["sha256"]:
        raise ModelError(
            f"{dense.source}: not the model that {artifact.path} was made of (sha256 {dense.sha256[:12]}..., "
            f"the manifest says {source['sha256'][:12]}...)"
        )
    record = source.get("structured")
    return dense if record is None or dense.structured is not None else replay(dense, record)


def recover(
    artifact: Artifact,
    dense: DenseModel,
    recovery: Recovery,
    tokens: Tensor,
    out: Path,
    compute: Compute,
    resume: bool = False,
    track: Track[Any] = silently,
) -> Artifact:
    """Train the kept weights of an artifact and write the result as a new one, with the same masks.

    Args:
        artifact: the pruned model, intact (`open_intact`).
        dense: the model it was made of (`load_teacher`).
        recovery: what to do.
        tokens: windows, int64 ``[windows, tokens]``, the last of them to be held out.
        out: the directory to write; must not exist unless ``resume``.
        compute: where and in which arithmetic models run.
        resume: continue an unfinished run of exactly these settings; a finished one is returned as it is.
        track: shows progress.

    Raises:
        UsageError: ``out`` holds something else.
        ModelError: activations that are not finite.
    """
    journal = open_journal(
        out, describe_recovery(artifact, recovery, tokens, compute), len(decoder_blocks(dense.model)), resume
    )
    if isinstance(journal, Artifact):
        return journal
    sparse = replace(dense, model=load(artifact.path, "dense").requires_grad_(False))
    units = _units(artifact, sparse.model, dense.model)
    if recovery.method == "spp" and len(journal.shards) < len(units):
        fit = fine_tune(
            sparse.model,
            dense.model,
            list(artifact.modules),
            tokens,
            recovery.training,
            compute,
            out / STATE,
            recovery.gradient_checkpointing,
            track,
        )
        journal = replace(journal, losses={"model": asdict(fit)})
    journal = _write_units(journal, artifact, sparse.model, dense.model, units, recovery, tokens, compute, track)
    (out / STATE).unlink(missing_ok=True)
    trained = any(loss["step"] > 0 for loss in journal.losses.values())
    facts = {
        "weights_updated": artifact.manifest.get("weights_updated") is True or trained,
        "recovery": {
            **recovery.as_json(),
            "measure": METHODS[recovery.method].measure,
            "losses": journal.losses,
            "earlier": artifact.manifest.get("recovery"),
        },
    }
    return finish_artifact(journal, sparse, {unit.name: unit.sparse for unit in units}, facts)


def describe_recovery(artifact: Artifact, recovery: Recovery, tokens: Tensor, compute: Compute) -> dict[str, Any]:
    """Everything that decides the new artifact's bytes: how the old one was made, its hash, and what is done to it."""
    return {
        **artifact.manifest["run"],
        "source": {key: value for key, value in artifact.manifest["source"].items() if key in (*SOURCE, "structured")},
        "tool_version": trim_export.__version__,
        "torch_version": torch.__version__,
        "artifact_sha256": sha256_file(artifact.path / MANIFEST),
        "recovery": recovery.as_json(),
        "calibration_sha256": sha256_bytes(tokens.cpu().numpy().tobytes()),
        "compute": {"device": compute.device.type, "autocast_bfloat16": compute.autocast},
    }


@dataclass(frozen=True)
class _Unit:
    """What has a shard of its own (a decoder block, or the LM head) in the sparse and in the dense model."""

    shard: str
    name: str
    sparse: nn.Module
    dense: nn.Module

    def masks(self, artifact: Artifact, device: torch.device) -> dict[str, Tensor]:
        """Path of each pruned layer inside the unit ("" for the unit itself) -> its mask."""
        return {
            name.removeprefix(self.name).removeprefix("."): artifact.matrix(name, entry).mask.to(device)
            for name, entry in artifact.modules.items()
            if entry["file"] == self.shard
        }

    def store(
        self, journal: Journal, artifact: Artifact, masks: Mapping[str, Tensor], inputs: Mapping[str, InputStatistics]
    ) -> Journal:
        """Write the shard; the manifest's entries are those of the pruning, but for the quality as it now is."""
        pruned, reports = {}, {}
        for path, mask in masks.items():
            weight = self.sparse.get_submodule(path).get_parameter("weight").data
            assert not weight[~mask].any(), f"{self.name}.{path}: a pruned weight came back"
            pruned[path] = SparseMatrix.from_dense(weight, mask)
            entry = artifact.modules[".".join(filter(None, (self.name, path)))]
            dense_weight = self.dense.get_submodule(path).get_parameter("weight").data
            cosine = output_cosine(dense_weight.float(), weight.float(), inputs[path].last_tokens)
            reports[path] = {key: value for key, value in entry.items() if key != "file"} | {"cosine": cosine}
        return write_unit(journal, self.shard, self.name, self.sparse, pruned, reports)


def _units(artifact: Artifact, sparse: PreTrainedModel, dense: PreTrainedModel) -> list[_Unit]:
    """The decoder blocks in order, and the LM head if it was pruned."""
    blocks, blocks_of_dense = decoder_blocks(sparse), decoder_blocks(dense)
    units = [_Unit(block_shard(i), name, blocks[name], blocks_of_dense[name]) for i, name in enumerate(blocks)]
    heads = [name for name, entry in artifact.modules.items() if entry["file"] == HEAD]
    return units + [_Unit(HEAD, name, sparse.get_submodule(name), dense.get_submodule(name)) for name in heads]


def _write_units(
    journal: Journal,
    artifact: Artifact,
    sparse: PreTrainedModel,
    dense: PreTrainedModel,
    units: list[_Unit],
    recovery: Recovery,
    tokens: Tensor,
    compute: Compute,
    track: Track[Any],
) -> Journal:
    """Write every unit that is not written yet, reconstructing blocks on the way if that is the method."""
    reconstructs = recovery.method == "blocks"
    blocks = [unit for unit in units if unit.shard != HEAD]
    sparse_blocks, dense_blocks = [unit.sparse for unit in blocks], [unit.dense for unit in blocks]
    calls = block_calls(dense, dense_blocks, tokens[:1])
    hidden, dense_hidden = embed(sparse, sparse_blocks, tokens), embed(dense, dense_blocks, tokens)
    for unit, call in track(list(zip(blocks, calls, strict=True)), "recovering" if reconstructs else "writing"):
        unit.sparse.to(compute.device)
        unit.dense.to(compute.device)
        if reconstructs:
            dense_hidden = run_block(unit.dense, call, dense_hidden, compute)
        if unit.shard in journal.shards:
            load_shard_into(unit.sparse, unit.name, journal.out / unit.shard, journal.shards[unit.shard])
            hidden = run_block(unit.sparse, call, hidden, compute)
        else:
            masks = unit.masks(artifact, compute.device)
            if reconstructs:
                fit = reconstruct_block(
                    unit.name, unit.sparse, masks, call, hidden, dense_hidden, recovery.training, compute
                )
                journal = replace(journal, losses={**journal.losses, unit.shard: asdict(fit)})
            pruned = {path: linear for path, linear in projections(unit.sparse).items() if path in masks}
            inputs, hidden = observe_block(unit.sparse, pruned, call, hidden, compute, unit.name)
            journal = unit.store(journal, artifact, masks, inputs)
        unit.sparse.to("cpu")
        unit.dense.to("cpu")
    for head in units[len(blocks) :]:
        if head.shard not in journal.shards:
            states = finish_forward(sparse, sparse_blocks, calls, tokens, hidden)
            inputs = {"": input_statistics(states, head.name)}
            journal = head.store(journal, artifact, head.masks(artifact, torch.device("cpu")), inputs)
    return journal
