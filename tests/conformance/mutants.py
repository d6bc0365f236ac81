"""Every broken backend by name; importing the modules registers them."""

from __future__ import annotations

import mutants_attention
import mutants_many
import mutants_ranked
import mutants_ranking
import mutants_reading
import mutants_scores
import mutants_sizes
import mutants_states
from mutation import BACKENDS

__all__ = ["BACKENDS", "MODULES"]

MODULES = (
    mutants_reading,
    mutants_attention,
    mutants_states,
    mutants_scores,
    mutants_ranking,
    mutants_ranked,
    mutants_sizes,
    mutants_many,
)
