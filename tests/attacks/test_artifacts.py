"""Crafted artifacts, one documented abuse each: every one ends in a sentence of ours that names file and reason.

An abuse changes a sound artifact in place. Unless it is about hashes, the manifest is then brought up to date, as one
who crafts an artifact would do: what refuses it is the check of structure at load and not the hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from attacks.sandbox import Sandbox
from safetensors.torch import load_file, save_file
from torch import Tensor

from trim_export.artifact import INDEX, JOURNAL, MANIFEST, REST, block_shard, open_artifact
from trim_export.convert import convert
from trim_export.errors import ArtifactError
from trim_export.runtimes import available_runtimes

MODULE = "model.layers.1.mlp.down_proj"  # 32 x 44
SHARD = block_shard(1)
RUNTIMES = [name for name in available_runtimes() if name != "dense"]

Change = Callable[[Path], None]


class Abuse(NamedTuple):
    """What is done to an artifact in an encoding, and words of the sentence that must come of it."""

    encoding: str
    change: Change
    words: tuple[str, ...]
    rehash: bool = True


# ---- means -------------------------------------------------------------------------------------------------------


def tensor(suffix: str, make: Callable[[Tensor], Tensor]) -> Change:
    """Replace one tensor of `MODULE` by what ``make`` gives for it."""

    def change(directory: Path) -> None:
        tensors = load_file(directory / SHARD)
        name = f"{MODULE}.{suffix}"
        tensors[name] = make(tensors[name].clone()).contiguous()
        save_file(tensors, directory / SHARD, {"format": "pt"})

    return change


def put(place: int, value: float) -> Callable[[Tensor], Tensor]:
    def change(values: Tensor) -> Tensor:
        values.view(-1)[place] = value
        return values

    return change


def edit(file: str, make: Callable[[Any], object]) -> Change:
    """Change a JSON file in place."""

    def change(directory: Path) -> None:
        content = json.loads((directory / file).read_text())
        make(content)
        (directory / file).write_text(json.dumps(content))

    return change


def header(make: Callable[[Any], object]) -> Change:
    """Change the header of a shard, the bytes behind it staying where they are."""

    def change(directory: Path) -> None:
        data = (directory / SHARD).read_bytes()
        size = int.from_bytes(data[:8], "little")
        content = json.loads(data[8 : 8 + size])
        make(content)
        text = json.dumps(content).encode()
        (directory / SHARD).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    return change


def raw(make: Callable[[bytes], bytes], file: str = SHARD) -> Change:
    """Change the bytes of a file."""

    def change(directory: Path) -> None:
        (directory / file).write_bytes(make((directory / file).read_bytes()))

    return change


def replaced(file: str, make: Callable[[Path], object]) -> Change:
    """Something else in the place of a file."""

    def change(directory: Path) -> None:
        (directory / file).rename(directory.parent / f"outside-{file}")
        make(directory / file)

    return change


def linked(path: Path) -> None:
    path.symlink_to(path.parent.parent / f"outside-{path.name}")


def moved_out(name: Callable[[Path], str]) -> Change:
    """A shard outside of the directory, under a name that leads there."""

    def change(directory: Path) -> None:
        (directory / SHARD).rename(directory.parent / SHARD)
        for file in (INDEX, MANIFEST):
            text = (directory / file).read_text()
            (directory / file).write_text(text.replace(f'"{SHARD}"', json.dumps(name(directory))))

    return change


def duplicate_in_header(directory: Path) -> None:
    data = (directory / SHARD).read_bytes()
    size = int.from_bytes(data[:8], "little")
    name = f'"{MODULE}.weight_mask":'
    text = data[8 : 8 + size].decode()
    entry = json.loads(text)[f"{MODULE}.weight_mask"]
    again = f"{name}{json.dumps(entry | {'dtype': 'I8'})}," + text.strip()[1:]
    text = "{" + again
    (directory / SHARD).write_bytes(len(text).to_bytes(8, "little") + text.encode() + data[8 + size :])


def stored_twice(directory: Path) -> None:
    name = f"{MODULE}.weight_values"
    other = load_file(directory / block_shard(0))
    save_file(other | {name: -load_file(directory / SHARD)[name]}, directory / block_shard(0), {"format": "pt"})


def pickled(directory: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(directory.parent / "owned"),)

    (directory / INDEX).unlink()
    for file in directory.glob("*.safetensors"):
        file.unlink()
    torch.save(Payload(), directory / "pytorch_model.bin")


def remote_code(directory: Path) -> None:
    (directory / "modeling_evil.py").write_text(f"import os\nos.mkdir({str(directory.parent / 'owned')!r})\n")
    edit("config.json", lambda c: c.update(model_type="evil", auto_map=dict.fromkeys(AUTO, "modeling_evil.X")))(
        directory
    )


AUTO = ("AutoConfig", "AutoModelForCausalLM")


def unfinished(directory: Path) -> None:
    (directory / MANIFEST).rename(directory / JOURNAL)


def swapped(directory: Path) -> None:
    aside = (directory / SHARD).rename(directory / "aside")
    (directory / block_shard(0)).rename(directory / SHARD)
    aside.rename(directory / block_shard(0))


def another_model(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"")


def rehash(directory: Path) -> None:
    """Bring the manifest's sizes and hashes up to date, where there are regular files."""
    manifest = json.loads((directory / MANIFEST).read_text())
    for name in manifest["files"]:
        file = directory / name
        if file.is_file():
            data = file.read_bytes()
            manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (directory / MANIFEST).write_text(json.dumps(manifest))


def of_module(**changes: Any) -> Change:
    return edit(MANIFEST, lambda manifest: manifest["modules"][MODULE].update(changes))


# ---- what `load` refuses -----------------------------------------------------------------------------------------

HUGE = 2**31 - 1

STRUCTURE = {
    "row pointers decrease": Abuse("csr", tensor("weight_row_ptr", put(5, 0)), (SHARD, MODULE, "decreases at row")),
    "row pointers begin before 0": Abuse("csr", tensor("weight_row_ptr", put(0, -4)), (SHARD, MODULE, "starts at -4")),
    "row pointers end behind the values": Abuse(
        "csr", tensor("weight_row_ptr", put(-1, HUGE)), (SHARD, MODULE, "ends at")
    ),
    "row pointers overflow int32": Abuse(
        "csr", tensor("weight_row_ptr", lambda t: put(4, -HUGE - 1)(put(3, HUGE)(t))), (SHARD, MODULE, "decreases")
    ),
    "row pointers of one row too few": Abuse(
        "csr", tensor("weight_row_ptr", lambda t: t[1:]), (SHARD, MODULE, "shape")
    ),
    "a column beyond the matrix": Abuse("csr", tensor("weight_columns", put(7, 44)), (SHARD, MODULE, "outside 0..43")),
    "a column far beyond the matrix": Abuse("csr", tensor("weight_columns", put(7, 32767)), (SHARD, MODULE, "outside")),
    "a negative column": Abuse("csr", tensor("weight_columns", put(7, -1)), (SHARD, MODULE, "outside 0..43")),
    "a column twice": Abuse(
        "csr", tensor("weight_columns", lambda t: put(1, float(t[0]))(t)), (SHARD, MODULE, "not strictly increasing")
    ),
    "columns out of order": Abuse("csr", tensor("weight_columns", lambda t: t.flip(0)), (SHARD, MODULE, "strictly")),
    "fewer values than columns": Abuse("csr", tensor("weight_values", lambda t: t[:-1]), (SHARD, MODULE, "values")),
    "block columns beyond the matrix": Abuse("bsr", tensor("weight_columns", put(0, 11)), (SHARD, MODULE, "outside")),
    "blocks without a side": Abuse("bsr", tensor("weight_values", lambda t: t[:, :, :0]), (SHARD, MODULE, "blocks of")),
    "blocks of 2**60 weights, none of them stored": Abuse(
        "bsr", tensor("weight_values", lambda _: torch.zeros(0, 2**30, 2**30)), (SHARD, MODULE)
    ),
    "a mask of more weights than there are values": Abuse(
        "bitmap", tensor("weight_mask", put(0, 255)), (SHARD, MODULE, "keeps")
    ),
    "a mask of fewer weights than there are values": Abuse(
        "bitmap", tensor("weight_mask", put(0, 0)), (SHARD, MODULE, "keeps")
    ),
    "mask bits behind the last column": Abuse(
        "bitmap", tensor("weight_mask", put(5, 255)), (SHARD, MODULE, "beyond column")
    ),
    "a mask of another shape": Abuse("bitmap", tensor("weight_mask", lambda t: t.T), (SHARD, MODULE, "shape")),
    "a mask that is no bytes": Abuse("bitmap", tensor("weight_mask", lambda t: t.int()), (SHARD, MODULE, "int32")),
    "8-bit values, whose scales could be NaN": Abuse(
        "bitmap-4x64", tensor("weight_values", lambda t: t.to(torch.int8)), (SHARD, MODULE)
    ),
    "an order that names a row twice": Abuse(
        "bitmap-4x64",
        tensor("weight_order", lambda t: put(1, float(t[0]))(t)),
        (SHARD, MODULE, "each of the 32 rows once"),
    ),
    "an order that names a row outside": Abuse(
        "bitmap-4x64", tensor("weight_order", put(0, HUGE)), (SHARD, MODULE, "rows once")
    ),
    "an order that names a negative row": Abuse(
        "bitmap-4x64", tensor("weight_order", put(0, -1)), (SHARD, MODULE, "rows once")
    ),
    "words with bits behind the last column": Abuse(
        "bitmap-4x64", tensor("weight_mask", put(0, -1)), (SHARD, MODULE, "beyond")
    ),
    "words that keep other numbers than stored": Abuse(
        "bitmap-4x64", tensor("weight_mask", put(0, 0)), (SHARD, MODULE, "keeps")
    ),
}

CONTAINERS = {
    "a header longer than the file": Abuse("bitmap", raw(lambda d: (2**62).to_bytes(8, "little") + d[8:]), (SHARD,)),
    "a header bomb": Abuse("bitmap", raw(lambda d: (2**31).to_bytes(8, "little") + b" " * 1000), (SHARD,)),
    "a header that is no JSON": Abuse("bitmap", raw(lambda d: d[:8] + b"x" + d[9:]), (SHARD,)),
    "a header nested 100000 deep": Abuse(
        "bitmap", raw(lambda d: (100_000).to_bytes(8, "little") + b"[" * 100_000), (SHARD,)
    ),
    "a tensor that claims 2**80 bytes": Abuse(
        "bitmap", header(lambda h: h[f"{MODULE}.weight_mask"].update(shape=[2**40, 2**40])), (SHARD,)
    ),
    "a tensor of no bytes with a side of 2**62": Abuse(
        "bitmap", header(lambda h: h[f"{MODULE}.weight_mask"].update(shape=[0, 2**62], data_offsets=[0, 0])), (SHARD,)
    ),
    "tensors that share their bytes": Abuse(
        "bitmap",
        header(lambda h: h[f"{MODULE}.weight_mask"].update(data_offsets=h[f"{MODULE}.weight_values"]["data_offsets"])),
        (SHARD,),
    ),
    "offsets behind the end": Abuse(
        "bitmap", header(lambda h: h[f"{MODULE}.weight_mask"].update(data_offsets=[0, 2**63])), (SHARD,)
    ),
    "a dtype that nobody knows": Abuse(
        "bitmap", header(lambda h: h[f"{MODULE}.weight_mask"].update(dtype="X7")), (SHARD,)
    ),
    "a tensor twice in one header": Abuse("bitmap", duplicate_in_header, (SHARD,)),
    "a tensor in two shards": Abuse("bitmap", stored_twice, (SHARD, MODULE, "a second time")),
    "a truncated shard": Abuse("bitmap", raw(lambda d: d[:-100]), (SHARD,)),
    "a shard with something behind it": Abuse("bitmap", raw(lambda d: d + b"\0" * 4096), (SHARD,)),
    "an empty shard": Abuse("bitmap", raw(lambda d: b""), (SHARD,)),
    "a tensor that is missing": Abuse("bitmap", header(lambda h: h.pop(f"{MODULE}.weight_mask")), (SHARD,)),
}

DIRECTORIES = {
    "an index that leads up": Abuse("bitmap", moved_out(lambda _: f"../{SHARD}"), ("unsafe file name",)),
    "an index with an absolute path": Abuse(
        "bitmap", moved_out(lambda d: str(d.parent / SHARD)), ("unsafe file name",)
    ),
    "a shard that is a link out of the directory": Abuse("bitmap", replaced(SHARD, linked), (SHARD, "regular file")),
    "a configuration that is a link": Abuse("bitmap", replaced("config.json", linked), ("config.json", "regular file")),
    "a link to a device without end": Abuse(
        "bitmap", replaced(SHARD, lambda p: p.symlink_to("/dev/zero")), (SHARD, "regular file")
    ),
    "a pipe nobody writes to": Abuse("bitmap", replaced(SHARD, os.mkfifo), (SHARD, "regular file")),
    "a pipe for a configuration": Abuse("bitmap", replaced("config.json", os.mkfifo), ("config.json", "regular file")),
    "a directory for a shard": Abuse("bitmap", replaced(SHARD, Path.mkdir), (SHARD,)),
    "a configuration nested too deep": Abuse("bitmap", raw(lambda _: b"[" * 200_000, "config.json"), ("config.json",)),
    "a configuration with a key twice": Abuse(
        "bitmap", raw(lambda d: b'{"model_type": "llama",' + d.strip()[1:], "config.json"), ("model_type", "twice")
    ),
    "a depth of 10**9 blocks": Abuse(
        "bitmap",
        edit("config.json", lambda c: c.update(num_hidden_layers=10**9)),
        ("config.json", "1000000000 decoder"),
    ),
    "heads of 10**12 features": Abuse("bitmap", edit("config.json", lambda c: c.update(head_dim=10**12)), ()),
    "a vocabulary of 10**15": Abuse(
        "bitmap", edit("config.json", lambda c: c.update(vocab_size=10**15)), (REST, "shape")
    ),
    "code in a module of its own": Abuse("bitmap", remote_code, ()),
    "a pickle for the weights": Abuse("bitmap", pickled, ()),
    "weights named by the configuration": Abuse(
        "bitmap", edit("config.json", lambda c: c.update(transformers_weights="../outside.safetensors")), ()
    ),
    "a journal and no manifest": Abuse(
        "bitmap",
        unfinished,
        ("damaged; start anew",),
        rehash=False,
    ),
}

LOADED = STRUCTURE | CONTAINERS | DIRECTORIES


@pytest.fixture
def attack(stored: Callable[[str], Path], tmp_path: Path) -> Callable[[Abuse], Path]:
    """``attack(abuse)``: a copy of an artifact on which it was committed."""

    def commit(abuse: Abuse) -> Path:
        directory = Path(shutil.copytree(stored(abuse.encoding), tmp_path / "artifact"))
        abuse.change(directory)
        if abuse.rehash:
            rehash(directory)
        return directory

    return commit


@pytest.mark.parametrize("abuse", LOADED.values(), ids=LOADED)
def test_loading_refuses(abuse: Abuse, attack: Callable[[Abuse], Path], worker: Sandbox) -> None:
    directory = attack(abuse)
    for runtime in RUNTIMES:
        for check_hashes in (False, True):
            answer = worker.run("compute", str(directory), runtime, check_hashes)
            assert (answer.kind, answer.error) == ("refused", "ArtifactError"), answer
            assert "\n" not in answer.text
            assert str(directory) in answer.text
            if not check_hashes:
                assert all(word in answer.text for word in abuse.words), answer.text
    assert not (directory.parent / "owned").exists()
    assert not (directory / "owned").exists()


@pytest.mark.parametrize("abuse", (STRUCTURE | CONTAINERS).values(), ids=STRUCTURE | CONTAINERS)
def test_check_finds(abuse: Abuse, attack: Callable[[Abuse], Path], worker: Sandbox) -> None:
    answer = worker.run("check", str(attack(abuse)))
    found = answer.value if answer.kind == "done" else [answer.text]
    assert answer.kind in ("done", "refused"), answer
    assert any(SHARD in line for line in found), found


# ---- what is only wrong in what the manifest says ----------------------------------------------------------------

NUMBERS = {
    "a weight that is NaN": Abuse("bitmap", tensor("weight_values", put(3, float("nan"))), (SHARD, MODULE, "NaN")),
    "a weight that is infinite": Abuse(
        "csr", tensor("weight_values", put(3, float("inf"))), (SHARD, MODULE, "infinity")
    ),
}


@pytest.mark.parametrize("abuse", NUMBERS.values(), ids=NUMBERS)
def test_check_and_convert_find_what_is_no_number(
    abuse: Abuse, attack: Callable[[Abuse], Path], worker: Sandbox, tmp_path: Path
) -> None:
    """Loading does not look at values: that would cost more than all its other checks, and NaN shows in the logits."""
    directory = attack(abuse)
    found = worker.run("check", str(directory))
    assert found.kind == "done", found
    assert len(found.value) == 1
    assert all(word in found.value[0] for word in abuse.words)
    with pytest.raises(ArtifactError, match="holds NaN or infinity"):
        convert(open_artifact(directory), "csr", tmp_path / "out")
    assert not (tmp_path / "out").exists()


LIES = {
    "a hash of other bytes": Abuse(
        "bitmap", edit(MANIFEST, lambda m: m["files"][SHARD].update(sha256="0" * 64)), (SHARD, "sha256 differs"), False
    ),
    "another size": Abuse("bitmap", edit(MANIFEST, lambda m: m["files"][SHARD].update(size=7)), (SHARD, "7"), False),
    "a weight that became another": Abuse("bitmap", tensor("weight_values", put(3, 9.0)), (SHARD, "sha256"), False),
    "shards that changed places": Abuse(
        "bitmap",
        swapped,
        ("manifest",),
        False,
    ),
    "a configuration that nothing lists": Abuse(
        "bitmap", edit(MANIFEST, lambda m: m["files"].pop("config.json")), (MANIFEST, "config.json"), False
    ),
    "weights that nothing lists": Abuse("bitmap", another_model, ("model.safetensors",)),
    "modules that config.json does not name": Abuse(
        "bitmap",
        edit("config.json", lambda c: c["quantization_config"]["modules"].pop()),
        ("config.json", "pruned modules"),
    ),
    "another encoding than config.json": Abuse(
        "bitmap", edit(MANIFEST, lambda m: m.update(encoding="csr")), ("encoding",)
    ),
}


@pytest.mark.parametrize("abuse", LIES.values(), ids=LIES)
def test_hashes_at_load_and_check_find(abuse: Abuse, attack: Callable[[Abuse], Path], worker: Sandbox) -> None:
    directory = attack(abuse)
    for runtime in RUNTIMES:
        answer = worker.run("compute", str(directory), runtime, True)
        assert (answer.kind, answer.error) == ("refused", "ArtifactError"), answer
        assert all(word in answer.text for word in abuse.words), answer.text
    found = worker.run("check", str(directory))
    assert found.kind == "done", found
    assert any(all(word in line for word in abuse.words) for line in found.value), found


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (of_module(nnz=7), "the manifest says 7"),
        (of_module(shape=[44, 32]), "shape"),
        (of_module(shape=[2**31, 2**31]), "cannot be a matrix"),
        (of_module(file=REST), "missing"),
    ],
    ids=["another count", "another shape", "a shape of 2**62 weights", "another file"],
)
def test_check_finds_what_the_manifest_says_wrongly_of_a_matrix(
    change: Change, word: str, stored: Callable[[str], Path], tmp_path: Path, worker: Sandbox
) -> None:
    directory = Path(shutil.copytree(stored("bitmap"), tmp_path / "artifact"))
    change(directory)
    found = worker.run("check", str(directory))
    assert found.kind == "done", found
    assert [line for line in found.value if MODULE in line and word in line], found


@pytest.mark.parametrize("name", ["../../owned", "a/b", "..", "", "a..b", ".hidden", "a b", "x\0y", "ünicode"])
def test_a_module_named_like_a_path_names_no_file_of_a_converter(
    name: str, stored: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(stored("bitmap"), tmp_path / "artifact"))
    tensors = load_file(directory / SHARD)
    for suffix in ("weight_mask", "weight_values"):
        tensors[f"{name}.{suffix}"] = tensors[f"{MODULE}.{suffix}"].clone()
    save_file(tensors, directory / SHARD, {"format": "pt"})
    edit(MANIFEST, lambda m: m["modules"].update({name: m["modules"][MODULE]}))(directory)
    rehash(directory)
    with pytest.raises(ArtifactError, match=MANIFEST):
        convert(open_artifact(directory), "scipy", tmp_path / "deep" / "out")
    assert not list(tmp_path.glob("**/*.npz"))


def test_a_snapshot_in_the_hubs_cache_is_made_of_links_and_loads(
    stored: Callable[[str], Path], tmp_path: Path, worker: Sandbox
) -> None:
    """The one place where links are right: they lead into the blobs beside the snapshots, and nowhere else."""
    snapshot, blobs = tmp_path / "snapshots" / "0123", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in stored("bitmap").iterdir():
        blob = blobs / hashlib.sha256(file.name.encode()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    expected = worker.run("compute", str(stored("bitmap")), "torch-sparse", True)
    assert worker.run("compute", str(snapshot), "torch-sparse", True) == expected
    assert expected.kind == "done"
    assert worker.run("check", str(snapshot)).value == []
    (snapshot / SHARD).unlink()
    (snapshot / SHARD).symlink_to(stored("bitmap") / SHARD)
    assert "not a regular file" in worker.run("compute", str(snapshot), "torch-sparse", False).text


def test_a_sound_artifact_in_every_encoding_computes_the_same(stored: Callable[[str], Path], worker: Sandbox) -> None:
    """The other side of all this: nothing that is sound is refused, and no network is needed."""
    for runtime in RUNTIMES:
        answers = {
            encoding: worker.run("compute", str(stored(encoding)), runtime, True)
            for encoding in ("bitmap", "csr", "bitmap-4x64")
        }
        assert {answer.kind for answer in answers.values()} == {"done"}, answers
        assert len({answer.value for answer in answers.values()}) == 1
