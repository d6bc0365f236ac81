"""`sliding-window`: the last tokens before the block, in every pass, layer and head."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from sparse_dlm_attn.arrays import Array
from sparse_dlm_attn.policies.positions import nearby_selection
from sparse_dlm_attn.policy import PassInputs, PrefixAttentionPolicy, check_count
from sparse_dlm_attn.selection import Selection

__all__ = ["SlidingWindow"]


@dataclass(frozen=True)
class SlidingWindow(PrefixAttentionPolicy[None]):
    """Read the last ``window`` context tokens before the block.

    Paper: the window baseline of StreamingLLM (Xiao et al. 2023, arXiv 2309.17453) and of SparseD.

    Rule: every row reads the pages that hold one of the last ``window`` tokens before the block. The
    window is anchored at the block's start, so all rows, heads, layers and passes read the same.
    A window as long as the context reads everything.

    Deviations from the authors' code:

    - Whole pages instead of single tokens: up to ``page_size - 1`` tokens more than ``window``. Page
      size 1 gives the exact window.
    - SparseD moves a band along with each row over the whole sequence. So does this where the sequence
      is the block, for a page's worth of rows at a time: ``window`` tokens up to the row and ``after``
      behind it. Over a prefix one anchor serves the block, which differs by at most
      ``block_length - 1`` tokens.
    - Tokens keep their true positions; StreamingLLM's code counts positions within the window.
    """

    name: ClassVar[str] = "sliding-window"
    counts_passes: ClassVar[bool] = False

    window: int = field(
        default=512,
        metadata={
            "help": "Tokens before the block to read, at least 1; page-rounded upwards. "
            "512 is the window of StreamingLLM's cache class."
        },
    )
    after: int = field(
        default=0,
        metadata={
            "help": "Tokens after the block to read where the context has a suffix; behind each row of "
            "a whole sequence."
        },
    )

    def __post_init__(self) -> None:
        check_count("window", self.window, 1)
        check_count("after", self.after)

    def select_pages(self, inputs: PassInputs[None], active: Array) -> Selection:
        """Select the pages of the window, the same for all heads."""
        return nearby_selection(inputs, window=self.window, after=self.after)
