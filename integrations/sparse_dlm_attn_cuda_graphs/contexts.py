"""Contexts whose tables and lengths stay in the same memory from block to block."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch

from sparse_dlm_attn import Context

__all__ = ["FixedContexts"]

NAMES = ("page_table", "page_lengths", "page_segments")


class FixedContexts:
    """The contexts of all layers, for blocks whose pages lie where these lie.

    Parameters
    ----------
    contexts : sequence of Context
        Of one block.

    Attributes
    ----------
    contexts : tuple of Context
        What graphs read: the pages as given, and copies of the rest.
    """

    def __init__(self, contexts: Sequence[Context]) -> None:
        copies: dict[int, torch.Tensor] = {}  # layers may share a table

        def copied(value: torch.Tensor | None) -> torch.Tensor | None:
            return None if value is None else copies.setdefault(id(value), value.clone())

        def fixed(context: Context) -> Context:
            parts: dict[str, Any] = {name: copied(getattr(context, name)) for name in NAMES}
            return replace(context, **parts, version=0)

        self.contexts = tuple(map(fixed, contexts))

    @staticmethod
    def key(contexts: Sequence[Context]) -> Hashable:
        """Return what has to be equal for graphs to serve other contexts: places and sizes."""
        return tuple(
            (
                context.k_pages.data_ptr(),
                context.v_pages.data_ptr(),
                context.k_pages.shape,
                context.k_pages.stride(),
                context.v_pages.stride(),
                context.k_pages.dtype,
                context.page_table.shape,
                context.page_segments is None,
                None if context.bounds is None else context.bounds.lower.data_ptr(),
            )
            for context in contexts
        )

    def take(self, contexts: Sequence[Context]) -> None:
        """Copy what is to be read from now on."""
        done: set[int] = set()
        for fixed, context in zip(self.contexts, contexts, strict=True):
            for name in NAMES:
                into, value = getattr(fixed, name), getattr(context, name)
                if into is not None and id(into) not in done:
                    into.copy_(value)
                    done.add(id(into))
