"""What the pages of the published policies state, once more and plainly: who is active, what is read.

A rule is told pass after pass what happened and answers with the rows and pages that the policy's
page promises. It shares nothing with the policies, so that an off-by-one in one of them shows.

A policy of your own may state its rule too: give it a method ``stated_rule(episode)`` that returns an
object with the method ``step`` of `Rule`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from sparse_dlm_attn import PrefixAttentionPolicy
from sparse_dlm_attn_conformance.cases import Arrays, Host
from sparse_dlm_attn_conformance.doubles import GRID
from sparse_dlm_attn_conformance.episodes import Episode
from sparse_dlm_attn_reference import ReferenceBackend

SUFFIX = 2


@dataclass(frozen=True, eq=False)
class Moment:
    """One pass, as a rule sees it: values on the host, place in the block."""

    arrays: Arrays
    number: int
    is_save: bool
    newly: Host


@dataclass(frozen=True, eq=False)
class Stated:
    """What a policy's page promises for a pass."""

    active: Host  # bool (batch, tokens)
    pages: Host  # bool, broadcasts to (batch, q_heads, tokens, pages); only active rows count


class Rule(Protocol):
    """Tells for each pass of an episode, in order, what the policy should do."""

    def step(self, now: Moment) -> Stated:
        """Return what the policy should do in this pass."""
        ...


def everyone(arrays: Arrays) -> Host:
    """Return all rows, bool ``(batch, tokens)``."""
    return np.ones((arrays.q.shape[0], arrays.q.shape[2]), dtype=bool)


def best(scores: Host, counts: Host, eligible: Host) -> Host:
    """Choose ``counts[b]`` pages in every row of ``scores``, the lowest index first among equals."""
    mask = np.zeros(scores.shape, dtype=bool)
    eligible = np.broadcast_to(eligible, scores.shape)
    for position in np.ndindex(*scores.shape[:-1]):
        pages = sorted(np.flatnonzero(eligible[position]), key=lambda page: (-scores[position][page], page))
        mask[position][pages[: max(int(counts[position[0]]), 0)]] = True
    return mask


def budget_pages(arrays: Arrays, budget: int, rounding: str = "floor", least: int = 1) -> Host:
    """Return the pages that a budget of tokens buys in each sequence; a context that fits is bought whole."""
    tokens, size = arrays.page_lengths.sum(axis=1), arrays.page_size
    count = budget // size if rounding == "floor" else -(-budget // size)
    return np.where(tokens <= budget, arrays.page_lengths.shape[1], max(count, least))


class Everything:
    """`dense`: all rows, all pages."""

    def step(self, now: Moment) -> Stated:
        return Stated(everyone(now.arrays), now.arrays.exists)


@dataclass
class Window:
    """`sliding-window` and `streaming-llm`: pages that hold one of the first or last tokens."""

    window: int
    sinks: int
    after: int

    def step(self, now: Moment) -> Stated:
        arrays = now.arrays
        mask = np.zeros(arrays.page_lengths.shape, dtype=bool)
        for b, lengths in enumerate(arrays.page_lengths):
            suffix = (
                np.zeros(len(lengths), dtype=bool)
                if arrays.page_segments is None
                else arrays.page_segments[b] == SUFFIX
            )
            before = [page for page in range(len(lengths)) if not suffix[page] for _ in range(lengths[page])]
            behind = [page for page in range(len(lengths)) if suffix[page] for _ in range(lengths[page])]
            start = max(len(before) - self.window, 0)
            mask[b, [*before[: self.sinks], *before[start:], *behind[: self.after]]] = True
        return Stated(everyone(arrays), mask[:, None, None, :])


class Ranked:
    """`quest` and `losa`: the best pages by the bound, for active rows."""

    def __init__(self, policy: Any, episode: Episode) -> None:
        self.policy = policy
        self.dense_layer = episode.layer < policy.dense_layers
        self.reference: Host | None = None

    def step(self, now: Moment) -> Stated:
        active = self.active(now)
        self.look_back(now.arrays.q, active)
        dense = self.dense_layer or (now.number == 0 and self.policy.first_pass == "dense")
        if now.is_save and getattr(self.policy, "save_pass", "") == "dense":
            dense = True
        return Stated(active, now.arrays.exists if dense else self.united(now.arrays, active))

    def active(self, now: Moment) -> Host:
        """Return the rows that moved most since the reference queries."""
        rows, policy = everyone(now.arrays), self.policy
        if policy.name != "losa" or now.number == 0 or self.dense_layer or self.reference is None:
            return rows
        if now.is_save and policy.save_pass != "step":
            return rows if policy.save_pass == "dense" else ~rows
        change = ((now.arrays.q - self.reference) ** 2).mean(axis=(1, 3)).astype(np.float32).astype(float)
        chosen = np.zeros(change.shape, dtype=bool)
        for b, row in enumerate(change):
            order = sorted(range(len(row)), key=lambda index: (-row[index], index))
            if policy.mass is None:
                chosen[b, order[: policy.active]] = True
                continue
            reached = 0.0
            for index in order:
                if reached >= policy.mass * row.sum():
                    break
                chosen[b, index] = True
                reached += row[index]
        return chosen

    def look_back(self, q: Host, active: Host) -> None:
        """Remember the queries that the next pass is compared with."""
        if self.reference is None or getattr(self.policy, "drift", "") != "refresh":
            self.reference = q
        else:
            self.reference = np.where(active[:, None, :, None], q, self.reference)

    def united(self, arrays: Arrays, active: Host) -> Host:
        """Return what each row reads: its own best pages, or their union over rows and heads."""
        policy, bounds = self.policy, arrays.bounds()
        lower, upper = (np.repeat(part, arrays.group, axis=1)[:, :, None] for part in (bounds.lower, bounds.upper))
        q = arrays.q[:, :, :, None, :]
        scores = np.maximum(q * lower, q * upper).sum(axis=4)
        if policy.group_scores != "query_head":
            batch, heads, rows, pages = scores.shape
            grouped = scores.reshape(batch, heads // arrays.group, arrays.group, rows, pages)
            pooled = grouped.max(axis=2) if policy.group_scores == "max" else grouped.sum(axis=2)
            scores = np.repeat(pooled, arrays.group, axis=1)
        count = budget_pages(arrays, policy.budget, policy.page_count, policy.min_pages)
        if policy.newest:
            forced = self.newest(arrays)[:, None, None, :]
            own = best(scores, count - forced.sum(axis=(1, 2, 3)), arrays.exists & ~forced) | forced
        else:
            own = best(scores, count, arrays.exists)
        own &= active[:, None, :, None]
        if policy.pages == "own":
            return own
        union: Host = np.asarray(own.any(axis=2, keepdims=True))
        if policy.union_over == "layer":
            return np.asarray(union.any(axis=1, keepdims=True))
        if policy.union_over == "kv_head":
            batch, heads, _, pages = union.shape
            groups = union.reshape(batch, heads // arrays.group, arrays.group, 1, pages).any(axis=2)
            return np.repeat(groups, arrays.group, axis=1)
        return union

    @staticmethod
    def newest(arrays: Arrays) -> Host:
        """Return the last page before the block that holds a token."""
        chosen = np.zeros(arrays.page_lengths.shape, dtype=bool)
        before = arrays.page_lengths > 0
        if arrays.page_segments is not None:
            before = before & (arrays.page_segments != SUFFIX)
        for b, pages in enumerate(before):
            chosen[b, np.flatnonzero(pages)[-1:]] = True
        return chosen


class Refreshed:
    """`flashblock`: all rows or none, by the tokens decoded since the last refresh."""

    def __init__(self, policy: Any, episode: Episode) -> None:
        self.policy = policy
        self.dirty: Host | None = None

    def step(self, now: Moment) -> Stated:
        rows = everyone(now.arrays)
        if now.number == 0 or self.dirty is None:
            self.dirty = ~rows
            return Stated(rows, now.arrays.exists)
        dirty = self.dirty | now.newly
        refresh = dirty.sum(axis=1) >= self.policy.limit
        if now.is_save:
            refresh = refresh | True if self.policy.save_pass == "refresh" else refresh & False
        self.dirty = dirty & ~refresh[:, None]
        return Stated(rows & refresh[:, None], now.arrays.exists)


class Frozen:
    """`mage` and `sparsed`: dense passes, then pages chosen once by softmax mass."""

    def __init__(self, policy: Any, episode: Episode) -> None:
        self.policy = policy
        self.dense_layer = episode.layer < getattr(policy, "dense_layers", 0)
        self.warmup = 1
        if policy.name == "sparsed":
            share = int((episode.total_passes or episode.case.tokens) * policy.skip)
            planned = share + 2 if policy.variant == "code" else max(share, 1)
            self.warmup = planned if policy.warmup is None else policy.warmup
        self.chosen: Host | None = None

    def step(self, now: Moment) -> Stated:
        dense = self.dense_layer or now.number < self.warmup
        due = now.number == max(self.warmup - 1, 0)
        if due or (now.number >= self.warmup and not getattr(self.policy, "frozen", True)):
            self.chosen = self.mage(now.arrays) if self.policy.name == "mage" else self.sparsed(now.arrays)
        pages = now.arrays.exists if dense or self.chosen is None else self.chosen
        return Stated(everyone(now.arrays), pages)

    def mage(self, arrays: Arrays) -> Host:
        """Choose for each KV head and the whole block."""
        mass = masses(arrays, arrays.q.shape[2])
        batch, heads, spans, pages = mass.shape
        grouped = mass.reshape(batch, heads // arrays.group, arrays.group, spans, pages).sum(axis=2)
        chosen = best(grouped, budget_pages(arrays, self.policy.budget), arrays.exists)
        return np.repeat(chosen, arrays.group, axis=1)

    def sparsed(self, arrays: Arrays) -> Host:
        """Choose for each query head and span, prompt and other pages apart if isolated."""
        tokens = arrays.q.shape[2]
        span = min(self.policy.span or tokens, tokens)
        if self.policy.score_scale == "heads":
            arrays = replace(arrays, scale=1 / np.sqrt(arrays.q.shape[1]))
        if self.policy.isolated and arrays.page_segments is not None:
            prompt = (arrays.page_segments == 0)[:, None, None, :] & arrays.exists
            others = arrays.exists & ~prompt
            alone = replace(arrays, page_lengths=np.where(others[:, 0, 0], arrays.page_lengths, 0))
            if self.policy.variant == "code":
                ours = self.share(masses(arrays, span), arrays.exists) & prompt
            else:
                ours = self.share(masses(arrays, span), prompt)
            chosen = ours | self.share(masses(alone, span), others)
        else:
            chosen = self.share(masses(arrays, span), arrays.exists)
        return np.repeat(chosen, span, axis=2)[:, :, :tokens]

    def share(self, mass: Host, eligible: Host) -> Host:
        """Choose floor(n * ratio) + 1 of n eligible pages (paper: the floor, at least 1), at most all."""
        floors = [int(n * self.policy.ratio) for n in eligible[:, 0, 0].sum(axis=1)]
        code = self.policy.variant == "code"
        return best(mass, np.asarray([n + 1 if code else max(n, 1) for n in floors]), eligible)


class Computed:
    """`dkv-cache`: rows that the model computes, and all pages for them."""

    def __init__(self, policy: Any, episode: Episode) -> None:
        self.policy = policy
        self.decoded: Host | None = None

    def step(self, now: Moment) -> Stated:
        rows, greedy = everyone(now.arrays), self.policy.mode == "greedy"
        self.decoded = now.newly if self.decoded is None else self.decoded | now.newly
        period = self.policy.reload or (2 if greedy else 8)
        if not now.is_save and now.number % period and (greedy or now.number > 1):
            rows = ~self.decoded | now.newly
        return Stated(rows, now.arrays.exists)


class Kept:
    """`sparse-dllm` and `snapkv`: dense passes, then pages chosen once by pooled scores."""

    def __init__(self, policy: Any, episode: Episode) -> None:
        self.policy = policy
        self.dense = policy.delay if policy.name == "sparse-dllm" else 0
        self.chosen: Host | None = None
        self.known: Host | None = None

    def step(self, now: Moment) -> Stated:
        present = now.arrays.exists
        pages = present
        if self.chosen is not None and self.known is not None:
            pages = self.chosen | (present & ~self.known)  # what has joined the context since is read, too
        if now.number == self.dense and self.chosen is None:
            sparse = self.policy.name == "sparse-dllm"
            self.chosen = self.sparse_dllm(now.arrays) if sparse else self.snapkv(now.arrays)
            self.known = present
        return Stated(everyone(now.arrays), pages)

    def pooled(self, scores: Host, order: Host, size: int, reduce: Callable[[Host], Any]) -> Host:
        """Pool the scores of the pages in ``order`` with those of their neighbours in that order."""
        half, result = self.policy.kernel // 2 // size, scores.copy()
        for place, page in enumerate(order):
            result[page] = reduce(scores[order[max(place - half, 0) : place + half + 1]])
        return result

    def sparse_dllm(self, arrays: Arrays) -> Host:
        """Choose a share of the pages for all heads, by the rows' and heads' summed bounds."""
        bounds = arrays.bounds()
        lower, upper = (np.repeat(part, arrays.group, axis=1)[:, :, None] for part in (bounds.lower, bounds.upper))
        q = arrays.q[:, :, :, None, :]
        scores = np.maximum(q * lower, q * upper).sum(axis=(1, 2, 4))
        mask = np.zeros(scores.shape, dtype=bool)
        for b, row in enumerate(scores):
            order = np.flatnonzero(arrays.page_lengths[b] > 0)
            pooled = self.pooled(row, order, arrays.page_size, np.max)
            ranked = sorted(order, key=lambda page: (-pooled[page], page))
            mask[b, ranked[: int(len(order) * self.policy.ratio)]] = True
        return mask[:, None, None, :]

    def snapkv(self, arrays: Arrays) -> Host:
        """Choose for each query head among the pages before the last tokens."""
        mass = masses(arrays, arrays.q.shape[2])
        mask = np.broadcast_to(arrays.exists, mass.shape).copy()
        for b, h in np.ndindex(mass.shape[:2]):
            lengths = arrays.page_lengths[b]
            prompt = lengths > 0
            if arrays.page_segments is not None:
                prompt = prompt & (arrays.page_segments[b] != SUFFIX)
            tokens = [page for page in np.flatnonzero(prompt) for _ in range(lengths[page])]
            if len(tokens) <= self.policy.capacity:
                continue
            earlier = np.setdiff1d(tokens, tokens[-self.policy.window :])
            reduce = np.max if self.policy.pooling == "max" else np.sum
            pooled = self.pooled(mass[b, h, 0], earlier, arrays.page_size, reduce)
            ranked = sorted(earlier, key=lambda page: (-pooled[page], page))
            mask[b, h, 0, earlier] = False
            mask[b, h, 0, ranked[: (self.policy.capacity - self.policy.window) // arrays.page_size]] = True
        return mask


def masses(arrays: Arrays, span: int) -> Host:
    """Return pooled scores on the grid (see `Grid`), in float64."""
    scores = ReferenceBackend().pooled_scores(arrays.q, arrays.context(), span=span, scale=arrays.scale)
    return np.asarray(np.round(scores * GRID) / np.float32(GRID), dtype=np.float64)


RULES: dict[str, Callable[[Any, Episode], Rule]] = {
    "dense": lambda policy, episode: Everything(),
    "sliding-window": lambda policy, episode: Window(policy.window, 0, policy.after),
    "streaming-llm": lambda policy, episode: Window(policy.window, policy.sinks, policy.after),
    "quest": Ranked,
    "losa": Ranked,
    "flashblock": Refreshed,
    "mage": Frozen,
    "sparsed": Frozen,
    "fast-dllm": lambda policy, episode: Everything(),
    "dkv-cache": Computed,
    "sparse-dllm": Kept,
    "snapkv": Kept,
}


def rule_of(policy: PrefixAttentionPolicy[Any], episode: Episode) -> Rule | None:
    """Return the rule that a policy states, None if it states none."""
    own = getattr(policy, "stated_rule", None)
    if own is not None:
        return own(episode)  # type: ignore[no-any-return]
    return RULES[policy.name](policy, episode) if policy.name in RULES else None
