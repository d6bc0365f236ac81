"""A pass on one GPU against the same pass with its pages over several, and from which length on that pays.

On a machine with two or more GPUs, from the repository's root (nothing needs to be installed but PyTorch,
Triton and NumPy)::

    PYTHONPATH=.:reference:backends:integrations:conformance \
        torchrun --nproc-per-node 2 benchmarks/two_gpus.py

Outputs are compared first; what is wrong is not timed. Times are microseconds a pass in CUDA graphs that hold
the pass once for each of several layers, so that the L2 cache is cold: medians, of the slowest rank. ``own
part`` is the pass over the pages that a rank holds, with the block but without any exchange. Page bounds are
kept by the owner of the cache.

``--device cpu --tokens 4096`` runs the same code over gloo, to see that it works: it measures nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Before PyTorch reads it: NVLink multicast needs rights that few hosts give.
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from sparse_dlm_attn import Context, PassInfo, PrefixAttention, get_backend, get_policy
from sparse_dlm_attn_distributed import DistributedAttention, ShardedContext

TOLERANCE = 3.2e-2  # of the largest value: two roundings to bfloat16 and their weights
COLD_BYTES = 420 << 20  # that layers rotate over: several times the L2 cache of any GPU of today
REPEATS = 12
LENGTHS = [1 << power for power in range(14, 21)]  # 16K to 1M tokens


def arguments() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backend", default="sparse_dlm_attn_triton:TritonBackend", help="module:attr")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--policies", nargs="+", default=["dense", "losa:budget=960"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, nargs=2, default=(32, 8), metavar=("Q", "KV"))
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--block", type=int, default=16)
    return parser.parse_args()


def policy_of(text: str) -> Any:
    """Return a policy by name, also where the package is on the path only and so registers none."""
    name, _, parameters = text.partition(":")
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    known = project["project"]["entry-points"]["sparse_dlm_attn.policies"]
    return get_policy(f"{known[name]}:{parameters}" if parameters else known.get(name, text))


class Layer:
    """The same block on every rank, the whole context, and the pages of it that this rank holds."""

    def __init__(self, given: argparse.Namespace, tokens: int, seed: int, many: DistributedAttention) -> None:
        device = torch.device(given.device)
        kind = torch.bfloat16 if given.device == "cuda" else torch.float32
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
        held = torch.arange(pages, device=device) % dist.get_world_size() == dist.get_rank()
        shard = ShardedContext.of(whole, held.expand(given.batch, pages).contiguous())
        one, local = many.backend.backend, shard.local
        self.whole = whole.with_bounds(one.page_bounds(whole))
        self.local = local.with_bounds(one.page_bounds(local))
        self.shard = shard.with_bounds(many.backend.page_bounds(shard))

    def passes(self, attention: PrefixAttention, context: Context) -> Callable[[], Any]:
        """Return a function that runs the pass to be timed, after a first one."""
        _, memory = attention(self.q[0], self.k, self.v, context, None, PassInfo(0))
        return lambda: attention(self.q[1], self.k, self.v, context, memory, PassInfo(1))


def slowest(value: float, device: str) -> float:
    """Return the largest value of all ranks."""
    largest = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


def microseconds(works: Sequence[Callable[[], object]], device: str) -> float:
    """Return microseconds of a work in a CUDA graph of all works; 0 without a GPU, which measures nothing."""
    for work in works:
        work()
    if device == "cpu":
        return 0.0
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # NCCL looks after its collectives from another thread.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for work in works:
            work()
    samples = []
    for _ in range(REPEATS):
        dist.barrier()
        graph.replay()  # brings the ranks into step
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) / 2 * 1e3)
    return slowest(statistics.median(samples) / len(works), device)


def compare(given: argparse.Namespace, tokens: int, policy: str, mesh: Any, say: Any) -> tuple[bool, float]:
    """Measure one length; return whether the outputs were right, and how much faster many GPUs are."""
    chosen = policy_of(policy)
    many = DistributedAttention(chosen, get_backend(given.backend), mesh)
    one = PrefixAttention(chosen, many.backend.backend)
    first = Layer(given, tokens, 0, many)
    memory = first.passes(one, first.whole)()[1]
    density = float(memory.traffic.density.mean())
    read = int(float(memory.traffic.bytes_read.sum())) // dist.get_world_size() + 1
    count = 1 if given.device == "cpu" else max(2, min(COLD_BYTES // read, 10))
    layers = [first, *(Layer(given, tokens, seed, many) for seed in range(1, count))]
    alone = [layer.passes(one, layer.whole) for layer in layers]
    together = [layer.passes(many, layer.shard) for layer in layers]
    pairs = [(a()[0], b()[0]) for a, b in zip(together, alone, strict=True)]
    error = max(float((got - want).abs().max() / want.abs().max()) for got, want in pairs)
    error = slowest(error if error == error else float("inf"), given.device)
    if not error <= TOLERANCE:
        say(f"{policy:<20}{tokens:>10}  WRONG, error {error:.1e}; not timed")
        return False, 0.0
    many.backend.sent.clear()
    together[0]()
    sent = sum(many.backend.sent.values())
    own = [layer.passes(one, layer.local) for layer in layers]
    times = [microseconds(works, given.device) for works in (alone, together, own)]
    ratio = times[0] / times[1] if times[1] else 0.0
    say(
        f"{policy:<20}{tokens:>10}{density:>9.3f}{times[0]:>10.1f}{times[1]:>10.1f}{ratio:>7.2f}x{times[2]:>10.1f}"
        f"{sent / 1024:>10.0f}   {error:.1e}"
    )
    return True, ratio


def main() -> None:
    given, rank = arguments(), int(os.environ["RANK"])
    on_gpu = given.device == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    mesh = init_device_mesh(given.device, (dist.get_world_size(),), mesh_dim_names=("context",))

    def say(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    card = torch.cuda.get_device_name() if on_gpu else "CPU"
    say(
        f"{card} x {dist.get_world_size()}, torch {torch.__version__}, heads {given.heads[0]}/{given.heads[1]}, "
        f"head dim {given.head_dim}, T={given.block}, B={given.batch}, page {given.page_size}"
    )
    say(
        f"{'policy':<20}{'tokens':>10}{'density':>9}{'one':>10}{'all':>10}{'':>8}{'own part':>10}{'KiB sent':>10}"
        "   error"
    )
    right = True
    for policy in given.policies:
        faster = []
        for tokens in given.tokens:
            good, ratio = compare(given, tokens, policy, mesh, say)
            right &= good
            faster += [tokens] if ratio > 1.0 else []
        if on_gpu:
            say(
                f"{policy}: {dist.get_world_size()} GPUs are faster than one at "
                f"{', '.join(map(str, faster)) or 'none'} of these lengths"
            )
    sys.stdout.flush()
    dist.barrier()
    os._exit(0 if right else 1)  # graphs that hold NCCL kernels can make the ordinary end hang


if __name__ == "__main__":
    main()
