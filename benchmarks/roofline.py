"""What decoding a token should cost on GPUs: a model of bytes, instructions and launches, checked on published data.

    python -m benchmarks.roofline

Everything printed is *predicted*. For each matrix the time is the larger of two: its bytes at the share of the memory's
bandwidth that decoding was seen to reach, and its instructions at a share of what the card can issue. A constant for
each decoder block stands for everything else: attention, norms, launches.

The two constants of the RTX 4090 were fitted to end-to-end measurements of MACKO-SpMV (arXiv 2511.13061, Llama-2-7B,
float16, batch 1), which `PUBLISHED` holds: the five sparse points were fitted, the dense one was not. For other cards
the bandwidth share is an assumption, and the constant for a block is the same. Neither the key-value cache nor the
gather from the input vector is in the model: figures for server cards are upper bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["FORMATS", "GPUS", "MODELS", "PUBLISHED", "Format", "Gpu", "Model", "decode_bytes", "decode_seconds"]

ISSUE_SHARE = 0.6
"""Of the instructions that a card can issue. Assumed; MACKO's measurements show that .45 are reached."""
BLOCK_SECONDS = 1.5175e-3 / 32
"""All but the matrices, for each decoder block; fitted."""
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Gpu:
    """A card.

    Attributes:
        bandwidth: bytes a second, as specified.
        share: of the bandwidth that decoding reaches; fitted for the RTX 4090, else assumed.
        instructions: of single threads, a second: multiprocessors x 128 x boost clock.
        memory: bytes.
    """

    bandwidth: float
    share: float
    instructions: float
    memory: float


@dataclass(frozen=True)
class Model:
    """A decoder: its blocks, the shapes (rows, columns) of a block's matrices, vocabulary and width."""

    blocks: int
    matrices: tuple[tuple[int, int], ...]
    vocabulary: int
    width: int


@dataclass(frozen=True)
class Format:
    """An encoding and its kernel.

    Attributes:
        slot_bytes: of a weight, a bridge or a padding.
        slot_instructions: of single threads in the inner loop, counted in compiled code.
        widest_gap: distance that fits into a slot; wider ones take bridges.
        group: slots that are filled up together at the end of a row.
    """

    slot_bytes: float
    slot_instructions: float
    widest_gap: float
    group: int

    def slots(self, density: float, columns: int) -> float:
        """Slots for each weight of a matrix at random places: bridges and half a group at a row's end included."""
        bridges = 0.0
        if math.isfinite(self.widest_gap) and density < 1:
            # Gaps are geometric: each further full distance is bridged with the probability of reaching it.
            reach = (1 - density) ** self.widest_gap
            bridges = reach / (1 - reach)
        return density * (1 + bridges) + (self.group - 1) / 2 / columns


GPUS = {
    "RTX 4090": Gpu(1008e9, 0.97, 128 * 128 * 2.52e9, 24e9),
    "A100 80GB": Gpu(2039e9, 0.88, 108 * 128 * 1.41e9, 80e9),
    "H100 SXM": Gpu(3352e9, 0.85, 132 * 128 * 1.755e9, 80e9),
}
MODELS = {
    "Llama-2-7B": Model(32, ((4096, 4096),) * 4 + ((11008, 4096),) * 2 + ((4096, 11008),), 32000, 4096),
    "Llama-2-13B": Model(40, ((5120, 5120),) * 4 + ((13824, 5120),) * 2 + ((5120, 13824),), 32000, 5120),
    "Qwen2.5-14B": Model(
        48, ((5120, 5120),) * 2 + ((1024, 5120),) * 2 + ((13824, 5120),) * 2 + ((5120, 13824),), 152064, 5120
    ),
}
FORMATS = {
    "dense": Format(2, 0, math.inf, 1),
    "g8": Format(2.75, 11, 15, 8),
    "csr-interleaved": Format(4, 9.75, math.inf, 8),
    "MACKO": Format(2.5, 27.5, 16, 8),
}

PUBLISHED = {1.0: 66.5, 0.5: 98.6, 0.4: 119.3, 0.3: 150.8, 0.2: 193.8, 0.1: 255.0}
"""Tokens a second by density: Llama-2-7B on an RTX 4090 with MACKO-SpMV, and dense with cuBLAS (arXiv 2511.13061)."""


def decode_seconds(model: Model, gpu: Gpu, form: Format, density: float) -> float:
    """Predicted seconds of one token at batch 1, short context, with matrices of this density and a dense LM head."""
    speed = gpu.bandwidth * gpu.share
    seconds = model.blocks * BLOCK_SECONDS + 2 * model.vocabulary * model.width / speed
    for rows, columns in model.matrices * model.blocks:
        slots = rows * columns * form.slots(density, columns)
        issue = slots * form.slot_instructions / (gpu.instructions * ISSUE_SHARE)
        seconds += max((slots * form.slot_bytes + 4 * rows) / speed, issue)
    return seconds


def decode_bytes(model: Model, form: Format, density: float) -> float:
    """Bytes of weights that one token reads: the matrices and the LM head."""
    matrices = sum(
        rows * columns * form.slots(density, columns) * form.slot_bytes + 4 * rows for rows, columns in model.matrices
    )
    return model.blocks * matrices + 2 * model.vocabulary * model.width


def main() -> None:
    """Print the check and the predictions."""
    llama, gaming = MODELS["Llama-2-7B"], GPUS["RTX 4090"]
    print("The model against published tokens a second (Llama-2-7B, RTX 4090, batch 1)")
    for density, measured in PUBLISHED.items():
        form = FORMATS["dense" if density == 1 else "MACKO"]
        found = 1 / decode_seconds(llama, gaming, form, density)
        print(f"  density {density:.1f}: measured {measured:6.1f}, model {found:6.1f} ({found / measured - 1:+.1%})")
    print("\nPREDICTED decode speed-up over dense float16, batch 1; nothing here was measured")
    for name, model in MODELS.items():
        for card, gpu in GPUS.items():
            dense = decode_seconds(model, gpu, FORMATS["dense"], 1.0)
            fits = "" if decode_bytes(model, FORMATS["dense"], 1.0) < gpu.memory else " (dense does not fit)"
            print(f"{name}, {card}{fits}")
            for encoding in ("g8", "csr-interleaved"):
                ratios = (dense / decode_seconds(model, gpu, FORMATS[encoding], 1 - s) for s in SPARSITIES)
                cells = "  ".join(f"{s:.0%} {ratio:.2f}x" for s, ratio in zip(SPARSITIES, ratios, strict=True))
                print(f"  {encoding:16s} {cells}")


if __name__ == "__main__":
    main()
