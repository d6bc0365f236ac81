"""`losa`: fresh sparse attention for the rows whose query moved; the others keep what they have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from sparse_dlm_attn.policies.page_choice import BoundRanking, FirstPass
from sparse_dlm_attn.policy import PassInputs, check_choice, check_count, check_fraction, either
from sparse_dlm_attn.ranked import Keep
from sparse_dlm_attn.rules import Rule, RuleMemory

__all__ = ["Losa"]

Drift = Literal["previous", "refresh"]
SavePass = Literal["step", "dense", "reuse"]


@dataclass(frozen=True)
class Losa(BoundRanking):
    """Recompute the context part of active rows on their pages; stable rows reuse theirs.

    Paper: "LoSA: Locality Aware Sparse Attention for Block-Wise Diffusion Language Models",
    arXiv 2604.12056. The authors published no code, so every open choice is a parameter.

    Rule, for each layer:

    1. Pass 0: all rows attend to all pages; their context part is kept.
    2. Later: the change of a row is the mean over heads and channels of the squared difference of its
       query to the reference. The rows that changed most are active.
    3. Active rows choose pages by the QUEST bound; all of them read the union, per KV head.
    4. Active rows replace their context part; the others keep it. The block part is always dense.

    Defaults: five active rows (the paper's ablation), change against the previous pass (figures 2
    and 4), pass 0 dense, everything else as `quest`. The save pass is a pass like any other.

    Points that the paper leaves open, as decided here:

    - One active set a layer, from queries alone. Before or after the rotary embedding is the same:
      it rotates, and a row's position is fixed within its block.
    - ``mass=tau`` takes the smallest set of largest changes that reaches ``tau`` of the total: at
      least one row for any tau above 0, no row if nothing changed or tau is 0.
    - ``drift="previous"`` lets a slow drift go unnoticed, because each step stays below the cut.
      ``drift="refresh"`` measures from the query that a row was last recomputed with.
    - ``active=0`` freezes the context part of pass 0 for the whole block.
    - A dense layer (``dense_layers``) is exact: all rows active and all pages, in every pass.
    - A pass without memory starts the block again: all rows are active.
    """

    name: ClassVar[str] = "losa"

    active: int = field(
        default=5,
        metadata={
            "help": "Rows recomputed in a pass, at least 0, clamped to the block. 5 is the best "
            "of the paper's ablation; 0 never refreshes."
        },
    )
    mass: float | None = field(
        default=None,
        metadata={
            "help": "Recompute the fewest rows that hold this share (0..1) of the total change, "
            "instead of a number of rows; the paper's figures use 0.5."
        },
    )
    drift: Drift = field(
        default="previous",
        metadata={
            "help": "What change is measured against: the query of the previous pass (paper) or "
            "of the row's last refresh."
        },
    )
    first_pass: FirstPass = field(
        default="dense", metadata={"help": "Whether pass 0 reads all pages (dense) or the chosen ones (sparse)."}
    )
    save_pass: SavePass = field(
        default="step",
        metadata={
            "help": "What the save pass does: an ordinary step, dense for all rows, or reuse "
            "without reading the context."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("active", self.active)
        if self.mass is not None:
            check_fraction("mass", self.mass)
        check_choice("drift", self.drift, get_args(Drift))
        check_choice("save_pass", self.save_pass, get_args(SavePass))

    def rule(self, inputs: PassInputs[RuleMemory]) -> Rule:
        """Return the rule of a pass: all rows in pass 0, dense layers and dense save passes, else those that moved."""
        dense = self.in_dense_layer(inputs)
        if self.save_pass == "dense":
            dense = either(dense, inputs.saves())
        memory = inputs.memory
        return self.ranking(
            inputs,
            all_rows=either(dense, inputs.restarts),
            all_pages=dense,
            no_rows=inputs.saves() if self.save_pass == "reuse" else False,
            reference=None if memory is None else memory.reference,
            mass=self.mass,
            count=None if self.mass is not None else min(self.active, inputs.tokens),
            keep=self._kept(inputs),
        )

    def _kept(self, inputs: PassInputs[RuleMemory]) -> Keep:
        if self.in_dense_layer(inputs):
            return "nothing"
        return "queries" if self.drift == "previous" or inputs.memory is None else "active_queries"
