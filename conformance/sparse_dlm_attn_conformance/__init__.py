"""A proof that a backend or a policy keeps the specification, for anyone's backend or policy.

``sparse-dlm-attn conformance --backend mine`` runs it, and so does
``pytest --pyargs sparse_dlm_attn_conformance --sda-backend mine`` from any directory. Strategies, laws
and the error budget are public, to be used in a suite of one's own.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = [
    "Case",
    "ChangeTable",
    "ConformanceFailure",
    "Episode",
    "MergeTable",
    "RankedRule",
    "ScoreTable",
    "Subject",
    "cases",
    "check_backend",
    "reproduce",
    "reproduce_denoising",
]

_HOMES = {
    "Case": "cases",
    "ChangeTable": "tables",
    "ConformanceFailure": "checks",
    "Episode": "episodes",
    "MergeTable": "tables",
    "RankedRule": "tables",
    "ScoreTable": "tables",
    "Subject": "subjects",
    "cases": "strategies",
    "check_backend": "programmatic",
    "reproduce": "programmatic",
    "reproduce_denoising": "programmatic",
}


def __getattr__(name: str) -> Any:
    # pytest imports this package in every run that has the plug-in: load Hypothesis only when used.
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
