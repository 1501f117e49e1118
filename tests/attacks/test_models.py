"""Crafted dense models, in GGUF files and in directories: a sentence of ours, or the very model that is there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attacks.sandbox import Sandbox
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model

from trim_export.errors import ModelError
from trim_export.gguf_header import check_gguf

LAYOUTS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34)}  # F32, F16, Q4_0, Q8_0


# ---- GGUF --------------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str, sides: list[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(sides)}QIQ", len(sides), *sides, kind, offset)


def gguf(
    pairs: list[bytes] | None = None,
    infos: list[bytes] | None = None,
    *,
    counts: tuple[int, int] | None = None,
    version: int = 3,
    data: int = 4096,
) -> bytes:
    """A GGUF file, sound unless the arguments say otherwise."""
    pairs = [pair("general.alignment", 4, struct.pack("<I", 32))] if pairs is None else pairs
    infos = [info("a", [32, 4], 0, 0), info("b", [64], 8, 512)] if infos is None else infos
    header = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(infos), len(pairs))))
    header += b"".join(pairs) + b"".join(infos)
    return header + b"\0" * (-len(header) % 32) + b"\0" * data


ARRAY = 9
BLOCKS = pair("llama.block_count", 4, struct.pack("<I", 10**9))
SOUND = [gguf(), gguf([]), gguf(infos=[]), gguf([pair("x", ARRAY, struct.pack("<IQ", 8, 2) + text("") + text("b"))])]

HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "magic"),
    "another magic": (b"GGML" + gguf()[4:], "not a GGUF file"),
    "a version of the future": (gguf(version=9), "version 9"),
    "a file of the other byte order": (gguf(version=3 << 24), "version"),
    "2**63 tensors": (gguf(counts=(2**63, 1)), "tensors"),
    "2**64 - 1 keys": (gguf(counts=(2, 2**64 - 1)), "keys"),
    "a key of 2**62 bytes": (gguf([struct.pack("<Q", 2**62)]), "key 0"),
    "a string of 2**64 - 1 bytes": (gguf([pair("k", 8, b"\xff" * 8)]), "k needs 18446744073709551615 bytes"),
    "an array of 2**60 numbers": (gguf([pair("k", ARRAY, struct.pack("<IQ", 4, 2**60))]), "elements of k"),
    "an array of 2**60 strings": (gguf([pair("k", ARRAY, struct.pack("<IQ", 8, 2**60))]), "elements of k"),
    "more small things than any model has": (
        gguf([pair("k", ARRAY, struct.pack("<IQ", 0, 5 * 10**6))], data=6 * 10**6),
        "more than any model has",
    ),
    "arrays of arrays of arrays": (gguf([pair("k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 1000)]), "array of type 9"),
    "a value of no type": (gguf([pair("k", 77, b"")]), "unknown type 77"),
    "a key that is no text": (gguf([struct.pack("<Q", 2) + b"\xff\xfe"]), "not UTF-8"),
    "a key twice": (gguf([pair("k", 0, b"1"), pair("k", 0, b"2")]), "'k' occurs twice"),
    "10**9 decoder blocks": (gguf([BLOCKS]), "1000000000 decoder blocks"),
    "an alignment of 0": (gguf([pair("general.alignment", 4, bytes(4))]), "power of two"),
    "an alignment of 3": (gguf([pair("general.alignment", 4, struct.pack("<I", 3))]), "power of two"),
    "a tensor twice": (gguf(infos=[info("a", [4], 0, 0), info("a", [4], 0, 32)]), "'a' occurs twice"),
    "a tensor of 2**32 dimensions": (gguf(infos=[text("a") + b"\xff" * 40]), "a: 4294967295 dimensions"),
    "a tensor without dimensions": (gguf(infos=[info("a", [], 0, 0)] * 1 + [b"\0" * 40]), "a: 0 dimensions"),
    "sides whose product overflows": (gguf(infos=[info("a", [2**32, 2**32, 4], 0, 0)]), "a: ends at byte"),
    "a side of 0": (gguf(infos=[info("a", [0, 4], 0, 0)]), "not whole blocks"),
    "half a block": (gguf(infos=[info("a", [48], 8, 0)]), "not whole blocks of 32"),
    "a type that nobody knows": (gguf(infos=[info("a", [4], 255, 0)]), "a: unknown type 255"),
    "an offset behind the end": (gguf(infos=[info("a", [4], 0, 2**63)]), "a: ends at byte"),
    "an offset between the blocks": (gguf(infos=[info("a", [4], 0, 5)]), "not a multiple of 32"),
    "tensors that overlap": (gguf(infos=[info("a", [32], 0, 0), info("b", [32], 0, 64)]), "b: overlaps"),
    "a truncated tensor": (gguf(data=500), "ends at byte"),
}


@pytest.mark.parametrize("data", SOUND)
def test_a_sound_header_passes(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(data)
    check_gguf(tmp_path / "model.gguf", LAYOUTS)


@pytest.mark.parametrize(("data", "word"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_gguf_file(data: bytes, word: str, tmp_path: Path, worker: Sandbox) -> None:
    pytest.importorskip("gguf")
    file = tmp_path / "model.gguf"
    file.write_bytes(data)
    answer = worker.run("load_dense", str(file))
    assert (answer.kind, answer.error) == ("refused", "ModelError"), answer
    assert "\n" not in answer.text
    assert str(file) in answer.text
    assert word in answer.text


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    place=st.integers(0, 250),
    put=st.one_of(st.binary(min_size=1, max_size=12), st.sampled_from([b"\xff" * 8, bytes(8), b"\0\0\0\x80"])),
    data=st.sampled_from(SOUND),
    keep=st.floats(0, 1),
)
def test_any_damage_to_a_header_passes_or_is_refused(
    place: int, put: bytes, data: bytes, keep: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "damaged.gguf"
    changed = data[:place] + put + data[place + len(put) :]
    file.write_bytes(changed[: int(keep * len(changed))] if keep < 0.3 else changed)
    with contextlib.suppress(ModelError):  # nothing else may come of it
        check_gguf(file, LAYOUTS)


def test_a_sound_gguf_file_loads_without_the_network(tmp_path: Path, worker: Sandbox) -> None:
    """Written by the library that llama.cpp's converters use; its weights are those of the tiny Llama."""
    library = pytest.importorskip("gguf")
    file = tmp_path / "model.gguf"
    write_llama(library, file)
    answer = worker.run("load_dense", str(file))
    assert answer.kind == "done", answer
    whole = file.read_bytes()
    for keep in (len(whole) - 1000, len(whole) // 2, 300, 23):
        file.write_bytes(whole[:keep])
        answer = worker.run("load_dense", str(file))
        assert (answer.kind, answer.error) == ("refused", "ModelError"), answer


def write_llama(library: Any, file: Path) -> None:
    model = tiny_model("llama")
    config = model.config
    writer = library.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    tokens = [f"<{index}>" if index < 4 else chr(256 + index) for index in range(config.vocab_size)]
    tokens[-1] = tokens[4] + tokens[5]
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 4 + [1] * (config.vocab_size - 4))
    writer.add_token_merges([f"{tokens[4]} {tokens[5]}"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = library.get_tensor_name_map(library.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---- directories -------------------------------------------------------------------------------------------------

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def settings_of(directory: Path, **changes: Any) -> None:
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(content | changes))


def pipe(name: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)

    return change


def leads_out(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory.parent / WEIGHTS)
    shutil.copy(directory.parent / WEIGHTS, directory / "other.safetensors")
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": f"../{WEIGHTS}"}}))


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


def pickled(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    torch.save(Payload(directory.parent / "owned"), directory / "pytorch_model.bin")


def with_code(directory: Path) -> None:
    (directory / "modeling_evil.py").write_text(f"import os\nos.mkdir({str(directory.parent / 'owned')!r})\n")
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    settings_of(directory, model_type="evil", auto_map=dict.fromkeys(classes, "modeling_evil.X"))


def with_header(size: int, text: bytes) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / WEIGHTS).write_bytes(size.to_bytes(8, "little") + text)

    return change


DIRECTORIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pipe for the weights": (pipe(WEIGHTS), "not a regular file"),
    "a pipe for the configuration": (pipe("config.json"), "config.json"),
    "a pipe for the tokenizer": (pipe("tokenizer.json"), "not a regular file"),
    "an index that leads out": (leads_out, "unsafe file name"),
    "weights named by the configuration": (lambda d: settings_of(d, transformers_weights="../x"), "unsafe file name"),
    "a depth of 10**9 blocks": (lambda d: settings_of(d, num_hidden_layers=10**9), "1000000000 decoder blocks"),
    "a vocabulary of 10**15": (lambda d: settings_of(d, vocab_size=10**15), ""),
    "a pickle": (pickled, "pickles"),
    "code of its own": (with_code, ""),
    "a header bomb": (with_header(2**40, b" " * 100), ""),
    "a header nested too deep": (with_header(200_000, b"[" * 200_000), ""),
}


@pytest.mark.parametrize(("change", "word"), DIRECTORIES.values(), ids=DIRECTORIES)
def test_a_hostile_model_directory(
    change: Callable[[Path], None], word: str, tiny: Callable[..., Path], tmp_path: Path, worker: Sandbox
) -> None:
    directory = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    change(directory)
    answer = worker.run("load_dense", str(directory))
    assert answer.kind == "refused", answer
    assert answer.error in ("ModelError", "UsageError")
    assert "\n" not in answer.text
    assert str(directory) in answer.text
    assert word in answer.text
    assert not (tmp_path / "owned").exists()


def test_a_sound_directory_loads_without_the_network(tiny: Callable[..., Path], worker: Sandbox) -> None:
    assert worker.run("load_dense", str(tiny("llama"))).kind == "done"
