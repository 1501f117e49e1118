"""Random damage: whatever is done to an artifact's files, loading it ends in a sentence of ours or in the same logits.

With hashes compared nothing else is possible. Without, a value that became another gives other logits, and that is all
it may do: no crash, no hang, no memory without bounds, no exception but ours. ``TRIM_FUZZ_MUTATIONS`` sets how much is
tried, ``TRIM_FUZZ_SEED`` draws other damage than last time; `make fuzz` sets both.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from attacks.mutations import MUTATIONS, SEED, Mutation, mutate, mutations
from attacks.sandbox import Answer, Sandbox, sandbox
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from trim_export.runtimes import available_runtimes

ENCODINGS = ("bitmap", "csr", "bitmap-4x64", "bsr")
RUNTIMES = [name for name in ("torch-sparse", "native") if name in available_runtimes()]

tally: Counter[str] = Counter()


@pytest.fixture(scope="module")
def workers() -> Iterator[list[Sandbox]]:
    """One for each runtime, working at the same time."""
    with sandbox() as one, sandbox() as other:
        yield [one, other][: len(RUNTIMES)]


@pytest.fixture(scope="module")
def sound(stored: Callable[[str], Path], workers: list[Sandbox]) -> dict[str, tuple[Path, list[Answer]]]:
    """Each encoding's artifact, and what it computes with each runtime."""
    return {name: (stored(name), load_all(workers, stored(name), True)) for name in ENCODINGS}


@pytest.fixture(scope="module", autouse=True)
def _report() -> Iterator[None]:
    yield
    print(f"\n{tally['tried']} mutated artifacts: " + ", ".join(f"{tally[key]} {key}" for key in sorted(tally)))


def load_all(workers: list[Sandbox], directory: Path, check_hashes: bool) -> list[Answer]:
    """Load it with every runtime, at the same time."""
    for worker, runtime in zip(workers, RUNTIMES, strict=True):
        worker.ask("compute", str(directory), runtime, check_hashes)
    return [worker.answer() for worker in workers]


def test_any_damage_ends_in_a_sentence_or_in_the_same_logits(
    sound: dict[str, tuple[Path, list[Answer]]], workers: list[Sandbox]
) -> None:
    names = sorted(path.name for path in sound["bitmap"][0].iterdir())

    @seed(SEED)
    @settings(
        max_examples=MUTATIONS, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False
    )
    @given(encoding=st.sampled_from(ENCODINGS), damage=mutations(names))
    def attempt(encoding: str, damage: list[Mutation]) -> None:
        original, expected = sound[encoding]
        with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
            directory = Path(folder) / "artifact"
            shutil.copytree(original, directory, copy_function=os.link if _same_disk(original, folder) else shutil.copy)
            for mutation in damage:
                mutate(directory, mutation)
            tally["tried"] += 1
            for check_hashes in (False, True):
                answers = load_all(workers, directory, check_hashes)
                for answer, right in zip(answers, expected, strict=True):
                    judge(answer, right, check_hashes)

    attempt()
    assert all(answer.kind == "done" for _, answers in sound.values() for answer in answers)
    # A test in which nothing gets through to the kernels, or nothing is refused, would prove nothing.
    assert tally["the same (hashes compared)"] > 0
    assert tally["refused (hashes compared)"] > tally["tried"] // 2
    assert tally["other logits"] > 0


def judge(answer: Answer, right: Answer, check_hashes: bool) -> None:
    """Count an outcome, or fail."""
    how = "hashes compared" if check_hashes else "structure alone"
    if answer.kind == "refused":
        assert answer.error == "ArtifactError", answer
        assert "\n" not in answer.text
        tally[f"refused ({how})"] += 1
    elif answer == right:
        tally[f"the same ({how})"] += 1
    else:
        # Values of weights and settings of the model may be others, as long as nobody compares hashes.
        assert not check_hashes, answer
        assert answer.kind in ("done", "unusable"), answer
        tally["other logits" if answer.kind == "done" else "a model that cannot compute"] += 1


def _same_disk(path: Path, folder: str) -> bool:
    return path.stat().st_dev == os.stat(folder).st_dev
