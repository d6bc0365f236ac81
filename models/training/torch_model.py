"""The model in PyTorch: the maths of its forward pass, and the packed form that training uses.

The maths, for one sequence of tokens at positions ``0, 1, 2, ...`` (weights in parentheses; every
matrix is stored ``(out, in)`` and applied as ``x @ matrix.T``; nothing has a bias)::

    x = (embedding)[token]                                      257 rows, row 256 is the mask token
    for each layer:
        h = rms_norm(x, (attention_norm))
        q = rope(rms_norm(split(h @ (query).T), (query_norm)))  4 heads of 64; norm over each head's
        k = rope(rms_norm(split(h @ (key).T), (key_norm)))      2 heads    64 channels, before RoPE
        v = split(h @ (value).T)                                2 heads
        x = x + join(attention(q, k, v)) @ (output).T
        h = rms_norm(x, (mlp_norm))
        x = x + (silu(h @ (gate).T) * (h @ (up).T)) @ (down).T
    logits = rms_norm(x, (final_norm)) @ (head).T               256 columns: the mask is no output

* ``rms_norm(x, gain) = x / sqrt(mean(x ** 2) + 1e-6) * gain`` over the last axis.
* ``split``: channel ``head * 64 + c`` of the projection is channel ``c`` of that head; ``join`` is
  its inverse. Query head ``h`` reads KV head ``h // 2``.
* ``rope`` turns channel pairs ``(c, c + 32)`` for ``c`` in 0..31 ("rotate half", as in GPT-NeoX and
  LLaMA in Hugging Face) by the angle ``position * theta ** (-c / 32)``, theta = 1e5:
  ``out[c] = x[c] cos - x[c + 32] sin`` and ``out[c + 32] = x[c + 32] cos + x[c] sin``.
* Attention: softmax of ``q . k / sqrt(64)``. Which keys a token sees:
  block-wise decoding: all tokens of earlier blocks and of its own block (block-causal, both ways
  inside the block); keys and values of finished blocks come from a pass over their final tokens.
  Full-sequence decoding: all tokens.

Training packs many sequences into one row of tokens and expresses who sees whom by a `Layout`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from layout import Layout
from torch.nn.attention.flex_attention import flex_attention

from sparse_dlm_attn_small_model.config import TinyConfig, weight_shapes

Weights = dict[str, torch.Tensor]
LAYER_WEIGHTS = [
    *("attention_norm", "query", "key", "value", "query_norm", "key_norm", "output"),
    *("mlp_norm", "gate", "up", "down"),
]
QK_GAIN_AT_START = 1.25


def initial_weights(config: TinyConfig, seed: int) -> Weights:
    """Return random float32 weights; what writes to the residual stream starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}
    for name, shape in weight_shapes(config).items():
        kind = name.split(".")[-1]
        if len(shape) == 1:
            # A larger gain lets attention become sharp over long contexts sooner.
            gain = QK_GAIN_AT_START if kind in ("query_norm", "key_norm") else 1.0
            weights[name] = torch.full(shape, gain)
        elif kind in ("output", "down"):
            weights[name] = torch.zeros(shape)
        else:
            scale = {"embedding": 0.1, "head": 0.02}.get(kind, 0.6 / math.sqrt(shape[-1]))
            weights[name] = torch.randn(shape, generator=generator) * scale
    return weights


def rms_norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise the last axis to mean square one, in float32, and scale by `gain`."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * gain).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply RoPE to ``(1, heads, tokens, head_dim)``; `cos` and `sin` are ``(tokens, head_dim / 2)``."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)


def rope_tables(config: TinyConfig, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine of every position's angles, float32 ``(tokens, head_dim / 2)``."""
    half = config.head_dim // 2
    channel = torch.arange(half, device=positions.device, dtype=torch.float64)
    frequency = config.rope_theta ** (-channel / half)
    angle = positions.double()[:, None] * frequency[None, :]
    return angle.cos().float(), angle.sin().float()


def attend_dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Attention with an explicit mask: slow, plain, for the CPU and for checks."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=layout.dense_mask(), enable_gqa=True)


def attend_flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_mask: object) -> torch.Tensor:
    """Attention by FlexAttention, for compiled code on a GPU."""
    # Inductor's CPU kernel reads strided q, k, v wrongly (torch 2.13), so none are passed anywhere.
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True)


def layer_forward(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    mask: object,
    attend: Callable[..., torch.Tensor],
    config: TinyConfig,
) -> torch.Tensor:
    """Return a packed row ``(tokens, width)`` after a layer, whose `weights` are in the order of `LAYER_WEIGHTS`."""
    attention_norm, query, key, value, query_norm, key_norm, output, mlp_norm, gate, up, down = weights
    tokens, dim, eps, dtype = x.shape[0], config.head_dim, config.norm_eps, x.dtype

    def heads(projected: torch.Tensor) -> torch.Tensor:
        return projected.view(tokens, -1, dim).transpose(0, 1)[None]

    h = rms_norm(x, attention_norm, eps)
    sizes = [query.shape[0], key.shape[0], value.shape[0]]
    q, k, v = (h @ torch.cat([query, key, value]).to(dtype).T).split(sizes, dim=-1)
    q = rotate(rms_norm(heads(q), query_norm, eps), cos, sin)
    k = rotate(rms_norm(heads(k), key_norm, eps), cos, sin)
    mixed = attend(q, k, heads(v), mask)
    x = x + mixed[0].transpose(0, 1).reshape(tokens, -1) @ output.to(dtype).T
    h = rms_norm(x, mlp_norm, eps)
    return x + (F.silu(h @ gate.to(dtype).T) * (h @ up.to(dtype).T)) @ down.to(dtype).T


def weighted_loss(
    x: torch.Tensor,
    final_norm: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    token_weights: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean cross-entropy, weighted (0 where not masked), and that of every token (detached)."""
    logits = rms_norm(x, final_norm, eps) @ head.to(x.dtype).T
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    mean = (losses * token_weights).sum() / token_weights.sum().clamp_min(1.0)
    return mean, losses.detach()


class PackedModel:
    """The model over packed rows; compiled with FlexAttention on a GPU, plain on a CPU."""

    def __init__(
        self,
        config: TinyConfig,
        weights: Mapping[str, torch.Tensor],
        *,
        compiled: bool,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config, self.weights = config, dict(weights)
        self.compiled, self.dtype = compiled, dtype
        self._layer = torch.compile(layer_forward, dynamic=False) if compiled else layer_forward
        self._loss = torch.compile(weighted_loss, dynamic=False) if compiled else weighted_loss
        self._attend = attend_flex if compiled else attend_dense

    def hidden(self, tokens: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Return the residual stream after the last layer, ``(tokens, width)``."""
        x = F.embedding(tokens.long(), self.weights["embedding"]).to(self.dtype)
        mask = layout.block_mask if self.compiled else layout
        for index in range(self.config.layers):
            layer = [self.weights[f"layers.{index}.{name}"] for name in LAYER_WEIGHTS]
            x = self._layer(x, layer, layout.cos, layout.sin, mask, self._attend, self.config)
        return x

    def loss(
        self, tokens: torch.Tensor, targets: torch.Tensor, token_weights: torch.Tensor, layout: Layout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `weighted_loss` returns for these input tokens."""
        x = self.hidden(tokens, layout)
        weights, eps = self.weights, self.config.norm_eps
        return self._loss(x, weights["final_norm"], weights["head"], targets, token_weights, eps)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return float32 logits of some rows of `hidden`'s result."""
        weights = self.weights
        normed = rms_norm(x.float(), weights["final_norm"], self.config.norm_eps)
        return normed @ weights["head"].T
