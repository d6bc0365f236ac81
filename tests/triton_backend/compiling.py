"""Compile the Triton backend's kernels for GPUs that need not be there; prints what came of it as JSON.

    python tests/triton_backend/compiling.py '{"CAPABILITY": ["PROBLEM", ...], ...}'

A process of its own: under TRITON_INTERPRET, as the other tests run, nothing is compiled. Launches are real up to
the last step: Triton's own binder specialises the arguments, and the kernel is compiled instead of run.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from sparse_dlm_attn_benchmarks.shape import Shape
from sparse_dlm_attn_triton import common
from sparse_dlm_attn_triton.full_sequence import attend_spans
from sparse_dlm_attn_triton.pooled import pooled_scores
from sparse_dlm_attn_triton.ranked import ranked_plan
from sparse_dlm_attn_triton.scores import page_bounds
from sparse_dlm_attn_triton.select import top_pages

SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory that a program may use: A100, H100 and H200, B200, and the GeForce cards since 8.6."""


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


def a_sequence(dtype: str, head_dim: int, page_size: int, choose: bool = True) -> None:
    """Launch attention of a whole sequence over selected pages, and the choice of these before it."""
    tokens, heads, pages = 1024, 2, 1024 // page_size
    q, table = empty(dtype, 1, heads, tokens, head_dim), empty("int32", 1, pages)
    pool = empty(dtype, pages, heads, page_size, head_dim)
    if choose:
        pooled_scores(q, pool, table, table, page_size, 0.1, None)
    mask = empty("bool", 1, heads, pages, pages)
    attend_spans(q, pool, pool, table, table, mask, page_size, empty("bool", 1, tokens), 0.1)


def metadata() -> None:
    """Launch the operators that stand alone."""
    table, scores = empty("int32", 2, 1024), empty("float32", 2, 16384)
    page_bounds(empty("bfloat16", 1024, 2, 256, 256), table, table)
    top_pages(scores, empty("int32", 2), empty("bool", 2, 16384))


PROBLEMS: dict[str, Callable[[], None]] = {
    "page 64": partial(a_pass, Shape()),
    "page 64, 64 lists": partial(a_pass, Shape(batch=8)),
    "page 64, 64 lists, 32 rows": partial(a_pass, Shape(batch=8, tokens=32), rows=32),
    "page 64, ragged": partial(a_pass, Shape(batch=8), ragged=True),
    "head size 256": partial(a_pass, Shape(head_dim=256)),
    "head size 256, 32 rows": partial(a_pass, Shape(head_dim=256, tokens=32), rows=32),
    "float32, own pages": partial(a_pass, Shape(dtype="float32"), own=True),
    "float32, head size 256, own pages, ragged": partial(
        a_pass, Shape(batch=2, dtype="float32", head_dim=256), own=True, ragged=True
    ),
    "metadata": metadata,
    "sequence, span 128": partial(a_sequence, "bfloat16", 128, 128, choose=False),
    "spans together": partial(a_sequence, "bfloat16", 64, 32, choose=False),
    "sequence, head size 256": partial(a_sequence, "bfloat16", 256, 128),
}


class Driver:
    """A GPU that is not there, as far as Triton's launches ask for it."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.utils = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": SHARED[capability]})

    def get_current_target(self) -> GPUTarget:
        """Return what to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """Return the number of the only device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the number of the only stream."""
        return 0


def compiled(request: tuple[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Return shared memory and waits for copies of the kernels of some problems, each distinct kernel once."""
    capability, names = int(request[0]), request[1]
    driver.set_active(Driver(capability))
    common.uses_pdl = lambda device: capability >= 90
    run, found, seen = JITFunction.run, {}, set()

    def warm_up(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if id(kernel) not in seen:
            seen.add(id(kernel))
            waits = re.findall(r"async_wait[^\n]*\{num = (\d+)", kernel.asm["ttgir"])
            key = f"{name}: {self.__name__}"
            assert key not in found, f"{key} is launched twice: one of them would be lost"
            found[key] = {"shared": kernel.metadata.shared, "waits": [int(number) for number in waits]}

    JITFunction.run = warm_up
    for name in names:
        PROBLEMS[name]()
    return found


def main() -> None:
    """Compile for one capability after the other, each in a process that begins with no plans and no kernels."""
    requests = json.loads(sys.argv[1])
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        results = pool.map(compiled, requests.items(), chunksize=1)
    print(json.dumps(dict(zip(requests, results, strict=True))))


if __name__ == "__main__":
    main()
