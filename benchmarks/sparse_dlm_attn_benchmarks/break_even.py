"""From which context length and density on sparse beats dense, on the GPU at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from sparse_dlm_attn import Backend

if TYPE_CHECKING:
    from sparse_dlm_attn_benchmarks.layer import Layer
    from sparse_dlm_attn_benchmarks.shape import Shape

__all__ = ["Point", "answer", "measure_context", "record"]

LAYER = {"layer": 16, "num_layers": 32}
"""The layer that is timed: one in the middle, since some policies read the first ones densely."""
DENSE_LAYERS = 4


@dataclass(frozen=True)
class Point:
    """One context length and density."""

    context: int  # tokens
    asked: float  # share of the context that was asked for, and that the pass reads
    density: float
    policy: str  # the policy with the budget that reads so much
    # Microseconds of a whole pass of one layer, inside a graph of several, and of the fastest dense peer.
    sparse_us: float
    dense_us: float
    peer: str  # its name
    error: float  # relative error of the pass's output

    @property
    def speedup(self) -> float:
        """Dense time over sparse time."""
        return self.dense_us / self.sparse_us


def measure_context(
    shape: Shape, policy: str, densities: Sequence[float], backend: Backend, repeats: int, say: Callable[[str], None]
) -> list[Point]:
    """Measure all densities of one context length; ``say`` takes remarks on peers that are not here."""
    import torch

    from sparse_dlm_attn_benchmarks import gate, layer, timing

    made = layer.layers(shape, backend, share=min(densities))
    dense_us, peer = _fastest_dense(made, shape, backend, repeats, say)
    points = []
    for asked in sorted(densities):
        chosen, density = layer.budget_for(asked, policy, shape, backend, made[0], **LAYER)
        error = gate.check_passes(shape, chosen, backend, made[0], **LAYER)
        works = [layer.runner(chosen, backend, one, **LAYER) for one in made]
        spent = timing.measure_chained(works, repeats)
        points.append(Point(shape.context, asked, density, chosen, spent, dense_us, peer, error))
    del made
    torch.cuda.empty_cache()
    return points


def _fastest_dense(
    made: list[Layer], shape: Shape, backend: Backend, repeats: int, say: Callable[[str], None]
) -> tuple[float, str]:
    """Return microseconds and name of the fastest dense kernel: libraries' and the backend's own."""
    from sparse_dlm_attn import UnavailableError
    from sparse_dlm_attn_benchmarks import gate, layer, peers, timing

    some = made[: max(DENSE_LAYERS, -(-timing.COLD_BYTES // shape.cache_bytes))]
    times: dict[str, float] = {}
    for name, works in peers.dense_peers(some, shape).items():
        if isinstance(works, str):
            say(f"{shape}: {name} is not here ({works})")
        else:
            times[name] = timing.measure_chained(works, repeats)
    try:
        gate.check_passes(shape, "dense", backend, some[0])
    except gate.WrongResultError as error:
        say(str(error))
    else:
        own = [layer.runner("dense", backend, one) for one in some]
        times[f"{backend.name}, policy dense"] = timing.measure_chained(own, repeats)
    if not times:
        raise UnavailableError(
            "dense peers", ["none of them runs here"], "Upgrade PyTorch, whose flash attention is one."
        )
    fastest = min(times, key=lambda name: times[name])
    return times[fastest], fastest


def answer(points: Sequence[Point], policy: str) -> str:
    """Say in one sentence for each density from which context on sparse beats dense at every longer one."""
    longest = max(point.context for point in points)
    parts = []
    for asked in sorted({point.asked for point in points}):
        column = sorted((p for p in points if p.asked == asked), key=lambda p: p.context, reverse=True)
        winning = []
        for point in column:
            if point.speedup <= 1:
                break
            winning.append(point)
        if winning:
            ends = winning[-1], winning[0]
            gains = " to ".join(dict.fromkeys(f"{point.speedup:.2f}x" for point in ends))
            parts.append(f"from {tokens(ends[0].context)} tokens on at {asked:.0%} ({gains})")
    if not parts:
        best = max(points, key=lambda point: point.speedup)
        return (
            f"{policy} beats dense attention nowhere up to {tokens(longest)} tokens; it comes closest at "
            f"{tokens(best.context)} tokens and {best.asked:.0%} of them read, with {best.speedup:.2f}x."
        )
    return f"{policy} beats the fastest dense kernel " + ", ".join(parts) + " of the context read."


def tokens(count: int) -> str:
    """Write a number of tokens, in K where it is a multiple."""
    return f"{count // 1024}K" if count % 1024 == 0 else str(count)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def record(points: Sequence[Point], shape: Shape, policy: str, sentence: str) -> dict[str, Any]:
    """Return everything as JSON can say it, with versions and device."""
    import torch

    sizes = {name: size for name, size in asdict(shape).items() if name != "context"}
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "policy": policy,
        **sizes,
        "answer": sentence,
        "points": [{**asdict(point), "speedup": point.speedup} for point in points],
    }
