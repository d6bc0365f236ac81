"""`sparsed`: after a dense warm-up, each query head keeps one share of the pages for the block."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

from sparse_dlm_attn.arrays import Array, namespace
from sparse_dlm_attn.context import PROMPT, Context
from sparse_dlm_attn.policies.page_choice import with_page_count
from sparse_dlm_attn.policy import (
    PassInputs,
    PrefixAttentionPolicy,
    check_count,
    check_flag,
    check_fraction,
)
from sparse_dlm_attn.selection import Selection

__all__ = ["SparseD", "SparseDMemory", "pages_of_ratio"]


@dataclass(frozen=True, eq=False)
class SparseDMemory:
    """What a block carries.

    Parameters
    ----------
    warmup_left : int or array
        Dense passes still to come, negative after the warm-up; int32 ``(batch,)`` if sequences differ.
    mask : array or None
        Pages chosen at the end of the warm-up, bool ``(batch, q_heads, spans, pages)``.
    """

    warmup_left: int | Array
    mask: Array | None


def pages_of_ratio(eligible: Array, ratio: float) -> Array:
    """Return ``floor(pages * ratio) + 1``, computed in float64 and clamped to the eligible pages.

    Parameters
    ----------
    eligible : array
        bool ``(batch, pages)``.
    ratio : float
        Share of the pages, 0..1.

    Returns
    -------
    array
        int32 ``(batch,)``.
    """
    xp = namespace(eligible)
    pages = xp.sum(xp.astype(eligible, xp.int32), axis=-1, dtype=xp.int32)
    # In float64 as Python computes it: 100 * 0.29 stays just below 29 and floors to 28.
    kept = xp.astype(xp.floor(xp.astype(pages, xp.float64) * ratio), xp.int32) + 1
    return xp.minimum(kept, pages)


@dataclass(frozen=True)
class SparseD(PrefixAttentionPolicy[SparseDMemory]):
    """Choose pages once per block, query head and span, from exact softmax masses.

    Paper: "SparseD: Sparse Attention for Diffusion Language Models", ICLR 2026. This is its form for
    a context outside the block; in the original the whole sequence is the block.

    Rule: the first passes of a block are dense. The last of them ranks the pages by their softmax
    mass, averaged over the rows of a span, for each query head, and keeps
    ``floor(n * ratio) + 1`` of ``n`` pages. Later passes of the block, the save pass included, read
    these pages. With ``isolated``, prompt pages and all others are ranked apart, each with its own
    ``n``, so that a long prompt does not crowd generated text out.

    Defaults: ``ratio=0.3`` and ``skip=0.2`` as in the authors' scripts for long contexts (their short
    contexts use 0.5). The warm-up is ``floor(total_passes * skip) + 2`` passes, as their code counts
    (their paper says ``total_passes * skip``). Where ``total_passes`` is not known, the block's length
    stands for it: one token a pass, the authors' own schedule. ``warmup`` gives the passes directly.

    Choosing costs one read of all keys, and a second one with ``isolated`` where the context has
    segments.

    Deviations from the authors' code:

    - Steps are counted within the block; their LLaDA code counts over all blocks, so that later
      blocks never have a dense step.
    - Only the block's rows rank pages, not the whole sequence; ``span`` is the block unless given
      (theirs is 128 or 32 rows, for which blocks of this form are too short).
    - Isolated selection takes ``floor(n * ratio) + 1`` of the prompt's own pages, as the paper says.
      Their code ranks all pages, counts with all of them, and then clears those of the generation.
    - Scores of pages outside the prompt are renormalised over them, as in their code; a suffix counts
      as generated.
    - Scores stay in float32 or better; theirs are rounded to the model's dtype and so tie often. Ties
      go to the lowest page. A ratio of 1 keeps every page; theirs fails.
    - The softmax scale is that of attention; their LLaDA code selects with ``1 / sqrt(heads)``.
    """

    name: ClassVar[str] = "sparsed"

    ratio: float = field(
        default=0.3,
        metadata={"help": "Share of the pages to keep, 0..1; one page more is kept. The authors use 0.3 "
                  "for long and 0.5 for short contexts."},
    )
    skip: float = field(
        default=0.2,
        metadata={"help": "Share of a block's passes that are dense, 0..1; two passes more are dense, as "
                  "in the authors' code."},
    )
    warmup: int | None = field(
        default=None,
        metadata={"help": "Dense passes at the start of a block, at least 1, instead of skip."},
    )
    span: int | None = field(
        default=None,
        metadata={"help": "Rows that share one selection, at least 1; none for the whole block."},
    )
    isolated: bool = field(
        default=True,
        metadata={"help": "Rank prompt pages and all other pages apart, where the context has segments."},
    )

    def __post_init__(self) -> None:
        check_fraction("ratio", self.ratio)
        check_fraction("skip", self.skip)
        check_flag("isolated", self.isolated)
        for name in ("warmup", "span"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1)

    def warmup_passes(self, total_passes: int) -> int:
        """Return the dense passes of a block planned to take ``total_passes``."""
        return self.warmup if self.warmup is not None else math.floor(total_passes * self.skip) + 2

    def select_pages(self, inputs: PassInputs[SparseDMemory], active: Array) -> Selection:
        """Select every page during the warm-up, then the frozen pages."""
        warming = self._warmup_left(inputs) >= 0
        return inputs.dense_where(warming, lambda: Selection(self._frozen(inputs), self._span(inputs)))

    def remember(
        self, inputs: PassInputs[SparseDMemory], active: Array, selection: Selection
    ) -> SparseDMemory:
        """Choose in the last warm-up pass; afterwards keep the choice."""
        left = self._warmup_left(inputs)
        if isinstance(left, int) and left > 0:
            return SparseDMemory(left, None)
        mask = inputs.rows_where(
            left == 0, lambda: self._best_pages(inputs), lambda: self._frozen(inputs)
        )
        return SparseDMemory(left, mask)

    def _span(self, inputs: PassInputs[SparseDMemory]) -> int:
        return inputs.tokens if self.span is None else min(self.span, inputs.tokens)

    def _warmup_left(self, inputs: PassInputs[SparseDMemory]) -> int | Array:
        """Count down the warm-up; it is fixed when a block begins or restarts.

        0 is its last pass, negative numbers come after it.
        """
        whole = self.warmup_passes(inputs.info.total_passes or inputs.tokens) - 1
        whole = min(whole, 2**30)  # fits int32, and no block has as many passes
        if inputs.restarts is True or inputs.memory is None:
            return whole
        left = inputs.memory.warmup_left - 1
        if inputs.restarts is False:
            return left
        zeros = inputs.xp.zeros_like(inputs.info.of_sequences("index", inputs.q))
        return inputs.xp.where(inputs.restarts, zeros + whole, zeros + left)

    def _frozen(self, inputs: PassInputs[SparseDMemory]) -> Array:
        """Return the stored mask; nothing for sequences that have not chosen yet."""
        if inputs.memory is not None and inputs.memory.mask is not None:
            return with_page_count(inputs.memory.mask, inputs.context.pages)
        batch, q_heads = inputs.q.shape[:2]
        shape = (batch, q_heads, -(-inputs.tokens // self._span(inputs)), inputs.context.pages)
        return inputs.xp.zeros(shape, dtype=inputs.xp.bool, device=inputs.q.device)

    def _best_pages(self, inputs: PassInputs[SparseDMemory]) -> Array:
        context = inputs.context
        if not self.isolated or context.page_segments is None:
            return self._best_of(inputs, context, context.exists)
        prompt = context.in_segment(PROMPT)
        others = context.exists & ~prompt
        lengths = inputs.xp.where(others, context.page_lengths, inputs.xp.zeros_like(context.page_lengths))
        others_alone = replace(context, page_lengths=lengths, bounds=None)
        return self._best_of(inputs, context, prompt) | self._best_of(inputs, others_alone, others)

    def _best_of(self, inputs: PassInputs[SparseDMemory], scored: Context, eligible: Array) -> Array:
        """Rank ``eligible`` pages by their mass among all keys of ``scored``."""
        ops = inputs.ops
        mass = ops.pooled_scores(inputs.q, scored, span=self._span(inputs), scale=inputs.scale)
        count = pages_of_ratio(eligible, self.ratio)
        return ops.top_pages(mass, count[:, None, None], eligible=eligible[:, None, None, :])
