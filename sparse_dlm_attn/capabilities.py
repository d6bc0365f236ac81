"""What a backend declares, what a call asks for, and the reasons why the one does not cover the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sparse_dlm_attn.arrays import Array, device_kind, dtype_name, shape_of
from sparse_dlm_attn.context import Context
from sparse_dlm_attn.errors import InvalidArgumentError, InvalidTypeError

__all__ = ["Capabilities", "Problem"]


@dataclass(frozen=True)
class Problem:
    """The facts about a call that decide whether a backend can compute it."""

    dtype: str
    head_dim: int
    page_size: int
    q_heads: int
    kv_heads: int
    block_length: int
    device: str = "cpu"

    @classmethod
    def of(cls, q: Array, context: Context) -> Problem:
        """Describe queries ``(batch, q_heads, tokens, head_dim)`` over ``context``."""
        _, q_heads, tokens, head_dim = shape_of(q)
        return cls(dtype_name(q), head_dim, context.page_size, q_heads, context.kv_heads, tokens, device_kind(q))


@dataclass(frozen=True)
class Capabilities:
    """What a backend declares that it computes; None means no limit.

    Parameters
    ----------
    dtypes, devices : tuple of str
        Supported dtypes of q, K and V, and device kinds ("cpu", "cuda").
    head_dims, page_sizes, groups : tuple of int, optional
        Supported channels a head, tokens a page, and query heads a KV head.
    max_block_length : int, optional
        Most query rows in one call, in tokens.
    deterministic : bool
        Same inputs give the same bits.
    batch_invariant : bool
        A sequence's result has the same bits whatever else is in the batch.
    plans_on_host : bool
        Selections on a device are read on the host, so that a pass waits for the device and cannot be
        captured in a graph: clause SYNC-1 does not hold.
    notes : str
        Anything a user should know, in one sentence.
    """

    dtypes: tuple[str, ...] = ("float32",)
    devices: tuple[str, ...] = ("cpu",)
    head_dims: tuple[int, ...] | None = None
    page_sizes: tuple[int, ...] | None = None
    groups: tuple[int, ...] | None = None
    max_block_length: int | None = None
    deterministic: bool = True
    batch_invariant: bool = False
    plans_on_host: bool = False
    notes: str = field(default="")

    def why_not(self, problem: Problem) -> list[str]:
        """Return every reason against ``problem``; empty if it is supported."""
        if not isinstance(problem, Problem):
            raise InvalidTypeError(
                "problem", "must be a Problem", type(problem).__name__, "Use Problem.of(q, context)."
            )
        if problem.kv_heads < 1 or problem.q_heads % problem.kv_heads:
            raise InvalidArgumentError(
                "problem.q_heads",
                "must be a multiple of kv_heads, itself at least 1",
                f"q_heads {problem.q_heads}, kv_heads {problem.kv_heads}",
            )
        checks: list[tuple[str, Any, tuple[Any, ...] | None]] = [
            ("dtype", problem.dtype, self.dtypes),
            ("device", problem.device, self.devices),
            ("head_dim", problem.head_dim, self.head_dims),
            ("page_size", problem.page_size, self.page_sizes),
            ("q_heads / kv_heads", problem.q_heads // problem.kv_heads, self.groups),
        ]
        reasons = [
            f"{name} {value} is not one of {listed(allowed)}"
            for name, value, allowed in checks
            if allowed is not None and value not in allowed
        ]
        if self.max_block_length is not None and problem.block_length > self.max_block_length:
            reasons.append(f"block of {problem.block_length} tokens exceeds {self.max_block_length}")
        return reasons


def listed(values: tuple[Any, ...]) -> str:
    """Write values that a backend supports; a run of integers as its first and last, ``1..256``."""
    ints = all(isinstance(value, int) for value in values)
    if len(values) > 2 and ints and values == tuple(range(values[0], values[0] + len(values))):
        return f"{values[0]}..{values[-1]}"
    return ", ".join(map(str, values))
