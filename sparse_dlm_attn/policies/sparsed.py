"""`sparsed`: after a dense warm-up, each query head keeps one share of the pages for good."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, get_args

from sparse_dlm_attn.arrays import Array, namespace
from sparse_dlm_attn.context import PROMPT, Context
from sparse_dlm_attn.policies.page_choice import with_page_count
from sparse_dlm_attn.policy import (
    PassInputs,
    PrefixAttentionPolicy,
    check_choice,
    check_count,
    check_flag,
    check_fraction,
)
from sparse_dlm_attn.selection import Selection

__all__ = ["SparseD", "SparseDMemory", "pages_of_ratio"]

Variant = Literal["code", "paper"]
ScoreScale = Literal["attention", "heads"]


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


def pages_of_ratio(eligible: Array, ratio: float, variant: Variant = "code") -> Array:
    """Return how many pages a share is, computed in float64 and clamped to the eligible pages.

    Parameters
    ----------
    eligible : array
        bool ``(batch, pages)``.
    ratio : float
        Share of the pages, 0..1.
    variant : {"code", "paper"}
        ``floor(pages * ratio) + 1``, or the floor itself but at least one.

    Returns
    -------
    array
        int32 ``(batch,)``.
    """
    xp = namespace(eligible)
    pages = xp.sum(xp.astype(eligible, xp.int32), axis=-1, dtype=xp.int32)
    # In float64 as Python computes it: 100 * 0.29 stays just below 29 and floors to 28.
    whole = xp.astype(xp.floor(xp.astype(pages, xp.float64) * ratio), xp.int32)
    kept = whole + 1 if variant == "code" else xp.where(whole > 0, whole, xp.ones_like(whole))
    return xp.minimum(kept, pages)


@dataclass(frozen=True)
class SparseD(PrefixAttentionPolicy[SparseDMemory]):
    """Choose pages once, for each query head and span of rows, from exact softmax masses.

    Paper: "SparseD: Sparse Attention for Diffusion Language Models", ICLR 2026. In the original the
    whole sequence is one block whose keys are the context (clause DRIVER-4); give ``span`` the size of
    a page there, 128 or 32 tokens. Over a prefix the block's rows choose among the pages before them.

    Rule: the first passes of a block are dense. The last of them ranks the pages by their softmax
    mass, averaged over the rows of a span, for each query head. Later passes, the save pass included,
    read the pages chosen then. With ``isolated``, prompt pages and all others are chosen apart, so
    that a long prompt does not crowd generated text out; masses of the others are normalised over
    them alone.

    Countings (``variant``), for ``n`` pages and ``T`` passes:

    - ``code``, the default, is what the authors' code does: ``floor(T * skip) + 2`` dense passes,
      ``floor(n * ratio) + 1`` pages. The prompt's part ranks *all* pages, counts with all of them, and
      then clears those that are not of the prompt: it keeps that many pages at most.
    - ``paper``: ``floor(T * skip)`` dense passes, at least one, and ``floor(n * ratio)`` of each part's
      own ``n`` pages, at least one.

    Where ``total_passes`` is not known, the block's length stands for it: one token a pass, the
    authors' own schedule. ``warmup`` gives the passes directly.

    Defaults: ``ratio=0.3`` and ``skip=0.2`` as in the authors' scripts for long contexts (their short
    contexts use 0.5).

    The choice takes the LSE of the dense pass that it follows and so reads all keys once; isolated
    choice reads those outside the prompt once more. ``score_scale=heads`` and passes without a dense
    pass before the choice (``warmup=0``, ``frozen=false``) have no LSE to take.

    Deviations from the authors' code:

    - Steps are counted within the block. Where the sequence is the block, that is over all windows, as
      their LLaDA code counts: later windows never have a dense step.
    - Scores stay in float32 or better; theirs are rounded to the model's dtype before pooling and so
      tie often. Ties go to the lowest page. A ratio of 1 keeps every page; theirs fails.
    - Their LLaDA code selects with ``1 / sqrt(heads)``: ``score_scale=heads``. Their Dream code, and
      this policy unless told, selects with the scale of attention.
    - Padding and attention masks are ignored in their selection; here absent tokens have no mass.
    """

    name: ClassVar[str] = "sparsed"
    counts_passes: ClassVar[bool] = False

    ratio: float = field(
        default=0.3,
        metadata={"help": "Share of the pages to keep, 0..1. The authors use 0.3 for long and 0.5 for short contexts."},
    )
    skip: float = field(
        default=0.2,
        metadata={"help": "Share of a block's passes that are dense, 0..1; two passes more with variant=code."},
    )
    warmup: int | None = field(
        default=None,
        metadata={
            "help": "Dense passes at the start of a block instead of skip; with 0 pass 0 reads what "
            "it chooses (ablation)."
        },
    )
    span: int | None = field(
        default=None, metadata={"help": "Rows that share one selection, at least 1; none for the whole block."}
    )
    isolated: bool = field(
        default=True,
        metadata={"help": "Choose prompt pages and all other pages apart, where the context has segments."},
    )
    variant: Variant = field(
        default="code", metadata={"help": "Whose counting of dense passes and pages: the authors' code or their paper."}
    )
    score_scale: ScoreScale = field(
        default="attention",
        metadata={
            "help": "Softmax scale of the choice: that of attention (Dream code, paper) or "
            "1 / sqrt(heads) (LLaDA code)."
        },
    )
    frozen: bool = field(
        default=True,
        metadata={"help": "Keep the choice; false chooses anew in every pass after the warm-up (ablation)."},
    )

    def __post_init__(self) -> None:
        check_fraction("ratio", self.ratio)
        check_fraction("skip", self.skip)
        check_flag("isolated", self.isolated)
        check_flag("frozen", self.frozen)
        check_choice("variant", self.variant, get_args(Variant))
        check_choice("score_scale", self.score_scale, get_args(ScoreScale))
        if self.warmup is not None:
            check_count("warmup", self.warmup)
        if self.span is not None:
            check_count("span", self.span, 1)

    @property
    def mixes_heads(self) -> bool:
        return self.score_scale == "heads"  # by their number

    def warmup_passes(self, total_passes: int) -> int:
        """Return the dense passes of a block planned to take ``total_passes``."""
        if self.warmup is not None:
            return self.warmup
        share = math.floor(total_passes * self.skip)
        return share + 2 if self.variant == "code" else max(share, 1)

    def select_pages(self, inputs: PassInputs[SparseDMemory], active: Array) -> Selection:
        """Select every page during the warm-up, then the frozen pages."""
        warming = self._warmup_left(inputs) >= 0
        return inputs.dense_where(warming, lambda: Selection(self._chosen(inputs), self._span(inputs)))

    def remember(self, inputs: PassInputs[SparseDMemory], active: Array, selection: Selection) -> SparseDMemory:
        """Choose in the last warm-up pass; afterwards keep the choice."""
        left = self._warmup_left(inputs)
        if not self.frozen or (isinstance(left, int) and left > 0):
            return SparseDMemory(left, None)
        if self.warmup == 0:
            return SparseDMemory(left, selection.mask)
        mask = inputs.rows_where(left == 0, lambda: self._best_pages(inputs), lambda: self._stored(inputs))
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
            return max(left, -1) if isinstance(left, int) else left
        zeros = inputs.xp.zeros_like(inputs.info.of_sequences("index", inputs.q))
        return inputs.xp.where(inputs.restarts, zeros + whole, zeros + left)

    def _chosen(self, inputs: PassInputs[SparseDMemory]) -> Array:
        """Return the pages of a pass after the warm-up."""
        if not self.frozen:
            return self._best_pages(inputs)
        if self.warmup == 0:
            return inputs.rows_where(inputs.restarts, lambda: self._best_pages(inputs), lambda: self._stored(inputs))
        return self._stored(inputs)

    def _stored(self, inputs: PassInputs[SparseDMemory]) -> Array:
        """Return the stored mask; nothing for sequences that have not chosen yet."""
        if inputs.memory is not None and inputs.memory.mask is not None:
            return with_page_count(inputs.memory.mask, inputs.context.pages)
        batch, q_heads = inputs.q.shape[:2]
        shape = (batch, q_heads, -(-inputs.tokens // self._span(inputs)), inputs.context.pages)
        return inputs.xp.zeros(shape, dtype=inputs.xp.bool, device=inputs.q.device)

    def _best_pages(self, inputs: PassInputs[SparseDMemory]) -> Array:
        context, xp = inputs.context, inputs.xp
        if not self.isolated or context.page_segments is None:
            return self._best_of(inputs, context, context.exists)
        prompt = context.in_segment(PROMPT)
        others = context.exists & ~prompt
        if self.variant == "code":
            ours = self._best_of(inputs, context, context.exists) & prompt[:, None, None, :]
        else:
            ours = self._best_of(inputs, context, prompt)
        lengths = xp.where(others, context.page_lengths, xp.zeros_like(context.page_lengths))
        others_alone = replace(context, page_lengths=lengths, bounds=None)
        return ours | self._best_of(inputs, others_alone, others)

    def _best_of(self, inputs: PassInputs[SparseDMemory], scored: Context, eligible: Array) -> Array:
        """Rank ``eligible`` pages by their mass among all keys of ``scored``."""
        ops, lse, scale = inputs.ops, None, inputs.scale
        if self.score_scale == "heads":
            scale = 1.0 / math.sqrt(inputs.q.shape[1])
        elif inputs.state is not None and scored is inputs.context:
            lse = inputs.state.lse  # of the dense pass that this is the end of
        mass = ops.pooled_scores(inputs.q, scored, span=self._span(inputs), scale=scale, lse=lse)
        count = pages_of_ratio(eligible, self.ratio, self.variant)
        return ops.top_pages(mass, count[:, None, None], eligible=eligible[:, None, None, :])
