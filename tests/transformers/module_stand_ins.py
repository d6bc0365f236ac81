"""Attention modules with the names and the protocols of models that come with their own code.

Their code is not in any registry. What is here is written from the contract: the shapes of Qwen3 and Llama,
with the arguments, the cache protocol and the results of the models that the contracts name.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

SHAPE = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 512,
}


def plain_attention(q: Any, k: Any, v: Any, mask: Any) -> torch.Tensor:
    """Softmax over all keys that a bool mask shows; ``(batch, tokens, heads, head_dim)``."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def rotated(x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    cosine, sine = (angle[:, None] for angle in angles)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


class OwnForward:
    """A forward pass that calls no attention function of transformers and stores KV only when told to."""

    save_flag, returns = "", 2

    def forward(self: Any, hidden_states: Any, attention_mask: Any = None, position_ids: Any = None,
                past_key_value: Any = None, position_embeddings: Any = None, **kwargs: Any) -> Any:
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        q, k, v = (p(hidden_states).view(shape) for p in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        q, k = rotated(q, position_embeddings), rotated(k, position_embeddings)
        if past_key_value is not None and kwargs.get(self.save_flag):
            k, v = past_key_value.update(k, v, self.layer_idx)
        elif past_key_value is not None and len(past_key_value.layers) > self.layer_idx:
            layer = past_key_value.layers[self.layer_idx]
            k, v = torch.cat([layer.keys, k], dim=2), torch.cat([layer.values, v], dim=2)
        out = self.o_proj(plain_attention(q, k, v, attention_mask).flatten(2))
        return out if self.returns == 1 else (out, *(None,) * (self.returns - 1))


class SDARAttention(OwnForward, Qwen3Attention):
    save_flag = "store_kv"


class Fast_dLLM_QwenAttention(OwnForward, LlamaAttention):
    save_flag, returns = "update_past_key_values", 1


class DreamAttention(OwnForward, LlamaAttention):
    returns = 3

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.rotary_emb = LlamaRotaryEmbedding(config)


class Layer(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.self_attn = attention

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        out = self.self_attn(hidden_states=x, **kwargs)
        return x + (out[0] if isinstance(out, tuple) else out)


class Stack(nn.Module):
    """Layers of one kind of attention, with rotary positions that go on behind the cache."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        config: Any = (Qwen3Config if issubclass(kind, Qwen3Attention) else LlamaConfig)(**SHAPE)
        self.rotary = LlamaRotaryEmbedding(config)
        self.layers = nn.ModuleList(
            Layer(kind(config, layer)) for layer in range(SHAPE["num_hidden_layers"])  # type: ignore[call-arg]
        )

    def forward(
        self, x: torch.Tensor, attention_mask: Any = None, past_key_values: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        start = 0 if past_key_values is None else past_key_values.get_seq_length()
        positions = torch.arange(start, start + x.shape[1])[None]
        angles = self.rotary(x, positions)
        for layer in self.layers:
            x = layer(
                x, attention_mask=attention_mask, position_ids=positions, position_embeddings=angles,
                past_key_value=past_key_values, **kwargs,
            )
        return x


class Turn(nn.Module):
    """Rotary positions from 0 on, of queries and keys together."""

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = q.shape[-1] // 2
        rates = 1.0 / 10_000.0 ** (torch.arange(half, dtype=q.dtype) / half)
        angles = (torch.arange(q.shape[2], dtype=q.dtype)[:, None] * rates).repeat(1, 2)[None]
        table = (angles.cos(), angles.sin())
        return rotated(q, table), rotated(k, table)


class LLaDALlamaBlock(nn.Module):
    """A block that projects first and calls ``attention(q, k, v, ...)``, as LLaDA's do."""

    def __init__(self, layer_id: int) -> None:
        super().__init__()
        self.layer_id, self.config = layer_id, SimpleNamespace(n_heads=4, rope=True)
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)
        self.attn_out, self.rotary_emb = nn.Linear(32, 32), Turn()

    def attention(self, q: Any, k: Any, v: Any, attention_bias: Any = None, layer_past: Any = None,
                  use_cache: bool = False) -> tuple[torch.Tensor, None]:
        q, k, v = (x.view(*x.shape[:2], -1, 8).transpose(1, 2) for x in (q, k, v))
        q, k = self.rotary_emb(q, k)
        return self.attn_out(plain_attention(q, k, v, None).flatten(2)), None

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        out, _ = self.attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), None, **kwargs)
        return x + out


class LLaDA(nn.Module):
    """Blocks within a ModuleDict, as LLaDA's are."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict({"blocks": nn.ModuleList(LLaDALlamaBlock(at) for at in range(2))})

    def forward(self, x: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> torch.Tensor:
        for block in self.transformer["blocks"]:
            x = block(x, **kwargs)
        return x
