"""Launches of `kernels`: sizes of programs, strides, and nothing that looks at a value."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sparse_dlm_attn import AttentionState

if TYPE_CHECKING:
    from sparse_dlm_attn_distributed.mailbox import Mailbox, Mailboxes

__all__ = [
    "Block",
    "chained",
    "gather",
    "lined",
    "merge_gathered",
    "merge_sent",
    "merges",
    "most_programs",
    "power_of_two",
    "programs_of_gather",
    "programs_of_merge",
]

GATHER_WORDS = 1024
"""Words of 4 bytes that a program carries at a time."""
MOST_KEYS = 256
"""Longest block whose own attention the kernel computes."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Block:
    """What every rank attends to itself.

    Parameters
    ----------
    q, k, v : torch.Tensor
        ``(batch, q_heads, tokens, head_dim)`` and twice ``(batch, kv_heads, keys, head_dim)``.
    scale : float
        Factor on q.k.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float


def merges(state: AttentionState, block: Block | None) -> bool:
    """Return whether the kernel can merge such states, with this block."""
    if 0 in state.out.shape or state.out.dtype not in DTYPES:
        return False
    if state.out.shape[3] > 256 or state.out.device.type != "cuda" or not _has_triton():
        return False
    return block is None or (0 < block.k.shape[2] <= MOST_KEYS and block.k.dtype == state.out.dtype)


@functools.cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@functools.cache
def most_programs(device: torch.device, each: int) -> int:
    """Return how many programs are on a GPU all at once, ``each`` on a multiprocessor.

    Programs that wait for those of other ranks must be: what waits for its turn cannot answer.
    """
    if device.type != "cuda":
        return each
    return int(torch.cuda.get_device_properties(device).multi_processor_count) * each


def programs_of_gather(words: int, device: torch.device) -> int:
    """Return how many programs share ``words`` of 4 bytes."""
    return min(-(-words // GATHER_WORDS), most_programs(device, 4))


def programs_of_merge(rows: int, device: torch.device) -> int:
    """Return how many programs share ``rows``."""
    return min(rows, most_programs(device, 8))


def gather(
    boxes: Mailboxes, box: Mailbox, source: torch.Tensor, result: torch.Tensor, phase: int = 3
) -> None:
    """Send int32 ``(words,)`` to all ranks and receive theirs into ``(ranks, words)``."""
    from sparse_dlm_attn_distributed.kernels import gather_kernel

    stopped, limit = boxes.words
    gather_kernel[(box.programs,)](
        box.table, box.epochs, stopped, source, result, source.numel(), box.space // 4, box.flags_at, limit,
        RANK=boxes.rank, RANKS=boxes.ranks, PHASE=phase, BLOCK=GATHER_WORDS, num_warps=4,
        **chained(source.device),
    )  # fmt: skip


def merge_sent(
    boxes: Mailboxes, box: Mailbox, part: AttentionState, active: torch.Tensor | None,
    cached: AttentionState | None, block: Block | None, phase: int = 3,
) -> tuple[torch.Tensor | None, AttentionState]:
    """Send this rank's state, receive and merge all; see `Mailboxes.merged`."""
    return _merge(
        part, active, cached, block, table=box.table, epochs=box.epochs, words=boxes.words,
        programs=box.programs, space=box.space, flags_at=box.flags_at, rank=boxes.rank, ranks=boxes.ranks,
        phase=phase, counted=True,
    )


def merge_gathered(
    gathered: torch.Tensor, part: AttentionState, active: torch.Tensor | None,
    cached: AttentionState | None, block: Block | None,
) -> tuple[torch.Tensor | None, AttentionState]:
    """Merge packed states that a collective brought, int32 ``(ranks, packed_bytes / 4)``."""
    table = _address_of(gathered)
    return _merge(
        part, active, cached, block, table=table, epochs=gathered, words=(gathered, 0),
        programs=part.lse.numel(), space=gathered.stride(0) * 4, flags_at=0, rank=0,
        ranks=gathered.shape[0], phase=2, counted=False,
    )


def _address_of(tensor: torch.Tensor) -> torch.Tensor:
    # A fill, not a copy from the host: it can be captured.
    return torch.full((1,), tensor.data_ptr(), dtype=torch.int64, device=tensor.device)


def _merge(
    part: AttentionState, active: torch.Tensor | None, cached: AttentionState | None, block: Block | None, *,
    table: torch.Tensor, epochs: torch.Tensor, words: tuple[torch.Tensor, int], programs: int, space: int,
    flags_at: int, rank: int, ranks: int, phase: int, counted: bool,
) -> tuple[torch.Tensor | None, AttentionState]:
    from sparse_dlm_attn_distributed.kernels import merge_kernel

    part_out, part_lse = part.out.contiguous(), part.lse.contiguous()
    batch, q_heads, tokens, head_dim = part_out.shape
    state = AttentionState(torch.empty_like(part_out), torch.empty_like(part_lse))
    out = torch.empty_like(part_out) if block is not None else None
    q, k, v = (lined(each) for each in (block.q, block.k, block.v)) if block is not None else (part_out,) * 3
    old = (lined(cached.out), lined(cached.lse)) if cached is not None else (part_out, part_lse)
    if cached is not None and active is None:
        raise AssertionError("cached rows need to be told from active ones")
    rows_on = active.contiguous().view(torch.int8) if active is not None else part_lse
    stopped, limit = words
    merge_kernel[(programs,)](
        table, epochs, stopped, part_out, part_lse, rows_on, *old, q, k, v,
        state.out if out is None else out, state.out, state.lse,
        batch * q_heads * tokens, q_heads, k.shape[2], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *old[0].stride()[:3], *old[1].stride()[:2], block.scale if block is not None else 1.0,
        space, part_lse.numel() * 4, flags_at, limit,
        TOKENS=tokens, GROUP=q_heads // k.shape[1], HEAD_DIM=head_dim, RANK=rank, RANKS=ranks, PHASE=phase,
        COUNTED=counted, CACHED=cached is not None, BLOCK=block is not None, BLOCK_D=power_of_two(head_dim),
        BLOCK_K=min(power_of_two(k.shape[2]), 16 if head_dim <= 128 else 8), BLOCK_R=power_of_two(ranks),
        num_warps=1,
        **chained(part_out.device),
    )  # fmt: skip
    return out, state


def lined(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose last axis is contiguous, as kernels read it: itself wherever it is."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def power_of_two(number: int) -> int:
    """Return the least power of two that holds ``number``."""
    return 1 << max(number - 1, 0).bit_length()


@functools.cache
def chained(device: torch.device) -> dict[str, Any]:
    """Return what lets a kernel start while the one before ends (programmatic dependent launch)."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}
