"""Every broken policy by name; importing the modules registers them."""

from __future__ import annotations

import policy_mutants_computed
import policy_mutants_others
import policy_mutants_passes
import policy_mutants_ranked
from policy_mutation import POLICIES

__all__ = ["MODULES", "POLICIES"]

MODULES = (policy_mutants_ranked, policy_mutants_others, policy_mutants_computed, policy_mutants_passes)
