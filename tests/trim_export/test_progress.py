"""Long steps say how far they are: every unit of work passes once through what shows the progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_tokenizer, tiny_tokens

from trim_export.artifact import Artifact
from trim_export.convert import convert
from trim_export.evaluate import compare, perplexity
from trim_export.runtimes import load
from trim_export.verify import PROMPTS, verify


class Counted:
    """A `Track` that counts the items that were taken."""

    def __init__(self) -> None:
        self.taken: dict[str, int] = {}

    def __call__(self, items: Iterable[Any], description: str) -> Iterable[Any]:
        for item in items:
            self.taken[description] = self.taken.get(description, 0) + 1
            yield item


@pytest.mark.parametrize(("target", "shown"), [("csr", "shards"), ("dense", "shards"), ("scipy", "matrices")])
def test_converting_counts_what_it_writes(
    target: str, shown: str, pruned: Callable[[str], Artifact], tmp_path: Path
) -> None:
    count, artifact = Counted(), pruned("llama")
    convert(artifact, target, tmp_path / "out", track=count)
    assert count.taken == {f"writing {shown}": len(artifact.shards if shown == "shards" else artifact.modules)}


def test_evaluating_counts_windows(pruned: Callable[[str], Artifact]) -> None:
    count, model, windows = Counted(), load(pruned("llama").path, "dense"), tiny_tokens()
    assert perplexity(model, windows, count) == perplexity(model, windows)
    assert compare(model, model, windows, count).kl == 0
    assert count.taken == {"perplexity": len(windows), "divergence": len(windows)}


def test_verifying_counts_the_prompts_of_every_model(pruned: Callable[[str], Artifact]) -> None:
    count = Counted()
    assert verify(pruned("llama"), tiny_tokenizer(), ["torch-sparse", "dense"], count)["passed"]
    phases = ("reference: writing", "reference: reading", "torch-sparse: reading", "dense: reading")
    assert count.taken == dict.fromkeys(phases, len(PROMPTS))
