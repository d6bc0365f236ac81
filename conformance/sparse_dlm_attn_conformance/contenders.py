"""Policies under test, with parameters small enough for small problems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from sparse_dlm_attn import PrefixAttentionPolicy, SparseAttentionError, get_policy
from sparse_dlm_attn.registry import list_policies
from sparse_dlm_attn_conformance.guards import restored, time_limit
from sparse_dlm_attn_conformance.strategies import choice
from sparse_dlm_attn_conformance.subjects import names_nothing

VARIANTS: dict[str, tuple[str, ...]] = {
    "dense": ("dense",),
    "sliding-window": ("sliding-window:window=3",),
    "streaming-llm": ("streaming-llm:sinks=3,window=2",),
    "quest": ("quest:budget=3,min_pages=1,pages=own,union_over=query_head", "quest:budget=4,newest=true"),
    "losa": ("losa:budget=3,active=2", "losa:budget=4,mass=0.5,drift=refresh,pages=own"),
    "flashblock": ("flashblock:limit=2",),
    "mage": ("mage:budget=4,dense_layers=0",),
    "sparsed": ("sparsed:ratio=0.4,warmup=1,span=2", "sparsed:variant=paper,warmup=1,ratio=0.4"),
    "fast-dllm": ("fast-dllm", "fast-dllm:mode=prefix"),
    "dkv-cache": ("dkv-cache:reload=4", "dkv-cache:mode=greedy,neighbours=2"),
    "sparse-dllm": ("sparse-dllm:ratio=0.4,delay=0", "sparse-dllm:kernel=1"),
    "snapkv": ("snapkv:capacity=5,window=2,kernel=3",),
}
"""Defaults are made for contexts of thousands of tokens: on a generated problem, which has a few dozen,
they would read every page and prove nothing."""


RANKING: dict[str, tuple[Any, ...]] = {
    "budget": (4, 1, 7, 16),
    "page_count": ("floor", "ceil"),
    "min_pages": (1, 2, 3),
    "newest": (False, True),
    "dense_layers": (0, 1),
    "pages": ("union", "own"),
    "union_over": ("kv_head", "query_head", "layer"),
    "group_scores": ("query_head", "mean", "max"),
    "first_pass": ("dense", "sparse"),
}
PARAMETERS: dict[str, dict[str, tuple[Any, ...]]] = {
    "quest": RANKING,
    "losa": {
        **RANKING,
        "active": (2, 0, 1, 5),
        "mass": (None, 0.5, 0.0, 0.9, 1.0),
        "drift": ("previous", "refresh"),
        "save_pass": ("step", "dense", "reuse"),
    },
    "sliding-window": {"window": (3, 1, 9), "after": (0, 2)},
    "streaming-llm": {"sinks": (2, 0, 5), "window": (2, 1, 9), "after": (0, 2)},
    "flashblock": {"limit": (1, 0, 2, 3), "dirty_rows": ("drop", "keep"), "save_pass": ("refresh", "reuse")},
    "mage": {"budget": (4, 1, 9), "dense_layers": (0, 1)},
    "sparsed": {
        "ratio": (0.3, 0.0, 0.5, 1.0),
        "skip": (0.2, 0.0),
        "warmup": (1, None, 0, 2),
        "span": (None, 1, 2),
        "isolated": (True, False),
        "variant": ("code", "paper"),
        "score_scale": ("attention", "heads"),
        "frozen": (True, False),
    },
    "fast-dllm": {"mode": ("dual", "prefix")},
    "dkv-cache": {"mode": ("decode", "greedy"), "reload": (None, 1, 3), "neighbours": (4, 0)},
    "sparse-dllm": {"ratio": (0.5, 0.0, 0.3, 1.0), "kernel": (3, 1, 5), "delay": (0, 1)},
    "snapkv": {"capacity": (4, 6, 30), "window": (1, 3), "kernel": (1, 3), "pooling": ("avg", "max")},
}
"""Parameters of the published policies, with values that matter on small problems."""


@st.composite
def policy_texts(draw: Any, /) -> str:
    """Draw a published policy with parameters, as `sparse_dlm_attn.get_policy` reads it."""
    name = draw(choice(tuple(PARAMETERS)), label="policy")
    chosen = [f"{key}={draw(choice(values), label=key)}" for key, values in PARAMETERS[name].items()]
    return f"{name}:{','.join(chosen)}"


@dataclass(eq=False)
class Contender:
    """A policy under test, or why it did not load."""

    spec: str
    instance: PrefixAttentionPolicy[Any] | None = None
    error: str = ""

    def __repr__(self) -> str:
        return self.spec


def contenders(wanted: list[str], seconds: float = 120.0) -> list[Contender]:
    """Return the wanted policies, by default all registered ones.

    A registered name stands for its small variants (`VARIANTS`); anything else is taken as it is.
    """
    names = list(dict.fromkeys(wanted)) or list(list_policies())
    return [load(spec, seconds) for name in names for spec in VARIANTS.get(name, (name,))]


def load(spec: str, seconds: float = 120.0) -> Contender:
    """Load one policy, whatever foreign code does meanwhile; raise for what is not there at all."""
    try:
        with restored(), time_limit(seconds, f"loading policy {spec}"):
            return Contender(spec, get_policy(spec))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # foreign code may raise anything
        if names_nothing(spec, error):
            raise
        if isinstance(error, SparseAttentionError):
            return Contender(spec, None, str(error))
        return Contender(spec, None, f"{type(error).__name__}: {error}")
