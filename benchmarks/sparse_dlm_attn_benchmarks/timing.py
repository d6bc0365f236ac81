"""Measure work on a GPU: CUDA-graph replays over inputs that rotate, so that the L2 cache is cold."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

__all__ = ["COLD_BYTES", "Timing", "bandwidth", "elapsed", "measure", "measure_chained", "relative_error"]

COLD_BYTES = 420 << 20
"""Bytes that inputs must rotate over: several times the L2 cache of any GPU of today. Flushing it by writing
a buffer leaves dirty lines behind, which cost the next kernel about 10 us."""


class Timing:
    """Medians of the times of one piece of work, in microseconds.

    ``alone`` is a graph that holds it once, the launch included; ``chained`` a graph that holds it once for every
    input, divided by their number: what it costs inside a model; ``plain`` are launches without a graph.
    """

    def __init__(self, alone: float, chained: float, plain: float) -> None:
        self.alone, self.chained, self.plain = alone, chained, plain

    def as_dict(self) -> dict[str, float]:
        """Return the three times under the names that records give them."""
        return {"alone_us": self.alone, "chained_us": self.chained, "plain_us": self.plain}


def measure(works: Sequence[Callable[[], object]], repeats: int = 30) -> Timing:
    """Time works that do the same on different inputs, of `COLD_BYTES` or more together."""
    for work in works:
        work()
    torch.cuda.synchronize()
    graphs = [_captured([work]) for work in works]
    chain = _captured(works)
    alone = [elapsed(graph.replay) for _ in range(repeats) for graph in graphs]
    chained = [elapsed(chain.replay) / len(works) for _ in range(repeats)]
    plain = [elapsed(work) for _ in range(max(repeats // 10, 2)) for work in works]
    return Timing(statistics.median(alone), statistics.median(chained), statistics.median(plain))


def measure_chained(works: Sequence[Callable[[], object]], repeats: int = 30) -> float:
    """Return `Timing.chained` alone: one capture, for whoever compares many forms of the same work."""
    for work in works:
        work()
    torch.cuda.synchronize()
    chain = _captured(works)
    return statistics.median(elapsed(chain.replay) / len(works) for _ in range(repeats))


def _captured(works: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    graph.replay()  # the first replay uploads the graph
    torch.cuda.synchronize()
    return graph


def elapsed(run: Callable[[], object]) -> float:
    """Return the microseconds that the GPU takes for a call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def bandwidth() -> float:
    """Return the read bandwidth of device memory, bytes a second: the best of a few plain sums."""
    data = torch.empty(1 << 30, dtype=torch.float32, device="cuda").normal_()
    best = min(elapsed(lambda: torch.sum(data)) for _ in range(10))
    return data.numel() * 4 / (best * 1e-6)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ``|got - expected| / |expected|``; infinite if anything is NaN."""
    got, expected = got.double(), expected.double()
    error = (got - expected).norm() / expected.norm()
    return float("inf") if bool(error.isnan()) else float(error)
