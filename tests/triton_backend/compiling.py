"""Compile the Triton backend's kernels for a GPU that need not be there; prints what came of it as JSON.

    python tests/triton_backend/compiling.py CAPABILITY SHARED_BYTES [PROBLEM...]

A process of its own: under TRITON_INTERPRET, as the other tests run, nothing is compiled. Launches are real
up to the last step, where the kernel with its arguments is compiled instead of run.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

from sparse_dlm_attn_bench.shape import Shape
from sparse_dlm_attn_triton import common, full_sequence, launch, launch_decisions
from sparse_dlm_attn_triton.full_sequence import attend_spans
from sparse_dlm_attn_triton.pooled import pooled_scores
from sparse_dlm_attn_triton.ranked_pass import ranked_plan

TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16",
         torch.int8: "i8", torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1"}
Call = tuple[tuple[Any, ...], dict[str, Any]]


def empty(dtype: str, *sizes: int) -> torch.Tensor:
    """Return memory that nobody reads."""
    return torch.empty(sizes, dtype=getattr(torch, dtype))


def a_pass(shape: Shape, own: bool = False, ragged: bool = False, rows: int = 5) -> None:
    """Launch a LoSA pass of so many active rows; with ``own`` each keeps the pages that it chose."""
    pages = shape.context // shape.page_size
    q = empty(shape.dtype, shape.batch, shape.q_heads, shape.tokens, shape.head_dim)
    k = empty(shape.dtype, shape.batch, shape.kv_heads, shape.tokens, shape.head_dim)
    bounds = (empty(shape.dtype, shape.batch, shape.kv_heads, pages, shape.head_dim),) * 2
    pool = empty(shape.dtype, shape.batch * pages, shape.kv_heads, shape.page_size, shape.head_dim)
    table = empty("int32", shape.batch, pages)
    rule = rows, None, 512, 512 // shape.page_size, "row" if own else "kv_head", "queries"
    pages, cached = (pool, pool, table, table), (q, empty("float32", *q.shape[:3]))
    ranked_plan(q, k, k, pages, bounds, q, cached, rule, 0.1, ragged).run(q, k, k, pages, bounds, q, cached)


def a_sequence(dtype: str, head_dim: int, page_size: int, tokens: int = 1024, heads: int = 2) -> None:
    """Launch what a whole sequence takes: the choice, and attention over it."""
    pages = tokens // page_size
    q, table = empty(dtype, 1, heads, tokens, head_dim), empty("int32", 1, pages)
    pool = empty(dtype, pages, heads, page_size, head_dim)
    pooled_scores(q, pool, table, table, page_size, 0.1, None)
    mask = empty("bool", 1, heads, pages, pages)
    attend_spans(q, pool, pool, table, table, mask, page_size, empty("bool", 1, tokens), 0.1)


PROBLEMS: dict[str, Callable[[], None]] = {
    "page 64": partial(a_pass, Shape()),
    "page 64, 64 lists": partial(a_pass, Shape(batch=8)),
    "page 64, 64 lists, 32 rows": partial(a_pass, Shape(batch=8, tokens=32), rows=32),
    "page 64, ragged": partial(a_pass, Shape(batch=8), ragged=True),
    "page 64, own pages": partial(a_pass, Shape(), own=True),
    "page 16": partial(a_pass, Shape(page_size=16)),
    "page 16, own pages": partial(a_pass, Shape(page_size=16), own=True),
    "head size 256": partial(a_pass, Shape(head_dim=256)),
    "head size 256, own pages": partial(a_pass, Shape(head_dim=256), own=True),
    "head size 256, 32 rows": partial(a_pass, Shape(head_dim=256, tokens=32), rows=32),
    "float32": partial(a_pass, Shape(dtype="float32")),
    "float32, own pages": partial(a_pass, Shape(dtype="float32"), own=True),
    "float32, head size 256, 32 rows": partial(
        a_pass, Shape(dtype="float32", head_dim=256, tokens=32), rows=32
    ),
    "float32, head size 256, own pages": partial(a_pass, Shape(dtype="float32", head_dim=256), own=True),
    "sequence, span 128": partial(a_sequence, "bfloat16", 128, 128),
    "sequence, span 32": partial(a_sequence, "bfloat16", 128, 32),
    "sequence, head size 256": partial(a_sequence, "bfloat16", 256, 128),
    "sequence, float32, head size 256": partial(a_sequence, "float32", 256, 32),
}


def launches(problem: Callable[[], None]) -> list[tuple[JITFunction[Any], Call]]:
    """Return the kernels that a problem launches, and with what."""
    calls: list[tuple[JITFunction[Any], Call]] = []

    def run(self: JITFunction[Any], *given: Any, grid: Any, warmup: bool, **named: Any) -> None:
        calls.append((self, (given, named)))

    real = JITFunction.run
    JITFunction.run = run
    try:
        problem()
    finally:
        JITFunction.run = real
    return calls


def source(kernel: JITFunction[Any], call: Call) -> tuple[ASTSource, dict[str, Any]]:
    """Return what the compiler gets for a launch, as Triton makes it of the arguments, and its options."""
    given, named = call
    values = dict(zip(kernel.arg_names, given, strict=False))
    values |= {name: value for name, value in named.items() if name in kernel.arg_names}
    signature: dict[str, str] = {}
    constants, attributes = {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        whole = isinstance(value, int) and not isinstance(value, bool)
        if parameter.is_constexpr or value is None or (
            whole and value == 1 and not parameter.do_not_specialize
        ):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or (
            whole and value % 16 == 0 and not parameter.do_not_specialize
        ):
            attributes[(place,)] = [["tt.divisibility", 16]]
    options = {name: value for name, value in named.items() if name not in kernel.arg_names}
    return ASTSource(kernel, signature, constants, attributes), options


def main(capability: int, shared: int, names: list[str]) -> None:
    """Compile the kernels of some problems."""
    common.chained = lambda device: capability >= 90
    for module in (full_sequence, launch, launch_decisions):
        module.shared_memory = lambda device: shared
    found: dict[str, dict[str, Any]] = {}
    for name in names or PROBLEMS:
        for kernel, call in launches(PROBLEMS[name]):
            made, options = source(kernel, call)
            compiled = compile(made, target=GPUTarget("cuda", capability, 32), options=options)
            waits = re.findall(r"async_wait[^\n]*\{num = (\d+)", compiled.asm["ttgir"])
            key = f"{name}: {kernel.__name__}"
            assert key not in found, f"{key} is launched twice: one of them would be lost"
            found[key] = {"shared": compiled.metadata.shared, "waits": [int(number) for number in waits]}
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
