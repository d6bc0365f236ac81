"""`newest-and-best`: every row reads the newest page and the page that promises most."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

from sparse_dlm_attn import PrefixAttentionPolicy, Selection
from sparse_dlm_attn.policy import check_count


@dataclass(frozen=True)
class NewestAndBest(PrefixAttentionPolicy[None]):
    """Read the last page that exists and, per query head and row, the ``best`` others by bound."""

    name = "newest-and-best"

    best: int = field(default=1, metadata={"help": "Pages beside the newest one, at least 0."})

    def __post_init__(self):
        check_count("best", self.best)

    def select_pages(self, inputs, active):
        xp, ops, exists = inputs.xp, inputs.ops, inputs.context.exists
        counted = xp.cumulative_sum(xp.astype(exists, xp.int32), axis=-1)
        newest = (exists & (counted == counted[:, -1:]))[:, None, None, :]
        scores = ops.page_scores(inputs.q, ops.page_bounds(inputs.context))
        best = ops.top_pages(scores, self.best, eligible=exists[:, None, None, :] & ~newest)
        return Selection(best | newest, 1)

    def stated_rule(self, episode):
        """Say for the conformance suite what the docstring promises, in plain NumPy."""
        return SimpleNamespace(step=self._step)

    def _step(self, now):
        arrays, bounds = now.arrays, now.arrays.bounds()
        lower, upper = (np.repeat(b, arrays.group, axis=1) for b in (bounds.lower, bounds.upper))
        pages = np.zeros((*arrays.q.shape[:3], arrays.page_lengths.shape[1]), bool)
        for b, h, row in np.ndindex(*arrays.q.shape[:3]):
            if not arrays.page_lengths[b].any():
                continue
            *others, last = np.flatnonzero(arrays.page_lengths[b]).tolist()
            q = arrays.q[b, h, row]
            scores = {page: np.maximum(q * lower[b, h, page], q * upper[b, h, page]).sum() for page in others}
            chosen = sorted(others, key=lambda page: (-scores[page], page))[: self.best]
            pages[b, h, row, [last, *chosen]] = True
        return SimpleNamespace(active=np.ones((arrays.q.shape[0], arrays.q.shape[2]), bool), pages=pages)
