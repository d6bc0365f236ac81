"""What each operator asks of its arguments: shapes, dtypes, libraries and devices (clause ERROR-1).

A backend calls these before it computes. They look at no array's contents, so they neither
synchronise with a device nor launch anything. Rules that the driver shares are stated here once.
"""

from __future__ import annotations

from sparse_dlm_attn.arrays import Array, dtype_name, records_gradient, shape_of, to_numpy
from sparse_dlm_attn.context import Context
from sparse_dlm_attn.errors import InvalidArgumentError, InvalidTypeError
from sparse_dlm_attn.forms import once_a_form
from sparse_dlm_attn.selection import Selection
from sparse_dlm_attn.values import (
    FLOATS,
    AttentionState,
    PageBounds,
    check_array,
    check_int,
    check_same_place,
    softmax_scale,
)

__all__ = [
    "check_attend_block",
    "check_attend_pages",
    "check_block",
    "check_cached",
    "check_context",
    "check_extend_bounds",
    "check_library",
    "check_page_count",
    "check_page_scores",
    "check_pooled_scores",
    "check_query_change",
    "check_reuse",
    "check_row_changes",
    "check_rows",
    "check_rows_are_tokens",
    "check_states",
    "check_top_pages",
    "check_whole_sequence",
]

RANKED = (*FLOATS, "int8", "int16", "int32", "int64")
COUNTS = ("int8", "int16", "int32", "int64")
BOOLS = ("bool", "bool_")


def check_library(name: str, value: Array, kind: type, backend: str) -> None:
    """Raise unless ``value``, an array, is of the library that a backend computes with."""
    if not isinstance(value, kind):
        raise InvalidTypeError(
            name,
            f"must be a {kind.__module__}.{kind.__qualname__}, as backend {backend!r} computes with",
            f"a {type(value).__module__}.{type(value).__qualname__}",
            "Convert it with the backend's asarray().",
        )


@once_a_form
def check_context(context: object) -> None:
    """Raise unless ``context`` is a `Context`, none of whose arrays records gradients."""
    if not isinstance(context, Context):
        raise InvalidTypeError(
            "context",
            "must be a Context",
            type(context).__name__,
            "Build one with Context.from_dense(k, v, page_size).",
        )
    _check_no_gradient("context.k_pages", context.k_pages)
    _check_no_gradient("context.v_pages", context.v_pages)
    if context.bounds is not None:
        _check_no_gradient("context.bounds", context.bounds.lower, context.bounds.upper)


def check_operand(name: str, value: Array, axes: tuple[int | str, ...], dtypes: tuple[str, ...] = FLOATS) -> None:
    """Raise unless ``value`` is an array of this form (see `check_array`) that records no gradient.

    What is recorded would be kept alive from pass to pass, and nothing here has a derivative.
    """
    check_array(name, value, axes, dtypes)
    _check_no_gradient(name, value)


def _check_no_gradient(name: str, *arrays: Array) -> None:
    if any(map(records_gradient, arrays)):
        raise InvalidArgumentError(
            name,
            "must not require a gradient where gradients are recorded: sparse attention serves "
            "inference and has no derivative",
            "requires_grad=True",
            "Run the model under torch.no_grad() or torch.inference_mode(), or detach it.",
        )


def check_queries(q: Array, context: Context) -> None:
    """Raise unless ``q`` fits the context in batch, heads, channels, dtype and place."""
    check_context(context)
    check_operand("q", q, ("batch", "q_heads", "tokens", "head_dim"))
    batch, q_heads, _, head_dim = shape_of(q)
    if head_dim != context.head_dim or dtype_name(q) != dtype_name(context.k_pages):
        raise InvalidArgumentError(
            "context.k_pages",
            f"must have head_dim {head_dim} and dtype {dtype_name(q)}, as q has",
            f"head_dim {context.head_dim}, dtype {dtype_name(context.k_pages)}",
        )
    if context.batch != batch:
        raise InvalidArgumentError("context", f"must hold {batch} sequences, as q does", context.batch)
    check_query_heads(q_heads, context.kv_heads)
    check_same_place("context", context.k_pages, "q", q)


def check_query_heads(q_heads: int, kv_heads: int) -> None:
    """Raise unless the query heads make whole groups."""
    if kv_heads == 0 or q_heads == 0 or q_heads % kv_heads:
        raise InvalidArgumentError("q", f"must have a multiple of kv_heads={kv_heads} query heads", f"{q_heads} heads")


def check_active(active: Array, q: Array) -> None:
    """Raise unless ``active`` is bool ``(batch, tokens)`` beside ``q``."""
    check_array("active", active, (shape_of(q)[0], shape_of(q)[2]), BOOLS)
    check_same_place("active", active, "q", q)


@once_a_form
def check_attend_pages(q: Array, context: Context, selection: Selection, active: Array, scale: float | None) -> None:
    """Check the arguments of `attend_pages`."""
    check_queries(q, context)
    if not isinstance(selection, Selection):
        raise InvalidTypeError("selection", "must be a Selection", type(selection).__name__)
    selection.check_fits(shape_of(q), context)
    check_active(active, q)
    softmax_scale(shape_of(q)[3], scale)


@once_a_form
def check_attend_block(q: Array, k: Array, v: Array, scale: float | None) -> None:
    """Check the arguments of `attend_block`."""
    check_operand("q", q, ("batch", "q_heads", "tokens", "head_dim"))
    batch, q_heads, _, head_dim = shape_of(q)
    check_operand("k", k, (batch, "kv_heads", "keys", head_dim), (dtype_name(q),))
    check_operand("v", v, shape_of(k), (dtype_name(q),))
    check_query_heads(q_heads, shape_of(k)[1])
    check_same_place("k", k, "q", q)
    check_same_place("v", v, "q", q)
    softmax_scale(head_dim, scale)


@once_a_form
def check_page_scores(q: Array, bounds: PageBounds, active: Array | None = None) -> None:
    """Check the arguments of `page_scores`."""
    check_operand("q", q, ("batch", "q_heads", "tokens", "head_dim"))
    if not isinstance(bounds, PageBounds):
        raise InvalidTypeError(
            "bounds", "must be PageBounds", type(bounds).__name__, "Make them with page_bounds(context)."
        )
    batch, q_heads, _, head_dim = shape_of(q)
    check_operand("bounds.lower", bounds.lower, (batch, "kv_heads", "pages", head_dim), (dtype_name(q),))
    _check_no_gradient("bounds.upper", bounds.upper)
    check_query_heads(q_heads, shape_of(bounds.lower)[1])
    check_same_place("bounds.lower", bounds.lower, "q", q)
    if active is not None:
        check_active(active, q)


@once_a_form
def check_extend_bounds(context: Context, bounds: PageBounds, from_page: int) -> None:
    """Check the arguments of `extend_bounds`."""
    check_context(context)
    if not isinstance(bounds, PageBounds):
        raise InvalidTypeError(
            "bounds", "must be PageBounds", type(bounds).__name__, "Make them with page_bounds(context)."
        )
    if check_int("from_page", from_page, 0) > context.pages:
        raise InvalidArgumentError("from_page", f"must lie in 0..pages = 0..{context.pages}", from_page)
    shape = (context.batch, context.kv_heads, "pages", context.head_dim)
    check_operand("bounds.lower", bounds.lower, shape, (dtype_name(context.k_pages),))
    _check_no_gradient("bounds.upper", bounds.upper)
    held = shape_of(bounds.lower)[2]
    if held < from_page:
        raise InvalidArgumentError(
            "bounds",
            f"must hold the first from_page={from_page} pages",
            f"{held} pages",
            "Begin at an earlier page, or make them with page_bounds(context).",
        )
    check_same_place("bounds.lower", bounds.lower, "context.k_pages", context.k_pages)


@once_a_form
def check_pooled_scores(q: Array, context: Context, span: int, scale: float | None, lse: Array | None = None) -> None:
    """Check the arguments of `pooled_scores`."""
    check_queries(q, context)
    check_int("span", span, 1)
    softmax_scale(shape_of(q)[3], scale)
    if lse is not None:
        check_operand("lse", lse, shape_of(q)[:3], ("float32",))
        check_same_place("lse", lse, "q", q)


@once_a_form
def check_top_pages(scores: Array, count: int | Array, eligible: Array) -> None:
    """Check the arguments of `top_pages`."""
    axes = len(getattr(scores, "shape", ())) or 1
    check_operand("scores", scores, (*("...",) * (axes - 1), "pages"), RANKED)
    shape = shape_of(scores)
    check_array("eligible", eligible, ("...",) * len(getattr(eligible, "shape", ())), BOOLS)
    _check_broadcasts("eligible", shape_of(eligible), shape)
    check_same_place("eligible", eligible, "scores", scores)
    check_page_count(count, shape)


def check_page_count(count: int | Array, shape: tuple[int, ...]) -> None:
    """Raise unless ``count`` is an int, or integers that broadcast to all but the last of ``shape``."""
    if getattr(count, "ndim", 0) == 0 and not hasattr(count, "device"):
        check_int("count", count)
        return
    check_array("count", count, ("...",) * len(getattr(count, "shape", ())), COUNTS)
    _check_broadcasts("count", shape_of(count), shape[:-1])


def _check_broadcasts(name: str, shape: tuple[int, ...], target: tuple[int, ...]) -> None:
    tail = target[len(target) - len(shape) :]
    if len(shape) > len(target) or any(size not in (1, wanted) for size, wanted in zip(shape, tail, strict=True)):
        raise InvalidArgumentError(name, f"must broadcast to shape {target}", f"shape {shape}")


@once_a_form
def check_query_change(q: Array, q_reference: Array) -> None:
    """Check the arguments of `query_change`."""
    check_operand("q", q, ("batch", "q_heads", "tokens", "head_dim"))
    check_operand("q_reference", q_reference, shape_of(q), (dtype_name(q),))
    check_same_place("q_reference", q_reference, "q", q)


@once_a_form
def check_row_changes(change: Array) -> None:
    """Check the array of `largest_changes`."""
    check_operand("change", change, ("batch", "tokens"), RANKED)


@once_a_form
def check_states(*states: AttentionState) -> None:
    """Check the arguments of `merge`: one or more states of one shape, dtype and place."""
    if not states:
        raise InvalidArgumentError("states", "must hold at least one AttentionState", "none")
    for state in states:
        check_state("states", state, states[0])


def check_state(name: str, state: AttentionState, like: AttentionState) -> None:
    """Raise unless ``state`` is an `AttentionState` of the form of ``like``."""
    for value in (like, state):
        if not isinstance(value, AttentionState):
            raise InvalidTypeError(name, "must be an AttentionState", type(value).__name__)
    check_operand(name, state.out, shape_of(like.out), (dtype_name(like.out),))
    _check_no_gradient(name, state.lse)
    check_same_place(name, state.out, "the first state", like.out)


@once_a_form
def check_cached(cached: AttentionState, q: Array) -> None:
    """Raise unless ``cached`` is a state of queries like ``q``."""
    if not isinstance(cached, AttentionState):
        raise InvalidTypeError("cached", "must be an AttentionState or None", type(cached).__name__)
    check_operand("cached", cached.out, shape_of(q), (dtype_name(q),))
    _check_no_gradient("cached", cached.lse)
    check_same_place("cached", cached.out, "q", q)


@once_a_form
def check_reuse(active: Array, fresh: AttentionState, cached: AttentionState) -> None:
    """Check the arguments of `reuse`."""
    check_state("fresh", fresh, fresh)
    check_state("cached", cached, fresh)
    check_active(active, fresh.out)


@once_a_form
def check_block(q: Array, k: Array, v: Array, context: Context) -> None:
    """Raise unless the block's q, k and v fit each other and the context.

    Raises
    ------
    InvalidTypeError
        For a wrong type or dtype, or arrays of different libraries.
    InvalidArgumentError
        For a wrong shape, head count or device.
    """
    check_context(context)
    check_operand("q", q, ("batch", "q_heads", "tokens", "head_dim"))
    batch, _, tokens, head_dim = shape_of(q)
    check_operand("k", k, (batch, context.kv_heads, tokens, head_dim), (dtype_name(q),))
    check_operand("v", v, shape_of(k), (dtype_name(q),))
    check_queries_fit(q, context)
    for name, array in (("k", k), ("v", v)):
        check_same_place(name, array, "q", q)


@once_a_form
def check_whole_sequence(q: Array, context: Context) -> None:
    """Raise unless queries of a whole sequence fit its context."""
    check_context(context)
    check_operand("q", q, ("batch", "q_heads", "tokens", "head_dim"))
    check_queries_fit(q, context)


def check_rows_are_tokens(q: Array, context: Context) -> None:
    """Raise unless every sequence of ``context`` holds as many tokens as ``q`` has rows; reads lengths."""
    tokens = to_numpy(context.tokens)
    if (tokens != q.shape[2]).any():
        raise InvalidArgumentError(
            "context",
            f"must hold exactly the block's {int(q.shape[2])} tokens where k and v are None",
            f"{tokens.tolist()} tokens",
        )


@once_a_form
def check_rows(name: str, rows: Array, q: Array) -> None:
    """Raise unless ``rows`` is bool ``(batch, tokens)`` of the queries."""
    check_array(name, rows, (q.shape[0], q.shape[2]), ("bool", "bool_"))
    check_same_place(name, rows, "q", q)


def check_queries_fit(q: Array, context: Context) -> None:
    """Raise unless queries of known form fit the heads, channels, dtype and place of ``context``."""
    batch, q_heads, tokens, head_dim = shape_of(q)
    if head_dim != context.head_dim or dtype_name(q) != dtype_name(context.k_pages):
        raise InvalidArgumentError(
            "context.k_pages",
            f"must have head_dim {head_dim} and dtype {dtype_name(q)}, as q has",
            f"head_dim {context.head_dim}, dtype {dtype_name(context.k_pages)}",
        )
    if context.batch != batch:
        raise InvalidArgumentError("context", f"must hold {batch} sequences, as q does", context.batch)
    if q_heads == 0 or q_heads % context.kv_heads:
        raise InvalidArgumentError(
            "q", f"must have a multiple of kv_heads={context.kv_heads} query heads", f"{q_heads} heads"
        )
    if tokens == 0:
        raise InvalidArgumentError("q", "must have at least one row", f"shape {shape_of(q)}")
    check_same_place("context.k_pages", context.k_pages, "q", q)
