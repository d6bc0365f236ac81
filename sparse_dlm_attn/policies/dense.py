"""`dense`: every row reads every page in every pass; the baseline of all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparse_dlm_attn.arrays import Array
from sparse_dlm_attn.policy import PassInputs, PrefixAttentionPolicy
from sparse_dlm_attn.selection import Selection

__all__ = ["Dense"]


@dataclass(frozen=True)
class Dense(PrefixAttentionPolicy[None]):
    """Read everything, always: exact attention, as SDAR and TraDo compute it."""

    name: ClassVar[str] = "dense"
    counts_passes: ClassVar[bool] = False

    def select_pages(self, inputs: PassInputs[None], active: Array) -> Selection:
        """Select every page that exists."""
        return Selection.all_pages(inputs.context, inputs.tokens)
