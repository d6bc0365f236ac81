"""What a pass reads and sends on each rank, from its sizes alone.

``python -m sparse_dlm_attn_distributed.scale`` prints the table of docs/scale.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparse_dlm_attn_distributed.packing import packed_bytes

__all__ = ["HBM_BYTES_A_SECOND", "Sizes", "table"]

HBM_BYTES_A_SECOND = 3.06e12
"""Read bandwidth that the best attention kernel reached on one H100 80GB HBM3, measured 2026-11-22."""

GRAPH_NODE_SECONDS = 3.5e-6
"""Least time of one kernel in a CUDA graph on the same card and day."""

CONTEXTS = (131_072, 1_048_576, 10_485_760)
RANKS = (1, 2, 8, 64)


@dataclass(frozen=True)
class Sizes:
    """One layer of a model, and how much of its context a pass reads.

    Parameters
    ----------
    tokens : int
        Of the context.
    ranks : int
        That hold it.
    budget : int, optional
        Context tokens that each row and head may choose; None reads everything.
    active : int
        Rows that choose.
    density : float
        Share of the context that is read after the union over rows and heads.
    block, q_heads, kv_heads, head_dim, page_size, element : int
        Rows of the block, heads, channels, tokens a page and bytes an element.
    """

    tokens: int
    ranks: int
    budget: int | None = None
    active: int = 5
    density: float = 1.0
    block: int = 16
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 64
    element: int = 2

    @property
    def read(self) -> int:
        """Bytes of keys, values and bounds that a rank reads, with pages spread evenly."""
        token = 2 * self.kv_heads * self.head_dim * self.element
        share = -(-self.tokens // self.ranks)
        bounds = 0 if self.budget is None else -(-share // self.page_size) * token
        return int(share * self.density) * token + bounds

    @property
    def state(self) -> int:
        """Bytes of the state that a rank gives to the gather, whatever the context."""
        return 0 if self.ranks == 1 else packed_bytes(self.block * self.q_heads, self.head_dim, self.element)

    @property
    def candidates(self) -> int:
        """Bytes of candidates that a rank gives to the ranking: 8 for each row, head and page.

        Rows that are not active have a place in it, so that no shape depends on values.
        """
        if self.budget is None or self.ranks == 1:
            return 0
        pages, most = -(-self.tokens // self.page_size), max(self.budget // self.page_size, 1)
        each = 8 * most if most * self.ranks < pages else 4 * pages
        return self.block * self.q_heads * each

    @property
    def sent(self) -> int:
        """Bytes that a rank gives to collectives in one pass of one layer."""
        return self.state + self.candidates

    @property
    def received(self) -> int:
        """Bytes that it gets from the other ranks."""
        return self.sent * (self.ranks - 1)

    @property
    def read_seconds(self) -> float:
        """Least time of reading at `HBM_BYTES_A_SECOND`."""
        return self.read / HBM_BYTES_A_SECOND


def table(budget: int | None = None, density: float = 1.0) -> str:
    """Return a Markdown table over contexts and ranks.

    Parameters
    ----------
    budget : int, optional
        As in `Sizes`.
    density : float
        As in `Sizes`.
    """
    lines = [
        "| context tokens | ranks | read a rank | at least | sent a rank | received a rank |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for tokens in CONTEXTS:
        for ranks in RANKS:
            of = Sizes(tokens, ranks, budget=budget, density=density)
            lines.append(
                f"| {tokens:,} | {ranks} | {of.read / 2**20:,.1f} MiB | {of.read_seconds * 1e6:,.1f} us "
                f"| {of.sent / 2**10:,.0f} KiB | {of.received / 2**10:,.0f} KiB |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print("dense\n" + table() + "\n\nLoSA, budget 256, 5 active rows, 4 % read\n" + table(256, 0.04))
