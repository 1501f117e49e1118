"""Killed, interrupted, out of disk or memory: the same command again gives the bytes of an uninterrupted run.

``TRIM_CRASH_RUNS`` runs are killed ``TRIM_CRASH_KILLS`` times each, at moments that ``TRIM_CRASH_SEED`` draws;
`make crash` sets all three.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from forked import finish, start
from tiny_models import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from trim_export.artifact import JOURNAL, MANIFEST, open_artifact, verify_files
from trim_export.errors import ArtifactError
from trim_export.storage import sha256_file

RUNS = int(os.environ.get("TRIM_CRASH_RUNS", "4"))
KILLS = int(os.environ.get("TRIM_CRASH_KILLS", "2"))
SEED = int(os.environ.get("TRIM_CRASH_SEED", "0"))
BLOCKS = 5

TEXT = "The quick brown fox jumps over the lazy dog. " * 400


def hashes(directory: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in directory.iterdir()}


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with more blocks than usual, so that kills fall into different ones."""
    directory = tmp_path_factory.mktemp("deep") / "model"
    config = AutoConfig.from_pretrained(tiny("llama"))
    config.num_hidden_layers = BLOCKS
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    (directory.parent / "text.txt").write_text(TEXT)
    return directory


@dataclass(frozen=True)
class Command:
    """A command but for its output directory, and what it gives when nothing disturbs it.

    Attributes:
        words: of the command.
        result: file name -> hash.
        seconds: that it took.
    """

    words: list[str]
    result: dict[str, str]
    seconds: float

    def to(self, out: Path) -> list[str]:
        """With that output directory."""
        return [*self.words, "-o", str(out)]


@pytest.fixture(scope="module")
def commands(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Command]:
    """Two ways to prune, and two to convert what the first gives."""
    place = tmp_path_factory.mktemp("whole")
    text = ["--calibration", str(model.parent / "text.txt"), "--samples", "12", "--sequence-length", "32"]
    prune = ["prune", "--model", str(model), "--sparsity", "0.6", "--resume", *text]
    all_words = [
        [*prune, "--update", "refit"],
        [*prune, "--update", "none", "--rows", "trim", "--layers", "owl", "--head"],
        ["convert", str(place / "0"), "--to", "csr"],
        ["convert", str(place / "0"), "--to", "dense"],
    ]
    finish(["--version"], place / "log")  # starts the server, which is not to be counted
    made = []
    for index, words in enumerate(all_words):
        out = place / str(index)
        begin = time.monotonic()
        ended = finish([*words, "-o", str(out)], place / "log")
        assert ended.code == 0, ended.said
        made.append(Command(words, hashes(out), time.monotonic() - begin))
    return made


def finished_shards(out: Path) -> dict[Path, int]:
    """Shards that the journal has, and when each was written."""
    journal = out / JOURNAL
    if not journal.is_file():
        return {}
    return {out / name: (out / name).stat().st_mtime_ns for name in json.loads(journal.read_text())["shards"]}


def test_the_same_command_gives_the_same_bytes_twice(commands: list[Command], tmp_path: Path) -> None:
    for index, command in enumerate(commands):
        ended = finish(command.to(tmp_path / str(index)), tmp_path / "log")
        assert ended.code == 0, ended.said
        assert hashes(tmp_path / str(index)) == command.result


@pytest.mark.parametrize("run", range(RUNS))
def test_killed_at_random_moments(run: int, commands: list[Command], tmp_path: Path) -> None:
    moments = random.Random(f"{SEED} {run}")
    command = commands[run % len(commands)]
    out, log = tmp_path / "out", tmp_path / "log"
    landed = attempts = kept = 0
    known: dict[Path, int] = {}
    seconds = command.seconds
    while landed < KILLS:
        attempts += 1
        assert attempts < 100 * KILLS, "no kill lands in time"
        begin = time.monotonic()
        process = start(command.to(out), log)
        process.join(moments.uniform(0, seconds))
        if process.exitcode is None:
            process.kill()
            process.join()
        if process.exitcode == -signal.SIGKILL:
            landed += 1
            if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).exists() and "prune" in command.words:
                with pytest.raises(ArtifactError, match=r"unfinished|not a trim-export artifact"):
                    open_artifact(out)
            before = finished_shards(out)
            if before:
                # At most the block in flight was done again.
                assert known.items() <= before.items()
                kept += len(before) - len(known)
                known = before
            if command.words[0] == "prune" and not before:
                seconds *= 1.25  # slower than when it was measured; kills are to fall between blocks too
            ended = finish(command.to(out), log) if landed == KILLS else None
            if ended is not None:
                assert ended.code == 0 or (command.words[0] == "convert" and "exists already" in ended.said), ended
                assert all(path.stat().st_mtime_ns == written for path, written in before.items())
        else:  # too fast; a finished run that is continued is faster still
            # A conversion may have been killed when all was in place.
            there = command.words[0] == "convert" and "exists already" in log.read_text()
            assert process.exitcode == 0 or there, log.read_text()
            seconds = seconds if there else min(seconds, time.monotonic() - begin)
            assert hashes(out) == command.result
            shutil.rmtree(out)
            known = {}
    assert hashes(out) == command.result
    assert [path.name for path in tmp_path.iterdir()] in (["out", "log"], ["log", "out"])
    print(f"\n{command.words[0]}: {landed} kills, {kept} finished shards kept, result as if never killed")


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_interrupted_by_the_user(share: float, commands: list[Command], tmp_path: Path) -> None:
    command = commands[0]
    out, log = tmp_path / "out", tmp_path / "log"
    process = start(command.to(out), log)
    process.join(share * command.seconds)
    if process.exitcode is None:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        process.join()
        if process.exitcode != 0:  # it may have finished in the meantime
            assert process.exitcode == 130
            assert log.read_text().strip() == "error: interrupted; an unfinished run continues with --resume"
    assert finish(command.to(out), log).code == 0
    assert hashes(out) == command.result


@pytest.mark.parametrize("megabytes", [40, 48])
def test_out_of_memory(megabytes: int, model: Path, tmp_path: Path) -> None:
    text = ["--calibration", str(model.parent / "text.txt"), "--samples", "400", "--sequence-length", "64"]
    words = ["prune", "--model", str(model), "--sparsity", "0.6", "--update", "refit", "--resume", *text, "-o"]
    out, log = tmp_path / "out", tmp_path / "log"
    assert finish([*words, str(tmp_path / "whole")], log).code == 0
    ended = finish([*words, str(out)], log, spare_bytes=megabytes * 2**20)
    assert ended.code == 3, ended
    assert ended.said.startswith("error: out of memory")
    assert len(ended.said.strip().splitlines()) == 1
    assert finish([*words, str(out)], log).code == 0
    assert hashes(out) == hashes(tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """``small_disk(kilobytes)``: a file system of that size; called again, the same one with another size."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a tmpfs needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["mount", "-t", "tmpfs", "-o"]
    if subprocess.run([*options, "size=1m", "tmpfs", str(disk)], capture_output=True, check=False).returncode:
        pytest.skip("this system does not let root mount a tmpfs")

    def resize(kilobytes: int) -> Path:
        subprocess.run([*options, f"remount,size={kilobytes}k", "tmpfs", str(disk)], check=True)
        return disk

    yield resize
    subprocess.run(["umount", "-l", str(disk)], check=False)


@pytest.mark.parametrize(
    ("index", "share"),
    [(0, 0.05), (0, 0.4), (1, 0.8), (2, 0.5), (3, 0.9)],
    ids=["prune at once", "prune", "prune late", "convert to csr", "convert to dense"],
)
def test_the_disk_is_full(
    index: int, share: float, commands: list[Command], small_disk: Callable[[int], Path], tmp_path: Path
) -> None:
    command, log = commands[index], tmp_path / "log"
    out = small_disk(4096) / "out"
    assert finish(command.to(out), log).code == 0
    whole = sum(path.stat().st_size for path in out.iterdir()) // 1024
    shutil.rmtree(out)
    small_disk(max(4, int(share * whole)))
    ended = finish(command.to(out), log)
    assert ended.code == 3, ended
    assert ended.said.startswith("error: no space left on the disk"), ended.said
    assert len(ended.said.strip().splitlines()) == 1
    assert not (out / MANIFEST).exists()
    if command.words[0] == "prune" and out.exists() and any(out.iterdir()):
        with pytest.raises(ArtifactError, match="unfinished"):
            open_artifact(out)
    small_disk(4096)
    assert finish(command.to(out), log).code == 0
    assert hashes(out) == command.result
    if (out / MANIFEST).exists():
        assert verify_files(open_artifact(out)) == []
