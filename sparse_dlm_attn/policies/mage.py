"""`mage`: exact scores in the first pass choose each KV head's tokens for the whole block."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from sparse_dlm_attn.arrays import Array, shape_of
from sparse_dlm_attn.policies.page_choice import pages_of_budget, with_page_count
from sparse_dlm_attn.policy import PassInputs, PrefixAttentionPolicy, check_count, either
from sparse_dlm_attn.selection import Selection

__all__ = ["Mage", "MageMemory"]


@dataclass(frozen=True, eq=False)
class MageMemory:
    """Pages chosen in the first pass, bool ``(batch, kv_heads, 1, pages)``."""

    mask: Array


@dataclass(frozen=True)
class Mage(PrefixAttentionPolicy[MageMemory]):
    """Freeze the best ``budget`` tokens of each KV head after a dense first pass.

    Paper: MAGE, arXiv 2602.14209. The authors published no code; the facts below are from the paper
    as others report it.

    Rule: pass 0 of a block is dense, and its exact softmax mass, averaged over the block's rows and
    summed over the query heads of a group, ranks the context for each KV head. The best ``budget``
    tokens serve all rows in all later passes of the block, the save pass included. The first two
    layers are dense.

    Choosing costs one read of all keys in pass 0 and nothing later.

    Deviations from the paper:

    - Pages instead of tokens: the best ``floor(budget / page_size)`` pages by summed mass, at least
      one. A context with page size 1 gives the paper's token lists exactly.
    - A context that fits into the budget is read whole. Ties go to the lowest page.
    - The save pass is not described; it reads what the other passes read.
    """

    name: ClassVar[str] = "mage"
    counts_passes: ClassVar[bool] = False

    budget: int = field(
        default=512,
        metadata={
            "help": "Context tokens that each KV head keeps for the block, at least 1. The paper "
            "uses 256, 512 and 1024."
        },
    )
    dense_layers: int = field(
        default=2, metadata={"help": "First layers that read everything in every pass; 2 in the paper."}
    )

    def __post_init__(self) -> None:
        check_count("budget", self.budget, 1)
        check_count("dense_layers", self.dense_layers)

    def select_pages(self, inputs: PassInputs[MageMemory], active: Array) -> Selection:
        """Select every page in the first pass and in dense layers, then the frozen pages."""
        dense = either(self._in_dense_layer(inputs), inputs.restarts)
        return inputs.dense_where(dense, lambda: Selection(self._frozen(inputs), inputs.tokens))

    def remember(self, inputs: PassInputs[MageMemory], active: Array, selection: Selection) -> MageMemory | None:
        """Choose in the first pass; afterwards keep the choice."""
        if self._in_dense_layer(inputs):
            return None
        return MageMemory(
            inputs.rows_where(inputs.restarts, lambda: self._best_pages(inputs), lambda: self._frozen(inputs))
        )

    def _in_dense_layer(self, inputs: PassInputs[MageMemory]) -> bool:
        return inputs.info.layer < self.dense_layers

    def _frozen(self, inputs: PassInputs[MageMemory]) -> Array:
        assert inputs.memory is not None  # a sequence without memory restarts
        return with_page_count(inputs.memory.mask, inputs.context.pages)

    def _best_pages(self, inputs: PassInputs[MageMemory]) -> Array:
        context, ops, xp = inputs.context, inputs.ops, inputs.xp
        # Pass 0 is dense, so its LSE is that of the whole context: one sweep over the keys is enough.
        lse = inputs.state.lse if inputs.state is not None else None
        mass = ops.pooled_scores(inputs.q, context, span=inputs.tokens, scale=inputs.scale, lse=lse)
        batch, _, spans, pages = shape_of(mass)
        grouped = xp.reshape(mass, (batch, context.kv_heads, inputs.group, spans, pages))
        count = pages_of_budget(context, self.budget)
        return ops.top_pages(xp.sum(grouped, axis=2), count[:, None, None], eligible=context.exists[:, None, None, :])
