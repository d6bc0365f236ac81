"""`flashblock`: reuse the context part of all rows until enough tokens have been decoded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from sparse_dlm_attn.arrays import Array
from sparse_dlm_attn.errors import InvalidArgumentError
from sparse_dlm_attn.policy import PassInputs, PrefixAttentionPolicy, check_choice, check_count, either
from sparse_dlm_attn.selection import Selection
from sparse_dlm_attn.values import AttentionState

__all__ = ["FlashBlock", "FlashBlockMemory"]

DirtyRows = Literal["drop", "keep"]
SavePass = Literal["refresh", "reuse"]


@dataclass(frozen=True, eq=False)
class FlashBlockMemory:
    """Tokens decoded since the sequence's last refresh, bool ``(batch, tokens)``."""

    dirty: Array


@dataclass(frozen=True)
class FlashBlock(PrefixAttentionPolicy[FlashBlockMemory]):
    """Refresh the context part of all rows, or of none, by the number of newly decoded tokens.

    Paper: "FlashBlock", arXiv 2602.05305.

    Rule: a row is dirty if its token was decoded since the last refresh. While fewer than ``limit``
    rows of a sequence are dirty, its rows reuse the context part of the last refresh and nothing is
    read; otherwise all rows attend to all pages. The first pass of a block refreshes, and so does the
    save pass.

    Needs ``info.newly_decoded`` in every pass but the first.

    Defaults: ``limit=2`` (the authors' mode s2; their evaluation files use 3). 0 refreshes always.

    Deviations from the authors' code:

    - On a pass that reuses, their reference path gives dirty rows no context part at all, so these
      rows attend within the block only: ``dirty_rows="drop"``, the default. Their CUDA path drops the
      value but leaves the mass in the denominator, which shrinks the output; it is not offered.
      ``dirty_rows="keep"`` lets dirty rows reuse like all others.
    - Their refresh is not stored when the block ends with that pass. Here it is, and the next block
      drops it: no output differs.
    """

    name: ClassVar[str] = "flashblock"
    counts_passes: ClassVar[bool] = False

    limit: int = field(
        default=2,
        metadata={
            "help": "Newly decoded tokens that cause a refresh, at least 0. The authors use 2 "
            "(mode s2) and 3 (evaluation); 0 refreshes in every pass."
        },
    )
    dirty_rows: DirtyRows = field(
        default="drop",
        metadata={
            "help": "Context part of rows decoded since the last refresh: drop (block only, the "
            "authors' reference path) or keep."
        },
    )
    save_pass: SavePass = field(
        default="refresh", metadata={"help": "Whether the save pass refreshes (authors) or reuses without reading."}
    )

    def __post_init__(self) -> None:
        check_count("limit", self.limit)
        check_choice("dirty_rows", self.dirty_rows, get_args(DirtyRows))
        check_choice("save_pass", self.save_pass, get_args(SavePass))

    def active_set(self, inputs: PassInputs[FlashBlockMemory]) -> Array:
        """Return all rows of sequences that refresh, no row of the others."""
        dirty = self._dirty(inputs)  # asked for first: it may refuse the pass
        return inputs.rows_where(self._refreshes(inputs, dirty), inputs.all_rows, inputs.no_rows)

    def select_pages(self, inputs: PassInputs[FlashBlockMemory], active: Array) -> Selection:
        """Select every page; without active rows none of them is read."""
        return Selection.all_pages(inputs.context, inputs.tokens)

    def reuse(self, inputs: PassInputs[FlashBlockMemory], active: Array, fresh: AttentionState) -> AttentionState:
        """Return the stored context part, without that of dirty rows if they are dropped."""
        kept = super().reuse(inputs, active, fresh)
        if self.dirty_rows == "keep" or inputs.cached is None:
            return kept
        dropped = self._dirty(inputs) & ~active
        return inputs.ops.reuse(dropped, AttentionState.empty_like(inputs.q), kept)

    def remember(self, inputs: PassInputs[FlashBlockMemory], active: Array, selection: Selection) -> FlashBlockMemory:
        """Keep the dirty rows; a refresh clears them."""
        return FlashBlockMemory(self._dirty(inputs) & ~active)

    def _dirty(self, inputs: PassInputs[FlashBlockMemory]) -> Array:
        """Return the rows decoded since the last refresh, bool ``(batch, tokens)``."""
        if inputs.restarts is True or inputs.memory is None:
            return inputs.no_rows()
        newly = inputs.info.newly_decoded
        if newly is None:
            raise InvalidArgumentError(
                "info.newly_decoded",
                "must be given after the first pass of a block, since flashblock refreshes by it",
                "None",
                "Pass PassInfo(index, newly_decoded=...), bool (batch, tokens): the tokens unmasked "
                "after the previous pass; or next_pass(decoded) where a Decoder counts passes.",
            )
        # A sequence that restarts refreshes whatever this says, and a refresh clears its dirty rows.
        return inputs.memory.dirty | inputs.xp.asarray(newly, device=inputs.q.device)

    def _refreshes(self, inputs: PassInputs[FlashBlockMemory], dirty: Array) -> bool | Array:
        """Return which sequences attend to their context in this pass, bool ``(batch,)``."""
        if inputs.restarts is True:
            return True
        xp = inputs.xp
        due = xp.sum(xp.astype(dirty, xp.int32), axis=-1) >= min(self.limit, inputs.tokens + 1)
        saves = inputs.info.of_sequences("is_save", inputs.q)
        due = due | saves if self.save_pass == "refresh" else due & ~saves
        return either(due, inputs.restarts)
