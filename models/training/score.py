"""Score a weights file on held-out material: retrieval, bits per byte of English, a sample.

Runs on a CPU too, slowly: nothing is cached between passes (see `evaluate`).
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from evaluate import FIRST_SEED, decode, english_bits_per_byte
from layout import TILE
from safetensors import safe_open
from torch_model import PackedModel

from sparse_dlm_attn_small_model import retrieval
from sparse_dlm_attn_small_model.config import TinyConfig
from sparse_dlm_attn_small_model.records import text_before_stop


def load_model(path: Path) -> PackedModel:
    """Return the model in a weights file, in float32 and not compiled."""
    with safe_open(path, "pt") as file:
        config = TinyConfig.from_json(file.metadata()["config"])
        weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = {name: weight.to(device) for name, weight in weights.items()}
    return PackedModel(config, weights, compiled=False)


def without_facts(prompt: retrieval.Prompt) -> bytes:
    """Return the prompt's text with other digits in the facts the answer needs.

    A model that still gives the right answer did not read it in the facts.
    """
    text = bytearray(prompt.text)
    for start, end in prompt.facts:
        changed = re.sub(rb"\d", lambda digit: b"%d" % ((int(digit[0]) + 5) % 10), text[start:end])
        text[start:end] = changed
    return bytes(text)


def score_retrieval(model: PackedModel, task: str, length: int, count: int, *, damaged: bool) -> None:
    """Print the share of exact answers; where `damaged` facts hold other digits, it must be 0."""
    exact = 0
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        prompt = retrieval.make_prompt(task, length=length, seed=seed)
        blocks = retrieval.answer_blocks(prompt.answer, 16)
        row = -(-(length + 16 * blocks) // TILE) * TILE
        text = without_facts(prompt) if damaged else prompt.text
        output = decode(model, [text], blocks=blocks, block_length=16, row_tokens=row)[0]
        exact += text_before_stop(output)[0].decode("latin-1") == prompt.answer
    print(f"{task} at {length}{', facts changed' if damaged else ''}: {exact} of {count}", flush=True)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--english", action="store_true")
    arguments = parser.parse_args()
    with torch.no_grad():
        model = load_model(arguments.weights)
        for task in retrieval.TASKS if arguments.prompts else ():
            for damaged in (False, True):
                count = arguments.prompts
                score_retrieval(model, task, arguments.length, count, damaged=damaged)
        start = retrieval.haystack_text()[:1024]
        tail = decode(model, [start], blocks=16, block_length=16, row_tokens=1024 + 256)[0]
        print(f"continuation of {start[-100:]!r}:\n{tail!r}", flush=True)
        if arguments.english:
            row = 2 * arguments.length
            bits = english_bits_per_byte(model, row_tokens=row, length=arguments.length)
            print(f"bits per byte of the held-out chapters, upper bound: {bits:.3f}")


if __name__ == "__main__":
    main()
