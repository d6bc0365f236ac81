"""`streaming-llm`: the first tokens (attention sinks) and the last ones before the block."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from sparse_dlm_attn.arrays import Array
from sparse_dlm_attn.policies.positions import nearby_selection
from sparse_dlm_attn.policy import PassInputs, PrefixAttentionPolicy, check_count
from sparse_dlm_attn.selection import Selection

__all__ = ["StreamingLLM"]


@dataclass(frozen=True)
class StreamingLLM(PrefixAttentionPolicy[None]):
    """Read the first ``sinks`` and the last ``window`` context tokens.

    Paper: Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks",
    arXiv 2309.17453.

    Rule: every row reads the pages that hold one of the first ``sinks`` tokens or one of the last
    ``window`` tokens before the block; the same for all rows, heads, layers and passes. Where sinks
    and window meet, everything is read.

    Deviations from the authors' code:

    - Whole pages instead of single tokens: 4 sinks at page size 16 read 16 tokens.
    - Tokens keep their true positions. The authors number positions within the cache, which needs
      keys stored before the rotary embedding; block diffusion models store them after it.
    - Nothing is evicted: what a pass leaves out stays in the cache.
    - Where the sequence is the block, the window moves along with each page's worth of rows.
    """

    name: ClassVar[str] = "streaming-llm"
    counts_passes: ClassVar[bool] = False

    sinks: int = field(
        default=4,
        metadata={
            "help": "Tokens at the beginning to read; page-rounded upwards. "
            "4 is the default of the authors' cache class."
        },
    )
    window: int = field(
        default=512,
        metadata={
            "help": "Tokens before the block to read, at least 1; page-rounded upwards. "
            "512 is the default of the authors' cache class; their scripts use 2000."
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
        check_count("sinks", self.sinks)
        check_count("window", self.window, 1)
        check_count("after", self.after)

    def select_pages(self, inputs: PassInputs[None], active: Array) -> Selection:
        """Select the pages of sinks and window, the same for all heads."""
        return nearby_selection(inputs, window=self.window, sinks=self.sinks, after=self.after)
