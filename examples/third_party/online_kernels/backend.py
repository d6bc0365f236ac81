"""`online`: pages stream through an online softmax, as they do in a fused kernel."""

import math

import numpy as np

from sparse_dlm_attn import AttentionState, Backend, PageBounds
from sparse_dlm_attn.capabilities import Capabilities
from sparse_dlm_attn.values import softmax_scale


class OnlineBackend(Backend):
    """Four functions in NumPy and float32; everything else is inherited."""

    name = "online"
    capabilities = Capabilities(dtypes=("float32", "float16"), deterministic=True)

    def asarray(self, values, *, dtype=None):
        return np.asarray(values, dtype=dtype)

    def page_bounds(self, context):
        shape = (context.batch, context.kv_heads, context.pages, context.head_dim)
        lower, upper = np.zeros((2, *shape), context.k_pages.dtype)
        for b, page in np.argwhere(context.page_lengths > 0):
            keys = context.k_pages[context.page_table[b, page], :, : context.page_lengths[b, page]]
            lower[b, :, page], upper[b, :, page] = keys.min(axis=1), keys.max(axis=1)
        return PageBounds(lower, upper)

    def page_scores(self, q, bounds, *, active=None):  # every row: inactive ones may hold anything
        group = q.shape[1] // bounds.lower.shape[1]
        rows = q.astype(np.float32)
        lower, upper = (np.repeat(b.astype(np.float32), group, axis=1) for b in (bounds.lower, bounds.upper))
        # sum_c max(q lower, q upper) as two matrix products, because lower <= upper
        return np.maximum(rows, 0) @ upper.swapaxes(2, 3) + np.minimum(rows, 0) @ lower.swapaxes(2, 3)

    def attend_pages(self, q, context, selection, active, *, scale=None):
        state = Online(q, scale)
        group = q.shape[1] // context.kv_heads
        rows = selection.for_rows(q.shape[1], q.shape[2]) & active[:, None, :, None]
        for b, h in np.ndindex(*q.shape[:2]):
            for page in np.flatnonzero(rows[b, h].any(axis=0) & (context.page_lengths[b] > 0)):
                where, length = context.page_table[b, page], context.page_lengths[b, page]
                k, v = (p[where, h // group, :length] for p in (context.k_pages, context.v_pages))
                state.add((b, h, np.flatnonzero(rows[b, h, :, page])), k, v)
        return state.finish()

    def attend_block(self, q, k, v, *, scale=None):
        state, group = Online(q, scale), q.shape[1] // k.shape[1]
        for b, h in np.ndindex(*q.shape[:2]):
            state.add((b, h, np.arange(q.shape[2])), k[b, h // group], v[b, h // group])
        return state.finish()


class Online:
    """Running peak, sum and mix of every row."""

    def __init__(self, q, scale):
        self.q, self.scale = q, np.float32(softmax_scale(q.shape[3], scale))
        self.peak, self.total = np.full(q.shape[:3], -np.inf, np.float32), np.zeros(q.shape[:3], np.float32)
        self.mixed = np.zeros(q.shape, np.float32)

    def add(self, rows, k, v):
        if len(k) == 0:
            return
        logits = self.scale * (self.q[rows].astype(np.float32) @ k.astype(np.float32).T)
        peak = np.maximum(self.peak[rows], logits.max(axis=1))
        # the peak of a row without keys, or with keys that score -inf, is -inf: -inf - -inf is never computed
        shift = np.where(peak == -math.inf, np.float32(0), peak)
        keep, weights = np.exp(self.peak[rows] - shift), np.exp(logits - shift[:, None])
        self.total[rows] = keep * self.total[rows] + weights.sum(axis=1)
        self.mixed[rows] = keep[:, None] * self.mixed[rows] + weights @ v.astype(np.float32)
        self.peak[rows] = peak

    def finish(self):
        empty = self.total == 0
        total = np.where(empty, np.float32(1), self.total)
        lse = np.where(empty, np.float32(-np.inf), np.where(empty, 0, self.peak) + np.log(total))
        return AttentionState((self.mixed / total[..., None]).astype(self.q.dtype), lse.astype(np.float32))
