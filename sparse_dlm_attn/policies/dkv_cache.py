"""`dkv-cache`: tokens decoded some passes ago are not computed again; their keys and values stay."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from sparse_dlm_attn.arrays import Array, namespace
from sparse_dlm_attn.pass_info import PassInfo
from sparse_dlm_attn.policies.windows import rows_if, window_begins
from sparse_dlm_attn.policy import PassInputs, PrefixAttentionPolicy, check_choice, check_count, either
from sparse_dlm_attn.selection import Selection

__all__ = ["DKVCache"]

Mode = Literal["decode", "greedy"]


@dataclass(frozen=True)
class DKVCache(PrefixAttentionPolicy[None]):
    """Compute the tokens that are still masked or were decoded in the previous pass.

    Paper: "dKV-Cache: The Cache for Diffusion Language Models", arXiv 2505.15781; its code for LLaDA.

    Rule, counting the passes ``i`` of a window from 0; every row attends to every key:

    - ``mode=decode``: all rows in passes 0 and 1 and whenever ``i`` is a multiple of ``reload``. Else the
      rows that were not decoded before the previous pass: one decoded after it is computed once more,
      with its own embedding, and then cached.
    - ``mode=greedy``: all rows whenever ``i`` is a multiple of ``reload``. Else the rows decoded after the
      previous pass, those that will be decoded after this one (``info.planned``), and for each of the
      latter, in ``info.planned_order``, the ``neighbours`` nearest masked rows that are not among them
      yet; of two equally near the left one. Where no plan is known, all masked rows of the window.

    On a model that is causal from block to block the prefix is exact; what remains is inside the block:
    rows decoded two passes ago are not computed. The save pass computes all rows.

    Defaults: ``reload`` 8 for ``decode`` (the paper; their code's 1 never caches) and 2 for ``greedy``.

    Deviations from the authors' code:

    - Keys are stored after the rotary embedding; positions do not change, so it is the same.
    - Sequences of a batch may compute different numbers of rows; theirs must agree.
    - Neighbours are sought around the tokens to be decoded, as their code does; their paper prefers those
      just decoded.
    - The variants for Dream are not offered: they follow its shift of predictions by one token.
    """

    name: ClassVar[str] = "dkv-cache"

    mode: Mode = field(
        default="decode",
        metadata={
            "help": "Rows computed between reloads: all not decoded before the previous pass (decode), "
            "or only those being decoded (greedy)."
        },
    )
    reload: int | None = field(
        default=None,
        metadata={
            "help": "Passes from one computation of all rows to the next, at least 1; none for 8 "
            "(decode) or 2 (greedy)."
        },
    )
    neighbours: int = field(
        default=4,
        metadata={
            "help": "Masked rows computed beside each row to be decoded, both sides together; greedy "
            "only. The authors use up to 6."
        },
    )

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, get_args(Mode))
        check_count("neighbours", self.neighbours)
        if self.reload is not None:
            check_count("reload", self.reload, 1)

    @property
    def period(self) -> int:
        """Passes from one computation of all rows to the next."""
        if self.reload is not None:
            return min(self.reload, 2**31 - 1)
        return 8 if self.mode == "decode" else 2

    def computed_tokens(self, info: PassInfo, rows: Array) -> Array:
        """Return the rows that are masked, newly decoded or due; all rows when they are reloaded."""
        if info.decoded is None or info.newly_decoded is None:
            return rows
        xp = namespace(rows)
        decoded, newly = (xp.asarray(part, device=rows.device) for part in (info.decoded, info.newly_decoded))
        due = ~decoded | newly if self.mode == "decode" else self._being_decoded(info, decoded) | newly
        return rows_if(self._reloads(info, rows), rows, due)

    def select_pages(self, inputs: PassInputs[None], active: Array) -> Selection:
        """Select every page."""
        return Selection.all_pages(inputs.context, inputs.tokens)

    def _reloads(self, info: PassInfo, rows: Array) -> bool | Array:
        number, saves = info.pass_in_window, info.is_save
        if not isinstance(number, int):
            number = info.of_sequences("window_index", rows)
        if not isinstance(saves, bool):
            saves = info.of_sequences("is_save", rows)
        due = number % self.period == 0
        if self.mode == "decode":
            due = either(due, number < 2)
        return either(either(due, saves), window_begins(info, rows))

    def _being_decoded(self, info: PassInfo, decoded: Array) -> Array:
        """Return the rows to be decoded after this pass, with their neighbours."""
        xp = namespace(decoded)
        if info.planned is None:
            window = ~decoded if info.window is None else xp.asarray(info.window, device=decoded.device)
            return window & ~decoded
        planned = xp.asarray(info.planned, device=decoded.device)
        order = None
        if info.planned_order is not None:
            order = xp.asarray(info.planned_order, device=decoded.device)
        return planned | masked_neighbours(planned, ~decoded, self.neighbours, order)


def masked_neighbours(centres: Array, masked: Array, count: int, order: Array | None = None) -> Array:
    """Return the ``count`` masked rows nearest to each centre, among those that no earlier centre took.

    Parameters
    ----------
    centres, masked : array
        bool ``(batch, tokens)``. No centre is a neighbour of another.
    count : int
        Neighbours of a centre, as far as there are any left; of two equally near the left one comes first.
    order : array, optional
        Integers ``(batch, rows)``: the centres in the order in which they choose, -1 behind the last.
        Default: from left to right.

    Returns
    -------
    array
        bool ``(batch, tokens)``: the neighbours, without the centres.

    Notes
    -----
    Centres choose one after another, at a few passes over ``(batch, tokens)`` each. After
    ``ceil((tokens - 1) / (count + 1))`` of them nothing is left, so no more are asked, nor more than
    ``order`` has columns.
    """
    xp = namespace(masked)
    tokens = int(masked.shape[1])
    count = min(count, tokens)
    # Row p stands in column p + 1: column 0, never free, is where counting begins.
    column = xp.arange(tokens + 1, dtype=xp.int64, device=masked.device)[None, :]
    if order is None:
        found = xp.argsort(xp.astype(~centres, xp.int32), axis=-1, stable=True)
        known = xp.sum(xp.astype(centres, xp.int32), axis=-1, keepdims=True, dtype=xp.int32)
        order = xp.where(column[:, :tokens] < known, xp.astype(found, xp.int64), -1)
    order = xp.astype(order, xp.int64)
    wanted = xp.astype((order >= 0) & (order < tokens), xp.int64) * count
    free = masked & ~centres
    free = first = xp.concat([xp.zeros_like(free[:, :1]), free], axis=-1)
    least, most = column[:, :1], column[:, tokens:]
    for step in range(min(int(order.shape[1]), -(-(tokens - 1) // (count + 1)) if count else 0)):
        centre, room = order[:, step : step + 1], wanted[:, step : step + 1]
        counted = xp.cumulative_sum(xp.astype(free, xp.int32), axis=-1, dtype=xp.int32)
        mirror = xp.minimum(xp.maximum(2 * centre + 1 - column, least), most)
        # The free rows that come before a free row lie between it and its mirror image at the centre, n of
        # them. The difference is n on the centre's left, and -n - 1 on its right, where the image counts.
        between = xp.take_along_axis(counted, mirror, axis=-1) - counted
        free = free & ~((between < room) & (between >= -room))
    return (first & ~free)[:, 1:]
