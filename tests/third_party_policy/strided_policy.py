"""`strided`: every n-th page, read afresh in every m-th pass only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from sparse_dlm_attn import Array, PassInputs, PrefixAttentionPolicy, Selection
from sparse_dlm_attn.policy import check_count, either


@dataclass(frozen=True)
class Strided(PrefixAttentionPolicy[None]):
    """Read pages 0, n, 2n, ... of those that exist; between refreshes all rows keep what they have."""

    name: ClassVar[str] = "strided"

    stride: int = field(default=4, metadata={"help": "Read one of so many pages, at least 1."})
    every: int = field(default=2, metadata={"help": "Refresh in one of so many passes, at least 1."})

    def __post_init__(self) -> None:
        check_count("stride", self.stride, 1)
        check_count("every", self.every, 1)

    def active_set(self, inputs: PassInputs[None]) -> Array:
        """Return all rows in every m-th pass and where nothing may be reused, else no row."""
        due = inputs.passes(lambda index: index % self.every == 0)
        return inputs.rows_where(either(inputs.restarts, due), inputs.all_rows, inputs.no_rows)

    def select_pages(self, inputs: PassInputs[None], active: Array) -> Selection:
        """Select every n-th page that exists, the same for all heads and rows."""
        xp, exists = inputs.xp, inputs.context.exists
        number = xp.cumulative_sum(xp.astype(exists, xp.int32), axis=-1) - 1
        chosen = exists & (number % self.stride == 0)
        return Selection(chosen[:, None, None, :], inputs.tokens)
