"""The parts of a transformer layer outside attention, written once on the Python array API.

Every array is float32. Matrices are ``(out, in)`` and applied as ``x @ matrix.T``; nothing has a bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sparse_dlm_attn.arrays import Array, is_host, namespace
from sparse_dlm_attn.backend import Backend
from sparse_dlm_attn_small_model.config import TinyConfig
from sparse_dlm_attn_small_model.weights import Weights


def rms_norm(x: Array, gain: Array, eps: float) -> Array:
    """Scale the last axis to mean square one, then by ``gain`` of shape ``(channels,)``."""
    xp = namespace(x)
    return x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + eps) * gain


def rope_tables(config: TinyConfig, start: int, count: int, backend: Backend) -> tuple[Array, Array]:
    """Return cosine and sine at positions ``start..start+count-1``, float32 ``(count, head_dim / 2)`` each.

    They are rounded from float64 angles.
    """
    half = config.head_dim // 2
    frequency = float(config.rope_theta) ** (-np.arange(half) / half)
    angle = np.arange(start, start + count, dtype=np.float64)[:, None] * frequency
    cosine, sine = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    return backend.asarray(cosine, dtype="float32"), backend.asarray(sine, dtype="float32")


def rotate(x: Array, cosine: Array, sine: Array) -> Array:
    """Apply rotary positions to ``(batch, heads, tokens, head_dim)``: channel pairs ``(c, c + dim / 2)``."""
    xp = namespace(x)
    half = int(x.shape[-1]) // 2
    first, second = x[..., :half], x[..., half:]
    return xp.concat([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def silu(x: Array) -> Array:
    """Return ``x * sigmoid(x)``; by tanh, which cannot overflow."""
    xp = namespace(x)
    half = x * 0.5
    return half * xp.tanh(half) + half


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer's weights; matrices that share an input are stacked, so that one product does."""

    config: TinyConfig
    attention_norm: Array
    query_norm: Array
    key_norm: Array
    mlp_norm: Array
    query_key_value: Array  # ((query_heads + 2 * kv_heads) * head_dim, width)
    output: Array  # (width, query_heads * head_dim)
    gate_up: Array  # (2 * hidden, width)
    down: Array  # (width, hidden)

    @classmethod
    def of(cls, config: TinyConfig, weights: Weights, index: int, backend: Backend) -> Layer:
        """Take layer ``index`` out of the weights and put it on the backend's device."""

        def stacked(*names: str) -> Any:
            parts = [weights[f"layers.{index}.{name}"] for name in names]
            return backend.asarray(np.concatenate(parts), dtype="float32")

        names = ("attention_norm", "query_norm", "key_norm", "mlp_norm", "output", "down")
        return cls(
            config=config,
            query_key_value=stacked("query", "key", "value"),
            gate_up=stacked("gate", "up"),
            **{name: stacked(name) for name in names},
        )

    def project(self, x: Array, cosine: Array, sine: Array) -> tuple[Array, Array, Array]:
        """Return queries, keys and values, normalised and rotated: ``(batch, heads, tokens, head_dim)``.

        ``x`` is the residual stream, ``(batch * tokens, width)``; ``cosine`` and ``sine`` are the
        `rope_tables` of one sequence's tokens.
        """
        config, eps = self.config, self.config.norm_eps
        xp = namespace(x)
        joint = rms_norm(x, self.attention_norm, eps) @ xp.matrix_transpose(self.query_key_value)
        tokens = int(cosine.shape[0])
        heads = config.query_heads + 2 * config.kv_heads
        joint = xp.reshape(joint, (int(x.shape[0]) // tokens, tokens, heads, config.head_dim))
        joint = xp.permute_dims(joint, (0, 2, 1, 3))
        keys, values = config.query_heads, config.query_heads + config.kv_heads
        q = rotate(rms_norm(joint[:, :keys, ...], self.query_norm, eps), cosine, sine)
        k = rotate(rms_norm(joint[:, keys:values, ...], self.key_norm, eps), cosine, sine)
        # A copy of its own: backends want the last axes of v laid out like those of q and k.
        return q, k, joint[:, values:, ...] * 1.0

    def finish(self, x: Array, attended: Array) -> Array:
        """Add attention output ``(batch, query_heads, tokens, head_dim)`` and feed-forward part to ``x``."""
        xp = namespace(x)
        joined = xp.reshape(xp.permute_dims(attended, (0, 2, 1, 3)), (int(x.shape[0]), -1))
        x = x + joined @ xp.matrix_transpose(self.output)
        hidden = rms_norm(x, self.mlp_norm, self.config.norm_eps) @ xp.matrix_transpose(self.gate_up)
        gate, up = hidden[:, : self.config.hidden], hidden[:, self.config.hidden :]
        return x + (silu(gate) * up) @ xp.matrix_transpose(self.down)


def block_causal_mask(rows: int, keys: int, block_length: int, backend: Backend) -> Array:
    """Return what to add to the scores of the last ``rows`` of ``keys`` tokens: 0, or -inf for later blocks.

    The last ``r`` rows and ``n`` columns of it are the mask of ``r`` rows and ``n`` keys, for whole blocks.
    """
    mask = np.zeros((rows, keys), dtype=np.float32)
    block = np.arange(rows) // block_length
    mask[:, keys - rows :][block[None, :] > block[:, None]] = -np.inf
    return backend.asarray(mask, dtype="float32")


def block_causal_attention(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Attend from the last rows of a prompt to everything up to and including their own block.

    ``q`` is ``(1, query_heads, rows, head_dim)``, ``k`` and ``v`` are ``(1, kv_heads, keys, head_dim)``,
    ``mask`` is that of `block_causal_mask`. This is the prompt's dense part, which no policy decides about.
    On a processor it is left to the array library, if that has an operator for it. Else one KV head at a
    time: its score matrix ``(group * rows, keys)`` is all the memory it takes.
    """
    fused = _fused_attention(q)
    if fused is not None:
        return fused(q, k, v, attn_mask=mask, enable_gqa=True)
    xp = namespace(q)
    _, query_heads, rows, head_dim = (int(size) for size in q.shape)
    kv_heads, keys = int(k.shape[1]), int(k.shape[2])
    group = query_heads // kv_heads
    bias = xp.concat([mask[:, keys - rows :]] * group, axis=0)
    outputs = []
    for head in range(kv_heads):
        queries = q[0, head * group : (head + 1) * group, ...] * (1.0 / head_dim**0.5)
        scores = xp.reshape(queries, (group * rows, head_dim)) @ xp.matrix_transpose(k[0, head, ...])
        scores[:, keys - rows :] += bias
        scores -= xp.max(scores, axis=-1, keepdims=True)
        weights = xp.exp(scores)
        out = (weights @ v[0, head, ...]) / xp.sum(weights, axis=-1, keepdims=True)
        outputs.append(xp.reshape(out, (1, group, rows, head_dim)))
    return xp.concat(outputs, axis=1)


def _fused_attention(q: Array) -> Any:
    """Return the array library's scaled dot product attention for tensors like ``q``, None if it has none.

    PyTorch's is faster on a processor. On a GPU it may round float32 products, so it is not used.
    """
    functional = getattr(getattr(namespace(q), "nn", None), "functional", None)
    return getattr(functional, "scaled_dot_product_attention", None) if is_host(q) else None
