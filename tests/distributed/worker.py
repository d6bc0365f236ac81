"""One rank of a test: a process of its own, which runs a scenario and writes down what it saw.

Run as ``python worker.py SCENARIOS DEVICE RANK WORLD FOLDER SECONDS``; the tests start one for each rank.
A worker that takes longer than SECONDS prints where each of its threads stands, and ends.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from shards import BLOCKS, RULES, block_of, infos, policies, policy_of
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sparse_dlm_attn import Context, PassInfo, SparseAttentionError
from sparse_dlm_attn_distributed import DistributedAttention, DistributedBackend, ShardedContext
from sparse_dlm_attn_torch import TorchBackend


class Rank:
    """What every scenario needs: this rank, its device, meshes and drivers."""

    def __init__(self, device: str, rank: int, world: int) -> None:
        self.device, self.rank, self.world = device, rank, world

    def mesh(self, *shape: int) -> Any:
        names = ("context", "heads")[: max(len(shape), 1)]
        return init_device_mesh(self.device, shape or (self.world,), mesh_dim_names=names)

    def attention(self, policy: Any, mesh: Any) -> DistributedAttention:
        return DistributedAttention(policy_of(policy), TorchBackend(self.device), mesh, check_contents=True)

    def block(self, name: str) -> Any:
        return block_of(name).converted(lambda array: torch.from_numpy(array.copy()).to(self.device))

    def shard(self, context: Any, rule: str, rank: int | None = None, ranks: int | None = None) -> Any:
        owner = RULES[rule](context.batch, context.pages, ranks or self.world)
        held = torch.from_numpy(owner == (self.rank if rank is None else rank)).to(self.device)
        return ShardedContext.of(context, held)


def denoised(attention: DistributedAttention, block: Any, context: Any) -> list[dict[str, Any]]:
    """Run the passes of a block and return what each of them gave, on the host."""
    memory, seen = None, []
    for index, info in enumerate(infos(block)):
        out, memory = attention(block.q[index], block.k, block.v, context, memory, info)
        seen.append(
            {
                "out": out.float().cpu(),
                "lse": memory.state.lse.cpu(),
                "active": memory.active.cpu(),
                "mask": memory.selection.for_rows(out.shape[1], out.shape[2]).cpu(),
            }
        )
    return seen


def every_policy(on: Rank) -> Any:
    mesh, results = on.mesh(), {}
    for number, policy in enumerate(policies(on.world)):
        for name in BLOCKS:
            block, rule = on.block(name), ("random", "uneven", "empty")[(number + BLOCKS.index(name)) % 3]
            results[policy, name] = denoised(on.attention(policy, mesh), block, on.shard(block.context, rule))
    return results


def every_ownership(on: Rank) -> Any:
    mesh, block = on.mesh(), on.block("pages of 4")
    return {
        (policy, rule): denoised(on.attention(policy, mesh), block, on.shard(block.context, rule))
        for policy in ("dense", "losa:active=2,budget=8", "mage:budget=8,dense_layers=0")
        for rule in RULES
    }


def heads_too(on: Rank) -> Any:
    """Pages over two ranks, KV heads over the two others; nothing where there are fewer ranks."""
    if on.world != 4:
        return {}
    mesh, results = on.mesh(2, 2), {}
    row, column = mesh.get_coordinate()
    own, queries = slice(column, column + 1), slice(2 * column, 2 * column + 2)
    for policy in policies():
        block = on.block("pages of 4")
        try:
            attention = on.attention(policy, mesh)
        except SparseAttentionError as error:
            results[policy] = str(error)
            continue
        pools = {name: getattr(block.context, name)[:, own] for name in ("k_pages", "v_pages")}
        context = on.shard(replace(block.context, **pools), "random", row, 2)
        mine = replace(block, q=type(block.q)([q[:, queries] for q in block.q]), k=block.k[:, own], v=block.v[:, own])
        results[policy] = (column, denoised(attention, mine, context))
    return results


def bounds(on: Rank) -> Any:
    """Bounds of all pages on every rank, with signed zeros and NaN, made at once and as pages come."""
    results = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        draw = torch.Generator().manual_seed(3)
        wild = torch.tensor([0.0, -0.0, 1.5, -2.0, torch.inf, -torch.inf, torch.nan])
        pools = [wild[torch.randint(7, (12, 2, 3, 5), generator=draw)].to(dtype).to(on.device) for _ in "kv"]
        table = torch.randperm(12, generator=draw).to(torch.int32).view(2, 6).to(on.device)
        lengths = torch.randint(0, 4, (2, 6), generator=draw).to(torch.int32).to(on.device)
        whole = Context(*pools, table, lengths)
        local, backend = TorchBackend(on.device), DistributedBackend(TorchBackend(on.device), on.mesh())
        want, shard = local.page_bounds(whole), on.shard(whole, "random")
        got = backend.page_bounds(shard)
        grown = backend.extend_bounds(shard, got, 4)
        results += [
            torch.equal(getattr(made, side).view(torch.uint8), getattr(want, side).view(torch.uint8))
            for made in (got, grown)
            for side in ("lower", "upper")
        ]
        shard.with_bounds(grown)  # they are of the type that a sharded context takes
    return results


def bytes_sent(on: Rank) -> Any:
    """Two contexts, one four times as long, whose owner keeps the bounds; and one whose owner does not."""
    mesh, results = on.mesh(), {}
    for policy in ("dense", "losa:active=2,budget=8", "quest:budget=8", "mage:budget=8,dense_layers=0"):
        for name in ("64 pages", "256 pages"):
            block, attention = on.block(name), on.attention(policy, mesh)
            context = on.shard(block.context, "round robin")
            kept = context.with_bounds(attention.backend.page_bounds(context))
            attention.backend.sent.clear()
            denoised(attention, block, kept)
            results[policy, name] = dict(attention.backend.sent)
            attention.backend.sent.clear()
            denoised(attention, block, context)
            results[policy, name, "without bounds"] = dict(attention.backend.sent)
    return results


def mistakes(on: Rank) -> Any:
    """Ranks that were given different things, or all the same wrong ones; each time a good pass follows.

    Returns what was said instead of what should have been.
    """
    mesh, both, names, other = on.mesh(), on.mesh(on.world, 1), ("context", "heads"), on.rank == 1
    attention, block = on.attention("quest:budget=8", mesh), on.block("pages of 4")
    context = on.shard(block.context, "random")

    def one_pass(rows: int = 6, keys: int = 6, info: Any = None, scale: Any = None, **changed: Any) -> None:
        q, k, v = block.q[0][:, :, :rows], block.k[:, :, :keys], block.v[:, :, :keys]
        attention(q, k, v, replace(context, **changed), None, info, scale=scale)

    local, clamped = TorchBackend(on.device), context.page_lengths.clamp(max=2)
    half = {name: getattr(context, name)[:, :, :2] for name in ("k_pages", "v_pages")} if other else {}
    everything = ShardedContext.of(block.context, torch.ones_like(context.held))
    swapped = {"context_dim": names[other], "heads_dim": names[not other]}
    acts: list[tuple[str, Any]] = [
        ("q must be the same on every rank", lambda: one_pass(rows=5 if other else 6, keys=5 if other else 6)),
        ("k must be the same on every rank", lambda: one_pass(keys=2 if other else 6)),
        (
            "context.page_lengths must be the same on every rank",
            lambda: one_pass(page_lengths=clamped if other else context.page_lengths),
        ),
        ("context.page_size must be the same on every rank", lambda: one_pass(page_lengths=clamped, **half)),
        ("context.version must be the same on every rank", lambda: one_pass(version=on.rank)),
        ("pass 0, is_save False, layer 0", lambda: one_pass(info=PassInfo(0, is_save=other))),
        ("scale must be the same on every rank", lambda: one_pass(scale=1.0 + on.rank)),
        ("exactly one rank; got 2 ranks", lambda: attention(block.q[0], block.k, block.v, everything)),
        ("context must be a ShardedContext", lambda: attention(block.q[0], block.k, block.v, block.context)),
        ("bounds must be ShardedBounds", lambda: context.with_bounds(local.page_bounds(context.local))),
        ("policy must be the same on every rank", lambda: on.attention(f"quest:budget={8 if other else 16}", mesh)),
        ("with pages over", lambda: DistributedBackend(local, both, **swapped)),
        (
            "compute on tensors of PyTorch",
            lambda: DistributedBackend("sparse_dlm_attn_reference:ReferenceBackend", mesh),
        ),
    ]
    wrong = []
    for words, act in acts:
        for call, wanted in ((act, words), (one_pass, "")):
            try:
                call()
                said = ""
            except SparseAttentionError as error:
                said = str(error)
            if wanted not in said or bool(said) != bool(wanted):
                wrong.append((words, said))
    return wrong


def late(on: Rank) -> Any:
    """The last rank comes later than the time limit of the group allows."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    attention = on.attention("dense", DeviceMesh.from_group(group, on.device, mesh_dim_names=("context",)))
    block = on.block("pages of 4")
    if on.rank == on.world - 1:
        time.sleep(6.0)
        return None
    begun = time.monotonic()
    try:
        attention(block.q[0], block.k, block.v, on.shard(block.context, "random"))
    except RuntimeError as error:
        return str(error), time.monotonic() - begun
    return None


def graphs(on: Rank) -> Any:
    """Passes captured in a CUDA graph, replayed with other queries: each against the pass without a graph."""
    from sparse_dlm_attn_triton import TritonBackend

    mesh, results, block = on.mesh(), {}, on.block("64 pages")
    for policy in ("dense", "losa:active=2,budget=8", "quest:budget=8"):
        attention = DistributedAttention(policy_of(policy), TritonBackend(), mesh)
        context = on.shard(block.context, "round robin")
        context = context.with_bounds(attention.backend.page_bounds(context))
        _, memory = attention(block.q[0], block.k, block.v, context, None, infos(block)[0])
        q = block.q[1].clone()

        def run(attention: Any = attention, context: Any = context, memory: Any = memory, q: Any = q) -> Any:
            return attention(q, block.k, block.v, context, memory, infos(block)[1])[0]

        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            captured = run()
        same = []
        for turn in range(5):
            q.copy_(block.q[1] * (turn % 3) - block.q[0])
            graph.replay()
            torch.cuda.synchronize()
            same.append(torch.equal(captured.clone(), run()))
        results[policy] = same
    return results


def main() -> None:
    names, device, rank, world, folder = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:5]), sys.argv[5]
    faulthandler.dump_traceback_later(float(sys.argv[6]), exit=True)
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    on = Rank(device, rank, world)
    for name in names.split(","):
        begun = time.monotonic()
        torch.save(globals()[name](on), f"{folder}/{name}-{rank}.pt")
        print(f"{name}: {time.monotonic() - begun:.1f} s", flush=True)
    sys.stdout.flush()
    os._exit(0)  # a group that has timed out must not hold up the end


if __name__ == "__main__":
    main()
