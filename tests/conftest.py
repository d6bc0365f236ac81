"""What tests of several folders share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Triton decides when it is imported whether it interprets kernels, and many libraries import it. Without a
# GPU it can do nothing else here.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest


@pytest.fixture
def toy_layer() -> Callable[..., Any]:
    """Return a maker of a layer of a diffusion language model, of which attention is the only part."""
    torch = pytest.importorskip("torch", reason="the layer is a torch.nn.Module")
    from sparse_dlm_attn import PrefixAttention

    class ToyLayer(torch.nn.Module):
        def __init__(self, policy: Any, backend: Any, dim: int, heads: int, kv_heads: int, head_dim: int):
            super().__init__()
            self.head_dim = head_dim
            sizes = (heads, kv_heads, kv_heads)
            self.rows = torch.nn.ModuleList(torch.nn.Linear(dim, n * head_dim, bias=False) for n in sizes)
            self.last = torch.nn.Linear(heads * head_dim, dim, bias=False)
            self.attention = PrefixAttention(policy, backend)

        def forward(self, x: Any, context: Any, memory: Any, info: Any) -> Any:
            batch, tokens, _ = x.shape
            q, k, v = (rows(x).view(batch, tokens, -1, self.head_dim).transpose(1, 2) for rows in self.rows)
            out, memory = self.attention(q, k, v, context, memory, info)
            return self.last(out.transpose(1, 2).reshape(batch, tokens, -1)), memory

    def make(policy: Any, backend: Any, *, dim: int = 64, heads: int = 4, kv_heads: int = 2, head_dim: int = 16) -> Any:
        torch.manual_seed(0)
        return ToyLayer(policy, backend, dim, heads, kv_heads, head_dim).requires_grad_(False)

    return make
