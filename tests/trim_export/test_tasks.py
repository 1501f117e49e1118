"""Zero-shot tasks on local files, against lm-eval's own way with the same model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from trim_export import tasks
from trim_export.artifact import Artifact
from trim_export.errors import UsageError
from trim_export.models import load_model
from trim_export.runtimes import load
from trim_export.tasks import TASKS, TaskScore, _task_manager, agreement, zero_shot

CHOICES = {"text": ["a rock", "the sky", "two cats"], "label": ["A", "B", "C"]}
QUESTIONS: dict[str, list[dict[str, object]]] = {
    "boolq": [{"passage": f"Ice {n} floats.", "question": "does ice float", "label": n % 2} for n in range(6)],
    "openbookqa": [{"question_stem": f"Which of {n} is blue?", "choices": CHOICES, "answerKey": "ABC"[n % 3]}
                   for n in range(6)],
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tasks")
    for name, questions in QUESTIONS.items():
        (directory / f"{name}_6.jsonl").write_text("\n".join(map(json.dumps, questions)) + "\n")
    return directory


@pytest.mark.filterwarnings("default")
def test_accuracies_are_those_that_lm_eval_finds_itself(
    tiny: Callable[[str], Path],
    pruned: Callable[[str], Artifact],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="the eval extra is not installed")
    # The tiny tokenizer reads characters, of which the model would take 64.
    config = json.loads((tiny("llama") / "config.json").read_text()) | {"max_position_embeddings": 512}
    for file in tiny("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    dense = load_model(str(tmp_path))
    sizes: list[int] = []

    def track(items: Iterable[Any], description: str) -> Iterable[Any]:
        for item in items:
            sizes.append(len(item))
            yield item

    monkeypatch.setattr(tasks, "_SHOWN", 8)
    found = zero_shot(dense.model, dense.tokenizer, ["boolq", "openbookqa"], data, track=track)
    assert sizes == [8, 8, 8, 6]  # six questions with two and with three choices
    official = _task_manager().task_index["openbookqa"].yaml_path
    own = {"include": str(official), "task": "own", "dataset_path": "json", "dataset_name": None,
           "dataset_kwargs": {"data_files": {"test": str(data / "openbookqa_6.jsonl")}},
           "training_split": None, "validation_split": None, "test_split": "test"}  # fmt: skip
    (tmp_path / "own.yaml").write_text(json.dumps(own))
    theirs = lm_eval.simple_evaluate(
        "hf", {"pretrained": str(tmp_path), "dtype": "float32", "device": "cpu"}, [str(tmp_path / "own.yaml")],
        bootstrap_iters=10, task_manager=_task_manager(),
    )["results"]["own"]  # fmt: skip
    assert found["openbookqa"].value == theirs["acc,none"]
    assert found["openbookqa"].normalised == theirs["acc_norm,none"]
    assert found["openbookqa"].stderr == pytest.approx(theirs["acc_stderr,none"])
    assert len(found["boolq"].choices) == 6
    right = [choice == question["label"] for choice, question in
             zip(found["boolq"].choices, QUESTIONS["boolq"], strict=True)]  # fmt: skip
    assert found["boolq"].value == sum(right) / 6
    # A sparse runtime is asked the same way, and chooses as the dense form of the same artifact does.
    scores = []
    for runtime in ("torch-sparse", "dense"):
        model = load(pruned("llama").path, runtime)
        model.config.max_position_embeddings = 512
        scores.append(zero_shot(model, dense.tokenizer, ["openbookqa"], data, limit=4)["openbookqa"])
    assert len(scores[0].choices) == 4
    assert scores[0] == scores[1]


def test_agreement_counts_questions() -> None:
    def score(*choices: int) -> TaskScore:
        return TaskScore(0.5, 0.1, None, choices)

    assert agreement(score(0, 1, 2, 3), score(0, 1, 2, 0)) == 0.75


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"passage": "a", "label": 1}', "line 2: no field 'question'"),
        ("[1]", "line 2: no field 'passage'"),
        ("{", "line 2: not JSON"),
    ],
)
def test_bad_lines_are_named_before_anything_is_asked(line: str, reason: str, tmp_path: Path) -> None:
    good = json.dumps(QUESTIONS["boolq"][0])
    (tmp_path / "boolq.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(UsageError, match=f"boolq.jsonl, {reason}"):
        zero_shot(None, None, ["boolq"], tmp_path)  # type: ignore[arg-type]


def test_files_that_are_missing_or_not_clear_are_named(tmp_path: Path) -> None:
    for name in TASKS:
        with pytest.raises(UsageError, match=f"no file for {name}; it reads {name}.jsonl"):
            zero_shot(None, None, [name], tmp_path)  # type: ignore[arg-type]
    for part in ("a", "b"):
        (tmp_path / f"rte_{part}.jsonl").write_text("")
    with pytest.raises(UsageError, match="several files for rte"):
        zero_shot(None, None, ["rte"], tmp_path)  # type: ignore[arg-type]
