"""What a whole model gains: one denoising pass, with the model's own attention and with policies.

    python benchmarks/model_pass.py --cases 1x16384,1x65536,8x32768 --out model_pass.json

The model has Qwen3-8B's shape (SDAR, TraDo) unless told otherwise, and random weights. For each case, sequences x
tokens of context, medians of the passes of a block after its first two, over several blocks that append to the cache.
Eager passes and graphs by hand read the context of the first block that is timed with ``cuda_graph=True``, which stands
behind those that were captured:

- *own*: the model's own attention over a DynamicCache, which it copies in every layer and pass;
- *eager*: `SparseAttention` without graphs; *captured*: with ``cuda_graph=True``, over a cache that stays in place;
- *by hand*: a CUDA graph captured around one eager pass, the least that captured passes can take;
- *busy*: time that the GPU computes in an eager pass; *host*: an eager pass without waiting for the GPU, less that of
  the same model whose attention does nothing, a layer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from sparse_dlm_attn.cli.console import result_console, table
from sparse_dlm_attn_transformers import PagedCache, SparseAttention

POLICIES = "dense,losa,quest,mage"


def policy_of(name: str, context: int) -> str:
    """Return a policy by its short name: ten per cent of the context, or as the documentation recommends."""
    return {
        "losa": f"losa:budget={context // 128}",
        "quest": f"quest:first_pass=dense,budget={context // 128}",
        "mage": "mage:budget=1024,dense_layers=0",
    }.get(name, name)


def make_model(arguments: argparse.Namespace) -> Any:
    """Return a model of the wanted shape on the GPU, its weights random."""
    config = Qwen3Config(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        head_dim=arguments.head_dim,
        max_position_embeddings=1 << 20,
        attn_implementation="sdpa",
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cuda").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1)
    model.model.rotary_emb = type(model.model.rotary_emb)(config, device="cuda")
    return model


class Run:
    """A model over a context of random keys and values."""

    def __init__(self, model: Any, arguments: argparse.Namespace, batch: int, context: int) -> None:
        self.model, self.arguments, self.batch, self.context = model, arguments, batch, context
        self.places: dict[int, Any] = {}
        self.text = torch.randint(3, 1000, (batch, arguments.tokens), device="cuda")

    def fill(self, cache: Any, blocks: int = 0) -> Any:
        """Put random keys and values into a cache: the context, and blocks behind it."""
        tokens = self.context + blocks * self.arguments.tokens
        shape = (self.batch, self.arguments.kv_heads, tokens, self.arguments.head_dim)
        for layer in range(self.arguments.layers):
            k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
            cache.update(k, v, layer)
        return cache

    def dynamic(self) -> Any:
        """Return a cache that grows, as long as where the captured passes are timed."""
        return self.fill(DynamicCache(config=self.model.config), self.arguments.blocks)

    def fixed(self) -> Any:
        """Return a cache that stays in place, with room for the blocks to come."""
        room = self.context + self.arguments.tokens * (2 * self.arguments.blocks + 1)
        return self.fill(PagedCache(self.model.config, self.batch, room, page_size=self.arguments.page_size))

    def step(self, cache: Any, **more: Any) -> Any:
        """Run one pass."""
        start = int(cache.get_seq_length())
        if start not in self.places:
            places = torch.arange(start, start + self.arguments.tokens, device="cuda")
            self.places[start] = places[None].expand(self.batch, -1)
        return self.model(self.text, past_key_values=cache, position_ids=self.places[start], use_cache=True, **more)


def clock(step: Callable[[], Any], passes: int) -> list[float]:
    """Return the milliseconds of passes, each waited for."""
    times = []
    for _ in range(passes):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def host(step: Callable[[], Any], passes: int) -> float:
    """Return the milliseconds of the host in a pass: queued, not waited for."""
    times = []
    for _ in range(passes):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e3)
    torch.cuda.synchronize()
    return statistics.median(times)


def busy(step: Callable[[], Any]) -> tuple[float, int]:
    """Return the milliseconds that the GPU computes in a pass, and its kernels."""
    step()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    events = found.key_averages()
    return sum(event.device_time_total for event in events) / 1e3, sum(event.count for event in events)


def by_hand(step: Callable[[], Any]) -> float:
    """Return the milliseconds of a CUDA graph of one pass."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    graph.replay()
    return statistics.median(clock(graph.replay, 12))


@contextmanager
def without_attention(model: Any) -> Iterator[None]:
    """Let attention return its queries, so that what is left is the rest of the model."""
    from transformers import AttentionInterface

    def nothing(module: Any, q: Any, *_: Any, **__: Any) -> Any:
        return q.transpose(1, 2), None

    AttentionInterface.register("nothing", nothing)
    before = model.config._attn_implementation
    model.config._attn_implementation = "nothing"
    try:
        yield
    finally:
        model.config._attn_implementation = before


def blocks_of(run: Run, sparse: Any, cache: Any) -> tuple[list[float], list[float]]:
    """Decode blocks that append to the cache; return first passes and those after the first two."""
    firsts, later = [], []
    for _ in range(run.arguments.blocks):
        with sparse.block(total_passes=run.arguments.passes):
            times = clock(lambda: run.step(cache), run.arguments.passes)
            sparse.next_pass(is_save=True)
            run.step(cache)
        firsts.append(times[0])
        later += times[2:]
    return firsts, later


def measure(run: Run, name: str, backend: str, floor: float) -> dict[str, Any]:
    """Time one policy on one backend."""
    policy, arguments, model = policy_of(name, run.context), run.arguments, run.model
    row: dict[str, Any] = {"policy": policy, "backend": backend}
    cache = run.dynamic()
    with SparseAttention(model, policy, backend, page_size=arguments.page_size) as sparse, sparse.block():

        def step() -> Any:
            return run.step(cache)

        row["eager_ms"] = statistics.median(clock(step, arguments.passes)[2:])
        row["host_ms_a_layer"] = (host(step, arguments.passes) - floor) / arguments.layers
        row["busy_ms"], row["kernels"] = busy(step)
        row["by_hand_ms"] = by_hand(step)
    del cache
    torch.cuda.empty_cache()
    if arguments.captured and backend.startswith("triton"):
        cache = run.fixed()
        options = {"page_size": arguments.page_size, "cuda_graph": True}
        with SparseAttention(model, policy, backend, **options) as sparse:
            blocks_of(run, sparse, cache)  # captures
            firsts, later = blocks_of(run, sparse, cache)
            row["captured_ms"], row["captured_first_ms"] = statistics.median(later), statistics.median(firsts)
            row["captures"] = sparse.graphs.captures
        del cache
        torch.cuda.empty_cache()
    return row


def case(model: Any, arguments: argparse.Namespace, batch: int, context: int) -> list[dict[str, Any]]:
    """Time everything on one batch and context."""
    run, where = Run(model, arguments, batch, context), f"B={batch}, {context // 1024}K"
    rows: list[dict[str, Any]] = []
    small = Run(model, arguments, batch, 64)
    with without_attention(model):
        cache = small.dynamic()
        start = cache.get_seq_length()

        def alone() -> Any:
            out = small.step(cache)
            cache.crop(start)
            return out

        clock(alone, 3)
        floor = host(alone, arguments.passes)
    rows.append({"case": where, "policy": "no attention", "backend": "own", "host_ms": floor})
    if arguments.own:
        cache = run.dynamic()
        length = cache.get_seq_length()

        def own() -> Any:
            out = run.step(cache, attention_mask=everything, logits_to_keep=arguments.tokens)
            cache.crop(length)
            return out

        everything = torch.ones(batch, 1, arguments.tokens, length + arguments.tokens, dtype=torch.bool, device="cuda")
        try:
            row = {"eager_ms": statistics.median(clock(own, 4)[1:])}
            row["busy_ms"], row["kernels"] = busy(own)
        except torch.OutOfMemoryError:
            row = {"error": "out of memory"}
        rows.append({"case": where, "policy": "own attention", "backend": "sdpa", **row})
        del cache
        torch.cuda.empty_cache()
    for backend in arguments.backends.split(","):
        for name in arguments.policies.split(","):
            rows.append({"case": where, **measure(run, name, backend, floor)})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table."""
    names = ("eager_ms", "captured_ms", "by_hand_ms", "busy_ms", "host_ms_a_layer", "kernels", "captures")
    lines = []
    for row in rows:
        values = [f"{row[name]:.2f}" if isinstance(row.get(name), float) else str(row.get(name, "")) for name in names]
        lines.append((row["case"], row["policy"], row["backend"], *values))
    result_console().print(table(("case", "policy", "backend"), names, lines))


@torch.no_grad()
def main() -> None:
    """Parse the command line and time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {
        "layers": 36,
        "hidden": 4096,
        "intermediate": 12288,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "vocabulary": 151936,
        "tokens": 16,
        "page_size": 64,
        "passes": 8,
        "blocks": 3,
    }
    for name, value in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--cases", default="1x16384,1x65536,8x65536")
    parser.add_argument("--policies", default=POLICIES)
    parser.add_argument("--backends", default="triton")
    parser.add_argument("--no-own", dest="own", action="store_false", help="leave out the model's own attention")
    parser.add_argument("--no-captured", dest="captured", action="store_false", help="leave out captured passes")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__)
    model, rows = make_model(arguments), []
    for one in arguments.cases.split(","):
        batch, context = map(int, one.split("x"))
        rows += case(model, arguments, batch, context)
    show(rows)
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
