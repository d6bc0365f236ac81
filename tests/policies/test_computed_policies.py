"""fast-dllm, dkv-cache and sparse-dllm: which rows are computed, and what is kept of the others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from policy_cases import Array, make_block

from sparse_dlm_attn import Context, PassInfo, PrefixAttention, get_policy


def rows(text: str) -> Array:
    """Rows as marks: ``"..x"`` is the third of three."""
    return np.array([[mark != "." for mark in text]])


def computed(policy: str, info: PassInfo, tokens: int = 10) -> str:
    found = get_policy(policy).computed_tokens(info, np.ones((1, tokens), bool))
    return "".join("x" if row else "." for row in np.asarray(found)[0])


WINDOW = rows("....xxx...")


@pytest.mark.parametrize(
    ("policy", "number", "expected"),
    [
        ("fast-dllm", 0, "xxxxxxxxxx"),
        ("fast-dllm", 1, "....xxx..."),
        ("fast-dllm", 7, "....xxx..."),
        ("fast-dllm:mode=prefix", 0, "xxxxxxxxxx"),
        ("fast-dllm:mode=prefix", 1, "....xxxxxx"),
        ("sparse-dllm", 1, "xxxxxxxxxx"),
        ("sparse-dllm", 2, "....xxx..."),
        ("sparse-dllm:delay=0", 1, "....xxx..."),
        ("dense", 5, "xxxxxxxxxx"),
    ],
)
def test_rows_of_a_window_are_computed_alone_after_its_first_passes(policy: str, number: int, expected: str) -> None:
    assert computed(policy, PassInfo(20, window=WINDOW, window_index=number)) == expected
    each = np.array([number], np.int32)
    assert computed(policy, PassInfo(20, window=WINDOW, window_index=each)) == expected
    assert computed(policy, PassInfo(number)) == "x" * 10  # the block is one window


@pytest.mark.parametrize(
    ("policy", "number", "expected"),
    [
        ("dkv-cache", 0, "xxxxxxxxxx"),
        ("dkv-cache", 1, "xxxxxxxxxx"),
        ("dkv-cache", 2, "....x.xxxx"),
        ("dkv-cache", 8, "xxxxxxxxxx"),
        ("dkv-cache", 9, "....x.xxxx"),
        ("dkv-cache:reload=1", 5, "xxxxxxxxxx"),
        ("dkv-cache:mode=greedy", 2, "xxxxxxxxxx"),
        ("dkv-cache:mode=greedy,neighbours=0", 3, "....x.x..."),
        ("dkv-cache:mode=greedy,neighbours=2", 3, "....x.xxx."),
        ("dkv-cache:mode=greedy,neighbours=9", 3, "....x.xxxx"),
    ],
)
def test_decoded_tokens_are_computed_once_more_and_then_cached(policy: str, number: int, expected: str) -> None:
    info = PassInfo(
        20,
        decoded=rows("xxxxxx...."),
        newly_decoded=rows("....x....."),
        window=WINDOW,
        window_index=number,
        planned=rows("......x..."),
    )
    assert computed(policy, info) == expected


def test_greedy_without_a_plan_computes_every_masked_row_of_the_window() -> None:
    info = PassInfo(3, decoded=rows("xxxxxx...."), newly_decoded=rows("....x....."), window=WINDOW)
    assert computed("dkv-cache:mode=greedy", info) == "....x.x..."
    assert computed("dkv-cache:mode=greedy", PassInfo(3)) == "x" * 10
    saving = PassInfo(3, True, rows("xxxxxxxxxx"), rows("....x....."))
    assert computed("dkv-cache", saving) == "x" * 10


@pytest.mark.parametrize(
    ("masked", "centres", "wanted", "expected"),
    [
        ([*range(10, 21), *range(30, 48)], [20], 4, [16, 17, 18, 19, 20]),
        ([*range(48)], [20, 21], 4, [*range(16, 26)]),
        # Row 11 lies between both centres, and the one that is decoded first takes it.
        ([6, 10, 11, 13, 17], [10, 13], 1, [10, 11, 13, 17]),
        ([6, 10, 11, 13, 17], [13, 10], 1, [6, 10, 11, 13]),
    ],
)
def test_neighbours_are_the_nearest_masked_rows_that_nobody_has_taken(
    masked: list[int], centres: list[int], wanted: int, expected: list[int]
) -> None:
    decoded, planned = ~np.isin(np.arange(48), masked)[None], np.isin(np.arange(48), centres)[None]
    policy = get_policy(f"dkv-cache:mode=greedy,neighbours={wanted}")
    for order in ([centres], None) if centres == sorted(centres) else ([centres],):
        info = PassInfo(
            3,
            decoded=decoded,
            newly_decoded=decoded & False,
            planned=planned,
            planned_order=None if order is None else np.array(order),
        )
        assert np.flatnonzero(policy.computed_tokens(info, decoded | True)).tolist() == expected


def by_position(masked: set[int], centres: list[int], wanted: int, length: int) -> set[int]:
    """The authors' rule, written plainly: centres and the neighbours that each takes in its turn."""
    chosen = set(centres)
    for centre in centres:
        found, distance = 0, 1
        while found < wanted and distance < length:
            for row in (centre - distance, centre + distance):
                if found < wanted and row in masked and row not in chosen:
                    chosen.add(row)
                    found += 1
            distance += 1
    return chosen


def test_neighbours_follow_the_rule_in_a_thousand_random_cases() -> None:
    rng = np.random.default_rng(0)
    cases = 1000
    while cases > 0:
        batch, length, wanted = (int(rng.integers(*span)) for span in ((1, 5), (1, 65), (0, 9)))
        masked = rng.random((batch, length)) < rng.random()
        planned = masked & (rng.random((batch, length)) < rng.random())
        lists = [rng.permutation(np.flatnonzero(part)).tolist() for part in planned]
        columns = max(map(len, lists)) + int(rng.integers(0, 3))
        order = np.array([[*one, *[-1] * (columns - len(one))] for one in lists], np.int32)
        policy = get_policy(f"dkv-cache:mode=greedy,neighbours={wanted}")
        for given in (order, None):
            info = PassInfo(3, decoded=~masked, newly_decoded=masked & False, planned=planned, planned_order=given)
            got = np.asarray(policy.computed_tokens(info, masked | True))
            for b, one in enumerate(lists):
                centres = one if given is not None else sorted(one)
                expected = by_position(set(np.flatnonzero(masked[b])), centres, wanted, length)
                assert set(np.flatnonzero(got[b])) == expected
        cases -= batch


def test_neighbours_are_found_without_a_look_at_values() -> None:
    """Tensors on PyTorch's meta device have shapes and no values: any look at one raises."""
    torch = pytest.importorskip("torch")
    some = torch.empty(2, 40, dtype=torch.bool, device="meta")
    order = torch.empty(2, 3, dtype=torch.int32, device="meta")
    for given in (order, None):
        info = PassInfo(3, decoded=some, newly_decoded=some, planned=some, planned_order=given)
        assert get_policy("dkv-cache:mode=greedy").computed_tokens(info, some).shape == (2, 40)


def whole_block(tokens: int, page_size: int, seed: int = 0) -> tuple[Array, Context]:
    rng = np.random.default_rng(seed)
    q = (rng.integers(-16, 17, (1, 4, tokens, 8)) / 8).astype(np.float32)
    pages = -(-tokens // page_size)
    k = (rng.integers(-16, 17, (1, 2, pages * page_size, 8)) / 8).astype(np.float32)
    return q, Context.from_dense(k, k + 1, page_size, [tokens])


@pytest.mark.parametrize(
    ("tokens", "window", "ratio", "kernel"),
    [(13, slice(0, 4), 0.5, 3), (13, slice(5, 9), 0.3, 1), (13, slice(9, 13), 1.0, 5), (150, slice(100, 140), 0.3, 3)],
)
def test_sparse_dllm_keeps_the_tokens_that_the_windows_rows_ask_for(
    tokens: int, window: slice, ratio: float, kernel: int
) -> None:
    q, context = whole_block(tokens, 1)
    inside = np.zeros((1, tokens), bool)
    inside[:, window] = True
    attention, memory = PrefixAttention(f"sparse-dllm:ratio={ratio},kernel={kernel}"), None
    for number in range(3):
        info = PassInfo(4 + number, window=inside, window_index=number)
        _, memory = attention(q, None, None, context, memory, info)
    keys = np.asarray(context.k_pages)[:, :, 0].astype(float)  # (tokens, kv_heads, channels)
    asked = q[0][:, window].mean(axis=1).astype(float)
    importance = np.mean([keys[:, h // 2] @ asked[h] for h in range(4)], axis=0)
    outside = np.flatnonzero(~inside[0])
    padded = np.pad(importance[outside], kernel // 2, constant_values=-np.inf)
    pooled = [padded[place : place + kernel].max() for place in range(len(outside))]
    best = outside[np.argsort(-np.array(pooled), kind="stable")[: int(len(outside) * ratio)]]
    expected = np.isin(np.arange(tokens), best) | inside[0]
    np.testing.assert_array_equal(np.asarray(memory.selection.mask)[0, 0, 0], expected)
    np.testing.assert_array_equal(memory.active, inside)


def test_sparse_dllm_begins_again_with_each_window() -> None:
    q, context = whole_block(12, 1)
    attention, memory, dense = PrefixAttention("sparse-dllm"), None, []
    for number in range(8):
        inside = np.zeros((1, 12), bool)
        inside[:, 4 + number // 4 * 4 : 8 + number // 4 * 4] = True
        info = PassInfo(number, window=inside, window_index=number % 4)
        _, memory = attention(q, None, None, context, memory, info)
        dense.append(bool(np.asarray(memory.selection.mask).all()))
    assert dense == [True, True, False, False] * 2


@pytest.mark.parametrize(("tokens", "kept"), [(324, 162), (325, 162), (1, 0)])
def test_sparse_dllm_keeps_the_floor(tokens: int, kept: int) -> None:
    block = make_block(3, batch=1, page_size=1, pages=tokens, segments=False)
    context = replace(block.context, page_lengths=np.ones((1, tokens), np.int32))
    attention, memory = PrefixAttention("sparse-dllm:delay=0"), None
    for number in range(2):
        _, memory = attention(block.q[0], block.k, block.v, context, memory, PassInfo(number))
    assert int(np.asarray(memory.selection.mask).sum()) == kept


@pytest.mark.parametrize("page_size", [1, 3, 4])
def test_a_window_holds_the_pages_near_each_row_of_a_whole_sequence(page_size: int) -> None:
    tokens = 14
    q, context = whole_block(tokens, page_size)
    for window, after, sinks in ((1, 0, 0), (3, 2, 0), (2, 0, 3), (99, 99, 0)):
        attention = PrefixAttention(f"streaming-llm:sinks={sinks},window={window},after={after}")
        got = attention(q, None, None, context)[1].selection.for_rows(4, tokens)[0, 0]
        for row in range(tokens):
            near = set(range(row - window + 1, row + after + 1)) | set(range(sinks))
            wanted = {token // page_size for token in near if 0 <= token < tokens}
            mine = set(np.flatnonzero(got[row]))
            assert wanted <= mine
            if page_size == 1:
                assert wanted == mine
