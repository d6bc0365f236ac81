"""Nothing is timed before its result is right: whole passes against the PyTorch backend's plain path."""

from __future__ import annotations

from typing import Any

from sparse_dlm_attn import Backend, PassInfo, PrefixAttention, SparseAttentionError
from sparse_dlm_attn_benchmarks.layer import Layer
from sparse_dlm_attn_benchmarks.peers import TOLERANCE
from sparse_dlm_attn_benchmarks.shape import Shape
from sparse_dlm_attn_benchmarks.timing import relative_error
from sparse_dlm_attn_torch import TorchBackend

__all__ = ["WrongResultError", "check_passes"]

MOST_DIFFERING = 1e-3
"""Of the pages that a pass selects: scores of random numbers may round to either side of a cut."""


class WrongResultError(SparseAttentionError, ArithmeticError):
    """A backend's result differs from the plain path's, so that its time means nothing."""


def check_passes(shape: Shape, policy: Any, backend: Backend, layer: Layer, /, **info: Any) -> float:
    """Return the largest relative error of three passes beside the plain path, which multiplies in float32.

    Raise `WrongResultError` if it exceeds the limit of the dtype, or if other pages were selected.
    """
    plain = TorchBackend(device=str(layer.q.device), attention="masked")
    ours, theirs = PrefixAttention(policy, backend), PrefixAttention(policy, plain)
    memory, other, worst = None, None, 0.0
    for index in range(3):
        q = layer.q if index < 2 else layer.q_next
        inputs, place = (q, layer.k, layer.v, layer.context), PassInfo(index, **info)
        out, memory = ours(*inputs, memory, place)
        expected, other = theirs(*inputs, other, place)
        worst = max(worst, relative_error(out, expected))
        differing = float((memory.selection.mask != other.selection.mask).float().mean())
        if differing > MOST_DIFFERING:
            raise WrongResultError(
                f"{shape}, {policy}: backend {backend.name!r} selects {differing:.2%} other pages than the "
                f"plain path; at most {MOST_DIFFERING:.2%} may differ. It was not timed."
            )
    if not worst <= TOLERANCE[shape.dtype]:
        raise WrongResultError(
            f"{shape}, {policy}: the output of backend {backend.name!r} has a relative error of {worst:.1e}; "
            f"at most {TOLERANCE[shape.dtype]:.0e} is allowed. It was not timed."
        )
    return worst
