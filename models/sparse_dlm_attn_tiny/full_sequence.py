"""Decoding over the full sequence, as LLaDA does: every pass recomputes all tokens, both ways.

The whole sequence is one block over an empty context, so attention is dense: this is the case that
policies of the prefix have nothing to decide about.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from sparse_dlm_attn import InvalidArgumentError, InvalidTypeError, PassInfo, PrefixAttention
from sparse_dlm_attn.arrays import to_numpy
from sparse_dlm_attn.policy import check_count
from sparse_dlm_attn_tiny.config import MASK_ID
from sparse_dlm_attn_tiny.model import TinyModel, as_tokens
from sparse_dlm_attn_tiny.records import Decoded, PassRecord, text_before_stop
from sparse_dlm_attn_tiny.schedule import Schedule, confidences

__all__ = ["decode_full_sequence"]


def decode_full_sequence(
    model: TinyModel,
    prompt: bytes | Sequence[int],
    *,
    new_tokens: int = 16,
    steps: int | None = None,
    threshold: float | None = None,
    block_length: int | None = None,
    on_pass: Callable[[PassRecord], None] | None = None,
) -> Decoded:
    """Fill in masks behind a prompt, greedily, with attention over the whole sequence.

    Parameters
    ----------
    model : TinyModel
        The model; its backend computes, by the ``dense`` policy.
    prompt : bytes
        At least one byte. Prompt and new tokens must fit the model's context.
    new_tokens : int
        Masks behind the prompt.
    steps : int, optional
        Passes, ``1..block_length``, for each block; default 8 unless a threshold is given.
    threshold : float, optional
        Instead of a fixed number: decode all tokens with a confidence strictly above it.
    block_length : int, optional
        Semi-autoregressive decoding: masks are filled in so many at a time, from the left; must divide
        ``new_tokens``. Default: all at once.
    on_pass : callable, optional
        Called with every `PassRecord` as soon as it exists.

    Returns
    -------
    Decoded
        As from block-wise decoding; there are no save passes and no context reads. A record's tokens
        are those behind the prompt, its positions count from there.

    Raises
    ------
    InvalidArgumentError, InvalidTypeError
        If an argument breaks a rule; nothing has been computed then.

    Notes
    -----
    The time of a pass grows with the square of the sequence, since nothing is cached. With
    ``block_length``, decoding ends after the block that holds a stop byte.
    """
    known = as_tokens("prompt", prompt)
    model.check_prompt(known)
    check_count("new_tokens", new_tokens, 1)
    if len(known) + new_tokens > model.config.max_context:
        raise InvalidArgumentError(
            "new_tokens", f"must leave prompt and answer within {model.config.max_context} bytes",
            f"{len(known)} + {new_tokens}", "Shorten the prompt.",
        )
    window = new_tokens if block_length is None else block_length
    check_count("block_length", window, 1)
    if new_tokens % window:
        raise InvalidArgumentError("block_length", f"must divide new_tokens={new_tokens}", window)
    schedule = Schedule(window, steps, threshold)
    if on_pass is not None and not callable(on_pass):
        raise InvalidTypeError("on_pass", "must be callable or None", type(on_pass).__name__)
    started = time.perf_counter()
    tokens = np.asarray((*known, *[MASK_ID] * new_tokens))
    records: list[PassRecord] = []
    stopped, end = False, len(known)
    while end < len(tokens) and not stopped:
        tokens = _fill_window(model, tokens, len(known), end, schedule, records, on_pass)
        end += window
        output, stopped = text_before_stop(bytes(tokens[len(known) : end].tolist()))
    return Decoded(
        output=output, generated=bytes(tokens[len(known) : end].tolist()), stopped=stopped,
        passes=tuple(records), block_length=window, page_size=1, prompt_tokens=len(known),
        prefilled_tokens=0, build_bytes=0.0, prefill_seconds=0.0, seconds=time.perf_counter() - started,
    )


def _fill_window(
    model: TinyModel,
    tokens: np.ndarray,
    prompt_tokens: int,
    start: int,
    schedule: Schedule,
    records: list[PassRecord],
    on_pass: Callable[[PassRecord], None] | None,
) -> np.ndarray:
    """Return ``tokens`` with the masks of one window from ``start`` on filled in."""
    attention = PrefixAttention("dense", model.backend)
    contexts = model.empty_cache(page_size=1).contexts()
    asarray = model.backend.asarray
    window = slice(start, start + schedule.tokens)
    newly = np.zeros(len(tokens), dtype=bool)
    planned = schedule.planned_passes(schedule.tokens)
    block, index = (start - prompt_tokens) // schedule.tokens, 0
    while (masked := tokens[window] == MASK_ID).any():
        began = time.perf_counter()
        decoded = (tokens != MASK_ID)[None]
        info = PassInfo(
            index, False, asarray(decoded, dtype="bool"), asarray(newly[None], dtype="bool"),
            total_passes=planned,
        )
        # Every row reads the context, which is empty: nothing could be carried to the next pass.
        result = model.forward_block(tokens.tolist(), 0, contexts, attention, info)
        best, confidence = confidences(to_numpy(result.logits)[window])
        newly = np.zeros(len(tokens), dtype=bool)
        newly[window] = schedule.choose(index, masked, confidence)
        tokens = tokens.copy()
        tokens[window] = np.where(newly[window], best, tokens[window])
        record = PassRecord.of(
            result.memories, block=block, index=index, is_save=False,
            tokens=tokens[prompt_tokens:].tolist(),
            newly_decoded=np.flatnonzero(newly[prompt_tokens:]), seconds=time.perf_counter() - began,
        )
        records.append(record)
        if on_pass is not None:
            on_pass(record)
        index += 1
    return tokens
