"""Context: layout, views of dense caches, and refusal of what does not fit."""

from __future__ import annotations

import numpy as np
import pytest
from problems import ragged_context

from sparse_dlm_attn import Context, Selection
from sparse_dlm_attn.context import GENERATED, PROMPT


def test_from_dense_of_torch_shares_memory_too() -> None:
    torch = pytest.importorskip("torch")
    k = torch.randn(2, 2, 24, 8)
    context = Context.from_dense(k, k.clone(), 4, lengths=torch.tensor([5, 24]))
    k[1, 1, 23, 7] = 42.0
    assert context.k_pages[context.page_table[1, 5], 1, 3, 7] == 42.0
    assert context.page_lengths.tolist() == [[4, 1, 0, 0, 0, 0], [4] * 6]


def test_lengths_become_full_partial_and_absent_pages() -> None:
    k = np.zeros((3, 1, 12, 4), np.float32)
    context = Context.from_dense(k, k, 4, lengths=[0, 5, 12])
    assert context.page_lengths.tolist() == [[0, 0, 0], [4, 1, 0], [4, 4, 4]]
    assert context.tokens.tolist() == [0, 5, 12]
    assert context.page_ends.tolist()[1] == [4, 5, 5]


def test_segments_default_to_prompt() -> None:
    context = ragged_context(3)
    assert np.array_equal(context.in_segment(PROMPT), context.exists)
    assert not context.in_segment(GENERATED).any()


def test_page_lists_and_csr_name_the_same_pages() -> None:
    k = np.zeros((2, 2, 12, 4), np.float32)
    context = Context.from_dense(k, k, 4, lengths=[12, 5])
    mask = np.array([[[[True, False, True]]], [[[False, True, True]]]])
    indices, counts = Selection(mask, 3).page_lists()
    assert indices.tolist() == [[[[0, 2, -1]]], [[[1, 2, -1]]]] and counts.tolist() == [[[2]], [[2]]]
    assert indices.dtype == np.int32
    indptr, physical, last = Selection(mask, 3).to_csr(context)
    assert indptr.tolist() == [0, 2, 3]  # page 2 of sequence 1 is absent
    assert physical.tolist() == [context.page_table[0, 0], context.page_table[0, 2], context.page_table[1, 1]]
    assert last.tolist() == [4, 1]
    assert "pages=3" in str(Selection(mask, 3))


def test_loaded_pages_are_the_union_over_active_rows_and_the_group() -> None:
    mask = np.zeros((1, 4, 3, 5), bool)  # 4 query heads, 3 spans of 2 rows, 5 pages
    mask[0, 0, 0, 0] = mask[0, 1, 0, 1] = mask[0, 1, 1, 2] = mask[0, 3, 2, 4] = True
    active = np.array([[True, False, False, False, True]])  # rows of spans 0 and 2
    loaded = Selection(mask, 2).loaded(active, q_heads=4, kv_heads=2)
    assert np.argwhere(loaded[0]).tolist() == [[0, 0], [0, 1], [1, 4]]
