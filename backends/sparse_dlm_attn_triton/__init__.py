"""The Triton backend: a pass in five launches that read the selected pages where they lie.

Each operator has a file with its kernels and launches: `scores`, `select`, `attention`, `stream_k` and `finish`
for passes, `pooled` and `full_sequence` for whole sequences. See docs/backends/triton.md.
"""

from __future__ import annotations

import os
from typing import ClassVar, cast

from sparse_dlm_attn import (
    AttentionState,
    Context,
    InvalidArgumentError,
    InvalidTypeError,
    PageBounds,
    Selection,
    UnavailableError,
    UnsupportedError,
)
from sparse_dlm_attn.capabilities import Capabilities
from sparse_dlm_attn.checks import (
    check_attend_block,
    check_attend_pages,
    check_cached,
    check_context,
    check_page_scores,
    check_pooled_scores,
    check_top_pages,
)
from sparse_dlm_attn.ranked import RankedPass, RankedResult, check_ranked_pass
from sparse_dlm_attn.values import softmax_scale

try:
    import torch
    import triton
except ImportError as error:
    raise UnavailableError(
        "backend 'triton'", [str(error)], "Install it: pip install 'sparse_dlm_attn[triton]'."
    ) from error

from sparse_dlm_attn.torch_backend import TorchTensors
from sparse_dlm_attn_triton import ops, settings
from sparse_dlm_attn_triton.common import INTERPRETED
from sparse_dlm_attn_triton.passes import MOST_ROWS
from sparse_dlm_attn_triton.select import MOST_RANKED

__all__ = ["TritonBackend"]

OLDEST = {"PyTorch": (torch.__version__, (2, 5)), "Triton": (triton.__version__, (3, 5))}
DTYPES = ("bfloat16", "float16", "float32")
OTHERS = ("int8", "int32", "int64", "bool", "float64")
MOST = 256
"""Largest head size and page size, in channels and tokens."""
Tensor = torch.Tensor


class TritonBackend(TorchTensors):
    """The operators on ``torch.Tensor``, a pass of a block of up to 128 rows fused.

    Parameters
    ----------
    device : str, optional
        "cuda" (any NVIDIA GPU) or "cuda:1" (that one). Under Triton's interpreter (the environment variable
        ``TRITON_INTERPRET=1``, set before Triton is imported) it is "cpu". Default: whichever of them it is.
    ragged : bool
        Whether sequences of a batch differ much in length. Programs then take equal shares of all page lists
        together instead of equal shares of each, for one more launch (docs/backends/triton.md has the times).
    tuned : bool, optional
        Whether to launch with what ``sparse-dlm-attn tune`` found for this GPU, in this process from now on.
        Default: only if the environment variable ``SDA_TRITON_TUNED`` is 1.

    Raises
    ------
    InvalidArgumentError, InvalidTypeError
        If it is no such device, or ``ragged`` or ``tuned`` is no bool.
    UnavailableError
        If PyTorch or Triton is too old, there is no GPU, or nothing was tuned for it.
    """

    name: ClassVar[str] = "triton"

    def __init__(self, device: str | None = None, ragged: bool = False, tuned: bool | None = None) -> None:
        _check_versions()
        if not isinstance(ragged, bool):
            raise InvalidTypeError("ragged", "must be a bool", repr(ragged))
        if not isinstance(tuned, bool | None):
            raise InvalidTypeError("tuned", "must be a bool or None", repr(tuned))
        self.ragged = ragged
        self._device = _check_device(("cpu" if INTERPRETED else "cuda") if device is None else device)
        self.device = str(self._device)
        self.tuned = os.environ.get("SDA_TRITON_TUNED") == "1" if tuned is None else tuned
        if self.tuned:
            if INTERPRETED:
                raise InvalidArgumentError("tuned", "must be False under TRITON_INTERPRET=1", self.tuned)
            settings.use_tuned(self._device)

    def __repr__(self) -> str:
        return f"TritonBackend(device={self.device!r}{self._options('=True')})"

    def _options(self, suffix: str = "") -> str:
        """Tell which options are on."""
        return "".join(f", {name}{suffix}" for name in ("ragged", "tuned") if getattr(self, name))

    @property
    def capabilities(self) -> Capabilities:
        """Half and single precision; heads and pages up to 256 channels and tokens."""
        notes = f"device={self.device}{self._options()}"
        if INTERPRETED:
            notes += ", interpreted: bfloat16 products are wrong in Triton's interpreter"
        return Capabilities(
            dtypes=DTYPES[1:] if INTERPRETED else DTYPES,
            devices=(self._device.type,),
            head_dims=tuple(range(1, MOST + 1)),
            page_sizes=tuple(range(1, MOST + 1)),
            deterministic=True,
            batch_invariant=False,
            notes=notes + ".",
        )

    def page_bounds(self, context: Context) -> PageBounds:
        check_context(context)
        self._check("context", context.k_pages)
        return PageBounds(*ops.page_bounds(context.k_pages, context.page_table, context.page_lengths))

    def page_scores(self, q: Tensor, bounds: PageBounds, *, active: Tensor | None = None) -> Tensor:
        check_page_scores(q, bounds, active)
        self._check("q", q)
        scores: Tensor = ops.page_scores(q, bounds.lower, bounds.upper)
        return scores

    def pooled_scores(
        self, q: Tensor, context: Context, *, span: int, scale: float | None = None, lse: Tensor | None = None
    ) -> Tensor:
        check_pooled_scores(q, context, span, scale, lse)
        self._check("q", q)
        keys, span = (context.k_pages, context.page_table, context.page_lengths), min(span, max(q.shape[2], 1))
        scores: Tensor = ops.pooled_scores(q, *keys, span, softmax_scale(q.shape[3], scale), lse)
        return scores

    def top_pages(self, scores: Tensor, count: int | Tensor, *, eligible: Tensor) -> Tensor:
        check_top_pages(scores, count, eligible)
        self._check("scores", scores, floats=False)
        exact = scores.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.int16)
        if not exact or scores.shape[-1] > MOST_RANKED:
            ranked: Tensor = super().top_pages(scores, count, eligible=eligible)
            return ranked
        if not isinstance(count, Tensor):  # any int is legal, but not in every integer dtype
            most = min(max(int(count), 0), scores.shape[-1])
            count = torch.full((), most, dtype=torch.int32, device=scores.device)
        mask: Tensor = ops.top_pages(scores, count.to(scores.device), eligible)
        return mask

    def attend_pages(
        self, q: Tensor, context: Context, selection: Selection, active: Tensor, *, scale: float | None = None
    ) -> AttentionState:
        check_attend_pages(q, context, selection, active, scale)
        self._check("q", q)
        chosen, scale = _chosen(q, selection, active), softmax_scale(q.shape[3], scale)
        return AttentionState(*ops.attend_pages(q, *_pages(context), *chosen, scale, self.ragged))

    def attend_block(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> AttentionState:
        check_attend_block(q, k, v, scale)
        self._check("q", q)
        return AttentionState(*ops.attend_block(q, k, v, softmax_scale(q.shape[3], scale)))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: Context,
        selection: Selection,
        active: Tensor,
        cached: AttentionState | None,
        *,
        scale: float | None = None,
    ) -> tuple[Tensor, AttentionState]:
        check_attend_pages(q, context, selection, active, scale)
        check_attend_block(q, k, v, scale)
        if cached is not None:
            check_cached(cached, q)
        self._check("q", q)
        if q.shape[2] > MOST_ROWS:
            return super().attend(q, k, v, context, selection, active, cached, scale=scale)
        chosen, scale = _chosen(q, selection, active), softmax_scale(q.shape[3], scale)
        out, *state = ops.attend(q, k, v, *_pages(context), *chosen, scale, *_parts(cached), self.ragged)
        return out, AttentionState(*state)

    def attend_ranked(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: Context,
        bounds: PageBounds,
        ranked_pass: RankedPass,
        cached: AttentionState | None,
        *,
        scale: float | None = None,
    ) -> RankedResult:
        check_ranked_pass(q, k, v, context, bounds, ranked_pass, cached, scale)
        self._check("q", q)
        rule = ranked_pass
        too_long = q.shape[2] > MOST_ROWS or context.pages > MOST_RANKED
        if too_long or 0 in (context.pages, *q.shape):
            return super().attend_ranked(q, k, v, context, bounds, rule, cached, scale=scale)
        # Any int is legal, but a kernel takes small ones.
        count = None if rule.count is None else min(rule.count, q.shape[2])
        budget, pages = min(rule.budget, context.pages * context.page_size), min(rule.pages, context.pages)
        out, state_out, state_lse, active, mask, kept = ops.attend_ranked(
            q,
            k,
            v,
            *_pages(context),
            bounds.lower,
            bounds.upper,
            rule.reference,
            count,
            rule.mass,
            budget,
            pages,
            rule.union,
            rule.keep,
            softmax_scale(q.shape[3], scale),
            *_parts(cached),
            self.ragged,
        )
        selection = Selection(mask, 1 if rule.union == "row" else q.shape[2])
        kept = None if rule.keep == "nothing" else kept
        return RankedResult(out, AttentionState(state_out, state_lse), active, selection, kept)

    def _check(self, name: str, tensor: Tensor, *, floats: bool = True) -> None:
        """Raise unless a tensor is PyTorch's, lies on this backend's device and has a dtype it computes."""
        self._check_place(name, tensor)
        if floats and tensor.dtype == torch.float64:
            raise UnsupportedError("triton", ["dtype float64 is not one of " + ", ".join(DTYPES)])
        if floats and tensor.shape[-1] > MOST:
            raise UnsupportedError("triton", [f"head_dim {tensor.shape[-1]} exceeds {MOST}"])


def _pages(context: Context) -> tuple[Tensor, ...]:
    return context.k_pages, context.v_pages, context.page_table, context.page_lengths


def _chosen(q: Tensor, selection: Selection, active: Tensor) -> tuple[Tensor, int, Tensor]:
    return selection.mask, min(selection.span, max(q.shape[2], 1)), active


def _parts(state: AttentionState | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if state is None else (state.out, state.lse)


def _check_versions() -> None:
    """Raise `UnavailableError` if PyTorch or Triton is too old."""
    for library, (version, oldest) in OLDEST.items():
        found = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
        if found < oldest:
            raise UnavailableError(
                "backend 'triton'",
                [f"{library} {version} is older than {'.'.join(map(str, oldest))}"],
                f"Upgrade it: pip install -U {library.lower().replace('py', '')}.",
            )


def _check_device(device: object) -> torch.device:
    """Return the device, if Triton can compute on it here."""
    rule = "must be 'cuda' or 'cuda:<number>', or 'cpu' under TRITON_INTERPRET=1"
    try:
        chosen = torch.device(cast("str", device))
    except (RuntimeError, TypeError) as error:
        raise InvalidArgumentError("device", rule, repr(device)) from error
    if INTERPRETED:
        if chosen.type != "cpu":
            raise InvalidArgumentError(
                "device",
                "must be 'cpu' while TRITON_INTERPRET=1 is set",
                repr(device),
                "Unset the variable to run on a GPU.",
            )
        return torch.device("cpu")
    if chosen.type == "cpu":
        raise UnavailableError(
            "backend 'triton' on device 'cpu'",
            ["Triton compiles for GPUs"],
            "Set TRITON_INTERPRET=1 before Python starts, to try it slowly, or use backend 'torch'.",
        )
    if chosen.type != "cuda":
        raise InvalidArgumentError("device", rule, repr(device))
    if not torch.cuda.is_available():
        raise UnavailableError(
            f"backend 'triton' on device {str(device)!r}",
            ["no usable GPU was found"],
            "Check the driver with nvidia-smi, or use backend 'torch' or 'reference'.",
        )
    if chosen.index is not None and chosen.index >= torch.cuda.device_count():
        raise InvalidArgumentError(
            "device", f"must name one of {torch.cuda.device_count()} GPUs, from cuda:0", repr(device)
        )
    return chosen
