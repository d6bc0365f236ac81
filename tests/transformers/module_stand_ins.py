"""Models with the names and the protocols of those that come with their own code.

Their code is not in any package index. What is here is written from the contracts: outer and inner classes, masks,
cache protocol, arguments and results of the models that the contracts name, on a few random weights.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from tiny_models import SIZES, VOCABULARY
from torch import nn
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

SHAPE = {**SIZES, "num_hidden_layers": 2, "head_dim": 16}


def plain_attention(q: Any, k: Any, v: Any, mask: Any, *, causal: bool = False) -> torch.Tensor:
    """Softmax over all keys that a mask shows; ``(batch, tokens, heads, head_dim)``."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if mask is not None:
        hidden = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, hidden) if mask.dtype == torch.bool else scores + mask
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def rotated(x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate the first channels, as many as there are angles."""
    cosine, sine = (angle[:, None] for angle in angles)
    part, rest = x[..., : cosine.shape[-1]], x[..., cosine.shape[-1] :]
    first, second = part.chunk(2, dim=-1)
    return torch.cat((part * cosine + torch.cat((-second, first), dim=-1) * sine, rest), dim=-1)


def cached(cache: Any, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Keys and values of a layer, in every version of transformers; None if there are none."""
    if cache is None or cache.get_seq_length() == 0 or cache.get_seq_length(layer) == 0:
        return None
    if hasattr(cache, "layers"):
        return cache.layers[layer].keys, cache.layers[layer].values
    return cache.key_cache[layer], cache.value_cache[layer]


class OwnForward:
    """A forward pass that calls no attention function of transformers and stores KV only when told to."""

    save_flag, returns = "", 2

    def forward(
        self: Any,
        hidden_states: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_value: Any = None,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> Any:
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        q, k, v = (p(hidden_states).view(shape) for p in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        q, k = rotated(q, position_embeddings), rotated(k, position_embeddings)
        k, v = self.of_block(k, v, **kwargs)
        if past_key_value is not None and kwargs.get(self.save_flag):
            k, v = past_key_value.update(k, v, self.layer_idx)
        elif (held := cached(past_key_value, self.layer_idx)) is not None:
            k, v = (torch.cat(parts, dim=2) for parts in zip(held, (k, v), strict=True))
        out = plain_attention(q, k, v, self.mask(attention_mask), causal=kwargs.get("is_causal", False))
        out = self.o_proj(out.flatten(2))
        return out if self.returns == 1 else (out, *(None,) * (self.returns - 1))

    def of_block(self, k: Any, v: Any, **kwargs: Any) -> Any:
        return k, v

    def mask(self, attention_mask: Any) -> Any:
        return attention_mask


class SDARAttention(OwnForward, Qwen3Attention):
    save_flag = "store_kv"

    def mask(self, attention_mask: Any) -> Any:
        """A mask of all ones is decoding, without a mask; others are made bool, of three axes or four."""
        if attention_mask is None or bool(torch.all(attention_mask)):
            return None
        seen = attention_mask.bool()
        return seen[:, None] if seen.ndim == 3 else seen


class Fast_dLLM_QwenAttention(OwnForward, LlamaAttention):
    save_flag, returns = "update_past_key_values", 1

    def of_block(
        self, k: Any, v: Any, block_past_key_values: Any = None, replace_position: Any = None, **kwargs: Any
    ) -> Any:
        """Rows of the block that this pass does not compute keep what is stored of them."""
        if block_past_key_values is None:
            return k, v
        held = cached(block_past_key_values, self.layer_idx)
        if held is None:
            return block_past_key_values.update(k, v, self.layer_idx)
        for whole, part in zip(held, (k, v), strict=True):
            whole[:, :, replace_position : replace_position + part.shape[2]] = part
        return held


class DreamAttention(OwnForward, LlamaAttention):
    returns = 3

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.rotary_emb = LlamaRotaryEmbedding(config)

    def mask(self, attention_mask: Any) -> Any:
        return attention_mask if isinstance(attention_mask, torch.Tensor) else None


class LLaDAMoEAttention(OwnForward, Qwen3Attention):
    returns = 3


class LLaDA2MoeAttention(nn.Module):
    """One projection for queries, keys and values, norms of its own names, half of the channels rotated."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        heads = self.num_heads + 2 * self.num_key_value_heads
        self.query_key_value = nn.Linear(config.hidden_size, heads * self.head_dim, bias=False)
        self.query_layernorm, self.key_layernorm = (nn.RMSNorm(self.head_dim) for _ in range(2))
        self.dense = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_value: Any = None,
        output_attentions: bool = False,
        use_cache: bool = False,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> Any:
        heads = self.query_key_value(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split([self.num_heads, *[self.num_key_value_heads] * 2], dim=1)
        angles = tuple(angle[..., : self.head_dim // 2] for angle in position_embeddings)
        q, k = rotated(self.query_layernorm(q), angles), rotated(self.key_layernorm(k), angles)
        if past_key_value is not None:
            k, v = past_key_value.update(k, v, self.layer_idx)
        out = self.dense(plain_attention(q, k, v, attention_mask).flatten(2))
        return out, None, past_key_value


class HalfAngles(nn.Module):
    """Angles for half of the channels, as a partial rotary embedding makes them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.whole = LlamaRotaryEmbedding(config)

    def forward(self, x: Any, positions: Any) -> Any:
        return tuple(angle[..., : angle.shape[-1] // 2] for angle in self.whole(x, positions))


class Layer(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.self_attn = attention

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        out = self.self_attn(hidden_states=x, **kwargs)
        return x + (out[0] if isinstance(out, tuple) else out)


class Stack(nn.Module):
    """Layers of one kind of attention over tokens or rows, with rotary positions that go on behind the cache."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        config: Any = (LlamaConfig if issubclass(kind, LlamaAttention) else Qwen3Config)(**SHAPE)
        self.embed = nn.Embedding(VOCABULARY, SHAPE["hidden_size"])
        self.rotary = HalfAngles(config) if kind is LLaDA2MoeAttention else LlamaRotaryEmbedding(config)
        self.layers = nn.ModuleList(
            Layer(kind(config, layer))
            for layer in range(SHAPE["num_hidden_layers"])  # type: ignore[call-arg]
        )

    def forward(
        self,
        x: torch.Tensor,
        attention_mask: Any = None,
        past_key_values: Any = None,
        position_ids: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        x = x if x.is_floating_point() else self.embed(x)
        if position_ids is None:
            start = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(start, start + x.shape[1])[None]
        angles = self.rotary(x, position_ids)
        for layer in self.layers:
            x = layer(
                x,
                attention_mask=attention_mask,
                position_ids=position_ids,
                position_embeddings=angles,
                past_key_value=past_key_values,
                **kwargs,
            )
        return x


class CausalLM(nn.Module):
    """The outer class: logits, and the caches that the inner model was given."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.model = Stack(kind)
        self.lm_head = nn.Linear(SHAPE["hidden_size"], VOCABULARY, bias=False)

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
        hidden = self.model(input_ids, past_key_values=past_key_values, **kwargs)
        return SimpleNamespace(logits=self.lm_head(hidden), past_key_values=past_key_values)


class FastDLLM(CausalLM):
    """Makes its mask by itself: a block of ``bd_size`` tokens sees itself and the blocks before."""

    def __init__(self, bd_size: int = 8) -> None:
        super().__init__(Fast_dLLM_QwenAttention)
        self.bd_size = bd_size

    def forward(
        self,
        input_ids: torch.Tensor,
        past_key_values: Any = None,
        use_block_cache: bool = False,
        block_past_key_values: Any = None,
        replace_position: int | None = None,
        **kwargs: Any,
    ) -> Any:
        from transformers import DynamicCache

        before = 0 if past_key_values is None else past_key_values.get_seq_length()
        if past_key_values is None:
            past_key_values = DynamicCache()
        if use_block_cache and block_past_key_values is None:
            block_past_key_values = DynamicCache()
        start, rows, mask = before + (replace_position or 0), input_ids.shape[1], None
        if block_past_key_values is None or block_past_key_values.get_seq_length() == 0:
            places = torch.arange(before + rows) // self.bd_size
            mask = places[before:, None] >= places[None, :]  # two axes: rows and keys
        hidden = self.model(
            input_ids,
            attention_mask=mask,
            past_key_values=past_key_values,
            use_block_cache=use_block_cache,
            block_past_key_values=block_past_key_values,
            replace_position=replace_position,
            position_ids=torch.arange(start, start + rows)[None],
            **kwargs,
        )
        return SimpleNamespace(
            logits=self.lm_head(hidden), past_key_values=past_key_values, block_past_key_values=block_past_key_values
        )


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

    def attention(
        self, q: Any, k: Any, v: Any, attention_bias: Any = None, layer_past: Any = None, use_cache: bool = False
    ) -> tuple[torch.Tensor, None]:
        q, k, v = (x.view(*x.shape[:2], -1, 8).transpose(1, 2) for x in (q, k, v))
        q, k = self.rotary_emb(q, k)
        return self.attn_out(plain_attention(q, k, v, attention_bias).flatten(2)), None

    def forward(self, x: torch.Tensor, attention_bias: Any = None, **kwargs: Any) -> torch.Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        out, _ = self.attention(q, k, v, attention_bias=attention_bias, **kwargs)
        return x + out


class LLaDA(nn.Module):
    """Blocks within a ModuleDict, as LLaDA's are; padding becomes a bias that is added to scores."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.transformer = nn.ModuleDict({"blocks": nn.ModuleList(LLaDALlamaBlock(at) for at in range(2))})

    def forward(self, x: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> torch.Tensor:
        x, bias = x if x.is_floating_point() else self.embed(x), None
        if attention_mask is not None and (attention_mask == 0).any():
            seen = attention_mask.to(x.dtype).view(x.shape[0], 1, 1, -1)
            bias = (1.0 - seen) * torch.finfo(x.dtype).min
        for block in self.transformer["blocks"]:
            x = block(x, attention_bias=bias, **kwargs)
        return x


class LLaDAModelLM(nn.Module):
    """The outer class, which calls ``forward`` of the inner one and so passes its hooks by."""

    def __init__(self) -> None:
        super().__init__()
        self.model = LLaDA()
        self.ff_out = nn.Linear(32, VOCABULARY, bias=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> Any:
        hidden = self.model.forward(input_ids, attention_mask=attention_mask)
        return SimpleNamespace(logits=self.ff_out(hidden))
