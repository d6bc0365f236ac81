"""How policies turn a budget and page scores into pages; shared by several methods."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from sparse_dlm_attn.arrays import Array, namespace, shape_of
from sparse_dlm_attn.context import Context
from sparse_dlm_attn.policy import PassInputs, certain, check_choice, check_count, check_flag, either
from sparse_dlm_attn.ranked import affordable_pages
from sparse_dlm_attn.rules import GroupScores, Rule, RulePolicy

__all__ = ["BoundRanking", "pages_of_budget", "with_page_count"]

Rounding = Literal["floor", "ceil"]
PagesRead = Literal["union", "own"]
UnionOver = Literal["kv_head", "query_head", "layer"]
FirstPass = Literal["dense", "sparse"]


def pages_of_budget(context: Context, budget: int, rounding: Rounding = "floor", minimum: int = 1) -> Array:
    """Return how many pages a budget buys in each sequence, int32 ``(batch,)``.

    Parameters
    ----------
    context : Context
        Its page size converts tokens to pages.
    budget : int
        Tokens.
    rounding : {"floor", "ceil"}
        What a fraction of a page becomes.
    minimum : int
        Pages to allow in any case.

    Notes
    -----
    A context that fits into the budget is bought whole. Without that rule ``floor`` would leave out
    one page of it whenever its last page is partial.
    """
    budget = min(budget, context.pages * context.page_size)
    return affordable_pages(context, budget, _bought(context, budget, rounding, minimum))


def _bought(context: Context, budget: int, rounding: Rounding, minimum: int) -> int:
    """Return the pages that a budget buys in a context that does not fit into it."""
    whole = budget // context.page_size if rounding == "floor" else -(-budget // context.page_size)
    return max(whole, minimum)


def with_page_count(mask: Array, pages: int) -> Array:
    """Return a stored mask ``(..., pages)`` at the width of the present context.

    While sequences of a batch stand in different blocks, the page table may grow for one of them;
    the others have no tokens in the pages that were added or cut off.
    """
    xp = namespace(mask)
    *axes, stored = shape_of(mask)
    if stored >= pages:
        return mask[..., :pages]
    added = xp.zeros((*axes, pages - stored), dtype=xp.bool, device=mask.device)
    return xp.concat([mask, added], axis=-1)


@dataclass(frozen=True)
class BoundRanking(RulePolicy):
    """Base of `quest` and `losa`: rank pages by the QUEST bound, for active rows only."""

    counts_passes: ClassVar[bool] = False
    budget: int = field(
        default=256,
        metadata={
            "help": "Context tokens that each row and head may choose, at least 1. LoSA reports "
            "128 to 1024, QUEST's scripts use 512 to 4096."
        },
    )
    page_count: Rounding = field(
        default="floor",
        metadata={
            "help": "What a fraction of a page in the budget becomes: floor (QUEST; never above the budget) or ceil."
        },
    )
    min_pages: int = field(
        default=1,
        metadata={
            "help": "Pages to choose however small the budget, at least 1. QUEST's accuracy code "
            "has 3, its kernels none."
        },
    )
    newest: bool = field(
        default=False,
        metadata={
            "help": "Always choose the last page before the block, where there is one, within the "
            "budget, as QUEST's kernels do; its accuracy code does not."
        },
    )
    dense_layers: int = field(
        default=0, metadata={"help": "First layers that read everything in every pass. QUEST has 2 of 32."}
    )
    pages: PagesRead = field(
        default="union",
        metadata={
            "help": "Pages a row reads: union of what the block's active rows chose (nothing "
            "more is loaded for it), or own."
        },
    )
    union_over: UnionOver = field(
        default="kv_head",
        metadata={
            "help": "Heads that a union covers: kv_head (what a kernel loads), query_head (rows "
            "only) or layer (all heads). No effect with pages=own."
        },
    )
    group_scores: GroupScores = field(
        default="query_head",
        metadata={
            "help": "Who ranks pages: each query_head, or each KV head by the mean or max of its group's scores."
        },
    )
    first_pass: FirstPass = field(
        default="sparse", metadata={"help": "Whether pass 0 reads all pages (dense) or the chosen ones (sparse)."}
    )

    def __post_init__(self) -> None:
        check_count("budget", self.budget, 1)
        check_choice("page_count", self.page_count, get_args(Rounding))
        check_count("min_pages", self.min_pages, 1)
        check_flag("newest", self.newest)
        check_count("dense_layers", self.dense_layers)
        check_choice("pages", self.pages, get_args(PagesRead))
        check_choice("union_over", self.union_over, get_args(UnionOver))
        check_choice("group_scores", self.group_scores, get_args(GroupScores))
        check_choice("first_pass", self.first_pass, get_args(FirstPass))

    @property
    def mixes_heads(self) -> bool:
        return self.pages == "union" and self.union_over == "layer"

    def in_dense_layer(self, inputs: PassInputs[Any]) -> bool:
        """Return whether this layer always reads everything, for all rows."""
        return certain(inputs.info.layer < self.dense_layers)

    def ranking(self, inputs: PassInputs[Any], all_pages: bool | Array, **rows: Any) -> Rule:
        """Return the rule of a pass that ranks pages; ``rows`` say which rows do, and what is kept."""
        context = inputs.context
        budget = min(self.budget, context.pages * context.page_size)
        return Rule(
            all_pages=either(all_pages, inputs.restarts) if self.first_pass == "dense" else all_pages,
            budget=budget,
            pages=_bought(context, budget, self.page_count, self.min_pages),
            newest=self.newest,
            union="row" if self.pages == "own" else self.union_over,
            group_scores=self.group_scores,
            **rows,
        )
