"""Models under ``torch.compile``: what surrounds attention is compiled once for all layers, and nothing changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tiny_models import cache_name, causal_shape, new_cache, tokens

from sparse_dlm_attn_transformers import SparseAttention

VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
BLOCK, PREFIX = 8, 40
ON_5 = pytest.mark.skipif(VERSION < (5, 0), reason="older models break their graphs themselves")


def blocks(model: Any, forward: Any, policy: str) -> list[torch.Tensor]:
    """Encode a prompt and denoise two blocks; return all logits."""
    cache, found = new_cache(model), []
    with torch.no_grad(), SparseAttention(model, policy, "torch", page_size=4) as sparse:
        forward(tokens(1, PREFIX), use_cache=True, **{cache_name(model): cache})
        for number in range(2):
            with sparse.block():
                start = PREFIX + number * BLOCK
                for index in range(4):
                    sparse.next_pass(is_save=index == 3)
                    places = torch.arange(start, start + BLOCK)[None]
                    ids = tokens(1, BLOCK, seed=10 * number + index)
                    found.append(forward(ids, position_ids=places, **{cache_name(model): cache}).logits)
    return found


def compiled(model: Any, policy: str) -> tuple[list[torch.Tensor], int]:
    """Return the logits of a compiled model, and how many graphs it took."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = blocks(model, torch.compile(model, backend="eager"), policy)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    return found, graphs


@ON_5
def test_a_compiled_model_gives_the_same_by_as_many_graphs_for_any_number_of_layers() -> None:
    policy, counts = "losa:budget=16,active=2", []
    for layers in (3, 5):
        model = causal_shape("Qwen3", layers=layers)
        found, graphs = compiled(model, policy)
        counts.append(graphs)
        for one, other in zip(blocks(model, model, policy), found, strict=True):
            assert torch.equal(one, other)
    assert 0 < counts[0] == counts[1]
