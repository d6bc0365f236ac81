"""Policies beside one another on the same prompts: what each answered, and what it read."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sparse_dlm_attn_small_model.cache import KVCache
from sparse_dlm_attn_small_model.decoding import decode_blocks, decode_together
from sparse_dlm_attn_small_model.denoiser import decodes_together
from sparse_dlm_attn_small_model.model import TinyModel
from sparse_dlm_attn_small_model.policy_choice import PolicyChoice
from sparse_dlm_attn_small_model.records import Decoded, PassRecord, TrafficTotal
from sparse_dlm_attn_small_model.retrieval import Prompt, answer_blocks

DEFAULT_BLOCKS = 4
"""Blocks to decode at most when no answer tells how many are needed."""

OnPass = Callable[[PolicyChoice, PassRecord], None]


@dataclass(frozen=True)
class DecodeSettings:
    """How every policy of a comparison decodes: arguments of `decode_blocks`."""

    block_length: int = 16
    steps: int | None = None
    threshold: float | None = None
    page_size: int = 16
    max_blocks: int | None = None  # None for as many as the expected answer needs, or DEFAULT_BLOCKS

    def blocks_for(self, answer: str | None) -> int:
        """Return how many blocks to decode at most, if this is the expected answer."""
        if self.max_blocks is not None:
            return self.max_blocks
        return DEFAULT_BLOCKS if answer is None else answer_blocks(answer, self.block_length)


@dataclass(frozen=True)
class PolicyResult:
    """What one policy made of one prompt."""

    choice: PolicyChoice
    output: bytes  # up to the stop byte
    exact: bool | None  # whether that is the expected answer; None if none is known
    agreement: float  # share of bytes that equal those of dense decoding, 0..1
    blocks: int
    passes: int  # save passes included
    everything: TrafficTotal  # what was read in all passes, with all metadata
    after_first_pass: TrafficTotal  # and without pass 0 of each block
    seconds: float  # wall time without the prefill

    @classmethod
    def of(
        cls, choice: PolicyChoice, decoded: Decoded, answer: str | None, baseline: Decoded | None = None
    ) -> PolicyResult:
        """Judge a decoding, which agrees with itself if there is no ``baseline``."""
        return cls(
            choice=choice,
            output=decoded.output,
            exact=None if answer is None else decoded.stopped and decoded.output == answer.encode(),
            agreement=agreement(decoded.output, (baseline or decoded).output),
            blocks=decoded.blocks,
            passes=len(decoded.passes),
            everything=decoded.traffic(first_pass=True),
            after_first_pass=decoded.traffic(first_pass=False),
            seconds=decoded.seconds,
        )

    def as_json(self) -> dict[str, Any]:
        """Return this result as JSON can say it, without the parameters of the policy."""
        totals = {"everything": self.everything, "after_first_pass": self.after_first_pass}
        return {
            "policy": self.choice.label,
            "answer": self.output.decode("latin-1"),
            "exact": self.exact,
            "agreement": self.agreement,
            "blocks": self.blocks,
            "passes": self.passes,
            "seconds": round(self.seconds, 4),
            "reads": {
                name: {
                    **dataclasses.asdict(total),
                    "bytes_read": total.bytes_read,
                    "density": total.density,
                    "byte_share": total.byte_share,
                }
                for name, total in totals.items()
            },
        }


@dataclass(frozen=True)
class Sample:
    """All policies on one prompt."""

    prompt: Prompt
    prefill_seconds: float  # of the prefill that the policies share
    results: tuple[PolicyResult, ...]  # in the order in which the policies were asked for


def agreement(output: bytes, reference: bytes) -> float:
    """Return the share of equal bytes, over the longer of two outputs; 1 if both are empty."""
    length = max(len(output), len(reference))
    equal = sum(left == right for left, right in zip(output, reference, strict=False))
    return equal / length if length else 1.0


def compare(
    model: TinyModel,
    prompts: Sequence[Prompt],
    choices: Sequence[PolicyChoice],
    settings: DecodeSettings,
    on_pass: OnPass | None = None,
) -> list[Sample]:
    """Prefill prompts of one length once and decode them with every policy, side by side where possible.

    Agreement is measured against the first policy. Policies that leave rows uncomputed decode prompt by
    prompt, and so do all with a threshold; ``on_pass`` is called after every pass of these.
    """
    prefixes, seconds = [], []
    for prompt in prompts:
        started = time.perf_counter()
        prefixes.append(model.prefill(prompt.text, block_length=settings.block_length, page_size=settings.page_size))
        seconds.append(time.perf_counter() - started)
    joint = KVCache.together(prefixes) if settings.threshold is None and len(prompts) > 1 else None
    blocks = [settings.blocks_for(prompt.answer) for prompt in prompts]
    decoded: list[list[Decoded]] = []
    for choice in choices:
        if joint is not None and decodes_together(choice.policy):
            decoded.append(
                decode_together(
                    model,
                    [prompt.text for prompt in prompts],
                    policy=choice.policy,
                    prefix=joint,
                    block_length=settings.block_length,
                    steps=settings.steps,
                    max_blocks=blocks,
                )
            )
            continue
        decoded.append(
            [
                decode_blocks(
                    model,
                    prompt.text,
                    policy=choice.policy,
                    block_length=settings.block_length,
                    steps=settings.steps,
                    threshold=settings.threshold,
                    max_blocks=most,
                    prefix=prefix,
                    on_pass=None if on_pass is None else partial(on_pass, choice),
                )
                for prompt, prefix, most in zip(prompts, prefixes, blocks, strict=True)
            ]
        )
    return [
        Sample(
            prompt,
            seconds[place],
            tuple(
                PolicyResult.of(choice, mine[place], prompt.answer, decoded[0][place])
                for choice, mine in zip(choices, decoded, strict=True)
            ),
        )
        for place, prompt in enumerate(prompts)
    ]


@dataclass(frozen=True)
class PolicyScore:
    """One policy with one budget, over all prompts: means of agreement and passes, sums of the others."""

    choice: PolicyChoice
    prompts: int
    exact: int
    tasks: dict[str, dict[str, int]]  # prompts and exact answers of each task
    agreement: float
    passes: float
    everything: TrafficTotal
    after_first_pass: TrafficTotal
    seconds: float

    @classmethod
    def of(cls, results: Sequence[tuple[str, PolicyResult]]) -> PolicyScore:
        """Return the score of the results of one policy, each with its task."""
        tasks: dict[str, dict[str, int]] = {}
        for task, result in results:
            entry = tasks.setdefault(task, {"prompts": 0, "exact": 0})
            entry["prompts"] += 1
            entry["exact"] += bool(result.exact)
        found = [result for _, result in results]
        return cls(
            choice=found[0].choice,
            prompts=len(found),
            exact=sum(bool(each.exact) for each in found),
            tasks=tasks,
            agreement=math.fsum(each.agreement for each in found) / len(found),
            passes=sum(each.passes for each in found) / len(found),
            everything=TrafficTotal.sum(each.everything for each in found),
            after_first_pass=TrafficTotal.sum(each.after_first_pass for each in found),
            seconds=math.fsum(each.seconds for each in found),
        )

    def as_json(self) -> dict[str, Any]:
        """Return this score as JSON can say it."""
        totals = {"": self.everything, "later_": self.after_first_pass}
        shares = {
            prefix + name: getattr(total, name)
            for prefix, total in totals.items()
            for name in ("density", "byte_share", "bytes_read")
        }
        return {
            "policy": self.choice.label,
            "specification": self.choice.specification,
            **self.choice.as_json(),
            "prompts": self.prompts,
            "exact": self.exact,
            "tasks": self.tasks,
            "agreement": self.agreement,
            "passes": self.passes,
            **shares,
            "seconds": self.seconds,
        }


def scores_of(samples: Sequence[Sample]) -> list[PolicyScore]:
    """Return one score for each policy and budget of samples that had the same."""
    columns = zip(*(sample.results for sample in samples), strict=True)
    tasks = [sample.prompt.task or "" for sample in samples]
    return [PolicyScore.of(list(zip(tasks, column, strict=True))) for column in columns]
