"""The PyTorch backend on one GPU: LoSA and SparseD passes beside dense attention, and what it compiles.

    PYTHONPATH=.:reference:backends:models:conformance python benchmarks/torch_gpu.py --out torch_gpu.json

Each contender's result is compared with float32 sums before it is timed. Times are medians of CUDA-graph
replays and of plain launches, over layers that rotate, so that the L2 cache is cold; see `timing`. A part
that fails says why and the others go on; then the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparse_dlm_attn import Context, PassInfo, PrefixAttention, Selection, UnsupportedError
from sparse_dlm_attn.cli.console import result_console, table
from sparse_dlm_attn_benchmarks.gate import WrongResultError
from sparse_dlm_attn_benchmarks.layer import Layer, budget_for, layers, relative_density, runner
from sparse_dlm_attn_benchmarks.peers import TOLERANCE, dense_peers, expected_dense
from sparse_dlm_attn_benchmarks.shape import Shape
from sparse_dlm_attn_benchmarks.timing import measure, relative_error
from sparse_dlm_attn_torch import TorchBackend, flex

PATHS = ("flex", "masked", "gather")
SHAPES = (Shape(), Shape(context=16384))
PEERS = ("SDPA flash, group folded", "FlexAttention, group folded", "FlexAttention, enable_gqa")
DENSITY = 0.10
SPARSED_TOKENS, SPARSED_SPAN = 16384, 128
PASSES = 200
Row = dict[str, Any]


def exact(layer: Layer, shape: Shape, pages: torch.Tensor) -> torch.Tensor:
    """Return attention of ``q_next`` in float32, over chosen pages and over the block.

    Parameters
    ----------
    layer, shape : Layer, Shape
        The problem.
    pages : torch.Tensor
        bool ``(batch, heads, 1, pages)``: the chosen ones.
    """
    rows = layer.q_next.float().reshape(shape.batch, shape.kv_heads, -1, shape.head_dim)
    keys, values = (torch.cat(pair, 2) for pair in zip(layer.cache, (layer.k, layer.v), strict=True))
    logits = rows @ keys.float().mT * shape.head_dim**-0.5
    tokens = pages.repeat_interleave(shape.page_size, -1)
    every = tokens.new_ones(*tokens.shape[:3], keys.shape[2] - tokens.shape[3])
    group = shape.q_heads // shape.kv_heads
    seen = torch.cat([tokens, every], -1).expand(-1, -1, shape.tokens, -1)
    if seen.shape[1] == shape.q_heads:
        seen = seen.reshape(shape.batch, shape.kv_heads, group * shape.tokens, -1)
    else:
        seen = seen.repeat(1, 1, group, 1)
    logits = logits.masked_fill(~seen, -torch.inf)
    return (logits.softmax(-1) @ values.float()).reshape(layer.q_next.shape)


def gate(name: str, error: float) -> float:
    """Return a relative error, or raise if it is too large."""
    limit = TOLERANCE["bfloat16"]
    if not error <= limit:
        raise WrongResultError(f"{name}: relative error {error:.1e} exceeds {limit:.0e}")
    return error


def check_pass(policy: str, backend: TorchBackend, layer: Layer, shape: Shape) -> float:
    """Compare the rows that a sparse pass recomputed with float32 sums over the pages that it chose."""
    out, memory = runner(policy, backend, layer)()
    wanted = exact(layer, shape, memory.selection.mask)
    rows = memory.active[:, None, :, None].expand_as(out)
    return gate(f"{policy} on {backend.attention}", relative_error(out[rows], wanted[rows]))


def losa_rows(shape: Shape, repeats: int, attempt: Callable[..., Any]) -> list[Row]:
    """Time a LoSA pass on every path, and dense attention, on one shape."""
    plain = TorchBackend(device="cuda", attention="masked")
    made = layers(shape, plain, share=DENSITY)
    policy, _ = budget_for(DENSITY, "losa", shape, plain, made[0])
    rows: list[Row] = []

    def peer(name: str, works: list[Callable[[], Any]]) -> None:
        out = works[0]()[0].reshape(made[0].q_next.shape)
        error = relative_error(out, expected_dense(made[0])[0])  # compared already, to be let in
        rows.append({"name": name, "kind": "dense", "read": 1.0, "error": error, **measure(works, repeats).as_dict()})

    def ours(path: str) -> None:
        backend = TorchBackend(device="cuda", attention=path)
        error = check_pass(policy, backend, made[0], shape)
        timing = measure([runner(policy, backend, layer) for layer in made], repeats)
        rows.append(
            {
                "name": f"{policy}, {path}",
                "kind": "ours",
                "error": error,
                "read": relative_density(policy, backend, made[0]),
                **timing.as_dict(),
            }
        )

    for name, works in dense_peers(made[:4], shape, PEERS).items():
        if isinstance(works, str):
            attempt(f"{shape}: {name}", _raise, works)
        else:
            attempt(f"{shape}: {name}", peer, name, works)
    for path in PATHS:
        attempt(f"{shape}: losa on {path}", ours, path)
    return _with_shape(rows, str(shape))


def sparsed_rows(repeats: int, attempt: Callable[..., Any]) -> list[Row]:
    """Time a frozen pass of SparseD over a whole sequence on every path, and dense attention."""
    import full_sequence_peers
    from full_sequence import Problem

    problem = Problem(SPARSED_TOKENS, SPARSED_SPAN)
    context = Context(problem.k_pages, problem.v_pages, problem.table, problem.lengths)
    selection = Selection(problem.mask, SPARSED_SPAN)
    rows: list[Row] = []

    def contender(name: str, call: Callable[[], Any], dense: bool) -> None:
        result = call()
        pair = result if isinstance(result, torch.Tensor) else (result[0], result[1])
        error = problem.error(pair, dense)
        if not error <= 1:
            raise WrongResultError(f"{name}: {error:.1f} times the limit on sampled rows")
        read = 1.0 if dense else float(problem.mask.float().mean())
        rows.append(
            {
                "name": name,
                "kind": "dense" if dense else "ours",
                "read": read,
                "error": error,
                **measure([call], repeats).as_dict(),
            }
        )

    def ours(path: str) -> None:
        backend = TorchBackend(device="cuda", attention=path)

        def call() -> Any:
            state = backend.attend_pages(problem.q, context, selection, problem.active)
            return state.out, state.lse

        contender(f"sparsed, {path}", call, False)

    for name, call in full_sequence_peers.dense(problem, quick=False).items():
        attempt(f"sparsed: {name}", contender, name, call, True)
    for path in PATHS:
        attempt(f"sparsed on {path}", ours, path)
    return _with_shape(rows, f"sequence of {SPARSED_TOKENS // 1024}K, spans and pages of {SPARSED_SPAN}")


def compilations() -> dict[str, int]:
    """Return what 200 passes with a growing context compile after the first block; raise unless nothing."""
    from torch._dynamo.utils import counters

    shape = Shape()
    attention = PrefixAttention("losa:budget=512", TorchBackend(device="cuda", attention="flex"))

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, device="cuda", dtype=torch.bfloat16)

    def block(pages: int, passes: int) -> None:
        cache = (normal(1, shape.kv_heads, pages * shape.page_size, shape.head_dim) for _ in range(2))
        context, memory = Context.from_dense(*cache, shape.page_size, version=pages), None
        k, v = (normal(1, shape.kv_heads, shape.tokens, shape.head_dim) for _ in range(2))
        for index in range(passes):
            q = normal(1, shape.q_heads, shape.tokens, shape.head_dim)
            _, memory = attention(q, k, v, context, memory, PassInfo(index))

    def compiled() -> tuple[int, int]:
        return flex.kernel.cache_info().misses, counters["stats"]["unique_graphs"]

    block(512, 3)  # the largest of its power of two
    before, done = compiled(), 0
    while done < PASSES:
        passes = 1 + done % 8
        block(260 + done, passes)
        done += passes
    kernels, graphs = (after - first for after, first in zip(compiled(), before, strict=True))
    torch.cuda.synchronize()
    print(
        f"{done} passes, context of {260 * 64 // 1024}K to {(260 + done) * 64 // 1024}K tokens: {kernels} "
        f"kernels and {graphs} graphs compiled after the first block"
    )
    if kernels or graphs:
        raise WrongResultError(f"{kernels} kernels and {graphs} graphs were compiled, wanted none")
    return {"passes": done, "kernels": kernels, "graphs": graphs}


def _with_shape(rows: list[Row], shape: str) -> list[Row]:
    """Name the shape, and say how many times faster than the fastest dense contender each is."""
    dense = [row for row in rows if row["kind"] == "dense"]
    for row in rows:
        row["shape"] = shape
        for kind in ("alone", "chained", "plain"):
            best = min((each[f"{kind}_us"] for each in dense), default=None)
            row[f"speedup_{kind}"] = None if best is None else best / row[f"{kind}_us"]
    return rows


def _raise(reason: str) -> None:
    raise RuntimeError(reason)


def print_rows(rows: list[Row]) -> None:
    """Print a table of one shape."""
    if not rows:
        return
    figures = ("read", "graph", "chained", "plain", "x graph", "x chained", "x plain", "error")
    lines = []
    for row in rows:
        ratios = [row[f"speedup_{kind}"] for kind in ("alone", "chained", "plain")]
        lines.append(
            (
                row["name"],
                f"{row['read']:.1%}",
                *(f"{row[key]:.1f}" for key in ("alone_us", "chained_us", "plain_us")),
                *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
                f"{row['error']:.1e}",
            )
        )
    caption = "Microseconds; x: of the fastest dense contender."
    result_console().print(table((rows[0]["shape"],), figures, lines, caption))


class Attempts:
    """Runs parts of the benchmark, and remembers which failed."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.refused: list[str] = []

    def __call__(self, name: str, part: Callable[..., Any], *arguments: Any) -> Any:
        """Run a part; print why it failed, or that the backend refuses it, which is no failure."""
        try:
            return part(*arguments)
        except UnsupportedError as error:
            self.refused.append(f"{name}: {error}")
            print(f"{name}: refused, as documented: {error}", flush=True)
        except Exception as error:  # whatever a GPU, a compiler or a missing library raises
            first = (str(error).strip().splitlines() or [""])[0]
            self.failures.append(f"{name}: {type(error).__name__}: {first[:200]}")
            trace = "".join(traceback.format_exception(error, limit=-4))
            print(f"{name}: FAILED\n{trace}"[:3000], flush=True)
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return None


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--repeats", type=int, default=5, help="rounds over all layers")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("A CUDA GPU is needed; benchmarks/test_cpu.py times the CPU.")
    torch._dynamo.config.recompile_limit = 64
    attempt, rows = Attempts(), []
    versions = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(versions, flush=True)
    result: dict[str, Any] = {**versions, "rows": rows}
    for shape in SHAPES:
        found = attempt(f"{shape}", losa_rows, shape, options.repeats, attempt) or []
        print_rows(found)
        rows += found
    found = attempt("sparsed", sparsed_rows, options.repeats, attempt) or []
    print_rows(found)
    rows += found
    result["compilations"] = attempt("compilations", compilations)
    result |= {"failures": attempt.failures, "refused": attempt.refused}
    options.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    if attempt.failures:
        sys.exit("failed: " + "; ".join(attempt.failures))


if __name__ == "__main__":
    main()
