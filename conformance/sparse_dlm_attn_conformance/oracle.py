"""Two independent computations of attention, both over explicit key sets and without a backend.

`softmax` in float64 is an oracle that shares nothing with the reference backend, so that the
reference can be put to the test as well. `simulate` computes the same in the precision that the
specification demands; its error is the yardstick of `sparse_dlm_attn_conformance.accuracy`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sparse_dlm_attn_conformance.cases import Arrays, Host, round_to
from sparse_dlm_attn_conformance.tables import HostState

COUNTS = math.exp(-80)
"""Least weight that no float32 computation takes for 0, in whatever order it adds up; NaN below may be dropped."""


@dataclass(frozen=True, eq=False)
class KeySet:
    """The keys of every query head and which of them each row reads; keys and values are 0 where none does."""

    keys: Host  # float64 (batch, q_heads, n, head_dim)
    values: Host
    allowed: Host  # bool (batch, q_heads, rows, n)

    def joined(self, other: KeySet) -> KeySet:
        """Return the union with a disjoint key set."""
        return KeySet(
            np.concatenate([self.keys, other.keys], axis=2),
            np.concatenate([self.values, other.values], axis=2),
            np.concatenate([self.allowed, other.allowed], axis=3),
        )


def context_keys(arrays: Arrays, pages: Host | None = None) -> KeySet:
    """Return the context's keys, with ``pages`` (see `Arrays.rows`) saying what each row reads."""
    rows = arrays.rows() if pages is None else pages
    size = arrays.page_size
    table = np.where(arrays.page_lengths > 0, arrays.page_table, 0)
    valid = np.arange(size) < arrays.page_lengths[:, :, None]
    batch, q_heads, tokens, count = rows.shape
    allowed = (rows[..., None] & valid[:, None, None]).reshape(batch, q_heads, tokens, count * size)
    read = np.asarray(allowed.any(axis=2))[..., None]

    def gathered(stored: Host) -> Host:
        shape = (batch, stored.shape[1], count * size, stored.shape[3])
        ordered = stored[table].swapaxes(1, 2).reshape(shape)
        return np.where(read, np.repeat(ordered, arrays.group, axis=1), 0.0)

    return KeySet(gathered(arrays.k_pages), gathered(arrays.v_pages), allowed)


def block_keys(arrays: Arrays) -> KeySet:
    """Return the block's keys, which every row reads."""
    keys, values = (np.repeat(part, arrays.group, axis=1) for part in (arrays.k, arrays.v))
    return KeySet(keys, values, np.ones((*arrays.q.shape[:3], arrays.k.shape[2]), dtype=bool))


def scale_of(arrays: Arrays) -> float:
    """Return the softmax scale of a problem, 1/sqrt(head_dim) by default (clause STATE-3)."""
    return 1.0 / math.sqrt(arrays.q.shape[3]) if arrays.scale is None else arrays.scale


def softmax(q: Host, keys: KeySet, scale: float) -> HostState:
    """Return the attention state of each row over its keys, in float64."""
    out, lse = _softmax(q, keys, scale, "float64", "float64")
    return HostState(out, lse)


def simulate(q: Host, keys: KeySet, scale: float, dtype: str) -> HostState:
    """Return the same in the precision that the specification demands for ``dtype``.

    Half precision: scores, exponentials and sums in float32; the weights are rounded to ``dtype``
    before they multiply V (as matrix units want them), and so is the result. float64 stays float64.
    """
    compute = "float64" if dtype == "float64" else "float32"
    out, lse = _softmax(q, keys, scale, compute, dtype)
    return HostState(round_to(out, dtype), lse)


def _softmax(q: Host, keys: KeySet, scale: float, compute: str, dtype: str) -> tuple[Host, Host]:
    rows, k, v = (part.astype(compute) for part in (q, keys.keys, keys.values))
    if k.shape[2] == 0:
        return np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    with np.errstate(all="ignore"):
        logits = np.where(keys.allowed, (rows @ k.swapaxes(2, 3)) * np.asarray(scale, compute), -np.inf)
        peak = logits.max(axis=3, keepdims=True)
        peak = np.where(peak == -np.inf, np.asarray(0.0, compute), peak)
        weights = np.where(keys.allowed, np.exp(logits - peak), np.asarray(0.0, compute))
        total = weights.sum(axis=3, keepdims=True)
        rounded = round_to(weights.astype(np.float64), dtype).astype(compute)
        out = (rounded @ v) / np.where(total == 0, 1, total)
        lse = np.where(total == 0, -np.inf, peak + np.log(np.where(total == 0, 1, total)))
    return out.astype(np.float64), lse[..., 0].astype(np.float64)


def weights(arrays: Arrays, keys: KeySet) -> Host:
    """Return the softmax weight of every key in every row, float64 ``(batch, q_heads, tokens, n)``."""
    logits = np.where(keys.allowed, scale_of(arrays) * np.einsum("bhtd,bhnd->bhtn", arrays.q, keys.keys), -np.inf)
    peak = logits.max(axis=3, keepdims=True, initial=-np.inf)
    parts = np.exp(logits - np.where(peak == -np.inf, 0.0, peak))
    total = parts.sum(axis=3, keepdims=True)
    return np.asarray(parts / np.where(total == 0, 1.0, total))


def page_mass(arrays: Arrays, span: int) -> Host:
    """Return the mean softmax mass of each page over each span, ``(batch, q_heads, spans, pages)``."""
    keys = context_keys(arrays, arrays.everyone())
    batch, q_heads, tokens, _ = arrays.q.shape
    spans = -(-tokens // span)
    if keys.keys.shape[2] == 0:
        return np.zeros((batch, q_heads, spans, arrays.page_lengths.shape[1]))
    mass = weights(arrays, keys)
    paged = mass.reshape(batch, q_heads, tokens, -1, arrays.page_size).sum(axis=4)
    return np.stack([paged[:, :, start : start + span].mean(axis=2) for start in range(0, tokens, span)], axis=2)
