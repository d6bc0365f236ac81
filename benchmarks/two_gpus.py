"""A pass on one GPU against the same pass with its pages over several, and where the time goes.

On a machine with two or more GPUs, from the repository's root (nothing needs to be installed but PyTorch,
Triton and NumPy), either of::

    PYTHONPATH=.:reference:backends:integrations:conformance python benchmarks/two_gpus.py
    PYTHONPATH=.:reference:backends:integrations:conformance \
        torchrun --nproc-per-node 2 benchmarks/two_gpus.py

Outputs are compared first; what is wrong is not timed. Times are microseconds a pass: CUDA graphs that hold
the pass once for each of several layers, so that the L2 cache is cold, and launches without a graph, each
the slowest rank's. Rows:

``one``       the pass on one GPU, without anything of the distributed package
``all``       on all ranks, for each way of exchange
``local``     the part that a rank computes on its own pages
``exchange``  the exchange and the merge alone, from states that are there already

``--device cpu --tokens 4096`` runs the same code over gloo, to see that it works: it measures nothing.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import socket
import statistics
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Before PyTorch reads them: NVLink multicast needs rights that few hosts give.
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

from sparse_dlm_attn import (
    Context,
    PassInfo,
    PrefixAttention,
    SparseAttentionError,
    UnknownNameError,
    get_backend,
    get_policy,
)
from sparse_dlm_attn.values import softmax_scale
from sparse_dlm_attn_distributed import DistributedAttention, RankError, ShardedContext
from sparse_dlm_attn_distributed.launches import Block

TOLERANCE = 3.2e-2  # of the largest value: two roundings to bfloat16 and their weights
COLD_BYTES = 420 << 20  # that layers rotate over: several times the L2 cache of any GPU of today
REPEATS = 12


def arguments() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backend", default="sparse_dlm_attn_triton:TritonBackend", help="name, module:attr")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[131072])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, nargs=2, default=(32, 8), metavar=("Q", "KV"))
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--policies", nargs="+", default=["dense", "losa"], help="losa without a budget: "
                        "the one that reads the share --density")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--ways", nargs="+", default=["symmetric", "collective"])
    parser.add_argument("--seconds", type=float, default=110.0, help="all that it may take; then it ends")
    return parser.parse_args()


def policy_of(text: str) -> Any:
    """Return a policy by name, also where the package is on the path only and so registers none."""
    name, _, parameters = text.partition(":")
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    known = project["project"]["entry-points"]["sparse_dlm_attn.policies"]
    return get_policy(f"{known[name]}:{parameters}" if parameters else known.get(name, text))


def backend_of(text: str, device: str) -> Any:
    """Return a backend, told the device if it wants to know."""
    try:
        return get_backend(text, device=device)
    except UnknownNameError as error:
        if error.name != "device":
            raise
        return get_backend(text)


class Layer:
    """The same block on every rank, the whole context, and the pages of it that this rank holds."""

    def __init__(
        self, given: argparse.Namespace, tokens: int, rank: int, device: torch.device, seed: int, backend: Any
    ) -> None:
        kind = torch.bfloat16 if device.type == "cuda" else torch.float32
        draw = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=draw, device=device, dtype=kind)

        (q_heads, kv_heads), rows, dim = given.heads, given.block, given.head_dim
        first = normal(given.batch, q_heads, rows, dim)
        moved = torch.linspace(0.05, 0.5, rows, device=device, dtype=kind)[:, None]
        self.q = [first, first + moved * normal(*first.shape)]
        self.k, self.v = (normal(given.batch, kv_heads, rows, dim) for _ in range(2))
        pages = tokens // given.page_size
        pools = [normal(given.batch * pages, kv_heads, given.page_size, dim) for _ in range(2)]
        table = torch.arange(given.batch * pages, device=device, dtype=torch.int32).view(given.batch, pages)
        whole = Context(*pools, table, torch.full_like(table, given.page_size))
        self.whole = whole.with_bounds(backend.page_bounds(whole))
        held = (torch.arange(pages, device=device) % given.ranks == rank).expand(given.batch, pages)
        shard = ShardedContext.of(whole, held.contiguous())
        self.shard = ShardedContext(
            shard.k_pages, shard.v_pages, shard.page_table, shard.page_lengths, held=shard.held,
            held_lengths=shard.page_lengths * shard.held,
        )
        self.local = self.shard.local
        self.local = self.local.with_bounds(backend.page_bounds(self.local))

    def passes(self, attention: Any, context: Context) -> Callable[[], Any]:
        """Return a function that runs the pass to be timed, after a first one."""
        _, memory = attention(self.q[0], self.k, self.v, context, None, PassInfo(0))
        return lambda: attention(self.q[1], self.k, self.v, context, memory, PassInfo(1))


class Clock:
    """Times works of all ranks together."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def chained(self, works: Sequence[Callable[[], object]]) -> float:
        """Return microseconds of a work in a CUDA graph of all works; the slowest rank's median."""
        if self.device.type == "cpu":
            return self.plain(works)
        for work in works:
            work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # NCCL looks after its collectives from another thread.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for work in works:
                work()
        return self._slowest(graph.replay, len(works))

    def plain(self, works: Sequence[Callable[[], object]]) -> float:
        """Return the same without a graph."""

        def run() -> None:
            for work in works:
                work()

        return self._slowest(run, len(works))

    def _slowest(self, run: Callable[[], object], count: int) -> float:
        samples = []
        for _ in range(REPEATS if self.device.type == "cuda" else 1):
            dist.barrier()
            if self.device.type == "cpu":
                begun = time.perf_counter()
                run()
                samples.append((time.perf_counter() - begun) * 1e6)
                continue
            run()  # brings the ranks into step
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            run()
            end.record()
            torch.cuda.synchronize()
            samples.append(start.elapsed_time(end) / 2 * 1e3)
        largest = torch.tensor([statistics.median(samples) / count], device=self.device, dtype=torch.float64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return float(largest)


def with_budget(policy: str, density: float, layer: Layer, backend: Any, given: argparse.Namespace) -> str:
    """Return the policy with the smallest budget that reads ``density`` of the context."""
    if not policy.startswith(("losa", "quest")) or "budget" in policy:
        return policy
    separator, pages = ("," if ":" in policy else ":"), 1
    while True:
        named = f"{policy}{separator}budget={pages * given.page_size}"
        memory = layer.passes(PrefixAttention(policy_of(named), backend), layer.whole)()[1]
        if float(memory.traffic.density.mean()) >= density or pages >= layer.whole.pages:
            return named
        pages += 1


def merging(many: DistributedAttention, layer: Layer, backend: Any) -> tuple[Any, Any]:
    """Return two works: a rank's own part of a dense pass, and the exchange and merge of it."""
    q, rows = layer.q[1], torch.ones(layer.q[1].shape[::2], dtype=torch.bool, device=layer.q[1].device)
    selection, scale = _everything(layer), softmax_scale(q.shape[3], None)
    part = backend.attend_pages(q, layer.local, selection, rows)
    block = Block(q, layer.k, layer.v, scale)
    pages = many.backend.ranks.pages
    return (
        lambda: backend.attend_pages(q, layer.local, selection, rows),
        lambda: pages.merge(backend, part, "attend", block=block),
    )


def _everything(layer: Layer) -> Any:
    from sparse_dlm_attn import Selection

    return Selection.all_pages(layer.local, layer.q[1].shape[2])


def table(given: argparse.Namespace, rank: int, device: torch.device, mesh: Any, say: Any) -> bool:
    """Measure everything; return whether all outputs were right."""
    backend, clock, right = backend_of(given.backend, given.device), Clock(device), True
    for tokens in given.tokens:
        token = 4 * given.heads[1] * given.head_dim
        for name in given.policies:
            share = given.density if name.startswith(("losa", "quest")) else 1.0
            read = token * tokens * given.batch * share / given.ranks
            count = 1 if device.type == "cpu" else max(2, min(-(-COLD_BYTES // int(read)), 10))
            layers = [Layer(given, tokens, rank, device, seed, backend) for seed in range(count)]
            named = with_budget(name, given.density, layers[0], backend, given)
            chosen = policy_of(named)
            one = PrefixAttention(chosen, backend)
            works = [layer.passes(one, layer.whole) for layer in layers]
            want = [work()[0] for work in works]
            say(f"{named}, {tokens} tokens, {count} layers of {2 * layers[0].whole.k_pages.nbytes >> 20} MiB")
            base = clock.chained(works)
            line = f"  {'one':<22}{base:>9.1f} graph{clock.plain(works):>9.1f} plain"
            say(line)
            local = [layer.passes(one, layer.local) for layer in layers]
            say(f"  {'local, with block':<22}{clock.chained(local):>9.1f} graph")
            budget = int(named.partition("budget=")[2].partition(",")[0] or given.page_size)
            for way in given.ways if device.type == "cuda" else ["collective"]:
                try:
                    many = DistributedAttention(
                        chosen, backend, mesh, candidates=max(budget // given.page_size, 1), exchange=way,
                        timeout=20.0,
                    )
                except SparseAttentionError as error:
                    say(f"  all, {way}: {type(error).__name__}: {str(error)[:400]}")
                    continue
                try:
                    right &= timed(way, many, layers, want, base, clock, backend, say, named == "dense")
                except RankError as error:  # every rank gets it, so all go on to the next way
                    right = False
                    say(f"  all, {way}: {error}")
            del layers, works, local
    return right


def timed(
    way: str, many: DistributedAttention, layers: list[Layer], want: list[Any], base: float, clock: Clock,
    backend: Any, say: Any, dense: bool,
) -> bool:
    """Compare the passes on all ranks with those on one, then time them; return whether they are right."""
    shards = [layer.shard.with_bounds(many.backend.page_bounds(layer.shard)) for layer in layers]
    works = [layer.passes(many, shard) for layer, shard in zip(layers, shards, strict=True)]
    got = [work()[0] for work in works]
    many.synchronize()
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True))
    worst = torch.tensor([error if error == error else float("inf")], device=want[0].device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    if not float(worst) <= TOLERANCE:
        say(f"  all, {way}: WRONG, error {float(worst):.1e}; not timed")
        return False
    sent = many.backend.ranks.pages.sent
    sent.clear()
    works[0]()
    told = {key: value for key, value in sent.items() if "check" not in key}
    many.synchronize()
    graph, plain = clock.chained(works), clock.plain(works)
    say(f"  {'all, ' + way:<22}{graph:>9.1f} graph{plain:>9.1f} plain  {base / graph:.2f}x  "
        f"error {float(worst):.1e}  sent {told}")
    if dense:
        parts = [merging(many, layer, backend) for layer in layers]
        alone, exchange = (clock.chained([part[side] for part in parts]) for side in (0, 1))
        say(f"  {'  local alone':<22}{alone:>9.1f} graph")
        say(f"  {'  exchange, ' + way:<22}{exchange:>9.1f} graph")
    return True


def measure(rank: int, given: argparse.Namespace, port: int | None) -> None:
    """Run on one rank."""
    faulthandler.dump_traceback_later(given.seconds, exit=True)
    device = torch.device(given.device, rank) if given.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if port is not None:
        os.environ.update(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(given.ranks)
        )
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    mesh = init_device_mesh(given.device, (given.ranks,), mesh_dim_names=("context",))

    def say(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    say(f"{card} x {given.ranks}, torch {torch.__version__}, heads {given.heads[0]}/{given.heads[1]}, "
        f"head dim {given.head_dim}, T={given.block}, B={given.batch}, page {given.page_size}; us a pass, "
        "slowest rank")
    right = table(given, rank, device, mesh, say)
    sys.stdout.flush()
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    os._exit(0 if right else 1)  # graphs that hold NCCL kernels can make the ordinary end hang


def main() -> None:
    """Start one process a rank, or be one of torchrun's."""
    given = arguments()
    if "RANK" in os.environ:
        given.ranks = int(os.environ["WORLD_SIZE"])
        measure(int(os.environ["RANK"]), given, None)
        return
    if given.device == "cuda" and torch.cuda.device_count() < given.ranks:
        sys.exit(f"needs {given.ranks} GPUs, there are {torch.cuda.device_count()}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(measure, args=(given, port), nprocs=given.ranks)


if __name__ == "__main__":
    main()
