"""`fast-dllm`: keys and values outside the window are computed once for each window."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from sparse_dlm_attn.arrays import Array, namespace
from sparse_dlm_attn.pass_info import PassInfo
from sparse_dlm_attn.policies.windows import rows_if, window_begins
from sparse_dlm_attn.policy import PassInputs, PrefixAttentionPolicy, check_choice
from sparse_dlm_attn.selection import Selection

__all__ = ["FastDLLM"]

Mode = Literal["prefix", "dual"]


@dataclass(frozen=True)
class FastDLLM(PrefixAttentionPolicy[None]):
    """Compute the window alone, or the window and what follows it; all rows when a window begins.

    Paper: "Fast-dLLM: Training-free Acceleration of Diffusion LLM by Enabling KV Cache and Parallel
    Decoding", arXiv 2505.22618.

    Rule: the first pass of a window computes every token and so refreshes all keys and values. Later
    passes of the window compute its rows (``mode=dual``) or those and every row behind them
    (``mode=prefix``); the other keys and values stay as that pass left them, although the tokens that
    they were computed beside have changed since. Every row attends to every key.

    On a model that is causal from block to block this decides nothing: a prefix's keys and values are
    exact, there is no suffix, and the block is one window. Both modes are `dense` there.

    Deviations from the authors' code:

    - Keys are stored after the rotary embedding; positions do not change, so it is the same.
    - Their refresh pass is followed by a cached pass even when it has completed the window; here a
      complete window ends.
    - Which tokens are decoded (their confidence threshold) is not a policy's business: see the decoding
      loop's ``threshold``.
    """

    name: ClassVar[str] = "fast-dllm"
    counts_passes: ClassVar[bool] = False

    mode: Mode = field(
        default="dual",
        metadata={
            "help": "Rows computed after a window's first pass: the window (dual) or the window and "
            "all behind it (prefix)."
        },
    )

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, get_args(Mode))

    def computed_tokens(self, info: PassInfo, rows: Array) -> Array:
        """Return all rows when a window begins, else those that the mode computes."""
        if info.window is None:
            return rows
        xp = namespace(rows)
        window = xp.asarray(info.window, device=rows.device)
        if self.mode == "prefix":
            window = xp.cumulative_sum(xp.astype(window, xp.int32), axis=-1) > 0
        return rows_if(window_begins(info, rows), rows, window)

    def select_pages(self, inputs: PassInputs[None], active: Array) -> Selection:
        """Select every page."""
        return Selection.all_pages(inputs.context, inputs.tokens)
