"""Checks that are made once for each form still refuse every other form, and everything that has no form."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest

from sparse_dlm_attn import AttentionState, Context, InvalidArgumentError, InvalidTypeError, PrefixAttention
from sparse_dlm_attn.checks import check_block, check_states
from sparse_dlm_attn.operators import largest_changes


def block(**changes: Any) -> tuple[Any, Any, Any, Context]:
    shapes = (4, 3), (2, 3), (2, 3), (2, 12)
    q, k, v, pages = (np.zeros((1, heads, tokens, 8), np.float32) for heads, tokens in shapes)
    given: dict[str, Any] = {"q": q, "k": k, "v": v, "context": Context.from_dense(pages, pages, page_size=4)}
    return tuple((given | changes).values())  # type: ignore[return-value]


@pytest.mark.parametrize(
    "changes",
    [
        {"q": np.zeros((1, 4, 2, 8), np.float32)},
        {"k": np.zeros((1, 2, 3, 8), np.float16)},
        {"v": [[1.0]]},
        {"v": None},
        {"context": None},
        {"k": np.zeros((1, 3, 3, 8), np.float32)},
    ],
)
def test_another_form_is_checked_after_one_that_passed(changes: dict[str, Any]) -> None:
    for _ in range(2):
        check_block(*block())
        with pytest.raises((InvalidArgumentError, InvalidTypeError)):
            check_block(*block(**changes))


def test_what_has_no_form_is_checked_each_time() -> None:
    state = AttentionState(np.zeros((1, 2, 3, 4), np.float32), np.zeros((1, 2, 3), np.float32))
    for _ in range(2):
        with pytest.raises(InvalidTypeError):
            check_states(state, [state])  # type: ignore[arg-type]


def test_true_is_no_count_after_one_was() -> None:
    for _ in range(2):
        assert largest_changes(np.ones((1, 2), np.float32), count=1).sum() == 1
        with pytest.raises(InvalidArgumentError, match="count"):
            largest_changes(np.ones((1, 2), np.float32), count=True)


def test_a_gradient_is_refused_after_a_form_that_passed() -> None:
    torch = pytest.importorskip("torch")
    q, k, v, pages = (torch.zeros(1, heads, tokens, 8) for heads, tokens in ((4, 3), (2, 3), (2, 3), (2, 12)))
    context = Context.from_dense(pages, pages, page_size=4)
    check_block(q, k, v, context)
    with pytest.raises(InvalidArgumentError, match="q must not require a gradient"):
        check_block(q.clone().requires_grad_(), k, v, context)
    context.k_pages.requires_grad_()
    with pytest.raises(InvalidArgumentError, match="k_pages must not require a gradient"):
        check_block(q, k, v, context)
    with torch.no_grad():
        check_block(q, k, v, context)


def test_a_driver_that_has_checked_can_be_copied_and_pickled() -> None:
    attention = PrefixAttention("losa", "reference")
    out, _ = attention(*block())
    for other in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        np.testing.assert_array_equal(other(*block())[0], out)
