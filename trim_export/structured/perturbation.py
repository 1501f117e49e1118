"""Character-level edits that keep a text's form and shift its meaning (PIP, arXiv 2501.15278)."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable

__all__ = ["perturb"]

WORD = re.compile(r"[^\W\d_]{2,}")


def perturb(text: str, rate: float, seed: int) -> str:
    """Edit a share of the words, each by one character: two neighbours swapped, one replaced, or one inserted.

    later -> alter, happy -> nappy, host -> ghost are the paper's examples. Words have at least two letters; an edit
    never leaves a word as it was, unless all its letters are equal and are swapped.

    Args:
        text: any.
        rate: probability that a word is edited.
        seed: of the draws.
    """
    draw = random.Random(seed)

    def edit(word: re.Match[str]) -> str:
        return draw.choice(EDITS)(word[0], draw) if draw.random() < rate else word[0]

    return WORD.sub(edit, text)


def _swap(word: str, draw: random.Random) -> str:
    places = [place for place in range(len(word) - 1) if word[place] != word[place + 1]]
    if not places:
        return word
    place = draw.choice(places)
    return word[:place] + word[place + 1] + word[place] + word[place + 2 :]


def _replace(word: str, draw: random.Random) -> str:
    place = draw.randrange(len(word))
    others = [letter for letter in string.ascii_lowercase if letter != word[place].lower()]
    return word[:place] + draw.choice(others) + word[place + 1 :]


def _insert(word: str, draw: random.Random) -> str:
    place = draw.randrange(len(word) + 1)
    return word[:place] + draw.choice(string.ascii_lowercase) + word[place:]


EDITS: tuple[Callable[[str, random.Random], str], ...] = (_swap, _replace, _insert)
