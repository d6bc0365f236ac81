"""One rank of a test: a process of its own, which runs a scenario and writes down what it saw.

Run as ``python worker.py SCENARIOS DEVICE RANK WORLD FOLDER SECONDS``; the tests start one for each rank.
DEVICE is cpu, cuda/collective or cuda/symmetric. A worker that takes longer than SECONDS prints where each of
its threads stands, and ends.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "policies"))

from shards import BLOCKS, block_of, infos, policies, policy_of, rule_of

from sparse_dlm_attn import PassInfo, Selection, SparseAttentionError
from sparse_dlm_attn_distributed import DistributedAttention, DistributedBackend, ShardedContext
from sparse_dlm_attn_torch import TorchBackend

HANGS = 30.0  # seconds after which an attempt that should have failed is taken for hanging
LIMITS = {"cpu": 2.0, "cuda": 4.0}  # seconds to wait for a rank that does not come


class Rank:
    """What every scenario needs: this rank, its device, meshes and drivers."""

    def __init__(self, device: str, rank: int, world: int) -> None:
        self.device, _, self.exchange = device.partition("/")
        self.rank, self.world, self.limit = rank, world, LIMITS[self.device]

    def mesh(self, *shape: int) -> Any:
        names = ("context", "heads")[: len(shape)]
        return init_device_mesh(self.device, shape or (self.world,), mesh_dim_names=names or ("context",))

    def backend(self) -> TorchBackend:
        return TorchBackend(self.device)

    def attention(self, policy: Any, mesh: Any, **options: Any) -> DistributedAttention:
        options = {"timeout": 60.0, "exchange": self.exchange or "auto", **options}
        return DistributedAttention(
            policy_of(policy), self.backend(), mesh, check_contents=True, **options
        )

    def distributed(self, mesh: Any, **options: Any) -> DistributedBackend:
        options = {"exchange": self.exchange or "auto", **options}
        return DistributedBackend(self.backend(), mesh, **options)

    def block(self, name: str) -> Any:
        return block_of(name).converted(lambda array: torch.from_numpy(array.copy()).to(self.device))

    def held(self, rule: str, context: Any, *, rank: int | None = None, ranks: int | None = None) -> Any:
        owner = rule_of(rule)(context.batch, context.pages, ranks or self.world)
        return torch.from_numpy(owner == (self.rank if rank is None else rank)).to(self.device)


def denoised(attention: DistributedAttention, block: Any, context: Any) -> list[dict[str, Any]]:
    """Run the passes of a block and return what each of them gave, on the host."""
    memory, seen = None, []
    for index, info in enumerate(infos(block)):
        out, memory = attention(block.q[index], block.k, block.v, context, memory, info)
        seen.append({
            "out": out.float().cpu(), "lse": memory.state.lse.cpu(), "active": memory.active.cpu(),
            "mask": memory.selection.for_rows(out.shape[1], out.shape[2]).cpu(),
        })
    return seen


def every_policy(on: Rank) -> Any:
    mesh, results = on.mesh(), {}
    for number, policy in enumerate(policies(on.world)):
        for name in BLOCKS:
            block = on.block(name)
            rule = ("random", "uneven", "empty")[(number + BLOCKS.index(name)) % 3]
            context = ShardedContext.of(block.context, on.held(rule, block.context))
            results[policy, name] = denoised(on.attention(policy, mesh), block, context)
    return results


def every_ownership(on: Rank) -> Any:
    mesh, results, block = on.mesh(), {}, on.block("pages of 4")
    for policy in ("dense", "losa:active=2,budget=8", "mage:budget=8,dense_layers=0"):
        for rule in ("random", "uneven", "empty", "one rank", "round robin"):
            context = ShardedContext.of(block.context, on.held(rule, block.context))
            results[policy, rule] = denoised(on.attention(policy, mesh), block, context)
    return results


def heads_too(on: Rank) -> Any:
    """Pages over two ranks, KV heads over the two others; nothing where there are fewer ranks."""
    if on.world != 4:
        return {}
    mesh, results = on.mesh(2, 2), {}
    row, column = mesh.get_coordinate()
    for policy in policies():
        block = on.block("pages of 4")
        try:
            attention = on.attention(policy, mesh)
        except SparseAttentionError as error:
            results[policy] = str(error)
            continue
        own = slice(column, column + 1)
        whole, queries = block.context, slice(2 * column, 2 * column + 2)
        pools = {name: getattr(whole, name)[:, own] for name in ("k_pages", "v_pages")}
        context = ShardedContext.of(
            replace(whole, **pools), on.held("random", whole, rank=row, ranks=2)
        )
        mine = replace(
            block, q=type(block.q)([q[:, queries] for q in block.q]), k=block.k[:, own], v=block.v[:, own]
        )
        results[policy] = (column, denoised(attention, mine, context))
    return results


def bytes_sent(on: Rank) -> Any:
    """Two contexts, one four times as long, under policies of every kind."""
    mesh, results = on.mesh(), {}
    for policy in ("dense", "losa:active=2,budget=8", "quest:budget=8", "mage:budget=8,dense_layers=0"):
        for name in ("64 pages", "256 pages"):
            block = on.block(name)
            attention = on.attention(policy, mesh, check=False)
            context = ShardedContext.of(block.context, on.held("round robin", block.context))
            before = dict(attention.backend.ranks.pages.sent)
            denoised(attention, block, context)
            after = dict(attention.backend.ranks.pages.sent)
            results[policy, name] = {key: after[key] - before.get(key, 0) for key in after}
    return results


def ranking(on: Rank) -> Any:
    """Top pages of tables full of ties, infinities and NaN, from scores of which each rank knows some."""
    backend, results = on.distributed(on.mesh()), []
    for seed in range(40):
        rng = torch.Generator().manual_seed(seed)
        shape = (2, 3, 4, (5, 33, 130)[seed % 3])
        wild = [0.0, -0.0, 1.0, -1.0, 2.0, torch.inf, -torch.inf, torch.nan]
        values = torch.tensor(wild[: 5 + 3 * (seed % 2)])
        scores = values[torch.randint(len(values), shape, generator=rng)]
        eligible = torch.rand(shape, generator=rng) < 0.7
        most = 4 if seed % 4 else shape[-1] + 2
        count = torch.randint(0, most, shape[:3], generator=rng, dtype=torch.int32)
        owner = torch.randint(on.world, shape[-1:], generator=rng)
        whole, eligible, count = (part.to(on.device) for part in (scores, eligible, count))
        known = torch.where((owner == on.rank).to(on.device), whole, -torch.inf)
        kind = (torch.float32, torch.float64, torch.float16)[seed % 3]
        got = backend.top_pages(known.to(kind), count, eligible=eligible)
        want = on.backend().top_pages(whole.to(kind), count, eligible=eligible)
        results.append(bool((got == want).all()))
    return results


def failures(on: Rank) -> Any:
    """One rank raises, one sleeps, one runs another policy, meshes differ; each in a fresh group."""
    results = {}

    if on.device == "cuda":  # compiles what ranks would otherwise wait for each other to compile
        warm, block = on.attention("quest:budget=8", on.mesh(), check=True), on.block("pages of 4")
        context = ShardedContext.of(block.context, on.held("random", block.context))
        warm(block.q[0], block.k, block.v, context)
        warm.synchronize()

    def attempt(name: str, act: Any) -> None:
        faulthandler.dump_traceback_later(HANGS, exit=True)
        begun = time.monotonic()
        try:
            act()
            results[name] = ("no error", "", time.monotonic() - begun)
        except Exception as error:
            results[name] = (type(error).__name__, str(error), time.monotonic() - begun)
        print(name, *results[name], sep=" | ", flush=True)

    def passes(act: Any) -> None:
        # On a GPU shapes are compared only if asked for.
        attention = on.attention("quest:budget=8", on.mesh(), timeout=on.limit, check=True)
        block = on.block("pages of 4")
        context = ShardedContext.of(block.context, on.held("random", block.context))

        def whole_pass() -> None:
            attention(block.q[0], block.k, block.v, context)
            attention.synchronize()  # where a GPU's waits become errors

        whole_pass()
        attempt(act.__name__, lambda: (act(attention, block, context), attention.synchronize()))
        attempt(f"{act.__name__}, then a pass", whole_pass)

    def one_raises(attention: Any, block: Any, context: Any) -> None:
        k = block.k[:, :, :2] if on.rank == 1 else block.k  # keys of two tokens: refused
        attention(block.q[0], k, block.v, context)

    def one_raises_outside(attention: Any, block: Any, context: Any) -> None:
        with attention.guard():
            if on.rank == 1:
                raise MemoryError("no room for the activations")
            attention(block.q[0], block.k, block.v, context)

    def one_sleeps(attention: Any, block: Any, context: Any) -> None:
        if on.rank == 1:
            time.sleep(on.limit + 1.0)
        attention(block.q[0], block.k, block.v, context)

    def one_has_more_rows(attention: Any, block: Any, context: Any) -> None:
        keep = slice(0, 5 if on.rank == 1 else 6)
        attention(block.q[0][:, :, keep], block.k[:, :, keep], block.v[:, :, keep], context)

    def lengths_differ(attention: Any, block: Any, context: Any) -> None:
        if on.rank == 1:
            context = replace(context, page_lengths=context.page_lengths.clamp(max=3))
        attention(block.q[0], block.k, block.v, context)

    def a_page_twice(attention: Any, block: Any, context: Any) -> None:
        whole = ShardedContext.of(block.context, torch.ones_like(context.held))
        attention(block.q[0], block.k, block.v, whole)

    def one_sleeps_unchecked(attention: Any, block: Any, context: Any) -> None:
        """Without checks nothing of a pass is read on the host: only `synchronize` can notice."""
        if on.rank == 1:
            time.sleep(on.limit + 1.0)
        q, context = block.q[0], replace(context, bounds=attention.backend.page_bounds(context))
        rows = torch.ones((q.shape[0], q.shape[2]), dtype=torch.bool, device=q.device)
        everything = Selection.all_pages(context, q.shape[2])
        attention.backend.ranks.pages.check = False
        attention.backend.attend(q, block.k, block.v, context, everything, rows, None)

    def page_sizes_differ(attention: Any, block: Any, context: Any) -> None:
        half = replace(context, page_lengths=context.page_lengths.clamp(max=2))
        if on.rank == 1:  # the same lengths, in pages of half the size
            pools = {name: getattr(half, name)[:, :, :2] for name in ("k_pages", "v_pages")}
            half = replace(half, **pools)
        attention(block.q[0], block.k, block.v, half)

    def one_saves(attention: Any, block: Any, context: Any) -> None:
        """The same shapes in all exchanges, of different passes."""
        attention(block.q[0], block.k, block.v, context, None, PassInfo(0, is_save=on.rank == 1))

    alone = (one_raises, one_raises_outside, one_sleeps, one_sleeps_unchecked, one_has_more_rows, one_saves)
    for act in (*alone, lengths_differ, page_sizes_differ, a_page_twice):
        passes(act)
    quest = f"quest:budget={8 if on.rank else 16}"
    attempt("policies differ", lambda: on.attention(quest, on.mesh(), timeout=on.limit))
    attempt("candidates differ", lambda: on.attention("dense", on.mesh(), candidates=1 + on.rank))
    attempt("ways differ", lambda: on.attention(
        "dense", on.mesh(), exchange="auto" if on.rank else "collective", timeout=on.limit
    ))
    attempt("no such way", lambda: on.attention("dense", on.mesh(), exchange="pigeons"))
    if on.device == "cpu":
        attempt("not on this device", lambda: on.attention("dense", on.mesh(), exchange="symmetric"))
        taken = on.distributed(on.mesh(), timeout=on.limit)
        results["taken"] = taken.exchange, taken.why_collective, repr(taken)
    numpy_backend = "sparse_dlm_attn_reference:ReferenceBackend"
    attempt("arrays of another library", lambda: DistributedBackend(numpy_backend, on.mesh()))
    ways = ("heads", "context") if on.rank else ("context", "heads")
    both = init_device_mesh(on.device, (on.world, 1), mesh_dim_names=("context", "heads"))
    attempt("meshes differ", lambda: on.distributed(
        both, context_dim=ways[0], heads_dim=ways[1], timeout=on.limit
    ))
    mesh = on.mesh()
    attempt("one rank alone", lambda: (
        time.sleep(on.limit + 1.0) if on.rank else on.distributed(mesh, timeout=on.limit)
    ))
    attempt("together again", lambda: on.distributed(mesh, timeout=30.0))
    faulthandler.dump_traceback_later(HANGS, exit=True)
    return results


def death(on: Rank) -> Any:
    """The last rank's process ends in the middle of a pass."""
    attention = on.attention("dense", on.mesh(), timeout=5.0)
    block = on.block("pages of 4")
    context = ShardedContext.of(block.context, on.held("random", block.context))
    attention(block.q[0], block.k, block.v, context)
    if on.rank == on.world - 1:
        os._exit(0)
    try:
        attention(block.q[0], block.k, block.v, context)
        attention.synchronize()
    except SparseAttentionError as error:
        return type(error).__name__, str(error)
    return "no error", ""


def graphs(on: Rank) -> Any:
    """Passes captured in a CUDA graph, replayed with other queries: each against the pass without a graph."""
    from sparse_dlm_attn_triton import TritonBackend

    mesh, results, block = on.mesh(), {}, on.block("64 pages")
    for policy in ("dense", "losa:active=2,budget=8", "quest:budget=8"):
        attention = DistributedAttention(
            policy_of(policy), TritonBackend(), mesh, exchange=on.exchange, candidates=2, timeout=20.0
        )
        context = ShardedContext.of(block.context, on.held("round robin", block.context))
        context = context.with_bounds(attention.backend.page_bounds(context))
        first = infos(block)[:2]
        _, memory = attention(block.q[0], block.k, block.v, context, None, first[0])
        q = block.q[1].clone()

        def run(attention: Any = attention, context: Any = context, memory: Any = memory, q: Any = q) -> Any:
            return attention(q, block.k, block.v, context, memory, infos(block)[1])[0]

        run()
        attention.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            captured = run()
        same = []
        for turn in range(5):  # an odd number of exchanges a replay: messages must alternate all the same
            q.copy_(block.q[1] * (turn % 3) - block.q[0])
            graph.replay()
            attention.synchronize()
            got = captured.clone()
            want = run()
            attention.synchronize()
            same.append(torch.equal(got, want))
        results[policy] = same, attention.backend.exchange
    return results


def main() -> None:
    names, device, rank, world, folder = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:5]), sys.argv[5]
    faulthandler.dump_traceback_later(float(sys.argv[6]), exit=True)
    torch.set_num_threads(1)
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(rank)
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=f"file://{folder}/store", rank=rank,
        world_size=world,
    )
    on = Rank(device, rank, world)
    for name in names.split(","):
        begun = time.monotonic()
        torch.save(globals()[name](on), f"{folder}/{name}-{rank}.pt")
        print(f"{name}: {time.monotonic() - begun:.1f} s", flush=True)
    sys.stdout.flush()
    os._exit(0)  # broken groups of the scenarios must not hold up the end


if __name__ == "__main__":
    main()
