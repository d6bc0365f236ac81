"""Search for launch settings of the Triton backend: one setting after the other, twice around."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from sparse_dlm_attn import Backend
from sparse_dlm_attn_benchmarks.break_even import LAYER
from sparse_dlm_attn_benchmarks.gate import WrongResultError, check_passes
from sparse_dlm_attn_benchmarks.layer import budget_for, layers, runner
from sparse_dlm_attn_benchmarks.shape import Shape
from sparse_dlm_attn_benchmarks.timing import measure_chained
from sparse_dlm_attn_triton.settings import Entry, Kind, Machine, Settings, forced, watched

__all__ = ["CANDIDATES", "kind_of", "search", "tune_shape"]

DENSITY = 0.1
MOST_LAYERS = 16
LEAST_GAIN = 0.01
"""Share by which a setting must be faster to be taken: less is noise."""

CANDIDATES: dict[str, tuple[int, ...]] = {
    "block_n": (32, 64, 128),
    "warps": (4, 8),
    "stages": (1, 2, 3, 4),
    "least_m": (16, 32, 64),
    "programs": (1, 2, 3, 4, 6, 8),
}
"""What is tried of each setting; ``programs`` for each multiprocessor of the GPU."""
Time = Callable[[Settings], float | None]


def kind_of(shape: Shape) -> Kind:
    """Return what settings for a shape are kept under."""
    return Kind(
        shape.dtype,
        shape.head_dim,
        shape.page_size,
        shape.q_heads // shape.kv_heads,
        shape.tokens,
        shape.batch * shape.kv_heads,
        shape.context,
    )


def neighbours(settings: Settings, multiprocessors: int) -> Iterator[Settings]:
    """Return settings that differ in one value, axis by axis; see `search`."""
    for name, values in CANDIDATES.items():
        factor = multiprocessors if name == "programs" else 1
        for value in values:
            changed = replace(settings, **{name: value * factor})
            if changed != settings:
                yield changed


def search(default: Settings, multiprocessors: int, limit: int, time: Time) -> tuple[Settings, float, float]:
    """Return the fastest settings found, their time and that of the default, in microseconds.

    At most ``limit`` settings are timed, the default included; ``time`` says None of those that do not run or are
    wrong. Raise `WrongResultError` if the default itself does not run.
    """
    first = time(default)
    if first is None:
        raise WrongResultError("the default settings of backend 'triton' do not run here; nothing was kept.")
    best, least, seen = default, first, {default}
    moved = True
    while moved and len(seen) < limit:
        moved = False
        for name in CANDIDATES:
            # From wherever the axes before it have led.
            tried = [
                one
                for one in neighbours(best, multiprocessors)
                if one not in seen and getattr(one, name) != getattr(best, name)
            ]
            for one in tried[: limit - len(seen)]:
                seen.add(one)
                spent = time(one)
                if spent is not None and spent < least * (1 - LEAST_GAIN):
                    best, least, moved = one, spent, True
    return best, least, first


def tune_shape(shape: Shape, policy: str, backend: Backend, limit: int, repeats: int, step: Callable[[], Any]) -> Entry:
    """Tune for one shape: each of at most ``limit`` settings compiles the attention kernel once, 1 to 3 seconds."""
    made = layers(shape, backend)[:MOST_LAYERS]
    chosen, _ = budget_for(DENSITY, policy, shape, backend, made[0], **LAYER)
    works = [runner(chosen, backend, one, **LAYER) for one in made]

    def time(settings: Settings) -> float | None:
        try:
            with forced(settings):
                check_passes(shape, chosen, backend, made[0], **LAYER)
                return measure_chained(works, repeats)
        except Exception:  # a wrong result, or tiles that do not fit the GPU, which Triton says in many ways
            return None
        finally:
            step()

    with watched() as defaults:
        works[0]()
    best, spent, before = search(defaults[-1], torch.cuda.get_device_properties(0).multi_processor_count, limit, time)
    return Entry(Machine.here(), kind_of(shape), best, before, spent)
