"""The figures at the top of page and card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench_results import BENCH, bench_row

from trim_export.errors import UsageError
from trim_export.report import model_card
from trim_export.report.headline import Measured, headlines, read_measured

MANIFEST: dict[str, Any] = {"bytes": {"artifact": 2_000_000, "dense": 8_000_000}}


def test_speed_is_that_of_the_runtime_that_decodes_fastest_and_losses_stay_losses() -> None:
    lines = {line.what: line for line in headlines(MANIFEST, Measured(bench=BENCH))}
    assert lines["weight files"].ratio == 0.25
    assert lines["decode, tokens/s (b)"].ratio == 2.0
    assert lines["decode, tokens/s (b)"].dense == "10.0 (16.0 in bfloat16)"
    assert lines["prefill, tokens/s (b)"].ratio == 0.8
    assert lines["weights in memory (b)"].ratio == 0.25


def test_a_rounded_head_does_not_count_because_the_quality_beside_it_is_of_the_artifact_as_stored() -> None:
    rounded = [bench_row("b, int8 head", "float32", phase, 90.0) for phase in ("decode", "prefill")]
    bench = {**BENCH, "rows": [*BENCH["rows"], *rounded]}
    assert headlines(MANIFEST, Measured(bench=bench)) == headlines(MANIFEST, Measured(bench=BENCH))


def test_what_was_gained_and_what_it_cost_are_told_apart() -> None:
    tasks = {"perplexity": {"value": 30.0, "reference": 20.0}}
    lines = headlines(MANIFEST, Measured(bench=BENCH, quality={"source": "a", "tasks": tasks}))
    gained = {line.what: line.gained for line in lines}
    assert gained.pop("prefill, tokens/s (b)") is False  # 0.8 x
    assert gained.pop("perplexity") is False
    assert set(gained.values()) == {True}


def test_a_benchmark_of_the_dense_model_alone_says_nothing_about_sparse_speed() -> None:
    dense = [row for row in BENCH["rows"] if row["runtime"] == "dense"]
    assert [line.what for line in headlines(MANIFEST, Measured(bench={**BENCH, "rows": dense}))] == ["weight files"]


def test_quality_stands_beside_the_dense_models() -> None:
    tasks = {
        "perplexity": {"value": 30.0, "reference": 20.0},
        "divergence": {"kl": 0.5, "argmax_agreement": 0.75},
        "boolq": {"value": 0.6, "reference": 0.7},
    }
    lines = {line.what: line for line in headlines(MANIFEST, Measured(quality={"source": "a", "tasks": tasks}))}
    assert (lines["perplexity"].dense, lines["perplexity"].sparse, lines["perplexity"].ratio) == ("20.00", "30.00", 1.5)
    assert lines["KL to the dense model, nats"].sparse == "0.5000"
    assert lines["same most likely token"].sparse == "75.0%"
    assert (lines["boolq"].dense, lines["boolq"].sparse) == ("70.0%", "60.0%")


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "not readable as JSON"), ("[]", "no 'machine'"), ('{"machine": {}}', "no 'rows'")],
)
def test_a_file_of_another_kind_is_named(content: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=f"bench.json: {reason}"):
        read_measured(file, None)


def test_the_card_repeats_measurements_and_their_machine(tmp_path: Path) -> None:
    manifest = json.loads(json.dumps(MANIFEST)) | {
        "source": {"model": "m", "structured": {"method": "pip", "removed": {"blocks": [3, 5]}, "share": 0.2}},
        "sparsity": {"achieved": 0.5, "target": 0.5}, "tool_version": "1", "encoding": "bitmap", "modules": {},
        "weights_updated": True,
        "run": {"recipe": {"layers": {"name": "owl"}, "rows": "trim", "counts": "exact", "samples": 1, "seed": 0,
                           "sequence_length": 2, "calibration": "c", "score": "wanda", "update": "admm"}},
    }  # fmt: skip
    quality = {"source": "a", "data": "t.txt", "tasks": {"perplexity": {"value": 9.0, "tokens": 2046}}}
    card = model_card(manifest, Measured(bench=BENCH, quality=quality))
    assert "Perplexity and divergence: on 2,046 tokens of t.txt." in card
    assert "| decode, tokens/s (b) | 10.0 (16.0 in bfloat16) | 20.0 | 2.00 x |" in card
    assert "Pip removed decoder blocks 3, 5 (20.0% of the parameters)." in card
    assert "2 threads" in card
