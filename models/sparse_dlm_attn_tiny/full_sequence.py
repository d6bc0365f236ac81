"""Decoding over the full sequence, as LLaDA does: no causal order, every token sees every other.

The whole sequence is one block whose keys are its context (clause DRIVER-4), so policies decide about all
of its rows. Masks are filled in window by window. Rows that a policy does not compute keep the keys and
values that they have.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

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
from sparse_dlm_attn.policy import check_choice, check_count
from sparse_dlm_attn_tiny.cache import DEFAULT_PAGE_SIZE
from sparse_dlm_attn_tiny.config import MASK_ID
from sparse_dlm_attn_tiny.model import TinyModel, as_tokens
from sparse_dlm_attn_tiny.records import Decoded, PassRecord, text_before_stop
from sparse_dlm_attn_tiny.schedule import Schedule, confidences
from sparse_dlm_attn_tiny.sequence import SequenceCache

__all__ = ["check_new_tokens", "computed_rows", "decode_full_sequence"]

Order = Literal["confidence", "random"]
HostArray = np.ndarray[Any, Any]


def decode_full_sequence(
    model: TinyModel,
    prompt: bytes | Sequence[int],
    *,
    policy: str | PrefixAttentionPolicy[Any] = "dense",
    new_tokens: int = 16,
    steps: int | None = None,
    threshold: float | None = None,
    block_length: int | None = None,
    page_size: int = DEFAULT_PAGE_SIZE,
    order: Order = "confidence",
    seed: int = 0,
    on_pass: Callable[[PassRecord], None] | None = None,
) -> Decoded:
    """Fill in masks behind a prompt, greedily, with attention over the whole sequence.

    Parameters
    ----------
    model : TinyModel
        The model; its backend computes.
    prompt : bytes
        At least one byte. Prompt and new tokens must fit the model's context.
    policy : str or PrefixAttentionPolicy
        A registered name, ``"name:key=value,..."``, ``"module:attr"``, or an instance.
    new_tokens : int
        Masks behind the prompt.
    steps : int, optional
        Passes, ``1..block_length``, for each window; default 8 unless a threshold is given.
    threshold : float, optional
        Instead of a fixed number: decode all tokens with a confidence strictly above it.
    block_length : int, optional
        Semi-autoregressive decoding: masks are filled in so many at a time, window by window from the left;
        must divide ``new_tokens``. Default: all at once.
    page_size : int
        Tokens a page of the sequence.
    order : {"confidence", "random"}
        What is decoded first in a window: what the model is surest of, or a random order drawn before the
        window begins, which the policy is told (``PassInfo.planned_order``). Random takes no threshold.
    seed : int
        Of the random order.
    on_pass : callable, optional
        Called with every `PassRecord` as soon as it exists.

    Returns
    -------
    Decoded
        As from block-wise decoding; there are no save passes. Context reads are those of the whole sequence:
        see `TrafficTotal.pair_share` and `TrafficTotal.row_share`, for here passes are bound by what they
        compute. A record's tokens are those behind the prompt, its positions count from there.

    Raises
    ------
    InvalidArgumentError, InvalidTypeError
        If an argument breaks a rule; nothing has been computed then.
        Or if logits of a masked row have no softmax, which only a pass can show.
    UnknownNameError, UnavailableError
        If the policy cannot be had.

    Notes
    -----
    With ``block_length``, decoding ends after the window that holds a stop byte. Passes are numbered over
    all windows, as LLaDA numbers its steps; ``total_passes`` counts them all, with a threshold one for
    each new token.
    """
    known = as_tokens("prompt", prompt)
    model.check_prompt(known)
    check_new_tokens(model, len(known), new_tokens)
    window = new_tokens if block_length is None else block_length
    check_count("block_length", window, 1)
    if new_tokens % window:
        raise InvalidArgumentError("block_length", f"must divide new_tokens={new_tokens}", window)
    schedule = Schedule(window, steps, threshold)
    check_count("page_size", page_size, 1)
    check_choice("order", order, get_args(Order))
    check_count("seed", seed)
    if order == "random" and threshold is not None:
        raise InvalidArgumentError("threshold", "must not be given with order='random'", threshold)
    if on_pass is not None and not callable(on_pass):
        raise InvalidTypeError("on_pass", "must be callable or None", type(on_pass).__name__)
    started = time.perf_counter()
    run = _SequenceRun(
        model, PrefixAttention(policy, model.backend), known, new_tokens, schedule, page_size,
        np.random.default_rng(seed) if order == "random" else None, on_pass,
    )
    stopped, end = False, len(known)
    while end < len(run.tokens) and not stopped:
        run.fill_window(end)
        end += window
        generated = bytes(run.tokens[len(known) : end].tolist())
        output, stopped = text_before_stop(generated)
    return Decoded(
        output=output, generated=generated, stopped=stopped, passes=tuple(run.records),
        block_length=window, page_size=page_size, prompt_tokens=len(known),
        prefilled_tokens=0, build_bytes=0.0, prefill_seconds=0.0, seconds=time.perf_counter() - started,
    )


def computed_rows(attention: PrefixAttention, info: PassInfo, count: int) -> HostArray:
    """Return the rows that a policy has the model compute in this pass.

    Parameters
    ----------
    attention : PrefixAttention
        Policy and backend.
    info : PassInfo
        Place in the denoising.
    count : int
        Rows of the block.

    Returns
    -------
    numpy.ndarray
        int64, ascending.
    """
    every = attention.backend.asarray(np.ones((1, count), dtype=bool), dtype="bool")
    return np.flatnonzero(to_numpy(attention.policy.computed_tokens(info, every))[0])


def check_new_tokens(model: TinyModel, known: int, new_tokens: int) -> None:
    """Raise unless a prompt and what is to be decoded fit the model's context.

    Parameters
    ----------
    model : TinyModel
        The model.
    known, new_tokens : int
        Bytes of the prompt, and masks behind it.

    Raises
    ------
    InvalidArgumentError
        If they do not fit, or there is no mask.
    """
    check_count("new_tokens", new_tokens, 1)
    if known + new_tokens > model.config.max_context:
        raise InvalidArgumentError(
            "new_tokens", f"must leave prompt and answer within {model.config.max_context} bytes",
            f"{known} + {new_tokens}", "Shorten the prompt.",
        )


@dataclass(frozen=True, eq=False)
class _Window:
    """A window under way: where it lies, its pass, what was decoded before, what will be after."""

    start: int
    end: int
    index: int
    newly: HostArray
    order: HostArray | None


class _SequenceRun:
    """A decoding under way: the only thing here that changes."""

    def __init__(
        self, model: TinyModel, attention: PrefixAttention, known: Sequence[int], new_tokens: int,
        schedule: Schedule, page_size: int, rng: np.random.Generator | None,
        on_pass: Callable[[PassRecord], None] | None,
    ) -> None:
        self.model, self.attention, self.schedule = model, attention, schedule
        self.prompt_tokens, self.rng, self.on_pass = len(known), rng, on_pass
        self.tokens = np.asarray((*known, *[MASK_ID] * new_tokens))
        self.records: list[PassRecord] = []
        self._cache = SequenceCache(
            model.config, model.backend, tokens=len(self.tokens), prompt_tokens=len(known),
            page_size=page_size,
        )
        self._memories: tuple[LayerMemory, ...] | None = None
        per_window = schedule.planned_passes(schedule.tokens)
        windows = new_tokens // schedule.tokens
        self._planned = new_tokens if per_window is None else per_window * windows

    def fill_window(self, start: int) -> None:
        """Fill in the masks of the window that begins at ``start``."""
        end = start + self.schedule.tokens
        order = None if self.rng is None else self.rng.permutation(self.schedule.tokens)
        newly = np.zeros(len(self.tokens), dtype=bool)
        index = 0
        while (self.tokens[start:end] == MASK_ID).any():
            newly = self._run(_Window(start, end, index, newly, order))
            index += 1

    def _run(self, window: _Window) -> HostArray:
        """Make one pass, decode some tokens and return which, bool over the sequence."""
        began = time.perf_counter()
        part = slice(window.start, window.end)
        masked = self.tokens[part] == MASK_ID
        planned = self._next(window, masked)
        info = self._info(window, planned)
        rows = computed_rows(self.attention, info, len(self.tokens))
        logits, self._memories = self.model.forward_sequence(
            self.tokens.tolist(), rows, self._cache, window.end, self.attention, info, self._memories
        )
        (best,), (confidence,) = confidences(
            to_numpy(logits)[None, part], masked[None],
            f"pass {window.index} of the window that begins with row {window.start}",
        )
        if planned is None:
            planned = window.start + np.flatnonzero(self.schedule.choose(window.index, masked, confidence))
        newly = self._rows(planned)
        self.tokens = self.tokens.copy()
        self.tokens[part] = np.where(newly[part], best, self.tokens[part])
        self._record(window, newly, len(rows), time.perf_counter() - began)
        return newly

    def _next(self, window: _Window, masked: HostArray) -> HostArray | None:
        """Return the rows to be decoded after this pass, in that order, if they are known beforehand."""
        if window.order is None:
            return None
        places = np.empty(len(masked))
        places[window.order] = np.arange(len(masked))
        chosen = self.schedule.choose(window.index, masked, -places)
        return (window.start + window.order[chosen[window.order]]).astype(np.int32)

    def _rows(self, places: HostArray | slice) -> HostArray:
        """Return the rows at ``places``, bool over the sequence."""
        rows = np.zeros(len(self.tokens), dtype=bool)
        rows[places] = True
        return rows

    def _info(self, window: _Window, planned: HostArray | None) -> PassInfo:
        def told(rows: HostArray) -> Any:
            return self.model.backend.asarray(rows[None], dtype=rows.dtype.name)

        return PassInfo(
            len(self.records), False, told(self.tokens != MASK_ID), told(window.newly),
            total_passes=self._planned, window=told(self._rows(slice(window.start, window.end))),
            window_index=window.index, planned=None if planned is None else told(self._rows(planned)),
            planned_order=None if planned is None else told(planned),
        )

    def _record(self, window: _Window, newly: HostArray, computed: int, seconds: float) -> None:
        assert self._memories is not None
        behind = slice(self.prompt_tokens, None)
        (record,) = PassRecord.of(
            self._memories, block=(window.start - self.prompt_tokens) // self.schedule.tokens,
            index=window.index, is_save=False, tokens=self.tokens[None, behind],
            newly_decoded=newly[None, behind], seconds=seconds, computed_rows=computed,
        )
        self.records.append(record)
        if self.on_pass is not None:
            self.on_pass(record)
