"""``trim-export generate``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from trim_export.cli.common import Directory, LmHead, Values, app, open_quietly, quiet, read_tokenizer
from trim_export.errors import UsageError


@app.command()
def generate(
    directory: Directory,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    runtime: Annotated[str, typer.Option(help="Runtime to use.")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    lm_head: LmHead = "stored",
    values: Values = "stored",
) -> None:
    """Continue a prompt (greedy)."""
    from trim_export.runtimes import load
    from trim_export.runtimes.onnxruntime import is_onnx

    if is_onnx(directory):
        quiet()
    else:
        open_quietly(directory)

    tokenizer = read_tokenizer(directory)
    tokens = tokenizer(prompt, return_tensors="pt")
    if tokens["input_ids"].shape[1] == 0:
        raise UsageError("the prompt is empty")
    model: Any = load(directory, runtime, lm_head=lm_head, values=values)
    text = model.generate(**tokens, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0)
    print(tokenizer.decode(text[0], skip_special_tokens=True))
