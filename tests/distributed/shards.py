"""What tests and their ranks share: blocks, the policies, and rules of ownership."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from policy_cases import EVERY_POLICY, Block, make_block

from sparse_dlm_attn import PassInfo, get_policy

BLOCKS = ("pages of 4", "pages of 1")
TOTAL_PASSES = 5

Owner = Callable[[int, int, int], Any]


def policies(world: int = 2) -> tuple[str, ...]:
    """Every registered policy: in several settings on two ranks, in one on more."""
    every = (*EVERY_POLICY, "snapkv:capacity=12,window=4,kernel=3", "losa:active=3,budget=4,pages=own")
    if world == 2:
        return every
    first = {policy.partition(":")[0]: policy for policy in reversed(every)}
    return tuple(policy for policy in every if policy in first.values())


def policy_of(text: str) -> Any:
    """Return a policy by name, also where the package is on the path only and so registers none."""
    name, _, parameters = text.partition(":")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    target = project["project"]["entry-points"]["sparse_dlm_attn.policies"][name]
    return get_policy(f"{target}:{parameters}" if parameters else target)


def block_of(name: str) -> Block:
    """Return one of the blocks on the dyadic grid."""
    if name == "pages of 1":
        return make_block(5, page_size=1, pages=25)
    if name == "pages of 4":
        return make_block(3)
    return make_block(7, pages=int(name.split()[0]), segments=False, batch=1)


def infos(block: Block) -> list[PassInfo]:
    """The passes of a block; the last one saves."""
    return [
        PassInfo(
            index, is_save=index == block.passes - 1, newly_decoded=block.newly[index], layer=1,
            num_layers=4, total_passes=TOTAL_PASSES,
        )
        for index in range(block.passes)
    ]


def _random(batch: int, pages: int, ranks: int) -> Any:
    return np.random.default_rng(ranks).integers(0, ranks, (batch, pages))


def _uneven(batch: int, pages: int, ranks: int) -> Any:
    owner = np.zeros((batch, pages), dtype=int)
    owner[:, 2 :: 2 * ranks] = ranks - 1
    return owner


def _empty(batch: int, pages: int, ranks: int) -> Any:
    return _random(batch, pages, ranks) % max(ranks - 1, 1)  # the last rank holds nothing


def _one(batch: int, pages: int, ranks: int) -> Any:
    return np.full((batch, pages), ranks - 1)


def _round_robin(batch: int, pages: int, ranks: int) -> Any:
    return np.broadcast_to(np.arange(pages) % ranks, (batch, pages))


RULES: dict[str, Owner] = {
    "random": _random, "uneven": _uneven, "empty": _empty, "one rank": _one, "round robin": _round_robin
}
"""Rules that give the rank of each page, ``(batch, pages)``."""
