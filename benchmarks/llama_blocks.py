"""An artifact shaped like the first blocks of Llama-2-7B, with random weights: for speed and memory, not for quality.

python -m benchmarks.llama_blocks blocks [--blocks 4] [--sparsity 0.8]
trim-export bench blocks --prompt 512
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trim_export.forward import choose_compute
from trim_export.models import DenseModel, load_model, quiet_transformers
from trim_export.prune import prune
from trim_export.recipe import make_recipe


def main() -> None:
    """Write the artifact."""
    quiet_transformers()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--sparsity", type=float, default=0.8)
    options = parser.parse_args()
    dense = random_llama(options.blocks)
    # Rows differ as TRIM makes them; the quality that they are chosen by is that of random weights on random text.
    recipe = make_recipe("paper", options.sparsity)
    tokens = torch.randint(0, dense.model.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
    prune(dense, recipe, tokens, options.output, choose_compute("cpu", dense.model.dtype))


def random_llama(blocks: int) -> DenseModel:
    """Blocks, embedding and head of Llama-2-7B's sizes in bfloat16; the tokenizer is another model's."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=blocks, num_attention_heads=32, vocab_size=32000
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    return DenseModel(model, load_model("smollm2-135m").tokenizer, f"{blocks} random blocks of Llama-2-7B", "0" * 64)


if __name__ == "__main__":
    main()
