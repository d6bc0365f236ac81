"""`snapkv`: the prompt is cut to a capacity once, by what its last tokens attend to."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, get_args

from sparse_dlm_attn.arrays import Array
from sparse_dlm_attn.context import PROMPT, SUFFIX
from sparse_dlm_attn.errors import InvalidArgumentError
from sparse_dlm_attn.policies.page_choice import with_page_count
from sparse_dlm_attn.policies.windows import pool_neighbours
from sparse_dlm_attn.policy import PassInputs, PrefixAttentionPolicy, check_choice, check_count
from sparse_dlm_attn.selection import Selection

__all__ = ["SnapKV", "SnapKVMemory"]

Pooling = Literal["avg", "max"]


@dataclass(frozen=True, eq=False)
class SnapKVMemory:
    """What the sequence carries.

    Parameters
    ----------
    mask : array
        Pages kept, bool ``(batch, q_heads, 1, pages)``.
    known : array
        Pages that there were when they were chosen, bool ``(batch, pages)``; later ones are read too.
    """

    mask: Array
    known: Array


@dataclass(frozen=True)
class SnapKV(PrefixAttentionPolicy[SnapKVMemory]):
    """Keep the last ``window`` tokens and the heaviest others, for each query head, for good.

    Paper: "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv 2404.14469, a method for
    autoregressive models.

    Rule: the first pass is dense. An observation window's attention ranks the tokens before the last
    ``window`` ones: softmax mass, summed over the observing rows, pooled over ``kernel`` neighbouring
    tokens. Each query head keeps the best ``capacity - window`` of them and the last ``window``. Nothing
    is chosen again, in no later block either; tokens that come later are all read. A prompt that fits
    into the capacity stays whole.

    Who observes: over a whole sequence the last ``window`` prompt rows, as in the paper. Over a prefix
    no prompt query is left, so the rows of the first block observe, in its first pass.

    Defaults are those of the authors' configuration (``window=32``, ``kernel=5``, mean pooling) with the
    smallest capacity of their LongBench runs; those use kernel 7 and ``pooling=max``.

    Deviations from the authors' code:

    - Pages instead of tokens: ``floor((capacity - window) / page_size)`` pages, neighbours counted in
      whole pages, the last tokens rounded to whole pages. Page size 1 gives tokens.
    - Observing rows see each other in both directions, or are the block's (above); theirs are causal.
    - Nothing is evicted, and KV heads are not repeated: a KV head loads the union over its group.
    - Masses stay in float32 or better; ties go to the lowest page.
    """

    name: ClassVar[str] = "snapkv"
    counts_passes: ClassVar[bool] = False
    memory_scope: ClassVar[Literal["block", "sequence"]] = "sequence"

    capacity: int = field(
        default=1024,
        metadata={
            "help": "Prompt tokens that each query head keeps, more than window. The authors' "
            "LongBench runs use 1024, 2048 and 4096."
        },
    )
    window: int = field(
        default=32,
        metadata={"help": "Last prompt tokens, always kept, at least 1; over a whole sequence they observe."},
    )
    kernel: int = field(
        default=5,
        metadata={"help": "Neighbouring tokens over which masses are pooled; odd, at least 1. LongBench runs use 7."},
    )
    pooling: Pooling = field(
        default="avg",
        metadata={"help": "How they are pooled: avg (zeros beyond the ends count) or max, as in the LongBench runs."},
    )

    def __post_init__(self) -> None:
        check_count("window", self.window, 1)
        check_count("capacity", self.capacity, 1)
        if self.capacity <= self.window:
            raise InvalidArgumentError("capacity", f"must exceed window={self.window}", self.capacity)
        check_count("kernel", self.kernel, 1)
        if self.kernel % 2 == 0:
            raise InvalidArgumentError("kernel", "must be odd, so that it has a middle", self.kernel)
        check_choice("pooling", self.pooling, get_args(Pooling))

    def select_pages(self, inputs: PassInputs[SnapKVMemory], active: Array) -> Selection:
        """Select every page before the choice, then the kept pages and all later ones."""
        if inputs.memory is None:
            return Selection.all_pages(inputs.context, inputs.tokens)
        pages = inputs.context.pages
        later = inputs.context.exists & ~with_page_count(inputs.memory.known, pages)
        mask = with_page_count(inputs.memory.mask, pages) | later[:, None, None, :]
        return Selection(mask, inputs.tokens)

    def remember(self, inputs: PassInputs[SnapKVMemory], active: Array, selection: Selection) -> SnapKVMemory:
        """Choose in the first pass; afterwards keep the choice."""
        if inputs.memory is not None:
            return inputs.memory
        return SnapKVMemory(self._best_pages(inputs), inputs.context.exists)

    def _best_pages(self, inputs: PassInputs[SnapKVMemory]) -> Array:
        context, ops, xp = inputs.context, inputs.ops, inputs.xp
        prompt = context.in_segment(PROMPT) if inputs.whole else context.exists & ~context.in_segment(SUFFIX)
        lengths = xp.where(prompt, context.page_lengths, xp.zeros_like(context.page_lengths))
        ends = xp.cumulative_sum(lengths, axis=-1, dtype=xp.int32)
        total = xp.sum(lengths, axis=-1, keepdims=True, dtype=xp.int32)
        last = prompt & (ends > total - min(self.window, context.pages * context.page_size))
        earlier = prompt & ~last
        scores, half = self._masses(inputs, lengths, total), self.kernel // 2 // context.page_size
        scores = pool_neighbours(scores, earlier, half, largest=self.pooling == "max")
        count = min((self.capacity - self.window) // context.page_size, context.pages)
        fits = total <= min(self.capacity, 2**31 - 1)
        counts = xp.where(fits, xp.full_like(total, context.pages), xp.full_like(total, count))
        chosen = ops.top_pages(scores, counts[:, :, None], eligible=earlier[:, None, None, :])
        return chosen | (context.exists & ~earlier)[:, None, None, :]

    def _masses(self, inputs: PassInputs[SnapKVMemory], lengths: Array, total: Array) -> Array:
        """Return the mass of each page for the observing rows, ``(batch, q_heads, 1, pages)``."""
        context, ops, xp = inputs.context, inputs.ops, inputs.xp
        if not inputs.whole:
            lse = inputs.state.lse if inputs.state is not None else None  # the first pass is dense
            return ops.pooled_scores(inputs.q, context, span=inputs.tokens, scale=inputs.scale, lse=lse)
        rows = min(self.window, inputs.tokens)
        places = xp.arange(rows, dtype=xp.int32, device=inputs.q.device)[None, :] + (total - rows)
        places = xp.astype(xp.clip(places, 0, inputs.tokens - 1), xp.int64)
        batch, q_heads, _, head_dim = (int(size) for size in inputs.q.shape)
        shape = (batch, q_heads, rows, head_dim)
        observing = xp.take_along_axis(inputs.q, xp.broadcast_to(places[:, None, :, None], shape), axis=2)
        alone = replace(context, page_lengths=lengths, page_segments=None, bounds=None)
        return ops.pooled_scores(observing, alone, span=rows, scale=inputs.scale)
