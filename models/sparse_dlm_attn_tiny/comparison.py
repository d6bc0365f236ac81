"""Decode prompts with several policies over one prefill each, and compare with dense decoding."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sparse_dlm_attn_tiny.cache import KVCache
from sparse_dlm_attn_tiny.decoding import decode_blocks, decode_together, decodes_together
from sparse_dlm_attn_tiny.model import TinyModel
from sparse_dlm_attn_tiny.policy_choice import PolicyChoice
from sparse_dlm_attn_tiny.prompts import Prompt
from sparse_dlm_attn_tiny.records import Decoded, PassRecord, TrafficTotal
from sparse_dlm_attn_tiny.retrieval import answer_blocks

__all__ = [
    "DEFAULT_BLOCKS",
    "Comparison",
    "DecodeSettings",
    "PolicyResult",
    "agreement",
    "compare",
    "compare_together",
    "traffic_record",
]

DEFAULT_BLOCKS = 4
"""Blocks to decode at most when no answer tells how many are needed."""


@dataclass(frozen=True)
class DecodeSettings:
    """How every policy of a comparison decodes.

    Parameters
    ----------
    block_length : int
        Tokens denoised together.
    steps, threshold : int, float, optional
        Unmasking, see `decode_blocks`.
    page_size : int
        Tokens a page.
    max_blocks : int, optional
        Blocks to decode at most; None for as many as the expected answer needs, or `DEFAULT_BLOCKS`.
    """

    block_length: int = 16
    steps: int | None = None
    threshold: float | None = None
    page_size: int = 16
    max_blocks: int | None = None

    def blocks_for(self, answer: str | None) -> int:
        """Return how many blocks to decode at most.

        Parameters
        ----------
        answer : str or None
            The expected answer, without stop byte.
        """
        if self.max_blocks is not None:
            return self.max_blocks
        return DEFAULT_BLOCKS if answer is None else answer_blocks(answer, self.block_length)


@dataclass(frozen=True)
class PolicyResult:
    """What one policy made of one prompt.

    Parameters
    ----------
    choice : PolicyChoice
        The policy.
    output : bytes
        What it decoded, up to the stop byte.
    exact : bool or None
        Whether that is the expected answer; None if none is known.
    agreement : float
        Share of bytes that equal those of dense decoding, 0..1.
    blocks, passes : int
        Blocks decoded and passes made, save passes included.
    everything, after_first_pass : TrafficTotal
        What was read: in all passes with all metadata, and without pass 0 of each block.
    seconds : float
        Wall time without the prefill.
    """

    choice: PolicyChoice
    output: bytes
    exact: bool | None
    agreement: float
    blocks: int
    passes: int
    everything: TrafficTotal
    after_first_pass: TrafficTotal
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Return this result as JSON can say it."""
        return {
            "policy": self.choice.label,
            "name": self.choice.name,
            "parameters": self.choice.parameters,
            "budget": self.choice.budget,
            "answer": self.output.decode("latin-1"),
            "exact": self.exact,
            "agreement": self.agreement,
            "blocks": self.blocks,
            "passes": self.passes,
            "seconds": round(self.seconds, 4),
            "reads": {
                "everything": traffic_record(self.everything),
                "after_first_pass": traffic_record(self.after_first_pass),
            },
        }


@dataclass(frozen=True, eq=False)
class Comparison:
    """Results of all policies on one prompt.

    Parameters
    ----------
    results : tuple of PolicyResult
        One a policy, in the order in which they were asked for.
    decoded : tuple of Decoded
        Their decodings, pass by pass.
    prefill_seconds : float
        Wall time of the prefill, which they share.
    """

    results: tuple[PolicyResult, ...]
    decoded: tuple[Decoded, ...]
    prefill_seconds: float


def compare(
    model: TinyModel,
    prompt: bytes,
    choices: Sequence[PolicyChoice],
    settings: DecodeSettings,
    *,
    answer: str | None = None,
    on_prefill: Callable[[float], None] | None = None,
    on_pass: Callable[[PolicyChoice, PassRecord], None] | None = None,
    on_result: Callable[[PolicyResult], None] | None = None,
) -> Comparison:
    """Prefill a prompt once and decode it with every policy.

    Parameters
    ----------
    model : TinyModel
        The model, with its backend.
    prompt : bytes
        The prompt.
    choices : sequence of PolicyChoice
        The policies; `dense` must be the first if agreement is to be measured.
    settings : DecodeSettings
        How to decode.
    answer : str, optional
        The expected answer, without stop byte.
    on_prefill, on_pass, on_result : callable, optional
        Called with the seconds of the prefill, after every pass, and after every policy.

    Returns
    -------
    Comparison
        One result a policy.
    """
    started = time.perf_counter()
    prefix = model.prefill(prompt, block_length=settings.block_length, page_size=settings.page_size)
    prefill_seconds = time.perf_counter() - started
    if on_prefill is not None:
        on_prefill(prefill_seconds)
    results: list[PolicyResult] = []
    decodings: list[Decoded] = []
    for choice in choices:
        decoded = decode_blocks(
            model, prompt, policy=choice.policy, block_length=settings.block_length, steps=settings.steps,
            threshold=settings.threshold, max_blocks=settings.blocks_for(answer), prefix=prefix,
            on_pass=None if on_pass is None else partial(on_pass, choice),
        )
        decodings.append(decoded)
        results.append(_result(choice, decoded, decodings[0], answer))
        if on_result is not None:
            on_result(results[-1])
    return Comparison(tuple(results), tuple(decodings), prefill_seconds)


def compare_together(
    model: TinyModel,
    prompts: Sequence[Prompt],
    choices: Sequence[PolicyChoice],
    settings: DecodeSettings,
) -> list[Comparison]:
    """Do what `compare` does for several prompts of one length, decoding them side by side where possible.

    Parameters
    ----------
    model : TinyModel
        The model, with its backend.
    prompts : sequence of Prompt
        At least one.
    choices : sequence of PolicyChoice
        The policies, `dense` first. Those that leave rows uncomputed decode prompt by prompt, and so do
        all with a threshold.
    settings : DecodeSettings
        How to decode.

    Returns
    -------
    list of Comparison
        One a prompt.
    """
    prefixes, seconds = [], []
    for prompt in prompts:
        started = time.perf_counter()
        prefixes.append(
            model.prefill(prompt.text, block_length=settings.block_length, page_size=settings.page_size)
        )
        seconds.append(time.perf_counter() - started)
    side_by_side = settings.threshold is None and len(prompts) > 1
    joint = KVCache.together(prefixes) if side_by_side else None
    decoded: list[list[Decoded]] = [[] for _ in prompts]
    for choice in choices:
        for place, result in enumerate(_decodings(model, prompts, prefixes, joint, choice, settings)):
            decoded[place].append(result)
    return [
        Comparison(
            tuple(
                _result(choice, each, mine[0], prompt.answer)
                for choice, each in zip(choices, mine, strict=True)
            ),
            tuple(mine), prefill_seconds,
        )
        for prompt, mine, prefill_seconds in zip(prompts, decoded, seconds, strict=True)
    ]


def _decodings(
    model: TinyModel, prompts: Sequence[Prompt], prefixes: Sequence[KVCache],
    joint: KVCache | None, choice: PolicyChoice, settings: DecodeSettings,
) -> list[Decoded]:
    """Decode all prompts with one policy."""
    blocks = [settings.blocks_for(prompt.answer) for prompt in prompts]
    if joint is not None and decodes_together(choice.policy):
        return decode_together(
            model, [prompt.text for prompt in prompts], policy=choice.policy, prefix=joint,
            block_length=settings.block_length, steps=settings.steps, max_blocks=blocks,
        )
    return [
        decode_blocks(
            model, prompt.text, policy=choice.policy, block_length=settings.block_length,
            steps=settings.steps, threshold=settings.threshold, max_blocks=most, prefix=prefix,
        )
        for prompt, prefix, most in zip(prompts, prefixes, blocks, strict=True)
    ]


def _result(
    choice: PolicyChoice, decoded: Decoded, baseline: Decoded, answer: str | None
) -> PolicyResult:
    return PolicyResult(
        choice=choice,
        output=decoded.output,
        exact=None if answer is None else decoded.stopped and decoded.output == answer.encode(),
        agreement=agreement(decoded.output, baseline.output),
        blocks=decoded.blocks,
        passes=len(decoded.passes),
        everything=decoded.traffic(first_pass=True),
        after_first_pass=decoded.traffic(first_pass=False),
        seconds=decoded.seconds,
    )


def agreement(output: bytes, reference: bytes) -> float:
    """Return the share of equal bytes, over the longer of two outputs; 1 if both are empty.

    Parameters
    ----------
    output, reference : bytes
        Outputs, compared position by position.
    """
    length = max(len(output), len(reference))
    equal = sum(left == right for left, right in zip(output, reference, strict=False))
    return equal / length if length else 1.0


def traffic_record(total: TrafficTotal) -> dict[str, float]:
    """Return counts and shares of a total as JSON can say them.

    Parameters
    ----------
    total : TrafficTotal
        What was read.
    """
    return {
        **dataclasses.asdict(total),
        "bytes_read": total.bytes_read,
        "density": total.density,
        "byte_share": total.byte_share,
    }
