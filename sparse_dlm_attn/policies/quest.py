"""`quest`: every row reads the pages whose key bounds promise the largest scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparse_dlm_attn.policies.page_choice import BoundRanking
from sparse_dlm_attn.policy import PassInputs
from sparse_dlm_attn.rules import Rule, RuleMemory

__all__ = ["Quest"]


@dataclass(frozen=True)
class Quest(BoundRanking):
    """Select pages by an upper bound of q.k, anew in every pass, for all rows.

    Paper: Tang et al. 2024, "QUEST: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
    arXiv 2406.10774; adapted to a block of queries as the baseline of LoSA is (arXiv 2604.12056).

    Rule: page ``j`` scores ``sum_c max(q_c lower_jc, q_c upper_jc)`` for every row and query head.
    Each takes its best ``budget / page_size`` pages; the block reads the union over its rows and over
    the query heads that share a KV head. ``first_pass=dense`` is the control that shares the dense
    pass 0 of `losa`.

    Defaults are those that make it `losa` with all rows active: ranking per query head, union per KV
    head, no forced page, no dense layer, pass 0 sparse.

    Deviations from the authors' code:

    - Their accuracy code keeps at least 3 pages and their kernels force the newest page; both are
      parameters (``min_pages=3``, ``newest=true``) and off, since the two code paths disagree.
    - Their first two layers are dense: ``dense_layers=2``. Off, as no source says that the block
      adaptation keeps it, and two layers weigh more in a small model.
    - A context that fits into the budget is read whole. Their accuracy code floors
      ``min(budget, length) / page_size``, which leaves one page out if the last one is partial.
    - Ties go to the lowest page; theirs are left to the library.
    - The authors' code serves one query; the union over the block is LoSA's description of it.
    """

    name: ClassVar[str] = "quest"

    def rule(self, inputs: PassInputs[RuleMemory]) -> Rule:
        """Return the rule of a pass: all rows rank pages, outside of dense layers."""
        return self.ranking(inputs, all_rows=True, all_pages=self.in_dense_layer(inputs))
