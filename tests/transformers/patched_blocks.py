"""A prefix in a cache and a block behind it, for models whose modules are patched."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import cache_name, new_cache, tokens

BLOCK, PREFIX = 8, 40


def block_causal(length: int, dtype: torch.dtype) -> torch.Tensor:
    """An additive mask: every token sees its own block and the blocks before."""
    blocks = torch.arange(length) // BLOCK
    hidden = blocks[:, None] < blocks[None, :]
    return torch.zeros(length, length, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)[None, None]


def one_pass(model: Any, batch: int = 1) -> torch.Tensor:
    """Logits of the last block of one dense pass over everything, block-causal."""
    with torch.no_grad():
        mask = block_causal(PREFIX + BLOCK, model.dtype)
        logits: torch.Tensor = model(tokens(batch, PREFIX + BLOCK), attention_mask=mask).logits
    return logits[:, PREFIX:]


def prefilled(model: Any, batch: int = 1) -> dict[str, Any]:
    """The cache of the prefix, as an argument for the model's forward pass."""
    cache = {cache_name(model): new_cache(model)}
    with torch.no_grad():
        prefix = tokens(batch, PREFIX + BLOCK)[:, :PREFIX]
        model(prefix, attention_mask=block_causal(PREFIX, model.dtype), **cache)
    return cache


def held(cache: dict[str, Any]) -> Any:
    return next(iter(cache.values()))


def random_stack(kind: Any, *arguments: Any) -> Any:
    torch.manual_seed(0)
    stack = kind(*arguments).eval()
    for parameter in stack.parameters():
        parameter.data = torch.randn_like(parameter) * 0.4
    return stack


def rows(count: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(1, count, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stand_ins_cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()
