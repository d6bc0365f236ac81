"""A proof that a backend or a policy keeps the specification, for anyone's backend or policy.

``sparse-dlm-attn conformance --backend mine`` runs it, and so does
``pytest --pyargs sparse_dlm_attn_conformance --sda-backend mine`` from any directory. Strategies, laws
and the error budget are public, to be used in a suite of one's own.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "cases": ("Case",),
    "checks": ("ConformanceFailure",),
    "episodes": ("Episode",),
    "run": ("check_backend", "reproduce", "reproduce_denoising"),
    "strategies": ("cases",),
    "subjects": ("Subject",),
    "tables": ("ChangeTable", "MergeTable", "RankedRule", "ScoreTable"),
}
__all__ = sorted(name for names in _HOMES.values() for name in names)

PROFILES = {"quick": 10, "ci": 40, "nightly": 2000}
"""Problems that a law gets, by profile."""


def __getattr__(name: str) -> Any:
    # pytest imports this package in every run that has the plug-in: load Hypothesis only when used.
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
