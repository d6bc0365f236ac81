"""Held-out scores during and after training: retrieval by decoding, and bits per byte of English.

Decoding here recomputes the whole prompt in every pass, with the mask of block-wise decoding. That
gives exactly what a cache of the prefix gives, and reuses the training graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from layout import TILE, Layout, Rows, block_training_rows, decoding_rows, full_rows
from torch_model import PackedModel, rope_tables

from sparse_dlm_attn_small_model import retrieval
from sparse_dlm_attn_small_model.config import MASK_ID
from sparse_dlm_attn_small_model.records import text_before_stop

TOKENS_PER_PASS = 2
FIRST_SEED = 10_000


def make_layout(model: PackedModel, rows: Rows, device: torch.device) -> Layout:
    """Return `rows` as a layout on the device."""
    cos, sin = rope_tables(model.config, torch.from_numpy(rows.position).to(device))
    return Layout(rows, cos, sin, flex=model.compiled)


def decode(
    model: PackedModel,
    prompts: Sequence[bytes],
    *,
    blocks: int,
    block_length: int,
    row_tokens: int,
    full_sequence: bool = False,
) -> list[bytes]:
    """Decode answers to prompts of one length, a multiple of `block_length`: two tokens a pass, the surest first.

    A row has `row_tokens` tokens; `full_sequence` decodes all blocks at once over the whole sequence.
    """
    device = model.weights["head"].device
    start, new = len(prompts[0]), blocks * block_length
    padded = -(-(start + new) // TILE) * TILE
    count = row_tokens // padded
    lengths = [padded] * count + [TILE] * ((row_tokens - count * padded) // TILE)
    if full_sequence:
        rows, spans = full_rows(lengths, used=start + new), [(start, new)]
    else:
        rows = decoding_rows(lengths, block_length)
        spans = [(start + i * block_length, block_length) for i in range(blocks)]
    layout = make_layout(model, rows, device)
    outputs: list[bytes] = []
    for begin in range(0, len(prompts), count):
        group = prompts[begin : begin + count]
        row = torch.zeros(row_tokens, dtype=torch.long, device=device)
        table = row[: count * padded].view(count, padded)
        for index, prompt in enumerate(group):
            table[index, :start] = torch.frombuffer(bytearray(prompt), dtype=torch.uint8).to(device)
        table[:, start : start + new] = MASK_ID
        for span_start, span_length in spans:
            for _ in range(span_length // TOKENS_PER_PASS):
                hidden = model.hidden(row, layout).detach()[: count * padded]
                window = hidden.view(count, padded, -1)[:, span_start : span_start + span_length]
                _unmask(table[:, span_start : span_start + span_length], model.logits(window))
        answers = table[: len(group), start : start + new].to(torch.uint8).cpu()
        outputs += [bytes(answer.tolist()) for answer in answers]
    return outputs


def _unmask(window: torch.Tensor, logits: torch.Tensor) -> None:
    """Fill in the surest masked tokens of every row of `window`, in place."""
    confidence, best = logits.softmax(dim=-1).max(dim=-1)
    confidence = confidence.where(window == MASK_ID, -1.0)
    chosen = confidence.topk(TOKENS_PER_PASS, dim=-1).indices
    window.scatter_(1, chosen, best.gather(1, chosen))


def retrieval_score(
    model: PackedModel,
    task: str,
    length: int,
    *,
    count: int,
    row_tokens: int,
    block_length: int = 16,
    full_sequence: bool = False,
) -> float:
    """Return the share of held-out prompts answered exactly."""
    prompts = [
        retrieval.make_prompt(task, length=length, seed=FIRST_SEED + i, block_length=block_length) for i in range(count)
    ]
    outputs = decode(
        model,
        [prompt.text for prompt in prompts],
        blocks=max(retrieval.answer_blocks(prompt.answer, block_length) for prompt in prompts),
        block_length=block_length,
        row_tokens=row_tokens,
        full_sequence=full_sequence,
    )
    answers = [text_before_stop(output)[0].decode("latin-1") for output in outputs]
    exact = [answer == prompt.answer for answer, prompt in zip(answers, prompts, strict=True)]
    return sum(exact) / count


def english_bits_per_byte(model: PackedModel, *, row_tokens: int, length: int = 4096, block_length: int = 16) -> float:
    """Return an upper bound of the bits per byte of the held-out chapters.

    The bound is that of any-order decoding in blocks: in every block a uniformly drawn number of
    uniformly drawn tokens is masked, and the block counts with the mean loss of its masked tokens.
    """
    device = model.weights["head"].device
    half = row_tokens // 2
    lengths = [length] * (half // length)
    layout = make_layout(model, block_training_rows(lengths, block_length), device)
    text = torch.frombuffer(bytearray(retrieval.haystack_text()), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    batches = len(text) // half
    for index in range(batches):
        clean = text[index * half : (index + 1) * half].long()
        order = torch.rand(half // block_length, block_length, generator=generator).argsort(dim=1)
        number = torch.randint(1, block_length + 1, (len(order), 1), generator=generator)
        masked = order < number
        weights = (masked / number).flatten()
        inputs = torch.cat([torch.where(masked.flatten(), MASK_ID, clean), clean])
        targets = torch.cat([clean, clean])
        token_weights = torch.cat([weights, torch.zeros_like(weights)])
        loss, _ = model.loss(inputs.to(device), targets.to(device), token_weights.to(device), layout)
        total += float(loss.detach())
    return total / batches / math.log(2)
