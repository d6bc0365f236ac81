"""Decoding by denoising: block by block over a cached prefix, or window by window over a whole sequence.

Block-wise, the prompt's whole blocks are prefilled; what is left of it stands at the front of the first
block, decoded from the start. A block is denoised in several passes, each followed by the decoding of
some tokens, and run once more when it is complete, to write its final KV (the save pass).

Over the whole sequence, as LLaDA decodes, every token sees every other. The sequence is one block whose
keys are its context (clause DRIVER-4), and masks are filled in window by window.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np

from sparse_dlm_attn import InvalidArgumentError, InvalidTypeError, PassInfo, PrefixAttention, PrefixAttentionPolicy
from sparse_dlm_attn.arrays import to_numpy
from sparse_dlm_attn.memory import LayerMemory
from sparse_dlm_attn.policy import check_choice, check_count
from sparse_dlm_attn_small_model.cache import DEFAULT_PAGE_SIZE, KVCache
from sparse_dlm_attn_small_model.config import MASK_ID
from sparse_dlm_attn_small_model.model import TinyModel, check_block_length
from sparse_dlm_attn_small_model.records import Decoded, PassRecord, text_before_stop
from sparse_dlm_attn_small_model.schedule import Schedule, confidences

HostArray = np.ndarray[Any, Any]
Policy = str | PrefixAttentionPolicy[Any]
OnPass = Callable[[PassRecord], None] | None
Order = Literal["confidence", "random"]


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
    return _Denoiser(model, attention, cache, schedule, [max_blocks], on_pass).decode([tokens])[0]


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
    return _Denoiser(model, attention, prefix.fork(), schedule, max_blocks).decode(tokens)


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
    denoiser = _Denoiser(model, attention, cache, schedule, [new_tokens // window], on_pass, rng)
    return denoiser.decode([tokens])[0]


def decodes_together(policy: PrefixAttentionPolicy[Any]) -> bool:
    """Return whether `decode_together` takes a policy, an instance: if it leaves no rows uncomputed."""
    return type(policy).computed_tokens is PrefixAttentionPolicy.computed_tokens


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


class _Sequence:
    """What came of one sequence so far."""

    def __init__(self, max_blocks: int) -> None:
        self.max_blocks = max_blocks
        self.blocks = 0
        self.generated = b""
        self.records: list[PassRecord] = []
        self.build_bytes = 0.0

    @property
    def running(self) -> bool:
        """Whether it takes another block. Until all have ended, one that has is computed on in vain."""
        return self.blocks < self.max_blocks and not text_before_stop(self.generated)[1]


class _Denoiser:
    """A decoding under way: the only thing here that changes."""

    def __init__(
        self,
        model: TinyModel,
        attention: PrefixAttention,
        cache: KVCache,
        schedule: Schedule,
        max_blocks: Sequence[int],
        on_pass: OnPass = None,
        rng: np.random.Generator | None = None,
    ) -> None:
        self.model, self.attention, self.cache, self.schedule = model, attention, cache, schedule
        self.on_pass, self.rng = on_pass, rng
        self.sequences = [_Sequence(most) for most in max_blocks]
        self.blocks = self.passes = self.index = 0  # blocks done, passes done, passes done in this block
        # Kept across blocks too: the driver drops what does not outlive a block.
        self.memories: tuple[LayerMemory, ...] | None = None

    def decode(self, prompts: Sequence[tuple[int, ...]]) -> list[Decoded]:
        """Decode blocks until every sequence has ended."""
        started, length = time.perf_counter(), self.schedule.tokens
        prefilled = 0 if self.cache.whole else self.cache.length
        width = self.cache.length if self.cache.whole else length
        known = np.asarray([prompt[prefilled:] for prompt in prompts], dtype=np.int64)
        while any(sequence.running for sequence in self.sequences):
            given = known.shape[1]
            masks = np.full((len(prompts), width - given), MASK_ID)
            self.tokens = np.concatenate([known, masks], axis=1)
            self.window = slice(given, given + length if self.cache.whole else width)
            self._fill()
            for sequence, row in zip(self.sequences, self.tokens, strict=True):
                if sequence.running:
                    sequence.generated += bytes(row[self.window].tolist())
                    sequence.blocks += 1
            self.blocks += 1
            known = self.tokens[:, : self.window.stop if self.cache.whole else 0]
        seconds = (time.perf_counter() - started) / len(prompts)
        results = []
        for sequence in self.sequences:
            output, stopped = text_before_stop(sequence.generated)
            results.append(
                Decoded(
                    output=output,
                    generated=sequence.generated,
                    stopped=stopped,
                    passes=tuple(sequence.records),
                    prefilled_tokens=prefilled,
                    build_bytes=sequence.build_bytes,
                    seconds=seconds,
                )
            )
        return results

    def _fill(self) -> None:
        """Decode the masks of the window pass by pass; block by block, save it then."""
        count = self.window.stop - self.window.start
        self.total = self.schedule.planned_passes(count)
        if self.cache.whole:
            self.total = (count if self.total is None else self.total) * self.sequences[0].max_blocks
        orders: list[HostArray] = []
        if self.rng is not None:  # as many tokens a pass, in an order that is drawn now
            drawn = self.window.start + self.rng.permutation(count).astype(np.int32)
            orders = np.split(drawn, np.cumsum(self.schedule.counts)[:-1])
        self.newly, self.index = np.zeros(self.tokens.shape, dtype=bool), 0
        while (masked := self.tokens[:, self.window] == MASK_ID).any():
            self._pass(masked, orders[self.index] if orders else None)
        if not self.cache.whole:
            self._pass(None, None)

    def _pass(self, masked: HostArray | None, order: HostArray | None) -> None:
        """Make a pass and decode some ``masked`` tokens of the window; None for the save pass."""
        started, built = time.perf_counter(), self.cache.bounds_key_bytes
        info, rows = self._info(masked is None, order), None
        if not decodes_together(self.attention.policy):  # then there is one sequence
            every = self._told(np.ones(self.tokens.shape, dtype=bool))
            rows = np.flatnonzero(to_numpy(self.attention.policy.computed_tokens(info, every))[0])
        logits, self.memories = self.model.forward(
            self.tokens,
            self.cache,
            self.attention,
            info,
            self.memories,
            rows=rows,
            window_end=self.window.stop if self.cache.whole else None,
        )
        if masked is None:
            self.cache.advance(self.tokens.tolist())
            self.newly = np.zeros_like(self.newly)
        else:
            self._unmask(to_numpy(logits)[:, self.window], masked, order)
        shown = slice(self.cache.prompt_tokens if self.cache.whole else 0, None)
        records = PassRecord.of(
            self.memories,
            self.tokens[:, shown],
            self.newly[:, shown],
            block=self.blocks,
            index=self.index,
            is_save=masked is None,
            computed_rows=self.tokens.shape[1] if rows is None else len(rows),
            seconds=(time.perf_counter() - started) / len(self.sequences),
        )
        self.index, self.passes = self.index + 1, self.passes + 1
        for sequence, record in zip(self.sequences, records, strict=True):
            if sequence.running:
                sequence.records.append(record)
                if masked is None:
                    # Building the bounds is work of the layers that use them; see Decoded.traffic().
                    layers = np.any([each.metadata_reads > 0 for each in sequence.records], axis=0).sum()
                    sequence.build_bytes = float(built * layers)
                if self.on_pass is not None:
                    self.on_pass(record)

    def _info(self, is_save: bool, order: HostArray | None) -> PassInfo:
        """Return what a policy is told about the next pass."""
        decoded, newly = self._told(self.tokens != MASK_ID), self._told(self.newly)
        if not self.cache.whole:
            return PassInfo(self.index, is_save, decoded, newly, total_passes=self.total)
        planned = None if order is None else self._told(self._rows(order))
        return PassInfo(
            self.passes,
            is_save,
            decoded,
            newly,
            total_passes=self.total,
            window=self._told(self._rows(self.window)),
            window_index=self.index,
            planned=planned,
            planned_order=None if order is None else self._told(order[None]),
        )

    def _unmask(self, logits: HostArray, masked: HostArray, order: HostArray | None) -> None:
        """Decode the next tokens of the window: those in ``order``, or the surest."""
        running = np.asarray([[sequence.running] for sequence in self.sequences])
        moment = f"pass {self.index} of block {self.blocks}"
        best, confidence = confidences(logits, running & masked, moment, self.window.start)
        if order is None:
            self.newly = np.zeros_like(self.newly)
            self.newly[:, self.window] = [
                self.schedule.choose(self.index, *rows) for rows in zip(masked, confidence, strict=True)
            ]
        else:
            self.newly = self._rows(order)
        np.copyto(self.tokens[:, self.window], best, where=self.newly[:, self.window])

    def _rows(self, places: HostArray | slice) -> HostArray:
        """Return the rows at ``places``, bool ``(batch, tokens)``."""
        rows = np.zeros(self.tokens.shape, dtype=bool)
        rows[:, places] = True
        return rows

    def _told(self, values: HostArray) -> Any:
        """Return ``values`` as an array of the backend."""
        return self.model.backend.asarray(values, dtype=values.dtype.name)
