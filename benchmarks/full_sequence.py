"""Whole-sequence attention on one GPU: dense peers, block-sparse peers, our kernels, the selection sweep.

    PYTHONPATH=.:reference:backends:models:conformance \
        python benchmarks/full_sequence.py --out full.json [--tune] [--quick]

Every contender's result is compared with float32 sums on sampled rows before it is timed. Times are
medians of CUDA events. Contenders that cannot run are named with the reason. About 3 minutes on an H100,
compilation included; `--tune` adds about one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import full_sequence_peers as peers
import torch
from full_sequence_tiles import ATTEND_TILES, POOLED_TILES

from sparse_dlm_attn.policies.sparsed import SparseD
from sparse_dlm_attn_benchmarks.timing import elapsed
from sparse_dlm_attn_triton.common import shared_memory
from sparse_dlm_attn_triton.full_sequence import attend_spans, lists_for
from sparse_dlm_attn_triton.pooled import pooled_scores
from sparse_dlm_attn_triton.select import top_pages
from sparse_dlm_attn_triton.span_tiles import Tile, attend_tile, pooled_tile

HEADS, DIM, DENSITY = 32, 128, 0.30
SCALE = DIM**-0.5
LIMITS = 1e-3, 1e-2  # of out, whose values are a few hundredths here, and of lse


def timed(call: Callable[[], Any], repeats: int) -> float:
    """Return the median milliseconds of a call that has run before."""
    return sorted(elapsed(call) for _ in range(repeats))[repeats // 2] / 1e3


class Problem:
    """One sequence of random q, K and V, as tensors and as pages, with a random selection."""

    def __init__(self, tokens: int, size: int, pattern: str = "random", seed: int = 0) -> None:
        made = torch.Generator("cuda").manual_seed(seed)
        self.tokens, self.size, self.pages, self.pattern = tokens, size, tokens // size, pattern
        shape = (1, HEADS, tokens, DIM)
        self.q, self.k, self.v = (
            torch.randn(shape, generator=made, device="cuda", dtype=torch.bfloat16) for _ in range(3)
        )
        self.k_pages, self.v_pages = (
            side.view(HEADS, self.pages, size, DIM).transpose(0, 1) for side in (self.k, self.v)
        )
        self.table = torch.arange(self.pages, device="cuda", dtype=torch.int32)[None]
        self.lengths = torch.full_like(self.table, size)
        self.active = torch.ones(1, tokens, dtype=torch.bool, device="cuda")
        self.mask = torch.empty(1, HEADS, self.pages, self.pages, dtype=torch.bool, device="cuda")
        for head in range(HEADS):  # some memory at a time
            grid = torch.rand(self.pages, self.pages, generator=made, device="cuda")
            if pattern == "neighbours":  # four neighbours choose alike; each choice differs once in five
                common = grid[::4].repeat_interleave(4, 0)[: self.pages]
                other = torch.rand(grid.shape, generator=made, device="cuda") < 0.2
                grid = torch.where(other, grid, common)
            self.mask[0, head] = grid < DENSITY
        self.mask[..., 0] = True  # no row without a key

    def name(self) -> str:
        suffix = "" if self.pattern == "random" else f" {self.pattern}"
        return f"{self.tokens // 1024}K/{self.size}{suffix}"

    def arguments(self) -> tuple[Any, ...]:
        return (self.q, self.k_pages, self.v_pages, self.table, self.lengths, self.mask, self.size, self.active, SCALE)

    def keys(self) -> tuple[Any, ...]:
        return self.q, self.k_pages, self.table, self.lengths, self.size, SCALE

    def sampled(self) -> list[tuple[int, int]]:
        rows = torch.randint(self.tokens, (24,), generator=torch.Generator().manual_seed(1)).tolist()
        return [(i * 5 % HEADS, row) for i, row in enumerate([0, self.tokens - 1, *rows])]

    def expected(self, dense: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return float32 ``(out, lse)`` of the sampled rows."""
        outs, lses = [], []
        for head, row in self.sampled():
            logits = (self.k[0, head].float() @ self.q[0, head, row].float()) * SCALE
            if not dense:
                keys = self.mask[0, head, row // self.size].repeat_interleave(self.size)
                logits = logits.masked_fill(~keys, -torch.inf)
            outs.append(torch.softmax(logits, 0) @ self.v[0, head].float())
            lses.append(logits.logsumexp(0))
        return torch.stack(outs), torch.stack(lses)

    def error(self, result: Any, dense: bool) -> float:
        """Return the largest error of the sampled rows as a share of its limit; NaN if there is a NaN."""
        out, lse = result if isinstance(result, tuple) else (result, None)
        heads, rows = (torch.tensor(side, device="cuda") for side in zip(*self.sampled(), strict=True))
        wanted, wanted_lse = self.expected(dense)
        worst = float((out[0, heads, rows].float() - wanted).abs().max()) / LIMITS[0]
        if lse is not None:
            given = lse.reshape(HEADS, -1)[heads, rows]
            worst = max(worst, float((given - wanted_lse).abs().max()) / LIMITS[1])
        return worst


def contend(
    problem: Problem, name: str, call: Callable[[], Any], dense: bool, repeats: int, rows: list[dict[str, Any]]
) -> float | None:
    """Check and time one contender; report and return its milliseconds, or None with the reason."""
    row: dict[str, Any] = {"shape": problem.name(), "contender": name}
    rows.append(row)
    start = time.monotonic()
    try:
        row["error"] = problem.error(call(), dense)
        torch.cuda.synchronize()
    except Exception as error:
        first = str(error).strip().splitlines()
        row["failed"] = f"{type(error).__name__}: {first[0][:160] if first else ''}"
        print(f"  {name:34s} failed: {row['failed']}", flush=True)
        return None
    compiled = time.monotonic() - start
    if not row["error"] <= 1:
        row["failed"] = "wrong result"
        print(f"  {name:34s} WRONG: {row['error']:.1f} times the limit on sampled rows", flush=True)
        return None
    row["ms"] = timed(call, repeats)
    share = 1.0 if dense else float(problem.mask.float().mean())
    row["tflops"] = 4 * share * problem.tokens**2 * DIM * HEADS / row["ms"] / 1e9
    print(
        f"  {name:34s} {row['ms']:9.3f} ms {row['tflops']:6.0f} TFLOP/s   error/limit {row['error']:.2f}"
        f"   first call {compiled:.1f} s",
        flush=True,
    )
    return float(row["ms"])


def small_gate() -> None:
    """Compare our kernels with float32 attention on one small sequence, all of it; stop if they differ."""
    thirty_two = Tile(32, 64, 4, 3), Tile(64, 64, 4, 3), Tile(128, 32, 8, 3)
    for size, tile in ((128, None), *((32, tile) for tile in thirty_two)):
        problem = Problem(2048, size)
        out, lse = attend_spans(*problem.arguments(), tile=tile)
        keys = problem.mask.repeat_interleave(size, 2).repeat_interleave(size, 3)
        logits = problem.q.float() @ problem.k.float().mT * SCALE
        listed = logits.masked_fill(~keys, -torch.inf)
        wanted = torch.softmax(listed, -1) @ problem.v.float()
        errors = [float((out.float() - wanted).abs().max()), float((lse - listed.logsumexp(-1)).abs().max())]
        masses = torch.softmax(logits, -1).unflatten(3, (-1, size)).sum(-1).unflatten(2, (-1, size)).mean(3)
        for given in (logits.logsumexp(-1), None):
            got = pooled_scores(*problem.keys(), given)
            errors.append(float((got - masses).abs().max()))
        print(
            f"gate {size}/{size} tile {tile and (tile.rows, tile.tokens)}: out {errors[0]:.1e} "
            f"lse {errors[1]:.1e} pooled {errors[2]:.1e} {errors[3]:.1e}",
            flush=True,
        )
        if not (errors[0] < 5e-3 and errors[1] < 1e-4 and max(errors[2:]) < 1e-5):
            raise SystemExit("gate: our kernels differ from float32 attention")


def tune(
    what: str, tiles: list[Tile], call: Callable[[Tile], Any], workers: int, rows: list[dict[str, Any]]
) -> Tile | None:
    """Compile tiles side by side, time them one by one, print them best first; return the best."""

    def attempt(tile: Tile) -> str | None:
        try:
            call(tile)
            torch.cuda.synchronize()
        except Exception as error:
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:90]}"
        return None

    start = time.monotonic()
    with ThreadPoolExecutor(workers) as pool:
        failures = list(pool.map(attempt, tiles))
    spent = time.monotonic() - start
    found = []
    for tile, failure in zip(tiles, failures, strict=True):
        if failure is None:
            found.append((timed(lambda tile=tile: call(tile), 7), tile))
        rows.append({"what": what, **asdict(tile), "ms": found[-1][0] if failure is None else None, "failed": failure})
    found.sort(key=lambda pair: pair[0])
    print(f"tune {what}: compiled {len(tiles)} in {spent:.0f} s", flush=True)
    for ms, tile in found:
        flags = "".join(
            (" tma" * tile.tma, " ws" * tile.warp_specialize, f" regs {tile.registers}" if tile.registers else "")
        )
        print(f"  {ms:8.3f} ms  rows {tile.rows} keys {tile.tokens} warps {tile.warps} stages {tile.stages}{flags}")
    for tile, failure in zip(tiles, failures, strict=True):
        if failure is not None:
            print(f"  failed    {tile}: {failure}")
    return found[0][1] if found else None


def selection_pass(problem: Problem, lse: torch.Tensor, tile: Tile, dense_ms: float) -> dict[str, Any]:
    """Time and weigh the choice of pages after a dense pass, and check the masses of sampled spans."""
    arguments = problem.keys()
    scores = pooled_scores(*arguments, lse, tile=tile)
    worst = 0.0
    for head, row in problem.sampled()[:8]:
        span = row // problem.size
        rows = problem.q[0, head, span * problem.size : (span + 1) * problem.size].float()
        weights = torch.softmax(rows @ problem.k[0, head].float().T * SCALE, -1)
        wanted = weights.view(problem.size, -1, problem.size).sum(-1).mean(0)
        worst = max(worst, float(((scores[0, head, span] - wanted).abs() / wanted).max()))
    count = torch.full((), int(problem.pages * DENSITY) + 1, device="cuda")
    eligible = torch.ones(1, 1, 1, problem.pages, dtype=torch.bool, device="cuda")
    top_pages(scores, count, eligible)
    pooled_ms = timed(lambda: pooled_scores(*arguments, lse, tile=tile), 5)
    top_ms = timed(lambda: top_pages(scores, count, eligible), 3)
    first_tokens = torch.arange(problem.pages, device="cuda") * problem.size
    generated = torch.where(first_tokens >= problem.tokens - 1024, problem.lengths, 0)
    alone = (*arguments[:3], generated, *arguments[4:])
    pooled_scores(*alone)
    alone_ms = timed(lambda: pooled_scores(*alone), 3)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mask = top_pages(pooled_scores(*arguments, lse, tile=tile), count, eligible)
    torch.cuda.synchronize()
    extra = (torch.cuda.max_memory_allocated() - before) / 2**30
    del mask
    total = pooled_ms + top_ms + alone_ms
    print(
        f"  selection: sweep {pooled_ms:.2f} ms, top pages {top_ms:.2f} ms, isolated sweep of the last "
        f"1024 tokens {alone_ms:.2f} ms; {total / dense_ms:.2f} of a dense pass; peak extra memory "
        f"{extra:.3f} GiB; relative error of masses {worst:.1e}",
        flush=True,
    )
    if worst > 2e-2:
        raise SystemExit("selection: wrong masses")
    found = {"sweep_ms": pooled_ms, "top_ms": top_ms, "isolated_ms": alone_ms, "total_ms": total}
    return found | {"dense_passes": total / dense_ms, "extra_gib": extra, "error": worst}


def schedule(dense: float, select: float, sparse: float, passes: int) -> tuple[float, int]:
    """Return attention's speed-up over all passes, selection included, and the dense passes among them."""
    warm = SparseD(skip=0.2).warmup_passes(passes)
    return passes * dense / (warm * dense + select + (passes - warm) * sparse), warm


class Frozen:
    """Our kernel as the frozen passes run it: lists made once."""

    def __init__(self, problem: Problem, tile: Tile) -> None:
        self.problem, self.tile = problem, tile

    def lists(self, mask: torch.Tensor) -> Any:
        p = self.problem
        return lists_for(p.q, p.v_pages, p.table, p.lengths, mask, p.size, p.active, self.tile)

    def __call__(self, lists: Any) -> Any:
        return attend_spans(*self.problem.arguments(), tile=self.tile, lists=lists)


def real_loop(problem: Problem, dense: Callable[[], Any], sparse: Frozen, tile: Tile) -> dict[str, Any]:
    """Run the 16 passes of a short schedule for real: dense ones, the choice, frozen ones."""
    passes = 16
    warm = SparseD(skip=0.2).warmup_passes(passes)
    count = torch.full((), int(problem.pages * DENSITY) + 1, device="cuda")
    eligible = torch.ones(1, 1, 1, problem.pages, dtype=torch.bool, device="cuda")

    def run() -> None:
        for _ in range(warm):
            _, lse = dense()
        scores = pooled_scores(*problem.keys(), lse.reshape(1, HEADS, -1), tile=tile)
        lists = sparse.lists(top_pages(scores, count, eligible))
        for _ in range(passes - warm):
            sparse(lists)

    def all_dense() -> None:
        for _ in range(passes):
            dense()

    run()
    ours, plain = timed(run, 1), timed(all_dense, 1)
    print(
        f"  real loop of {passes} passes, {warm} dense: {ours:.0f} ms, all dense {plain:.0f} ms, {plain / ours:.2f}x",
        flush=True,
    )
    return {"passes": passes, "dense_passes": warm, "ms": ours, "all_dense_ms": plain, "speedup": plain / ours}


def measure(problem: Problem, tiles: dict[str, Tile], repeats: int, quick: bool) -> dict[str, Any]:
    """Measure one shape."""
    density = float(problem.mask.float().mean())
    print(f"{problem.name()}: {HEADS} heads, head dim {DIM}, bf16, density {density:.3f}")
    rows: list[dict[str, Any]] = []
    dense: dict[str, float | None] = {}
    sparse: dict[str, float | None] = {}
    if problem.pattern == "random":
        for name, call in peers.dense(problem, quick).items():
            dense[name] = contend(problem, name, call, True, max(repeats // 2, 3), rows)
        for name, call in peers.block_sparse(problem, quick).items():
            sparse[name] = contend(problem, name, call, False, repeats, rows)
            torch.cuda.empty_cache()
    tile = tiles["attend"]
    ours = Frozen(problem, tile)
    lists = ours.lists(problem.mask)
    sparse["ours"] = contend(problem, "ours, lists kept", lambda: ours(lists), False, repeats, rows)
    contend(problem, "ours, lists made anew", lambda: ours(ours.lists(problem.mask)), False, repeats, rows)
    print(f"  our tile: {tile}")
    result: dict[str, Any] = {"rows": rows, "tile": asdict(tile)}
    known = {name: ms for name, ms in dense.items() if ms is not None}
    if not known or sparse["ours"] is None:
        return result
    fastest = min(known, key=lambda name: known[name])
    flex = [ms for name, ms in sparse.items() if name.startswith("FlexAttention Triton") and ms is not None]
    best = min((ms, name) for name, ms in sparse.items() if ms is not None)
    print(
        f"  fastest dense {fastest} {known[fastest]:.2f} ms: ours {known[fastest] / sparse['ours']:.2f}x, "
        f"best ({best[1]}) {known[fastest] / best[0]:.2f}x"
        + (f"; ours over FlexAttention Triton {min(flex) / sparse['ours']:.2f}x" if flex else "")
    )
    result |= {"fastest_dense": fastest, "best_sparse": best[1]}
    with_lse = peers.dense_with_lse(problem)
    choice = selection_pass(problem, with_lse()[1].reshape(1, HEADS, -1), tiles["pooled"], known[fastest])
    for passes in (128, 1024):
        speedups = {
            name: schedule(known[fastest], choice["total_ms"], ms, passes)[0]
            for name, ms in (("ours", sparse["ours"]), (best[1], best[0]))
        }
        warm = schedule(1.0, 1.0, 1.0, passes)[1]
        print(f"  T={passes} ({warm} dense): " + ", ".join(f"{n} {s:.2f}x" for n, s in speedups.items()))
        result[f"T{passes}"] = speedups
    result |= {"selection": choice, "loop": real_loop(problem, with_lse, ours, tiles["pooled"])}
    return result


def main() -> None:
    """Run it all and write the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tune", action="store_true", help="try tiles at 16K first, and use the best ones")
    parser.add_argument("--quick", action="store_true", help="16K only, without what compiles long")
    parser.add_argument("--workers", type=int, default=8, help="compilations at a time")
    options = parser.parse_args()
    start = time.monotonic()
    torch._dynamo.config.recompile_limit = 64
    versions = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": __import__("triton").__version__,
    }
    print(versions, flush=True)
    result: dict[str, Any] = {**versions, "tune": []}
    small_gate()
    for size in (128, 32):
        shapes = [16384] if options.quick else [16384, 65536]
        room = shared_memory(torch.device("cuda"))
        tiles = {
            "attend": attend_tile(torch.bfloat16, DIM, 65536, size, room),
            "pooled": pooled_tile(torch.bfloat16, DIM, 65536, size),
        }
        if options.tune:
            problem = Problem(16384, size)
            sweep = (*problem.keys(), torch.full((1, HEADS, 16384), 12.0, device="cuda"))
            for what, found in (
                (
                    "attend",
                    tune(
                        f"attend 16K/{size}",
                        ATTEND_TILES[size],
                        lambda t, p=problem: attend_spans(*p.arguments(), tile=t),
                        options.workers,
                        result["tune"],
                    ),
                ),
                (
                    "pooled",
                    tune(
                        f"pooled 16K/{size}",
                        POOLED_TILES,
                        lambda t, s=sweep: pooled_scores(*s, tile=t),
                        options.workers,
                        result["tune"],
                    ),
                ),
            ):
                tiles[what] = found or tiles[what]
        for tokens in shapes:
            for pattern in ("random", "neighbours") if size == 32 and tokens == shapes[-1] else ("random",):
                problem = Problem(tokens, size, pattern)
                result[problem.name()] = measure(
                    problem, tiles, 5 if tokens > 16384 else 9, options.quick or tokens < shapes[-1]
                )
                options.out.write_text(json.dumps(result, indent=1))
                del problem
                torch.cuda.empty_cache()
        print(f"[{time.monotonic() - start:.0f} s]", flush=True)
    result["wall_s"] = time.monotonic() - start
    options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
