"""A decoding under way: passes over a block or a window until every sequence has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from sparse_dlm_attn import PassInfo, PrefixAttention, PrefixAttentionPolicy
from sparse_dlm_attn.arrays import to_numpy
from sparse_dlm_attn.memory import LayerMemory
from sparse_dlm_attn_small_model.cache import KVCache
from sparse_dlm_attn_small_model.config import MASK_ID
from sparse_dlm_attn_small_model.model import TinyModel
from sparse_dlm_attn_small_model.records import Decoded, PassRecord, text_before_stop
from sparse_dlm_attn_small_model.schedule import Schedule, confidences

HostArray = np.ndarray[Any, Any]
OnPass = Callable[[PassRecord], None] | None
Order = Literal["confidence", "random"]

__all__ = ["Denoiser", "decodes_together"]


def decodes_together(policy: PrefixAttentionPolicy[Any]) -> bool:
    """Return whether `decode_together` takes a policy, an instance: if it leaves no rows uncomputed."""
    return type(policy).computed_tokens is PrefixAttentionPolicy.computed_tokens


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


class Denoiser:
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
