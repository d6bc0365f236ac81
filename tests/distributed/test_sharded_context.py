"""A sharded context cut at a page, in one process."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="shards are PyTorch tensors")

from sparse_dlm_attn import Context  # noqa: E402
from sparse_dlm_attn_distributed import ShardedContext  # noqa: E402


def test_the_rest_of_a_context_knows_which_of_its_pages_are_here() -> None:
    cache = torch.randn(2, 1, 2, 64, 8)
    whole = Context.from_dense(cache[0], cache[1], 16)
    held = torch.tensor([[True, False, True, False]])
    rest = ShardedContext.of(whole, held).pages_from(1)
    assert isinstance(rest, ShardedContext)
    assert rest.held.tolist() == [[False, True, False]]
    assert rest.local.tokens.tolist() == [16]
    assert torch.equal(rest.k_pages[rest.page_table[0, 1]], cache[0, 0, :, 32:48])
