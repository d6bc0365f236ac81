"""`dkv-cache`: tokens decoded some passes ago are not computed again; their keys and values stay."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from sparse_dlm_attn.arrays import Array, invert_permutation, namespace
from sparse_dlm_attn.policies.windows import rows_if, window_begins
from sparse_dlm_attn.policy import PassInputs, PrefixAttentionPolicy, check_choice, check_count, either
from sparse_dlm_attn.selection import Selection
from sparse_dlm_attn.values import PassInfo

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
      latter its ``neighbours`` nearest rows that are still masked, taken from left and right in turn.
      Where nothing is planned, all masked rows of the window are computed.

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
        metadata={"help": "Rows computed between reloads: all not decoded before the previous pass (decode), "
                  "or only those being decoded (greedy)."},
    )
    reload: int | None = field(
        default=None,
        metadata={"help": "Passes from one computation of all rows to the next, at least 1; none for 8 "
                  "(decode) or 2 (greedy)."},
    )
    neighbours: int = field(
        default=4,
        metadata={"help": "Masked rows computed beside each row to be decoded, both sides together; greedy "
                  "only. The authors use up to 6."},
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
        return planned | masked_neighbours(planned, ~decoded, self.neighbours)


def masked_neighbours(centres: Array, masked: Array, count: int) -> Array:
    """Return the ``count`` masked rows next to each centre, left and right in turn.

    Parameters
    ----------
    centres, masked : array
        bool ``(batch, tokens)``; centres that are not masked have no neighbours.
    count : int
        Neighbours of a centre; a side that has no more leaves its turns to the other.

    Returns
    -------
    array
        bool ``(batch, tokens)``.
    """
    xp = namespace(masked)
    tokens = int(masked.shape[1])
    # Side by side without the gaps between them, the masked rows next to a centre are its neighbours.
    order = xp.argsort(xp.astype(~masked, xp.int32), axis=-1, stable=True)
    packed = xp.take_along_axis(centres & masked, order, axis=-1)
    place = xp.arange(tokens, dtype=xp.int32, device=masked.device)[None, :]
    left = place + xp.zeros_like(xp.astype(packed, xp.int32))
    right = xp.sum(xp.astype(masked, xp.int32), axis=-1, keepdims=True, dtype=xp.int32) - 1 - left
    count = min(count, tokens)
    lefts = xp.clip(count - right, -(-count // 2), count)
    rights = xp.clip(count - left, count // 2, count)
    chosen = xp.zeros_like(packed)
    for step in range(1, min(count, tokens - 1) + 1):
        edge = xp.zeros_like(packed[:, :step])
        chosen = chosen | xp.concat([(packed & (step <= lefts))[:, step:], edge], axis=-1)
        chosen = chosen | xp.concat([edge, (packed & (step <= rights))[:, : tokens - step]], axis=-1)
    back = xp.take_along_axis(chosen, invert_permutation(order), axis=-1)
    return back & masked
