"""The zero-shot tasks of the TRIM paper through lm-eval (EleutherAI), on hub data or on files of one's own.

Prompts, scoring and metrics are lm-eval's; here are only the list, the way to a local file, and the choices one by one,
so that two models can be compared question by question.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trim_export.errors import EnvironmentLacks, UsageError, first_line
from trim_export.progress import Track, silently

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TASKS", "Task", "TaskScore", "agreement", "zero_shot"]


@dataclass(frozen=True)
class Task:
    """One of lm-eval's tasks, as it is when its data come from a file.

    Attributes:
        split: what lm-eval evaluates on.
        fields: that each line of a JSONL file must have.
    """

    split: str
    fields: tuple[str, ...]


_SHOWN = 64
"""Requests after which progress is shown again; of every question each choice is one."""
ARC = Task("test", ("question", "choices", "answerKey"))
TASKS: dict[str, Task] = {
    "boolq": Task("validation", ("passage", "question", "label")),
    "rte": Task("validation", ("sentence1", "sentence2", "label")),
    "hellaswag": Task("validation", ("activity_label", "ctx_a", "ctx_b", "endings", "label")),
    "winogrande": Task("validation", ("sentence", "option1", "option2", "answer")),
    "arc_easy": ARC,
    "arc_challenge": ARC,
    "openbookqa": Task("test", ("question_stem", "choices", "answerKey")),
}
"""By the names that lm-eval gives them."""


@dataclass(frozen=True)
class TaskScore:
    """What a model made of one task.

    Attributes:
        value: accuracy.
        stderr: its standard error, ``sqrt(p (1 - p) / (n - 1))``.
        normalised: accuracy when choices are compared by likelihood per byte; None where lm-eval has no such metric.
        choices: what was chosen for each question, in order.
    """

    value: float
    stderr: float
    normalised: float | None
    choices: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values, without the choices."""
        normalised = {} if self.normalised is None else {"normalised": self.normalised}
        return {"value": self.value, "stderr": self.stderr, **normalised, "questions": len(self.choices)}


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    data_dir: Path | None = None,
    limit: int | None = None,
    batch: int = 1,
    track: Track[Any] = silently,
) -> dict[str, TaskScore]:
    """Ask a model the questions of some tasks.

    Args:
        model: dense or sparse, of any runtime.
        tokenizer: its.
        names: in `TASKS`.
        data_dir: holds ``NAME.jsonl``, or one ``NAME_*.jsonl``, for each; None takes the data sets from the hub.
        limit: of each task only the first so many questions.
        batch: sequences at a time.
        track: shows progress.

    Raises:
        UsageError: a file or field that is missing, or data that cannot be fetched.
        EnvironmentLacks: lm-eval is not installed.
    """
    # Checked first: reading files takes no time and needs no library.
    files = {} if data_dir is None else {name: _data_file(name, data_dir) for name in names}
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise EnvironmentLacks("zero-shot tasks need the eval extra: pip install 'trim-export[eval]'") from error

    class Tracked(HFLM):  # type: ignore[misc]  # lm-eval is not typed
        """lm-eval's own model, asked a few requests at a time so that progress can be shown."""

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            parts = [requests[first : first + _SHOWN] for first in range(0, len(requests), _SHOWN)]
            answers = (super(Tracked, self).loglikelihood(part, True) for part in track(parts, "zero-shot tasks"))
            return list(itertools.chain.from_iterable(answers))

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _task_manager()
    try:
        with tempfile.TemporaryDirectory() as directory:
            for name, file in files.items():
                official = manager.task_index[name].yaml_path
                (Path(directory) / f"{name}.yaml").write_text(json.dumps(_local(name, file, official)))
            found = simple_evaluate(
                Tracked(pretrained=model, tokenizer=tokenizer, batch_size=batch),
                tasks=[str(Path(directory) / f"{name}.yaml") if name in files else name for name in names],
                num_fewshot=0,
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
                task_manager=manager,
            )
    except (OSError, ConnectionError) as error:
        raise UsageError(
            f"the data of {', '.join(names)} cannot be had from the hub ({first_line(error)}); give --data-dir"
        ) from error
    return {name: _score(found["results"][name], found["samples"][name]) for name in names}


def agreement(first: TaskScore, second: TaskScore) -> float:
    """Share of questions for which two models choose alike."""
    same = [mine == theirs for mine, theirs in zip(first.choices, second.choices, strict=True)]
    return sum(same) / len(same)


@functools.cache  # reading the list of lm-eval's thousands of tasks takes seconds
def _task_manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _local(name: str, file: Path, official: Path) -> dict[str, Any]:
    """lm-eval's own task with its data taken from a file; JSON, which its YAML reader reads."""
    split = TASKS[name].split
    return {
        "include": str(official),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(file.resolve())}},
        **dict.fromkeys(("training_split", "validation_split", "test_split")),
        f"{split}_split": split,
    }


def _data_file(name: str, data_dir: Path) -> Path:
    """The file of one task, all its lines checked."""
    exact = data_dir / f"{name}.jsonl"
    files = [exact] if exact.is_file() else sorted(data_dir.glob(f"{name}_*.jsonl"))
    if len(files) != 1:
        raise UsageError(f"{data_dir}: {'several files' if files else 'no file'} for {name}; it reads {exact.name}")
    _check_lines(files[0], TASKS[name])
    return files[0]


def _check_lines(file: Path, task: Task) -> None:
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            question = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{file}, line {number}: not JSON ({error})") from error
        missing = [field for field in task.fields if not isinstance(question, dict) or field not in question]
        if missing:
            raise UsageError(f"{file}, line {number}: no field {missing[0]!r}")


def _score(result: dict[str, Any], samples: list[dict[str, Any]]) -> TaskScore:
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    likelihoods = [[float(response[0]) for response in sample["filtered_resps"]] for sample in ordered]
    accuracy = float(result["acc,none"])
    return TaskScore(
        value=accuracy,
        stderr=math.sqrt(accuracy * (1 - accuracy) / max(1, len(ordered) - 1)),
        normalised=float(result["acc_norm,none"]) if "acc_norm,none" in result else None,
        choices=tuple(max(range(len(row)), key=row.__getitem__) for row in likelihoods),
    )
