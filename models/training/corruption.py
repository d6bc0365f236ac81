"""Mask tokens for training, on the device, for a whole row at once."""

from __future__ import annotations

import torch
from data import ANSWER, FILL, LAST_ANSWER, STATEMENT, Batch
from layout import Layout

from sparse_dlm_attn_small_model.config import MASK_ID

MIN_RATE = 0.05
STATEMENT_WEIGHT = 0.1
FILL_WEIGHT = 0.2


def byte_weights(kinds: torch.Tensor, answer_weight: float) -> torch.Tensor:
    """Return each byte's weight in the loss."""
    # New names and codes cannot be guessed: their loss is noise, so they weigh little.
    table = torch.ones(4, device=kinds.device)
    table[STATEMENT], table[ANSWER], table[FILL] = STATEMENT_WEIGHT, answer_weight, FILL_WEIGHT
    return table[(kinds % LAST_ANSWER).long()]


def mask_blocks(position: torch.Tensor, block: torch.Tensor, blocks: int, block_length: int) -> torch.Tensor:
    """Draw masked tokens block by block.

    In 60 % of the blocks every token is masked at the block's own rate, drawn from 0.05..1; in
    25 % all tokens from a random place on are masked (a decoded name, then an unknown code); 15 %
    are masked wholly, as at the start of decoding.
    """
    device = position.device
    rate = MIN_RATE + (1 - MIN_RATE) * torch.rand(blocks, device=device)
    style = torch.rand(blocks, device=device)
    cut = (torch.rand(blocks, device=device) * block_length).floor()
    noise = torch.rand(len(position), device=device)
    scattered = noise < rate[block]
    suffix = position % block_length >= cut[block]
    drawn = style[block]
    return torch.where(drawn < 0.6, scattered, torch.where(drawn < 0.85, suffix, drawn >= 0.85))


def mask_sequences(kinds: torch.Tensor, sequence: torch.Tensor, sequences: int) -> torch.Tensor:
    """Draw masked tokens for full-sequence training.

    The blocks of the last answer are masked wholly in half of the sequences, otherwise at a rate
    drawn from 0.05..1; elsewhere nothing in half of the sequences, otherwise up to 30 %.
    """
    device = kinds.device
    draws = torch.rand(4, sequences, device=device)
    end_rate = torch.where(draws[0] < 0.5, 1.0, MIN_RATE + (1 - MIN_RATE) * draws[1])
    rate = torch.where(draws[2] < 0.5, 0.0, 0.3 * draws[3])
    noise = torch.rand(len(kinds), device=device)
    chosen = torch.where(kinds >= LAST_ANSWER, end_rate[sequence], rate[sequence])
    return noise < chosen


def corrupt(
    batch: Batch, tokens: torch.Tensor, kinds: torch.Tensor, layout: Layout, answer_weight: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a row's input tokens, targets and weights (all per token of the row)."""
    tokens = tokens.long()
    weights = byte_weights(kinds, answer_weight)
    block = layout.block[: len(tokens)].long()
    if batch.full_sequence:
        masked = mask_sequences(kinds, block, layout.blocks)
        return torch.where(masked, MASK_ID, tokens), tokens, weights * masked
    position = layout.position[: len(tokens)]
    masked = mask_blocks(position, block, layout.blocks, batch.block_length)
    noisy = torch.where(masked, MASK_ID, tokens)
    inputs = torch.cat([noisy, tokens])
    return inputs, torch.cat([tokens, tokens]), torch.cat([weights * masked, torch.zeros_like(weights)])
