"""Decoding by denoising: block by block over a cached prefix, or window by window over a whole sequence.

Block-wise, the prompt's whole blocks are prefilled; what is left of it stands at the front of the first
block, decoded from the start. A block is denoised in several passes, each followed by the decoding of
some tokens, and run once more when it is complete, to write its final KV (the save pass).

Over the whole sequence, as LLaDA decodes, every token sees every other. The sequence is one block whose
keys are its context (clause DRIVER-4), and masks are filled in window by window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from sparse_dlm_attn import InvalidArgumentError, InvalidTypeError, PrefixAttention, PrefixAttentionPolicy
from sparse_dlm_attn.policy import check_choice, check_count
from sparse_dlm_attn_small_model.cache import DEFAULT_PAGE_SIZE, KVCache
from sparse_dlm_attn_small_model.denoiser import Denoiser, OnPass, Order, decodes_together
from sparse_dlm_attn_small_model.model import TinyModel, check_block_length
from sparse_dlm_attn_small_model.records import Decoded
from sparse_dlm_attn_small_model.schedule import Schedule

HostArray = np.ndarray[Any, Any]
Policy = str | PrefixAttentionPolicy[Any]


def decode_blocks(
    model: TinyModel,
    prompt: bytes | Sequence[int],
    *,
    policy: Policy,
    block_length: int = 16,
    steps: int | None = None,
    threshold: float | None = None,
    max_blocks: int = 8,
    prefix: KVCache | None = None,
    page_size: int | None = None,
    on_pass: OnPass = None,
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
    prefix : KVCache, optional
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
        If an argument breaks a rule; nothing has been computed then. Or if logits of a masked row have no
        softmax, which only a pass can show.
    UnknownNameError, UnavailableError
        If the policy cannot be had.

    Notes
    -----
    Confidence is the softmax probability of the likeliest byte; ties go to the lowest position. The stop byte
    is looked for when a block is complete, as in SDAR, so all policies make the same passes.
    """
    tokens = model.tokens_of(prompt)
    schedule = Schedule(check_block_length(block_length), steps, threshold)
    check_count("max_blocks", max_blocks, 1)
    _check_callable(on_pass)
    attention = PrefixAttention(policy, model.backend)
    if prefix is None:
        pages = DEFAULT_PAGE_SIZE if page_size is None else page_size
        cache = model.prefill(tokens, block_length=block_length, page_size=pages)
    else:
        _check_prefix(model, prefix, [tokens], block_length)
        cache = prefix.fork(page_size=page_size)
    return Denoiser(model, attention, cache, schedule, [max_blocks], on_pass).decode([tokens])[0]


def decode_together(
    model: TinyModel,
    prompts: Sequence[bytes | Sequence[int]],
    *,
    policy: Policy,
    prefix: KVCache,
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
    prefix : KVCache
        `KVCache.together` of ``model.prefill(prompt, block_length=...)`` of each; it is not changed.
    block_length, steps : int
        As for `decode_blocks`, as are the errors. There is no threshold: sequences would need different
        numbers of passes.
    max_blocks : sequence of int
        Blocks to decode at most, for each prompt.

    Returns
    -------
    list of Decoded
        One a prompt.
    """
    tokens = [model.tokens_of(prompt, "prompts") for prompt in prompts]
    schedule = Schedule(check_block_length(block_length), steps)
    if len(max_blocks) != len(tokens):
        raise InvalidArgumentError("max_blocks", f"must hold {len(tokens)} numbers", len(max_blocks))
    for number in max_blocks:
        check_count("max_blocks", number, 1)
    attention = PrefixAttention(policy, model.backend)
    if not decodes_together(attention.policy):
        raise InvalidArgumentError(
            "policy",
            "must compute all rows in every pass",
            repr(attention.policy),
            "Decode its prompts one by one, with decode_blocks.",
        )
    _check_prefix(model, prefix, tokens, block_length)
    return Denoiser(model, attention, prefix.fork(), schedule, max_blocks).decode(tokens)


def decode_full_sequence(
    model: TinyModel,
    prompt: bytes | Sequence[int],
    *,
    policy: Policy = "dense",
    new_tokens: int = 16,
    steps: int | None = None,
    threshold: float | None = None,
    block_length: int | None = None,
    page_size: int = DEFAULT_PAGE_SIZE,
    order: Order = "confidence",
    seed: int = 0,
    on_pass: OnPass = None,
) -> Decoded:
    """Fill in masks behind a prompt, greedily, with attention over the whole sequence.

    Parameters
    ----------
    model, prompt, policy : TinyModel, bytes, str or PrefixAttentionPolicy
        As for `decode_blocks`, as are the errors. Prompt and new tokens must fit the model's context.
    new_tokens : int
        Masks behind the prompt.
    steps, threshold : int, float, optional
        As for `decode_blocks`, for each window.
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
        As for `decode_blocks`.

    Returns
    -------
    Decoded
        As from block-wise decoding; there are no save passes. Context reads are those of the whole sequence:
        see `TrafficTotal.pair_share` and `TrafficTotal.row_share`, for here passes are bound by what they
        compute. A record's tokens are those behind the prompt, its positions count from there.

    Notes
    -----
    With ``block_length``, decoding ends after the window that holds a stop byte. Passes are numbered over all windows,
    as LLaDA numbers its steps; ``total_passes`` counts them all, with a threshold one for each new token.
    """
    tokens = model.tokens_of(prompt)
    check_new_tokens(model, len(tokens), new_tokens)
    window = new_tokens if block_length is None else block_length
    check_count("block_length", window, 1)
    if new_tokens % window:
        raise InvalidArgumentError("block_length", f"must divide new_tokens={new_tokens}", window)
    schedule = Schedule(window, steps, threshold)
    check_choice("order", order, get_args(Order))
    check_count("seed", seed)
    if order == "random" and threshold is not None:
        raise InvalidArgumentError("threshold", "must not be given with order='random'", threshold)
    _check_callable(on_pass)
    attention = PrefixAttention(policy, model.backend)
    cache = KVCache(
        model.config,
        model.backend,
        page_size=page_size,
        capacity=len(tokens) + new_tokens,
        whole=True,
        prompt_tokens=len(tokens),
    )
    rng = np.random.default_rng(seed) if order == "random" else None
    denoiser = Denoiser(model, attention, cache, schedule, [new_tokens // window], on_pass, rng)
    return denoiser.decode([tokens])[0]


def check_new_tokens(model: TinyModel, known: int, new_tokens: int) -> None:
    """Raise `InvalidArgumentError` unless a prompt and what is to be decoded fit the model's context."""
    check_count("new_tokens", new_tokens, 1)
    if known + new_tokens > model.config.max_context:
        raise InvalidArgumentError(
            "new_tokens",
            f"must leave prompt and answer within {model.config.max_context} bytes",
            f"{known} + {new_tokens}",
            "Shorten the prompt.",
        )


def _check_callable(on_pass: object) -> None:
    """Raise unless ``on_pass`` can be called or is left out."""
    if on_pass is not None and not callable(on_pass):
        raise InvalidTypeError("on_pass", "must be callable or None", type(on_pass).__name__)


def _check_prefix(model: TinyModel, prefix: KVCache, prompts: Sequence[tuple[int, ...]], block_length: int) -> None:
    """Raise unless ``prefix`` is what `TinyModel.prefill` returns for these prompts and block length."""
    if not isinstance(prefix, KVCache):
        raise InvalidTypeError("prefix", "must be a KVCache or None", type(prefix).__name__)
    blocks = tuple(tokens[: len(tokens) // block_length * block_length] for tokens in prompts)
    if (
        prefix.owner is not model
        or prefix.block_length != block_length
        or prefix.tokens != blocks
        or any(prefix.prompt_tokens != len(tokens) for tokens in prompts)
    ):
        raise InvalidArgumentError(
            "prefix",
            f"must be made by this model with block_length={block_length}, and hold exactly the "
            f"first {[len(tokens) for tokens in blocks]} bytes of the prompts",
            prefix,
            "Pass model.prefill(prompt, block_length=...), or leave prefix out.",
        )
