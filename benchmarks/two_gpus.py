"""One pass on one GPU against the same pass with its pages over several: time, speed-up, correctness.

On a machine with two or more GPUs, from the repository's root (nothing needs to be installed but PyTorch
and NumPy)::

    PYTHONPATH=.:reference:backends:integrations:conformance \
        python benchmarks/two_gpus.py --backend sparse_dlm_attn_torch:TorchBackend

Each line gives one policy: microseconds a pass on one GPU and on all, the quotient, and the largest
difference of the outputs. Passes are captured in a CUDA graph (``--eager`` for without) and timed by CUDA
events; the slowest rank counts. On one GPU the backend runs by itself, without the distributed wrapper.
``--device cpu --tokens 4096`` runs the same code over gloo, to see that it works: it measures nothing.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

from sparse_dlm_attn import Context, PassInfo, PrefixAttention, UnknownNameError, get_backend, get_policy
from sparse_dlm_attn_distributed import DistributedAttention, ShardedContext

TOLERANCE = 3.2e-2  # of the largest value: two roundings to bfloat16 and their weights


def arguments() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backend", default="sparse_dlm_attn_torch:TorchBackend", help="name or module:attr")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[65536, 131072, 262144])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, nargs=2, default=(32, 8), metavar=("Q", "KV"))
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--policies", nargs="+", default=["dense", "losa:budget=256"])
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
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


class Problem:
    """The same block on every rank, and the pages that this rank holds, in turn."""

    def __init__(self, given: argparse.Namespace, tokens: int, rank: int, device: torch.device) -> None:
        kind = torch.bfloat16 if device.type == "cuda" else torch.float32
        draw = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=draw, device=device, dtype=kind)

        (q_heads, kv_heads), rows, dim = given.heads, given.block, given.head_dim
        self.q = [normal(given.batch, q_heads, rows, dim) for _ in range(2)]
        self.k, self.v = (normal(given.batch, kv_heads, rows, dim) for _ in range(2))
        pages = tokens // given.page_size
        pools = [normal(given.batch * pages, kv_heads, given.page_size, dim) for _ in range(2)]
        table = torch.arange(given.batch * pages, device=device, dtype=torch.int32).view(given.batch, pages)
        self.whole = Context(*pools, table, torch.full_like(table, given.page_size))
        held = (torch.arange(pages, device=device) % given.ranks == rank).expand(given.batch, pages)
        self.shard = ShardedContext.of(self.whole, held)

    def passes(self, attention: Any, context: Context) -> tuple[Any, Any]:
        """Return a dense first pass, and a function that runs the pass to be timed."""
        _, memory = attention(self.q[0], self.k, self.v, context, None, PassInfo(0))
        return memory, lambda: attention(self.q[1], self.k, self.v, context, memory, PassInfo(1))[0]


def microseconds(run: Any, given: argparse.Namespace, device: torch.device, *, together: bool) -> float:
    """Return the median time of a call, after a warm-up; ``together`` starts each batch on all ranks."""
    if device.type == "cpu":
        run()
        begun = time.perf_counter()
        for _ in range(3):
            run()
        return (time.perf_counter() - begun) / 3 * 1e6
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    repeat = run
    if not given.eager:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
        repeat = graph.replay
    samples = []
    for _ in range(10):
        if together:
            dist.barrier()
        for _ in range(5):
            repeat()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(max(given.repeats // 10, 1)):
            repeat()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) / max(given.repeats // 10, 1) * 1e3)
    return statistics.median(samples)


def slowest(value: float, device: torch.device) -> float:
    """Return the largest value of all ranks."""
    largest = torch.tensor([value], device=device, dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


def measure(rank: int, given: argparse.Namespace, port: int) -> None:
    """Run on one rank: every context length and policy, compared first and then timed."""
    device = torch.device(given.device, rank) if given.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # plain NVLink: multicast needs rights that few hosts give
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=given.ranks)
    mesh = init_device_mesh(given.device, (given.ranks,), mesh_dim_names=("context",))
    backend = backend_of(given.backend, given.device)
    if rank == 0:
        card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        print(f"{card} x {given.ranks}, torch {torch.__version__}, {backend!r}, "
              f"{'eager' if given.eager else 'CUDA graph'}, heads {given.heads[0]}/{given.heads[1]}, "
              f"head dim {given.head_dim}, T={given.block}, B={given.batch}, page {given.page_size}")
        print(f"{'policy':<20}{'tokens':>9}{'one us':>10}{'all us':>10}{'speed-up':>10}{'error':>10}  sent")
    failed = False
    for tokens in given.tokens:
        problem = Problem(given, tokens, rank, device)
        for policy in given.policies:
            chosen = policy_of(policy)
            one = PrefixAttention(chosen, backend)
            budget = int(policy.partition("budget=")[2].partition(",")[0] or given.page_size)
            # Known in advance, so that the host need not ask the device for it.
            candidates = max(budget // given.page_size, 1)
            many = DistributedAttention(chosen, backend, mesh, candidates=candidates, timeout=120.0)
            _, run_one = problem.passes(one, problem.whole)
            memory, run_many = problem.passes(many, problem.shard)
            want, got = run_one(), run_many()
            many.synchronize()
            error = float((want - got).abs().max() / want.abs().max())
            failed |= not error <= TOLERANCE
            sent = many.backend.ranks.pages.sent
            sent.clear()
            run_many()
            told = {key: value for key, value in sent.items() if "check" not in key}
            alone = slowest(microseconds(run_one, given, device, together=False), device)
            all_of = slowest(microseconds(run_many, given, device, together=True), device)
            if rank == 0:
                verdict = "" if error <= TOLERANCE else "  WRONG"
                print(f"{policy:<20}{tokens:>9}{alone:>10.1f}{all_of:>10.1f}{alone / all_of:>10.2f}"
                      f"{error:>10.1e}  {told}{verdict}", flush=True)
            del memory
        del problem
    sys.stdout.flush()
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    os._exit(1 if failed else 0)  # graphs that hold NCCL kernels can make the ordinary end hang


def main() -> None:
    """Start one process a rank."""
    given = arguments()
    if given.device == "cuda" and torch.cuda.device_count() < given.ranks:
        sys.exit(f"needs {given.ranks} GPUs, there are {torch.cuda.device_count()}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(measure, args=(given, port), nprocs=given.ranks)


if __name__ == "__main__":
    main()
