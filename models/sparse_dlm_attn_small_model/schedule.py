"""Which masked tokens of a block are decoded after a pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sparse_dlm_attn.errors import InvalidArgumentError
from sparse_dlm_attn.policy import check_count, check_fraction

DEFAULT_STEPS = 8
HostArray = np.ndarray[Any, Any]


def confidences(logits: HostArray, read: HostArray, moment: str, first_row: int = 0) -> tuple[HostArray, HostArray]:
    """Return the likeliest byte of each row, int64, and its softmax probability, float64 ``(batch, tokens)``.

    A logit of -inf is a probability of 0; ties go to the smallest byte. Raise `InvalidArgumentError`, with
    ``moment`` and the rows counted from ``first_row``, if a row that is ``read`` has no softmax: one of its
    logits is NaN or inf, or all are -inf. Others may hold anything.
    """
    wide = logits.astype(np.float64)
    best = wide.argmax(axis=-1)
    peak = wide.max(axis=-1, keepdims=True)  # finite just where there is a softmax
    broken = read & ~np.isfinite(peak[..., 0])
    if broken.any():
        first = int(broken.any(axis=-1).argmax())
        raise InvalidArgumentError(
            "logits",
            "must be numbers or -inf, with a number in every row",
            f"{int((~np.isfinite(wide[read])).sum())} of {wide[read].size} that are not finite in {moment}: "
            f"rows {(first_row + np.flatnonzero(broken[first])).tolist()} of sequence {first}",
            "If policy 'dense' on backend 'reference' decodes, look at the policy and backend in use, "
            "otherwise at the weights.",
        )
    with np.errstate(over="ignore", invalid="ignore"):  # a difference beyond all floats is a probability of 0
        return best, 1.0 / np.exp(wide - peak).sum(axis=-1)


@dataclass(frozen=True)
class Schedule:
    """Greedy unmasking, by a fixed number of tokens a pass or by confidence; bad values are typed errors.

    Two deviations from SDAR's script. Tokens decoded already are never chosen again: there, a first
    block with prompt tokens in it can have fewer masks than a pass decodes, and the surplus overwrites
    decoded tokens. And by threshold at least one token is decoded a pass, not at least the fixed number.
    """

    tokens: int  # length of the block
    steps: int | None = None  # passes of a full block; default 8, at most one a token
    threshold: float | None = None  # instead: decode all tokens with a confidence strictly above it

    def __post_init__(self) -> None:
        if self.threshold is not None:
            if self.steps is not None:
                rule = f"must not be given together with threshold={self.threshold}"
                raise InvalidArgumentError("steps", rule, self.steps)
            check_fraction("threshold", self.threshold)
        elif self.steps is not None:
            check_count("steps", self.steps, 1)
            if self.steps > self.tokens:
                raise InvalidArgumentError(
                    "steps",
                    f"must be at most {self.tokens}, since every pass decodes at least one of {self.tokens} tokens",
                    self.steps,
                )

    @property
    def counts(self) -> tuple[int, ...]:
        """How many tokens each pass decodes, by the fixed schedule: 8 tokens in 3 passes are 3, 3, 2.

        ``floor(tokens / steps)`` each, and one more in the first ``tokens mod steps`` passes (SDAR's rule).
        """
        steps = min(DEFAULT_STEPS, self.tokens) if self.steps is None else self.steps
        base, rest = divmod(self.tokens, steps)
        return tuple(base + (index < rest) for index in range(steps))

    def planned_passes(self, masked: int) -> int | None:
        """Return the denoising passes that ``masked`` tokens take, None if the model decides."""
        if self.threshold is not None:
            return None
        return int(np.searchsorted(np.cumsum(self.counts), masked)) + 1 if masked > 0 else 0

    def choose(self, index: int, masked: HostArray, confidence: HostArray) -> HostArray:
        """Return the tokens to decode after pass ``index`` of the block: some of those that are ``masked``.

        All are arrays ``(tokens,)``. Ties go to the lowest position; a confidence of NaN comes last.
        """
        ranked = np.lexsort((-confidence, ~masked))  # whatever a confidence is, masked tokens come first
        if self.threshold is None:
            count = self.counts[index]
        else:
            count = max(int((masked & (confidence > self.threshold)).sum()), 1)
        chosen = np.zeros_like(masked)
        chosen[ranked[:count]] = True
        return chosen & masked
