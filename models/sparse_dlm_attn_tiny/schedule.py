"""Which masked tokens of a block are decoded after a pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sparse_dlm_attn.errors import InvalidArgumentError
from sparse_dlm_attn.policy import check_count, check_fraction

__all__ = ["DEFAULT_STEPS", "Schedule", "confidences", "static_counts"]

DEFAULT_STEPS = 8

HostArray = np.ndarray[Any, Any]


def static_counts(tokens: int, steps: int) -> tuple[int, ...]:
    """Return how many tokens each of ``steps`` passes decodes.

    ``floor(tokens / steps)`` each, and one more in the first ``tokens mod steps`` passes (SDAR's
    schedule): 8 tokens in 3 passes are 3, 3, 2.

    Raises
    ------
    InvalidArgumentError
        If ``steps`` lies outside ``1..tokens``: a pass that decodes nothing would change nothing.
    """
    check_count("steps", steps, 1)
    if steps > tokens:
        raise InvalidArgumentError(
            "steps", f"must be at most {tokens}, since every pass decodes at least one of {tokens} tokens",
            steps,
        )
    base, rest = divmod(tokens, steps)
    return tuple(base + (index < rest) for index in range(steps))


def confidences(logits: HostArray, read: HostArray, moment: str) -> tuple[HostArray, HostArray]:
    """Return the likeliest byte of each row and its softmax probability.

    Parameters
    ----------
    logits : numpy.ndarray
        ``(batch, tokens, 256)``. A logit of -inf is a probability of 0.
    read : numpy.ndarray
        bool ``(batch, tokens)``: rows whose answer counts. That of others may be NaN.
    moment : str
        What the logits are of, for the message ("pass 3 of block 0").

    Returns
    -------
    best : numpy.ndarray
        int64 ``(batch, tokens)``; ties go to the smallest byte.
    confidence : numpy.ndarray
        float64 ``(batch, tokens)``.

    Raises
    ------
    InvalidArgumentError
        If a row that is read has no softmax: one of its logits is NaN or inf, or all are -inf.
    """
    wide = logits.astype(np.float64)
    best = wide.argmax(axis=-1)
    peak = wide.max(axis=-1, keepdims=True)  # finite just where there is a softmax
    broken = read & ~np.isfinite(peak[..., 0])
    if broken.any():
        first = int(broken.any(axis=-1).argmax())
        raise InvalidArgumentError(
            "logits", "must be numbers or -inf, with a number in every row",
            f"{int((~np.isfinite(wide[read])).sum())} of {wide[read].size} that are not finite in {moment}: "
            f"rows {np.flatnonzero(broken[first]).tolist()} of sequence {first}",
            "If policy 'dense' on backend 'reference' decodes, look at the policy and backend in use, "
            "otherwise at the weights.",
        )
    with np.errstate(over="ignore", invalid="ignore"):  # a difference beyond all floats is a probability of 0
        return best, 1.0 / np.exp(wide - peak).sum(axis=-1)


@dataclass(frozen=True)
class Schedule:
    """Greedy unmasking, by a fixed number of tokens a pass or by confidence.

    Parameters
    ----------
    tokens : int
        Length of the block.
    steps : int, optional
        Denoising passes of a full block; default 8 unless ``threshold`` is given (at most ``tokens``).
    threshold : float, optional
        Decode every token whose confidence is strictly above it, and at least the best one.

    Raises
    ------
    InvalidArgumentError
        If both are given or one is out of range.

    Notes
    -----
    Two deviations from SDAR's script. Tokens decoded already are never chosen again: there, a first
    block with prompt tokens in it can have fewer masks than a pass decodes, and the surplus overwrites
    decoded tokens. And by threshold at least one token is decoded a pass, not at least the fixed number.
    """

    tokens: int
    steps: int | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.threshold is not None:
            raise InvalidArgumentError(
                "steps/threshold", "must not be given together",
                f"steps={self.steps}, threshold={self.threshold}", "Leave one of them out.",
            )
        if self.threshold is not None:
            check_fraction("threshold", self.threshold)
        else:
            static_counts(self.tokens, self.passes_of_full_block)

    @property
    def passes_of_full_block(self) -> int:
        """Denoising passes of a block without prompt tokens, by the fixed schedule."""
        return min(DEFAULT_STEPS, self.tokens) if self.steps is None else self.steps

    def planned_passes(self, masked: int) -> int | None:
        """Return the denoising passes that ``masked`` tokens take, None if the model decides."""
        if self.threshold is not None:
            return None
        left, passes = masked, 0
        for count in static_counts(self.tokens, self.passes_of_full_block):
            if left <= 0:
                break
            left, passes = left - count, passes + 1
        return passes

    def choose(self, index: int, masked: HostArray, confidence: HostArray) -> HostArray:
        """Return the tokens to decode after pass ``index``.

        Parameters
        ----------
        index : int
            Pass in the block, from 0.
        masked : numpy.ndarray
            bool ``(tokens,)``: tokens not decoded yet.
        confidence : numpy.ndarray
            float64 ``(tokens,)``; NaN comes last.

        Returns
        -------
        numpy.ndarray
            bool ``(tokens,)``: a part of ``masked``, not empty unless that is. Ties go to the lowest
            position.
        """
        ranked = np.lexsort((-confidence, ~masked))  # whatever a confidence is, masked tokens come first
        if self.threshold is None:
            count = static_counts(self.tokens, self.passes_of_full_block)[index]
        else:
            count = max(int((masked & (confidence > self.threshold)).sum()), 1)
        chosen = np.zeros(self.tokens, dtype=bool)
        chosen[ranked[:count]] = True
        return chosen & masked
