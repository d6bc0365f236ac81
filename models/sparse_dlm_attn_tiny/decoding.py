"""Block diffusion decoding over a cached prefix.

The prompt's whole blocks are prefilled; what is left of it stands at the front of the first block,
decoded from the start. A block is denoised in several passes, each followed by the decoding of some
tokens, and run once more when it is complete, to write its final KV (the save pass). Every pass
computes the block's own KV afresh and reads the prefix through `PrefixAttention`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sparse_dlm_attn import (
    InvalidArgumentError,
    InvalidTypeError,
    LayerMemory,
    PassInfo,
    PrefixAttention,
    PrefixAttentionPolicy,
)
from sparse_dlm_attn.arrays import to_numpy
from sparse_dlm_attn.policy import check_count
from sparse_dlm_attn_tiny.cache import DEFAULT_PAGE_SIZE, PrefixCache
from sparse_dlm_attn_tiny.config import MASK_ID
from sparse_dlm_attn_tiny.full_sequence import computed_rows, decode_full_sequence
from sparse_dlm_attn_tiny.model import BlockPass, TinyModel, as_tokens, check_block_length
from sparse_dlm_attn_tiny.records import Decoded, PassRecord, text_before_stop
from sparse_dlm_attn_tiny.schedule import Schedule, confidences

__all__ = [
    "Decoded", "PassRecord", "decode_blocks", "decode_full_sequence", "decode_together", "decodes_together",
]

HostArray = np.ndarray[Any, Any]
Memories = tuple[LayerMemory, ...] | None


def decode_blocks(
    model: TinyModel,
    prompt: bytes | Sequence[int],
    *,
    policy: str | PrefixAttentionPolicy[Any],
    block_length: int = 16,
    steps: int | None = None,
    threshold: float | None = None,
    max_blocks: int = 8,
    prefix: PrefixCache | None = None,
    page_size: int | None = None,
    on_pass: Callable[[PassRecord], None] | None = None,
) -> Decoded:
    """Continue a prompt block by block, greedily.

    Parameters
    ----------
    model : TinyModel
        The model; its backend computes.
    prompt : bytes
        At least one byte, at most the model's context. What is decoded may go beyond that.
    policy : str or PrefixAttentionPolicy
        A registered name, ``"name:key=value,..."``, ``"module:attr"``, or an instance.
    block_length : int
        Tokens denoised together: 8, 16 or 32.
    steps : int, optional
        Denoising passes of a full block, ``1..block_length``; default 8 unless a threshold is given.
    threshold : float, optional
        Instead of a fixed number: decode all tokens with a confidence strictly above it.
    max_blocks : int
        Blocks to decode at most.
    prefix : PrefixCache, optional
        ``model.prefill(prompt, block_length=...)``, to share it between decodings; it is not changed.
    page_size : int, optional
        Tokens a page; default: that of ``prefix``, else 16.
    on_pass : callable, optional
        Called with every `PassRecord` as soon as it exists.

    Returns
    -------
    Decoded
        Output, and what each pass read.

    Raises
    ------
    InvalidArgumentError, InvalidTypeError
        If an argument breaks a rule; nothing has been computed then.
        Or if logits of a masked row have no softmax, which only a pass can show.
    UnknownNameError, UnavailableError
        If the policy cannot be had.

    Notes
    -----
    Confidence is the softmax probability of the likeliest byte; ties go to the lowest position. The stop byte
    is looked for when a block is complete, as in SDAR, so all policies make the same passes.
    """
    tokens = as_tokens("prompt", prompt)
    model.check_prompt(tokens)
    schedule = Schedule(check_block_length(block_length), steps, threshold)
    check_count("max_blocks", max_blocks, 1)
    if page_size is not None:
        check_count("page_size", page_size, 1)
    if on_pass is not None and not callable(on_pass):
        raise InvalidTypeError("on_pass", "must be callable or None", type(on_pass).__name__)
    attention = PrefixAttention(policy, model.backend)
    started = time.perf_counter()
    if prefix is None:
        cache = model.prefill(
            tokens, block_length=block_length, page_size=page_size or DEFAULT_PAGE_SIZE
        )
        prefill_seconds = time.perf_counter() - started
        lent: contextlib.AbstractContextManager[PrefixCache] = contextlib.nullcontext(cache)
    else:
        _check_prefix(model, prefix, (tokens,), block_length)
        lent, prefill_seconds = prefix.forked(page_size=page_size), 0.0
    with lent as cache:
        run = _BlockRun(model, attention, cache, schedule, (max_blocks,), on_pass)
        (decoded,) = run.decode((tokens,))
    return replace(decoded, prefill_seconds=prefill_seconds)


def decode_together(
    model: TinyModel,
    prompts: Sequence[bytes | Sequence[int]],
    *,
    policy: str | PrefixAttentionPolicy[Any],
    prefix: PrefixCache,
    block_length: int = 16,
    steps: int | None = None,
    max_blocks: Sequence[int],
) -> list[Decoded]:
    """Continue several prompts of one length side by side, as `decode_blocks` continues each alone.

    A pass computes all of them at once, so that the work around the arrays is done once and not for each.

    Parameters
    ----------
    model : TinyModel
        The model; its backend computes.
    prompts : sequence of bytes
        At least one.
    policy : str or PrefixAttentionPolicy
        One that `decodes_together`.
    prefix : PrefixCache
        `PrefixCache.together` of ``model.prefill(prompt, block_length=...)`` of each; it is not changed.
    block_length, steps : int
        As for `decode_blocks`. There is no threshold: sequences would need different numbers of passes.
    max_blocks : sequence of int
        Blocks to decode at most, for each prompt.

    Returns
    -------
    list of Decoded
        One a prompt.

    Raises
    ------
    InvalidArgumentError, InvalidTypeError
        If an argument breaks a rule; nothing has been computed then.
        Or if logits of a masked row have no softmax, which only a pass can show.
    UnknownNameError, UnavailableError
        If the policy cannot be had.
    """
    tokens = tuple(as_tokens("prompts", prompt) for prompt in prompts)
    schedule = Schedule(check_block_length(block_length), steps, None)
    if len(max_blocks) != len(tokens):
        raise InvalidArgumentError("max_blocks", f"must hold {len(tokens)} numbers", len(max_blocks))
    for number in max_blocks:
        check_count("max_blocks", number, 1)
    attention = PrefixAttention(policy, model.backend)
    if not decodes_together(attention.policy):
        raise InvalidArgumentError(
            "policy", "must compute all rows in every pass", repr(attention.policy),
            "Decode its prompts one by one, with decode_blocks.",
        )
    _check_prefix(model, prefix, tokens, block_length)
    with prefix.forked() as cache:
        return _BlockRun(model, attention, cache, schedule, tuple(max_blocks), None).decode(tokens)


def decodes_together(policy: PrefixAttentionPolicy[Any]) -> bool:
    """Return whether `decode_together` takes a policy: if it leaves no rows uncomputed.

    Parameters
    ----------
    policy : PrefixAttentionPolicy
        An instance.
    """
    return type(policy).computed_tokens is PrefixAttentionPolicy.computed_tokens


def _check_prefix(
    model: TinyModel, prefix: PrefixCache, prompts: tuple[tuple[int, ...], ...], block_length: int
) -> None:
    """Raise unless ``prefix`` is what `TinyModel.prefill` returns for these prompts and block length."""
    if not isinstance(prefix, PrefixCache):
        raise InvalidTypeError("prefix", "must be a PrefixCache or None", type(prefix).__name__)
    remedy = "Pass model.prefill(prompt, block_length=...), or leave prefix out."
    if prefix.owner is not model:
        raise InvalidArgumentError("prefix", "must be made by this model", "one of another", remedy)
    if prefix.block_length != block_length:
        raise InvalidArgumentError(
            "prefix", f"must be made with block_length={block_length}", prefix.block_length, remedy
        )
    whole = tuple(tokens[: len(tokens) // block_length * block_length] for tokens in prompts)
    if prefix.tokens != whole or any(prefix.prompt_tokens != len(tokens) for tokens in prompts):
        raise InvalidArgumentError(
            "prefix", f"must hold exactly the first {[len(tokens) for tokens in whole]} bytes of the prompts",
            prefix, remedy,
        )


@dataclass(frozen=True, eq=False)
class _Step:
    """Place in a block: pass number, and what is decoded since when, bool ``(batch, tokens)``."""

    index: int
    is_save: bool
    decoded: HostArray
    newly: HostArray
    planned: int | None


class _Sequence:
    """What came of one sequence so far."""

    def __init__(self, layers: int, max_blocks: int) -> None:
        self.max_blocks = max_blocks
        self.blocks = 0
        self.generated = b""
        self.records: list[PassRecord] = []
        self.build_bytes = [0] * layers

    @property
    def running(self) -> bool:
        """Whether it takes another block. Until all have ended, one that has is computed on in vain."""
        return self.blocks < self.max_blocks and not text_before_stop(self.generated)[1]


class _BlockRun:
    """A decoding under way: the only thing here that changes, with its sequences."""

    def __init__(
        self,
        model: TinyModel,
        attention: PrefixAttention,
        cache: PrefixCache,
        schedule: Schedule,
        max_blocks: tuple[int, ...],
        on_pass: Callable[[PassRecord], None] | None,
    ) -> None:
        self.model, self.attention, self.cache = model, attention, cache
        self.schedule, self.on_pass = schedule, on_pass
        self.blocks = 0
        self.sequences = [_Sequence(model.config.layers, most) for most in max_blocks]
        self._memories: Memories = None
        self._previous: BlockPass | None = None  # whose rows stay if the policy does not compute them
        self._computed = np.arange(schedule.tokens)

    def decode(self, prompts: tuple[tuple[int, ...], ...]) -> list[Decoded]:
        """Decode blocks until every sequence has ended."""
        started, prefilled = time.perf_counter(), self.cache.length
        known = np.asarray([tokens[prefilled:] for tokens in prompts], dtype=np.int64)
        while any(sequence.running for sequence in self.sequences):
            self._decode_block(known)
            known = known[:, :0]
        seconds = (time.perf_counter() - started) / len(prompts)
        results = []
        for tokens, sequence in zip(prompts, self.sequences, strict=True):
            output, stopped = text_before_stop(sequence.generated)
            results.append(Decoded(
                output=output, generated=sequence.generated, stopped=stopped,
                passes=tuple(sequence.records), block_length=self.schedule.tokens,
                page_size=self.cache.page_size, prompt_tokens=len(tokens), prefilled_tokens=prefilled,
                build_bytes=float(sum(sequence.build_bytes)), prefill_seconds=0.0, seconds=seconds,
            ))
        return results

    def _decode_block(self, known: HostArray) -> None:
        """Decode one block that starts with the ``known`` tokens, and save it."""
        batch, given = known.shape
        length = self.schedule.tokens
        tokens = np.full((batch, length), MASK_ID)
        tokens[:, :given] = known
        decoded = tokens != MASK_ID
        newly = np.zeros_like(decoded)
        planned = self.schedule.planned_passes(length - given)
        index = 0
        while not decoded.all():
            step = _Step(index, False, decoded, newly, planned)
            started = time.perf_counter()
            result = self._forward(tokens, step)
            running = np.asarray([[sequence.running] for sequence in self.sequences])
            best, confidence = confidences(
                to_numpy(result.logits), running & ~decoded, f"pass {index} of block {self.blocks}"
            )
            newly = np.stack([
                self.schedule.choose(index, *rows) for rows in zip(~decoded, confidence, strict=True)
            ])
            tokens = np.where(newly, best, tokens)
            decoded = decoded | newly
            self._record(result, step, tokens, newly, started)
            index += 1
        self._save(tokens, _Step(index, True, decoded, newly, planned))
        self.blocks += 1
        for sequence, row in zip(self.sequences, tokens, strict=True):
            if sequence.running:
                sequence.blocks += 1
                sequence.generated += bytes(row[given:].tolist())

    def _save(self, tokens: HostArray, step: _Step) -> None:
        """Run the complete block once more and append its KV."""
        started = time.perf_counter()
        built = self.cache.bounds_key_bytes
        result = self._forward(tokens, step)
        self.cache.append(result.keys, result.values, tokens.tolist())
        self._record(result, step, tokens, np.zeros_like(step.newly), started)
        for sequence in self.sequences:
            for layer in range(self.model.config.layers):
                # Building the bounds is work of the layers that use them; see Decoded.traffic().
                if sequence.running and any(record.metadata_reads[layer] for record in sequence.records):
                    sequence.build_bytes[layer] = built[layer]

    def _forward(self, tokens: HostArray, step: _Step) -> BlockPass:
        asarray = self.model.backend.asarray
        info = PassInfo(
            step.index, step.is_save, asarray(step.decoded, dtype="bool"),
            asarray(step.newly, dtype="bool"), total_passes=step.planned,
        )
        if not decodes_together(self.attention.policy):  # then there is one sequence
            self._computed = computed_rows(self.attention, info, tokens.shape[1])
        result = self._previous = self.model.forward_block(
            tokens, self.cache.length, self.cache.contexts(), self.attention, info, self._memories,
            computed=self._computed, previous=self._previous,
        )
        # Kept across blocks too: the driver drops what does not outlive a block.
        self._memories = result.memories
        return result

    def _record(
        self, result: BlockPass, step: _Step, tokens: HostArray, newly: HostArray, started: float
    ) -> None:
        records = PassRecord.of(
            result.memories, block=self.blocks, index=step.index, is_save=step.is_save, tokens=tokens,
            newly_decoded=newly, seconds=(time.perf_counter() - started) / len(self.sequences),
            computed_rows=len(self._computed),
        )
        for sequence, record in zip(self.sequences, records, strict=True):
            if sequence.running:
                sequence.records.append(record)
                if self.on_pass is not None:
                    self.on_pass(record)
