"""Writing an artifact so that it can be interrupted at any moment: shard, journal, next shard, ..., manifest.

Every file is replaced atomically and holds no time of day, so that the same inputs give the same bytes, interrupted
or not. The journal names the shards that are finished; it disappears when the manifest is in place.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import trim_export
from trim_export.artifact import INDEX, JOURNAL, MANIFEST, REST, Artifact, open_artifact
from trim_export.converters import ENCODINGS, SparseMatrix
from trim_export.errors import ArtifactError, ModelError, UsageError
from trim_export.format import FORMAT_VERSION, METHOD, STORED, guard
from trim_export.models import DenseModel, dtype_name, projections, unique_tensors
from trim_export.recipe import fingerprint, first_difference
from trim_export.report import achieved, in_order, model_card
from trim_export.storage import canonical_json, read_json, sha256_file, temporary_file, write_bytes, write_tensors

__all__ = [
    "Journal",
    "achieved_sparsity",
    "finish_artifact",
    "load_shard_into",
    "open_journal",
    "remove_artifact",
    "require_room",
    "sparse_config",
    "write_description",
    "write_index",
    "write_manifest",
    "write_unit",
]

ENCODING = ENCODINGS[STORED]
"""What `prune` stores: one bit a weight for the mask, then the kept values."""


@dataclass(frozen=True)
class Journal:
    """State of an unfinished run.

    Attributes:
        out: the directory.
        run: everything that decides the bytes (`trim_export.prune.describe_run`, or what `recover` makes of it).
        blocks: number of decoder blocks.
        sparsities: of each block's matrices by their names inside the block, once allocated.
        layer_choice: how the layer budget was chosen, if that was left to trials (`trim_export.auto_budget`).
        shards: finished shard -> its sha256 and its modules' manifest entries.
        losses: of a recovery: what was trained (a shard, or ``model``) -> what that did to its loss.
    """

    out: Path
    run: dict[str, Any]
    blocks: int
    sparsities: list[dict[str, float]] | None = None
    layer_choice: dict[str, Any] | None = None
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    losses: dict[str, dict[str, Any]] = field(default_factory=dict)

    def save(self) -> Journal:
        """Write the state to disk."""
        state = {name: value for name, value in vars(self).items() if name != "out"}
        write_bytes(self.out / JOURNAL, canonical_json(state))
        return self

    def with_sparsities(
        self, sparsities: list[dict[str, float]], layer_choice: dict[str, Any] | None = None
    ) -> Journal:
        """Record what the layer budget allocated."""
        return replace(self, sparsities=sparsities, layer_choice=layer_choice).save()

    def with_shard(self, name: str, entry: dict[str, Any]) -> Journal:
        """Record a finished shard."""
        return replace(self, shards={**self.shards, name: entry}).save()


def open_journal(out: Path, run: dict[str, Any], blocks: int, resume: bool) -> Journal | Artifact:
    """Start a run in an absent or empty directory, or pick up one of exactly the same settings.

    Raises:
        UsageError: the directory holds something else; nothing in it is touched.
    """
    require_room(out, resume)
    if _vacant(out):
        out.mkdir(parents=True, exist_ok=True)
        return Journal(out, run, blocks).save()
    finished = (out / MANIFEST).is_file()
    file = out / (MANIFEST if finished else JOURNAL)
    state = read_json(file)
    if not (_has_run(state) and (finished or _is_journal(state))):
        raise ArtifactError(f"{file}: damaged; start anew with --overwrite")
    difference = first_difference(run, state["run"])
    if difference:
        raise UsageError(f"{out}: holds another run, which differs in {difference}; pass --overwrite or another -o")
    if finished:
        (out / JOURNAL).unlink(missing_ok=True)  # killed between the manifest and this
        return open_artifact(out)
    return Journal(out, run, blocks, state["sparsities"], state["layer_choice"], state["shards"], state["losses"])


def _has_run(state: Any) -> bool:
    return isinstance(state, dict) and isinstance(state.get("run"), dict)


def _is_journal(state: dict[str, Any]) -> bool:
    """Whether its fields are there and of the right kinds."""
    kinds = {"sparsities": list | None, "layer_choice": dict | None, "shards": dict, "losses": dict}
    complete = all(isinstance(state.get(key, ...), kind) for key, kind in kinds.items())
    return complete and all(isinstance(block, dict) for block in state["sparsities"] or [])


def require_room(out: Path, resume: bool, overwrite: bool = False) -> None:
    """Refuse an output directory that cannot be written to as asked; touches nothing.

    Raises:
        UsageError: it is a file, holds something foreign, or holds an artifact and neither flag is given.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: a file is in the way of the artifact directory")
    if _vacant(out):
        return
    finished, unfinished = (out / MANIFEST).is_file(), (out / JOURNAL).is_file()
    if not finished and not unfinished:
        raise UsageError(f"{out}: not empty and not an artifact; give another directory")
    if not resume and not overwrite:
        state = "a finished artifact" if finished else "an unfinished run"
        raise UsageError(f"{out}: already holds {state}; pass --resume to continue it, --overwrite to start anew")


def _vacant(out: Path) -> bool:
    """Absent, empty, or with nothing but the half-written first journal of a killed run."""
    return not out.exists() or all(path == temporary_file(out / JOURNAL) for path in out.iterdir())


def remove_artifact(out: Path) -> None:
    """Make room for a new artifact: delete a directory that is an artifact, finished or not, and nothing else."""
    if (out / MANIFEST).is_file() or (out / JOURNAL).is_file():
        shutil.rmtree(out)


def write_unit(
    journal: Journal,
    file: str,
    name: str,
    unit: nn.Module,
    pruned: Mapping[str, SparseMatrix],
    reports: Mapping[str, dict[str, Any]],
) -> Journal:
    """Write the shard of a block (or of the LM head, whose one matrix has the path ""): pruned matrices encoded,
    everything else (norms, biases) as it is."""
    tensors = {_join(name, path): value for path, value in unit.state_dict().items()}
    for path, matrix in pruned.items():
        module = _join(name, path)
        del tensors[f"{module}.weight"]
        stored = SparseMatrix(matrix.mask.cpu(), matrix.values.cpu())
        if not stored.values.isfinite().all():
            raise ModelError(f"{module}: kept weights overflow {dtype_name(stored.values.dtype)}; use --dtype float32")
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in ENCODING.encode(stored).items()}
    write_tensors(journal.out / file, tensors)
    modules = {_join(name, path): {"file": file, **report} for path, report in reports.items()}
    return journal.with_shard(file, {"sha256": sha256_file(journal.out / file), "modules": modules})


def load_shard_into(block: nn.Module, name: str, file: Path, entry: dict[str, Any]) -> None:
    """Put the pruned weights of a finished shard back into its block.

    Raises:
        ArtifactError: the shard is not the one the journal recorded.
    """
    if not file.is_file() or sha256_file(file) != entry["sha256"]:
        raise ArtifactError(f"{file}: not as the journal recorded it; start anew with --overwrite")
    tensors = load_file(file)
    for path, linear in projections(block).items():
        shape = (linear.out_features, linear.in_features)
        parts = {suffix: tensors[f"{name}.{path}.{suffix}"] for suffix in ENCODING.tensors}
        linear.weight.data = ENCODING.decode(parts, shape).to_dense().to(linear.weight.device)


def finish_artifact(
    journal: Journal, dense: DenseModel, units: Mapping[str, nn.Module], more: Mapping[str, Any] | None = None
) -> Artifact:
    """Write what belongs to no pruned unit, the configuration, the card, and last of all the manifest.

    Args:
        journal: of the run, every unit written.
        dense: the model, its units as they are stored.
        units: name -> what has a shard of its own.
        more: facts that the manifest shall hold besides.
    """
    rest = unique_tensors(
        {
            name: tensor
            for name, tensor in dense.model.state_dict().items()
            if not any(name.startswith(f"{unit}.") for unit in units)
        }
    )
    # In one order whether or not the journal was read back from disk on the way.
    modules = dict(in_order({n: entry for shard in journal.shards.values() for n, entry in shard["modules"].items()}))
    write_tensors(journal.out / REST, rest | guard(list(modules)))
    write_description(journal.out, dense, sparse_config(list(modules), ENCODING.name))
    write_index(journal.out)
    facts = {
        "run": journal.run,
        "source": journal.run["source"] | {"architecture": type(dense.model).__name__},
        "encoding": ENCODING.name,
        "weights_updated": journal.run["recipe"]["update"] != "none",
        "sparsity": achieved_sparsity(journal.run["recipe"]["sparsity"], modules),
        "modules": modules,
        **(more or {}),
    }
    if journal.layer_choice is not None:
        facts["layer_choice"] = journal.layer_choice
    artifact = write_manifest(journal.out, facts, journal.run["source"]["bytes"])
    (journal.out / JOURNAL).unlink()
    return artifact


def sparse_config(modules: list[str], encoding: str) -> dict[str, Any]:
    """The `quantization_config` by which transformers finds our loader."""
    return {
        "quant_method": METHOD,
        "format_version": FORMAT_VERSION,
        "encoding": encoding,
        "modules": modules,
        "how_to_load": "pip install trim-export; import trim_export.runtimes before from_pretrained",
    }


def write_description(out: Path, dense: DenseModel, quantization_config: dict[str, Any]) -> None:
    """Write config.json, generation_config.json and the tokenizer's files."""
    config = copy.deepcopy(dense.model.config)
    config.architectures = [type(dense.model).__name__]
    config.dtype = dtype_name(dense.model.dtype)
    # A setting of the class, so a model created in memory and one loaded from disk would otherwise differ.
    config._name_or_path = ""
    config.quantization_config = quantization_config
    with tempfile.TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        if dense.model.generation_config is not None:
            dense.model.generation_config.save_pretrained(directory)
        dense.tokenizer.save_pretrained(directory)
        for file in sorted(Path(directory).iterdir()):
            write_bytes(out / file.name, file.read_bytes())


def write_index(out: Path) -> None:
    """Write the index by which transformers finds each tensor's shard."""
    shards = _shards(out)
    index = {
        "metadata": {"total_size": sum(shard.stat().st_size for shard in shards)},
        "weight_map": {name: shard.name for shard in shards for name in _tensor_names(shard)},
    }
    write_bytes(out / INDEX, canonical_json(index))


def write_manifest(out: Path, facts: Mapping[str, Any], dense_bytes: int) -> Artifact:
    """Write the model card and, last, the manifest: ``facts`` plus versions, sizes and every file's hash."""
    manifest: dict[str, Any] = {
        **facts,
        "format_version": FORMAT_VERSION,
        "tool_version": trim_export.__version__,
        "fingerprint": fingerprint(facts["run"]),
        "bytes": {"artifact": sum(shard.stat().st_size for shard in _shards(out)), "dense": dense_bytes},
    }
    write_bytes(out / "README.md", model_card(manifest).encode())
    # A killed run may have left temporary files, whose names begin with a dot.
    files = sorted(path for path in out.glob("[!.]*") if path.name not in (MANIFEST, JOURNAL) and path.is_file())
    manifest["files"] = {path.name: {"size": path.stat().st_size, "sha256": sha256_file(path)} for path in files}
    write_bytes(out / MANIFEST, canonical_json(manifest))
    return open_artifact(out)


def _join(name: str, path: str) -> str:
    return f"{name}.{path}" if path else name


def achieved_sparsity(target: float, modules: Mapping[str, dict[str, Any]]) -> dict[str, float]:
    """The manifest's ``sparsity``: what was asked for, and what all matrices together have."""
    return {"target": target, "achieved": achieved(modules.values())}


def _shards(out: Path) -> list[Path]:
    return sorted(out.glob("*.safetensors"))


def _tensor_names(shard: Path) -> list[str]:
    with safe_open(shard, "pt") as file:
        return sorted(file.keys())
