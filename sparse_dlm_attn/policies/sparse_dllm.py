"""`sparse-dllm`: one set of tokens outside the window, chosen once for each window, for all heads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from sparse_dlm_attn.arrays import Array, namespace
from sparse_dlm_attn.errors import InvalidArgumentError
from sparse_dlm_attn.pass_info import PassInfo
from sparse_dlm_attn.policies.page_choice import with_page_count
from sparse_dlm_attn.policies.windows import pages_holding, pool_neighbours, rows_if, window_begins
from sparse_dlm_attn.policy import PassInputs, PrefixAttentionPolicy, check_count, check_fraction, either
from sparse_dlm_attn.selection import Selection

__all__ = ["SparseDLLM", "SparseDLLMMemory"]

ROWS_AT_ONCE = 64  # rows scored together: a whole sequence must not take a matrix of rows x pages


@dataclass(frozen=True, eq=False)
class SparseDLLMMemory:
    """What a window carries.

    Parameters
    ----------
    dense_left : int or array
        Dense passes still to come, negative after the choice; int32 ``(batch,)`` if sequences differ.
    mask : array or None
        Pages kept outside the window, bool ``(batch, 1, 1, pages)``.
    """

    dense_left: int | Array
    mask: Array | None


@dataclass(frozen=True)
class SparseDLLM(PrefixAttentionPolicy[SparseDLLMMemory]):
    """Keep a share of the tokens outside the window, with the keys and values that they have by then.

    Paper: "Sparse-dLLM: Accelerating Diffusion LLMs with Dynamic Cache Eviction", arXiv 2508.02558.

    Rule, counting the passes of a window from 0: passes ``0..delay`` compute all rows and read
    everything. Pass ``delay`` scores every token outside the window, before and behind it, by the mean
    over the window's rows and all query heads of ``q . k``, takes the largest score among ``kernel``
    neighbouring tokens, and keeps the best ``floor(n * ratio)`` of ``n``: one set for all heads of a
    layer. Later passes compute the window's rows alone and read the kept tokens and the window.

    On a model that is causal from block to block there is nothing behind the block and no stale key:
    what remains is the choice among prefix tokens.

    Defaults are those of the authors' scripts: half of the tokens, kernel 3, chosen in pass 1.

    Deviations from the authors' code:

    - Pages instead of tokens: ``floor(pages * ratio)`` of the pages, scored by the QUEST bound of their
      keys, neighbours counted in whole pages. Page size 1 gives their token sets exactly. Over a whole
      sequence the pages that hold a row of the window are read besides.
    - Nothing is moved or freed; what is not kept is not read.
    - A kernel must be odd; an even one lengthens their scores by one. Sequences of a batch choose apart;
      theirs is one sequence. Ties go to the lowest page.
    """

    name: ClassVar[str] = "sparse-dllm"
    counts_passes: ClassVar[bool] = False

    ratio: float = field(
        default=0.5,
        metadata={
            "help": "Share of the tokens outside the window to keep, 0..1. The authors' scripts use "
            "0.5, their class has 0.7."
        },
    )
    kernel: int = field(
        default=3, metadata={"help": "Neighbouring tokens among which the largest score counts; odd, at least 1."}
    )
    delay: int = field(
        default=1, metadata={"help": "Pass of the window that chooses, at least 0; it and those before it are dense."}
    )

    def __post_init__(self) -> None:
        check_fraction("ratio", self.ratio)
        check_count("kernel", self.kernel, 1)
        if self.kernel % 2 == 0:
            raise InvalidArgumentError("kernel", "must be odd, so that it has a middle", self.kernel)
        check_count("delay", self.delay)

    @property
    def mixes_heads(self) -> bool:
        return True

    def computed_tokens(self, info: PassInfo, rows: Array) -> Array:
        """Return all rows up to the pass that chooses, then the window's."""
        if info.window is None:
            return rows
        number = info.pass_in_window
        if not isinstance(number, int):
            number = info.of_sequences("window_index", rows)
        dense = either(number <= min(self.delay, 2**31 - 1), window_begins(info, rows))
        return rows_if(dense, rows, namespace(rows).asarray(info.window, device=rows.device))

    def select_pages(self, inputs: PassInputs[SparseDLLMMemory], active: Array) -> Selection:
        """Select every page up to the pass that chooses, then what it kept and the window."""
        dense = self._dense_left(inputs) >= 0

        def kept() -> Selection:
            mask = self._stored(inputs)
            own = self._window_pages(inputs)
            return Selection(mask if own is None else mask | own[:, None, None, :], inputs.tokens)

        return inputs.dense_where(dense, kept)

    def remember(self, inputs: PassInputs[SparseDLLMMemory], active: Array, selection: Selection) -> SparseDLLMMemory:
        """Choose in pass ``delay``; afterwards keep the choice."""
        left = self._dense_left(inputs)
        if isinstance(left, int) and left > 0:
            return SparseDLLMMemory(left, None)
        mask = inputs.rows_where(left == 0, lambda: self._best_pages(inputs), lambda: self._stored(inputs))
        return SparseDLLMMemory(left, mask)

    def _dense_left(self, inputs: PassInputs[SparseDLLMMemory]) -> int | Array:
        """Count down the dense passes of a window; 0 is the one that chooses."""
        delay = min(self.delay, 2**30)
        begins = either(inputs.restarts, window_begins(inputs.info, inputs.q))
        if begins is True or inputs.memory is None:
            return delay
        left = inputs.memory.dense_left - 1
        if begins is False:
            return max(left, -1) if isinstance(left, int) else left
        zeros = inputs.xp.zeros_like(inputs.info.of_sequences("index", inputs.q))
        return inputs.xp.where(begins, zeros + delay, zeros + left)

    def _stored(self, inputs: PassInputs[SparseDLLMMemory]) -> Array:
        if inputs.memory is not None and inputs.memory.mask is not None:
            return with_page_count(inputs.memory.mask, inputs.context.pages)
        return inputs.xp.zeros_like(inputs.context.exists)[:, None, None, :]

    @staticmethod
    def _window_pages(inputs: PassInputs[SparseDLLMMemory]) -> Array | None:
        """Return the pages that hold a row of the window; None over a prefix, which holds none."""
        if not inputs.whole:
            return None
        if inputs.info.window is None:
            return inputs.context.exists
        window = inputs.xp.asarray(inputs.info.window, device=inputs.q.device)
        return pages_holding(inputs.context, window)

    def _best_pages(self, inputs: PassInputs[SparseDLLMMemory]) -> Array:
        context, ops, xp = inputs.context, inputs.ops, inputs.xp
        rows, own = inputs.all_rows(), self._window_pages(inputs)
        if inputs.whole and inputs.info.window is not None:
            rows = xp.asarray(inputs.info.window, device=inputs.q.device)
        outside = context.exists if own is None else context.exists & ~own
        bounds = ops.page_bounds(context)
        scores: Any = xp.zeros((context.batch, 1, 1, context.pages), dtype=xp.float32, device=inputs.q.device)
        for start in range(0, inputs.tokens, ROWS_AT_ONCE):
            part = slice(start, min(start + ROWS_AT_ONCE, inputs.tokens))
            some = ops.page_scores(inputs.q[:, :, part, :], bounds, active=rows[:, part])
            some = xp.where(rows[:, None, part, None], some, xp.zeros_like(some))
            # The sum ranks as the mean does, and no division can round two scores into a tie.
            scores = scores + xp.sum(some, axis=(1, 2), keepdims=True)
        half = self.kernel // 2 // context.page_size
        scores = pool_neighbours(scores, outside, half, largest=True)
        pages = xp.astype(xp.sum(xp.astype(outside, xp.int32), axis=-1), xp.float64)
        count = xp.astype(xp.floor(pages * self.ratio), xp.int32)
        return ops.top_pages(scores, count[:, None, None], eligible=outside[:, None, None, :])
