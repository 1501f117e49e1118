"""Character-level edits."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from trim_export.structured import perturb

WORDS = st.lists(st.text("abcXYZ", min_size=1, max_size=6), min_size=1, max_size=8)


def one_edit_apart(first: str, second: str) -> bool:
    """Whether one swap of neighbours, one replacement or one insertion makes ``second`` of ``first``."""
    if len(second) == len(first) + 1:
        return any(second[:i] + second[i + 1 :] == first for i in range(len(second)))
    changed = [i for i in range(len(first)) if first[i] != second[i]] if len(first) == len(second) else []
    if len(changed) == 2 and changed[1] == changed[0] + 1:
        return first[changed[0]] == second[changed[1]] and first[changed[1]] == second[changed[0]]
    return len(changed) == 1


@given(WORDS, st.integers(0, 99))
def test_every_word_is_one_edit_away_and_all_else_stays(words: list[str], seed: int) -> None:
    text = "1, ".join(words)
    edited = perturb(text, 1.0, seed)
    assert re.sub(r"[^\W\d_]+", "", edited) == re.sub(r"[^\W\d_]+", "", text)
    for before, after in zip(words, edited.split("1, "), strict=True):
        if len(before) == 1:
            assert after == before
        else:
            assert one_edit_apart(before, after) or (before == after and len(set(before)) == 1)


def test_the_rate_is_the_share_of_words() -> None:
    words = ["lantern"] * 4000
    edited = perturb(" ".join(words), 0.25, 0).split()
    share = sum(a != b for a, b in zip(words, edited, strict=True)) / len(words)
    assert abs(share - 0.25) < 0.03
    assert perturb("some words", 0.0, 0) == "some words"
    assert perturb("some more words here", 1.0, 3) == perturb("some more words here", 1.0, 3)
