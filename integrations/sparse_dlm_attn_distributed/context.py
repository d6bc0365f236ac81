"""A context whose pages are spread over ranks: all of them are known, some of them are here."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import torch

from sparse_dlm_attn import Context, InvalidTypeError, PageBounds
from sparse_dlm_attn.arrays import Array, shape_of
from sparse_dlm_attn.values import check_array, check_same_place

__all__ = ["ShardedBounds", "ShardedContext"]

BOOLS = ("bool", "bool_")


@dataclass(frozen=True, eq=False)
class ShardedBounds(PageBounds):
    """Bounds of all pages, those of other ranks included, the same on every rank.

    `DistributedBackend.page_bounds` and `extend_bounds` make them. They have a type of their own because
    bounds of the pages held alone look alike and would lead to other decisions on every rank.

    Parameters
    ----------
    lower, upper : array
        As in :class:`sparse_dlm_attn.PageBounds`.
    """


@dataclass(frozen=True, eq=False)
class ShardedContext(Context):
    """The whole context as every rank knows it, with keys and values of the pages that this rank holds.

    Table, lengths, segments and version are those of the whole context, in reading order and the same on
    every rank but for the table's entries: a few bytes a page. So positions, budgets and fractions mean
    what they mean on one device, and a `Selection` names pages of the whole context. ``k_pages`` and
    ``v_pages`` are this rank's own pool; the table points into it where ``held`` says so, and may hold
    anything elsewhere. Each page lies on exactly one rank, any one; a rank may hold none.

    Parameters
    ----------
    k_pages, v_pages, page_table, page_lengths, page_segments, bounds, version
        As in :class:`sparse_dlm_attn.Context`; ``bounds`` are `ShardedBounds`.
    held : array
        bool ``(batch, pages)``: the pages that this rank holds.

    Examples
    --------
    >>> import torch
    >>> pool = torch.zeros(2, 1, 4, 8)  # two pages of four tokens
    >>> rank, ranks = 0, 2
    >>> owner = torch.arange(3)[None] % ranks  # any rule will do
    >>> lengths = torch.full((1, 3), 4, dtype=torch.int32)
    >>> table = torch.tensor([[0, -1, 1]], dtype=torch.int32)
    >>> context = ShardedContext(pool, pool, table, lengths, held=owner == rank)
    >>> context.tokens.tolist(), context.local.tokens.tolist()
    ([12], [8])
    """

    held: Array = None
    _of_pages: ClassVar[tuple[str, ...]] = (*Context._of_pages, "held")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_array("held", self.held, shape_of(self.page_table), BOOLS)
        check_same_place("held", self.held, "k_pages", self.k_pages)
        if self.bounds is not None and not isinstance(self.bounds, ShardedBounds):
            raise InvalidTypeError(
                "bounds",
                "must be ShardedBounds or None",
                type(self.bounds).__name__,
                "Make them with page_bounds(context) of the distributed backend.",
            )

    @property
    def resident(self) -> Array:
        """Bool ``(batch, pages)``: existing pages that this rank holds."""
        return self.exists & self.held

    @property
    def local(self) -> Context:
        """The same context with the pages of other ranks absent."""
        lengths = self.page_lengths * self.held
        return Context(self.k_pages, self.v_pages, self.page_table, lengths, version=self.version)

    @classmethod
    def of(cls, context: Context, held: Array) -> ShardedContext:
        """Take the pages that this rank holds out of a context that has them all.

        For tests and small contexts: it copies the pages held, and reads ``held`` on the host. An engine
        builds its pools as pages are written instead.

        Parameters
        ----------
        context : Context
            The whole context, in PyTorch.
        held : torch.Tensor
            bool ``(batch, pages)``.

        Returns
        -------
        ShardedContext
            Its pool has one physical page for each page held.
        """
        if isinstance(context, cls) or not isinstance(context.k_pages, torch.Tensor):
            raise InvalidTypeError("context", "must be a whole Context of torch.Tensor", type(context).__name__)
        check_array("held", held, shape_of(context.page_table), BOOLS)
        wanted = held & context.exists
        physical = context.page_table[wanted].to(torch.int64)
        table = torch.full_like(context.page_table, -1)
        table[wanted] = torch.arange(physical.numel(), dtype=torch.int32, device=table.device)
        given = {item.name: getattr(context, item.name) for item in fields(Context)}
        pools = {name: given[name].index_select(0, physical) for name in ("k_pages", "v_pages")}
        return cls(**{**given, **pools, "page_table": table, "bounds": None}, held=held)
