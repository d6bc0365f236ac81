"""Global ranking of pages from candidates: exactly what one device would choose.

The score of a page is the largest that any rank gives it: the rank that holds it gives its true score,
the others something that is not above (`page_scores` gives them -inf, `pooled_scores` 0). Every rank lists
its best pages by its own scores, and the union of the lists, each page at its largest score, is ranked.

Why this is exact. Let a page be among the global best ``count``, and look at the rank that gives it its
true score. Whatever stands before it there has at least that score on that rank, hence globally, and an
equal score only at a lower index; so it stands before it globally too, and is less than ``count`` pages.
The page is therefore listed with its true score. All others are listed at most at theirs, so none of them
can move ahead.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist

from sparse_dlm_attn import Backend, InvalidArgumentError
from sparse_dlm_attn_distributed.exchange import Exchange

__all__ = ["largest_on_any_rank", "most_wanted", "top_pages_of_all"]


def most_wanted(
    count: int | torch.Tensor, eligible: torch.Tensor, pages: int, candidates: int | None,
    read: Callable[[torch.Tensor], torch.Tensor],
) -> int:
    """Return how many pages a row can take at most, the same number on every rank.

    Parameters
    ----------
    count : int or torch.Tensor
        Pages to take.
    eligible : torch.Tensor
        bool, broadcasts to the scores.
    pages : int
        Pages there are.
    candidates : int or None
        The bound that the user gave, so that a device need not be asked.
    read : callable
        Brings a tensor to the host, with a limit to the wait.

    Raises
    ------
    InvalidArgumentError
        If a row wants more than ``candidates``; on a device the kernel's assertion fails instead.
    """
    if not isinstance(count, torch.Tensor):
        most = min(max(int(count), 0), pages)
        return most if candidates is None else _within(most, candidates)
    wanted = torch.minimum(count.to(eligible.device), eligible.sum(-1)).clamp(min=0)
    if wanted.numel() == 0:
        return 0
    if candidates is not None and wanted.device.type != "cpu":
        torch._assert_async((wanted <= candidates).all())
        return min(candidates, pages)
    most = min(int(read(wanted.max())), pages)
    return most if candidates is None else _within(most, candidates)


def _within(most: int, candidates: int) -> int:
    if most > candidates:
        raise InvalidArgumentError(
            "candidates", "must be at least the pages that a row may choose", f"{candidates} for {most}",
            "Raise it, or leave it out: it is then read from the counts.",
        )
    return candidates


def largest_on_any_rank(scores: torch.Tensor, exchange: Exchange, what: str) -> torch.Tensor:
    """Return every page's score on every rank; NaN counts as +inf."""
    dtype = scores.dtype
    return exchange.reduce(_comparable(scores), dist.ReduceOp.MAX, what).to(dtype)


def top_pages_of_all(
    backend: Backend, exchange: Exchange, scores: torch.Tensor, count: int | torch.Tensor,
    eligible: torch.Tensor, most: int,
) -> torch.Tensor:
    """Return the mask of the best pages of all ranks, the same on every rank.

    Parameters
    ----------
    backend : Backend
        Ranks on one device.
    exchange : Exchange
        The ranks that hold pages.
    scores : torch.Tensor
        ``(..., pages)``, as the module says.
    count, eligible : int or torch.Tensor, torch.Tensor
        As for :meth:`sparse_dlm_attn.Backend.top_pages`; the same on every rank.
    most : int
        No row takes more pages.

    Returns
    -------
    torch.Tensor
        bool, like ``scores``.
    """
    pages = scores.shape[-1]
    if exchange.size == 1 or most == 0 or 0 in scores.shape:
        return backend.top_pages(scores, count, eligible=eligible)  # type: ignore[no-any-return]
    if most * exchange.size >= pages:  # lists would be longer than the scores themselves
        return backend.top_pages(  # type: ignore[no-any-return]
            largest_on_any_rank(scores, exchange, "top_pages"), count, eligible=eligible
        )
    scores = _comparable(scores)
    listed = backend.top_pages(scores, count, eligible=eligible)
    gathered = exchange.gather(_lists(scores, listed, most), "top_pages")
    best, known = _united(gathered, scores)
    return backend.top_pages(best, count, eligible=eligible & known)  # type: ignore[no-any-return]


def _comparable(scores: torch.Tensor) -> torch.Tensor:
    """Return scores without NaN, in a dtype that every collective and `scatter` takes."""
    if not scores.is_floating_point():
        return scores.to(torch.int32) if scores.element_size() < 4 else scores
    wide = scores if scores.element_size() >= 4 else scores.to(torch.float32)
    return torch.where(wide.isnan(), math.inf, wide)


def _lowest(scores: torch.Tensor) -> float | int:
    return -math.inf if scores.is_floating_point() else torch.iinfo(scores.dtype).min


def _integer(scores: torch.Tensor) -> torch.dtype:
    """Return the integer dtype of the same width, so that scores and indices fit into one tensor."""
    return torch.int64 if scores.element_size() == 8 else torch.int32


def _lists(scores: torch.Tensor, listed: torch.Tensor, most: int) -> torch.Tensor:
    """Pack scores and indices of the listed pages, ``(2, ..., most)``; the rest is no page at all."""
    pages, kind = scores.shape[-1], _integer(scores)
    places = torch.where(listed, listed.cumsum(-1) - 1, most).clamp(max=most)
    shape = (*scores.shape[:-1], most + 1)
    values = scores.new_full(shape, _lowest(scores)).scatter(-1, places, scores)[..., :most]
    numbers = torch.arange(pages, dtype=kind, device=scores.device).expand(scores.shape)
    indices = torch.full(shape, pages, dtype=kind, device=scores.device).scatter(-1, places, numbers)
    return torch.stack([values.contiguous().view(kind), indices[..., :most]])


def _united(gathered: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unpack lists ``(ranks, 2, ..., most)``: each page at its largest score, and which are listed."""
    pages = scores.shape[-1]
    values, indices = (gathered[:, side].movedim(0, -2).flatten(-2).contiguous() for side in (0, 1))
    shape = (*scores.shape[:-1], pages + 1)
    places = indices.to(torch.int64).clamp(0, pages)  # of a rank that failed, anything may have come
    best = scores.new_full(shape, _lowest(scores))
    best = best.scatter_reduce(-1, places, values.view(scores.dtype), "amax")
    known = torch.zeros(shape, dtype=torch.bool, device=scores.device).scatter(-1, places, True)
    return best[..., :pages], known[..., :pages]
