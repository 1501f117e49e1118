"""Random damage to an ONNX directory: a sentence of ours or the same logits, and never a crash of ONNX Runtime.

With hashes compared nothing else is possible. Without, a number that became another gives other logits, and a graph
that became another may be a model that cannot compute. A fifth as much is tried as of artifacts, and drawn by the same
``TRIM_FUZZ_MUTATIONS`` and ``TRIM_FUZZ_SEED``; `make fuzz` sets both.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from attacks.mutations import MUTATIONS, SEED, Mutation, mutate, mutations
from attacks.sandbox import Sandbox
from hypothesis import HealthCheck, given, seed, settings
from onnx_graphs import needs_operators

from trim_export.artifact import Artifact
from trim_export.convert_onnx import convert_to_onnx
from trim_export.converters.onnx import Form


@needs_operators
@pytest.mark.parametrize("encoding", ["csr", "bitmap"])
def test_any_damage_ends_in_a_sentence_or_in_the_same_logits(
    encoding: str, pruned: Callable[..., Artifact], worker: Sandbox, tmp_path: Path
) -> None:
    sound = tmp_path / "sound"
    convert_to_onnx(pruned("llama-16"), sound, Form(encoding, "float32", "int8"))
    expected = worker.run("compute", str(sound), "auto", True)
    assert expected.kind == "done", expected
    names = sorted(path.name for path in sound.iterdir())
    tally: Counter[str] = Counter()

    @seed(SEED)
    @settings(
        max_examples=MUTATIONS // 10,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(damage=mutations(names, (".onnx", ".data")))
    def attempt(damage: list[Mutation]) -> None:
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            directory = Path(shutil.copytree(sound, Path(folder) / "model"))
            for mutation in damage:
                mutate(directory, mutation)
            for check_hashes in (False, True):
                answer = worker.run("compute", str(directory), "auto", check_hashes)
                how = "hashes compared" if check_hashes else "structure alone"
                if answer.kind == "refused":
                    assert answer.error == "ArtifactError", answer
                    assert "\n" not in answer.text
                elif answer != expected:
                    assert not check_hashes, answer
                    assert answer.kind in ("done", "unusable"), answer
                tally[f"{'the same' if answer == expected else answer.kind} ({how})"] += 1

    attempt()
    print(f"\n{encoding}: " + ", ".join(f"{count} {key}" for key, count in sorted(tally.items())))
    assert tally["refused (hashes compared)"] > MUTATIONS // 20
    assert tally["the same (hashes compared)"] > 0
    assert tally["done (structure alone)"] > 0
