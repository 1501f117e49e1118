"""Calibration windows from files and from the model itself."""

from __future__ import annotations

import builtins
import json
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import SPECIAL, VOCABULARY, tiny_model, tiny_tokenizer
from torch import Tensor

from trim_export import calibration
from trim_export.calibration import (
    calibration_windows,
    consecutive_windows,
    read_text,
    self_generated,
    source_name,
    token_stream,
    training_windows,
)
from trim_export.errors import EnvironmentLacks, UsageError
from trim_export.forward import Compute
from trim_export.models import load_model
from trim_export.prune import prune
from trim_export.recipe import Recipe

TEXT = "".join(random.Random(0).choices(string.ascii_letters + " \n", k=500))


def windows(source: Path | str, samples: int = 6, length: int = 20, seed: int = 0) -> Tensor:
    return calibration_windows(str(source), tiny_model("llama"), tiny_tokenizer(), samples, length, seed)


def refusal(source: Path | str, **options: int) -> str:
    with pytest.raises(UsageError) as caught:
        windows(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(source))
    return message


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    def to(name: str, content: str | bytes) -> Path:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / name

    return to


@pytest.fixture
def text(write: Any) -> Path:
    return Path(write("text.txt", TEXT))


# ---- files -------------------------------------------------------------------------------------------------------


def test_windows_lie_where_torch_randint_puts_them(text: Path) -> None:
    stream = tiny_tokenizer()(TEXT, add_special_tokens=False).input_ids
    torch.manual_seed(3)  # the authors draw from the global generator, which gives the same numbers
    expected = []
    for start in torch.randint(0, len(stream) - 20 - 1, (6,)).tolist():
        expected.append(stream[start : start + 20])
    drawn = windows(text, seed=3)
    assert drawn.tolist() == expected
    assert drawn.dtype == torch.int64


def test_held_out_windows_come_from_the_last_eighth_and_the_others_from_the_rest(write: Any) -> None:
    file = write("text.txt", "a" * 700 + "b" * 100)
    drawn = training_windows(str(file), tiny_model("llama"), tiny_tokenizer(), 40, 30, 0, held_out=10)
    assert drawn.shape == (40, 30)
    of_a, of_b = tiny_tokenizer()("ab", add_special_tokens=False).input_ids
    assert (drawn[:30] == of_a).all()
    assert (drawn[30:] == of_b).all()


def test_a_text_whose_last_eighth_has_no_window_is_refused(write: Any) -> None:
    file = write("short.txt", "abcdefgh" * 4)
    with pytest.raises(UsageError, match=r"last eighth: 4 tokens are too few for a window of 3"):
        training_windows(str(file), tiny_model("llama"), tiny_tokenizer(), 8, 3, 0, held_out=1)


def test_windows_depend_on_the_seed_and_on_nothing_else(text: Path) -> None:
    torch.manual_seed(1)
    once = windows(text, seed=5)
    torch.manual_seed(2)
    assert torch.equal(windows(text, seed=5), once)
    assert not torch.equal(windows(text, seed=6), once)


def test_drawing_leaves_the_global_generator_alone(text: Path) -> None:
    before = torch.get_rng_state()
    windows(text)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_special_tokens_are_added(text: Path) -> None:
    assert int(windows(text, samples=50).min()) >= len(SPECIAL)
    assert token_stream("ab", tiny_tokenizer()).tolist() == [4, 5]


@pytest.mark.parametrize(("tokens", "enough"), [(21, False), (22, True)])
def test_the_shortest_text_that_has_a_window(write: Any, tokens: int, enough: bool) -> None:
    file = write("short.txt", TEXT[:tokens].replace("\n", "x"))
    if enough:
        assert windows(file).shape == (6, 20)
    else:
        assert "21 tokens are too few for a window of 20" in refusal(file)


def test_jsonl_documents_are_joined_by_blank_lines(write: Any) -> None:
    documents = ["first\ndocument", "zweites Dokument: ä", "", "last"]
    lines = [json.dumps({"text": document, "id": 7}) for document in documents]
    file = write("text.jsonl", "\n\n".join(lines) + "\n")
    assert read_text(str(file), 1) == "first\ndocument\n\nzweites Dokument: ä\n\n\n\nlast"


@pytest.mark.parametrize(
    "line", ["not json", '{"txt": "a"}', "[1]", "3", "null", '{"text": "a"', '"text"', '{"text": "a"} {"text": "b"}']
)
def test_a_line_that_is_no_document(write: Any, line: str) -> None:
    file = write("text.jsonl", '{"text": "fine"}\n' + line + "\n")
    assert refusal(file) == f'{file}, line 2: not a JSON object with a "text" field'


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_line_separators_inside_json_strings_are_text(write: Any, character: str) -> None:
    document = f"one{character}document"
    file = write("text.jsonl", json.dumps({"text": document}, ensure_ascii=False))
    assert read_text(str(file), 1) == document


def test_blank_lines_count(write: Any) -> None:
    file = write("text.jsonl", '{"text": "fine"}\n\n\nnot json\n')
    assert "line 4:" in refusal(file)


def test_a_byte_order_mark_is_no_text(write: Any) -> None:
    assert read_text(str(write("text.txt", b"\xef\xbb\xbfabc")), 1) == "abc"
    assert read_text(str(write("text.jsonl", b'\xef\xbb\xbf{"text": "abc"}')), 1) == "abc"


@pytest.mark.parametrize("value", [None, 5, ["a"], {"a": 1}])
def test_a_text_that_is_no_string(write: Any, value: Any) -> None:
    refusal(write("text.jsonl", json.dumps({"text": value}) + "\n" + json.dumps({"text": TEXT})))


@pytest.mark.parametrize("content", ["", " \n\t\n"])
@pytest.mark.parametrize("name", ["text.txt", "text.jsonl"])
def test_an_empty_file(write: Any, name: str, content: str) -> None:
    assert refusal(write(name, content)).endswith(": empty")


def test_documents_that_are_all_empty(write: Any) -> None:
    assert refusal(write("text.jsonl", '{"text": ""}\n{"text": "  "}')).endswith(": empty")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "no such text file (known besides files: self, c4, wikitext2)" in refusal(tmp_path / "absent.txt")
    assert "no such text file" in refusal(tmp_path)
    assert "no such text file" in refusal("wikitext")


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl"])
def test_a_file_that_is_not_utf8(write: Any, name: str) -> None:
    assert refusal(write(name, b"caf\xe9 " * 50)).endswith(": not UTF-8 text")


def test_line_ends_of_windows_are_line_ends(write: Any) -> None:
    assert read_text(str(write("text.txt", b"a\r\nb")), 1) == "a\nb"


def test_a_data_set_needs_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    importer = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return importer(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EnvironmentLacks, match=r"calibration on c4 needs .*trim-export\[data\]"):
        windows("c4")


def test_sources_are_named_without_their_place(text: Path) -> None:
    assert source_name(str(text)) == "text.txt"
    assert source_name(str(text.parent)) == text.parent.name
    assert source_name("self") == "self"
    assert source_name("org/model") == "org/model"


def test_sources_relative_to_here_or_home_have_names_too(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(text.parent)
    monkeypatch.setenv("HOME", str(text.parent))
    assert source_name(".") == text.parent.name
    assert source_name("~/text.txt") == "text.txt"


# ---- evaluation --------------------------------------------------------------------------------------------------


def test_consecutive_windows_cut_the_stream() -> None:
    stream = torch.arange(25)
    assert consecutive_windows(stream, 10, 2).tolist() == [list(range(10)), list(range(10, 20))]
    assert consecutive_windows(stream, 10, 1, first=1).tolist() == [list(range(10, 20))]
    with pytest.raises(UsageError, match="the text has 2 windows of 10 tokens; 3 are asked for"):
        consecutive_windows(stream, 10, 2, first=1)


# ---- written by the model ----------------------------------------------------------------------------------------


def test_the_model_writes_windows_of_the_right_shape() -> None:
    drawn = windows("self", samples=5, length=9)
    assert drawn.shape == (5, 9)
    assert drawn.dtype == torch.int64
    assert int(drawn.min()) >= 0
    assert int(drawn.max()) < VOCABULARY
    assert len({tuple(window) for window in drawn.tolist()}) == 5


def test_what_the_model_writes_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    once = windows("self", seed=4)
    torch.manual_seed(2)
    assert torch.equal(windows("self", seed=4), once)
    assert not torch.equal(windows("self", seed=5), once)


def test_no_global_generator_is_disturbed() -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    windows("self", samples=2, length=4)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]


def test_many_windows_are_written_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "GENERATION_TOKENS", 12)
    assert windows("self", samples=5, length=6).shape == (5, 6)


def test_an_end_token_does_not_end_a_window() -> None:
    # It is made the most likely of all, so that sampling would meet it at once.
    model = tiny_model("opt")
    model.lm_head.weight[2] = 0
    model.model.decoder.final_layer_norm.weight.zero_()
    model.model.decoder.final_layer_norm.bias.fill_(1)
    model.lm_head.weight[2] = 10
    drawn = self_generated(model, tiny_tokenizer(), 4, 12, 0)
    assert drawn.shape == (4, 12)
    assert not (drawn == 2).any()


def test_the_models_own_distribution_is_sampled() -> None:
    """At temperature 1 without truncation, whatever the model's generation settings say."""
    model = tiny_model("llama")
    model.generation_config.update(temperature=0.1, top_k=1, top_p=0.1, repetition_penalty=5.0, do_sample=False)
    drawn = self_generated(model, tiny_tokenizer(), 2048, 1, 0)[:, 0]
    with torch.no_grad():
        logits = model(torch.tensor([[1]])).logits[0, -1]
    logits[2] = -torch.inf
    probabilities = logits.softmax(0)
    frequencies = torch.bincount(drawn, minlength=VOCABULARY) / len(drawn)
    # The total variation of 2048 honest samples is 0.08; of the 50 likeliest tokens, or at temperature 0.8, 0.2.
    assert float((frequencies - probabilities).abs().sum()) / 2 < 0.12


def test_a_tokenizer_without_a_first_token() -> None:
    tokenizer = tiny_tokenizer().__class__(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    assert tokenizer.bos_token_id is None
    with pytest.raises(UsageError, match="needs a tokenizer with a beginning or end token; give a text file"):
        self_generated(tiny_model("llama"), tokenizer, 1, 4, 0)


def test_an_end_token_stands_in_for_a_missing_first_one() -> None:
    tokenizer = tiny_tokenizer().__class__(tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token="</s>")
    assert self_generated(tiny_model("llama"), tokenizer, 1, 4, 0).shape == (1, 4)


def test_a_model_is_pruned_on_what_it_wrote(tiny: Callable[..., Path], tmp_path: Path) -> None:
    dense = load_model(str(tiny("llama")))
    recipe = Recipe(0.5, update="none", samples=4, sequence_length=8, context_length=0)
    tokens = calibration_windows("self", dense.model, dense.tokenizer, 4, 8, recipe.seed)
    artifact = prune(dense, recipe, tokens, tmp_path / "out", Compute(torch.device("cpu"), autocast=False))
    assert artifact.manifest["run"]["recipe"]["calibration"] == "self"
