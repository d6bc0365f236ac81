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
    first = {policy.partition(":")[0]: policy for policy in reversed(EVERY_POLICY)}
    return EVERY_POLICY if world == 2 else tuple(first.values())


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
            index,
            is_save=index == block.passes - 1,
            newly_decoded=block.newly[index],
            layer=1,
            num_layers=4,
            total_passes=TOTAL_PASSES,
        )
        for index in range(block.passes)
    ]


RULES: dict[str, Owner] = {
    "random": lambda batch, pages, ranks: np.random.default_rng(ranks).integers(0, ranks, (batch, pages)),
    "uneven": lambda batch, pages, ranks: np.tile((np.arange(pages) % (2 * ranks) == 2) * (ranks - 1), (batch, 1)),
    "empty": lambda batch, pages, ranks: RULES["random"](batch, pages, ranks) % max(ranks - 1, 1),
    "one rank": lambda batch, pages, ranks: np.full((batch, pages), ranks - 1),
    "round robin": lambda batch, pages, ranks: np.tile(np.arange(pages) % ranks, (batch, 1)),
}
"""Rules that give the rank of each page, ``(batch, pages)``; with "empty" the last rank holds nothing."""
