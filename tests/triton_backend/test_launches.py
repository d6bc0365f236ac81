"""The order of launches: kernels read what a pass was given before they wait for the one in front."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparse_dlm_attn_triton import launch, launch_decisions, ops

TOKENS, Q_HEADS, KV_HEADS, PAGES, PAGE, DIM = 4, 4, 2, 3, 16, 16


class Recorder:
    """Stands in for a kernel, and writes down that it was launched."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def __getitem__(self, grid: object) -> Any:
        return lambda *given, **named: self.events.append("launch")


@pytest.fixture
def events(fresh_plans: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what happens from now on: launches, and copies of tensors that are not contiguous."""
    found: list[str] = []
    for module in (launch, launch_decisions):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder(found))
    real = torch.Tensor.contiguous

    def contiguous(self: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        if not self.is_contiguous():
            found.append("copy")
        return real(self, *given, **named)

    monkeypatch.setattr(torch.Tensor, "contiguous", contiguous)
    return found


def strided(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a tensor every other number of which is somebody else's."""
    return torch.zeros((*sizes[:-1], 2 * sizes[-1])).to(dtype)[..., ::2]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("count", [None, 2])
def test_inputs_are_copied_before_the_first_launch_of_a_ranked_pass(
    events: list[str], ragged: bool, count: int | None
) -> None:
    block, bounds = strided(2, KV_HEADS, TOKENS, DIM), strided(2, KV_HEADS, PAGES, DIM)
    q, pages = strided(2, Q_HEADS, TOKENS, DIM), torch.zeros(2 * PAGES, KV_HEADS, PAGE, DIM)
    table = strided(2, PAGES, dtype=torch.int32)
    reference, cached_lse = (None, None) if count is None else (q, strided(2, Q_HEADS, TOKENS))
    ops.attend_ranked(
        q, block, block, pages, pages, table, table, bounds, bounds, reference, count, None, 16, 1, "kv_head",
        "queries", 1.0, None if count is None else q, cached_lse, ragged,
    )
    launches = 4 + (count is not None) + ragged
    assert events == ["copy"] * events.count("copy") + ["launch"] * launches
    assert events.count("copy") >= 7


@pytest.mark.parametrize("ragged", [False, True])
def test_inputs_are_copied_before_the_first_launch_of_a_selected_pass(
    events: list[str], ragged: bool
) -> None:
    block, q = strided(2, KV_HEADS, TOKENS, DIM), strided(2, Q_HEADS, TOKENS, DIM)
    pages, table = torch.zeros(2 * PAGES, KV_HEADS, PAGE, DIM), strided(2, PAGES, dtype=torch.int32)
    mask, active = strided(2, KV_HEADS, 1, PAGES, dtype=torch.bool), strided(2, TOKENS, dtype=torch.bool)
    ops.attend(
        q, block, block, pages, pages, table, table, mask, TOKENS, active, 1.0, q,
        strided(2, Q_HEADS, TOKENS), ragged,
    )
    assert events == ["copy"] * events.count("copy") + ["launch"] * (2 + ragged)
    assert events.count("copy") >= 7
