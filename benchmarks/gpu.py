"""Every kernel of the Triton backend and whole passes on one GPU, beside the peers that import.

    python benchmarks/gpu.py --out gpu.json [--plot gpu.png]

A pass is a whole one: change, active rows, scores, pages, attention, block, merge. Dense peers attend to the
whole context, sparse peers to the pages that the LoSA pass chose, for its active rows alone. Results are
compared with float32 sums, or with the PyTorch backend's plain path, before anything is timed; peers that do
not import or are wrong are named with the reason. Times are medians of CUDA-graph replays over layers that
rotate, so that the L2 cache is cold; see `sparse_dlm_attn_benchmarks.timing`. About three minutes on an H100,
half a minute more where FlashInfer compiles.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table

from sparse_dlm_attn import PrefixAttention
from sparse_dlm_attn_benchmarks.gate import WrongResultError, check_passes
from sparse_dlm_attn_benchmarks.layer import Layer, budget_for, layers, relative_density, runner
from sparse_dlm_attn_benchmarks.peers import DENSE, FAST, dense_peers
from sparse_dlm_attn_benchmarks.shape import Shape
from sparse_dlm_attn_benchmarks.sparse_peers import SPARSE, Chosen, sparse_peers
from sparse_dlm_attn_benchmarks.timing import COLD_BYTES, Timing, bandwidth, measure
from sparse_dlm_attn_triton import TritonBackend
from sparse_dlm_attn_triton.common import layout
from sparse_dlm_attn_triton.passes import attend as attend_pass
from sparse_dlm_attn_triton.problem import Part
from sparse_dlm_attn_triton.ranked import ranking_of
from sparse_dlm_attn_triton.scores import page_scores

SHAPES = (
    Shape(context=16384),
    Shape(context=32768),
    Shape(),
    Shape(context=131072),
    Shape(batch=8),
    Shape(page_size=16),
)
MAGE = "mage:dense_layers=0,budget=1024"
Row = dict[str, Any]


def check(shape: Shape, policy: str) -> float:
    """Return the relative error of three passes against float32, the same pages read; exit if it is large."""
    backend = TritonBackend()
    try:
        return check_passes(shape, policy, backend, layers(shape, backend)[0])
    except WrongResultError as error:
        sys.exit(str(error))


def roofline(shape: Shape, density: float, metadata: bool, rate: float) -> float:
    """Return the microseconds that reading the pages, their bounds and the states takes at ``rate``."""
    states = 6 * shape.batch * shape.q_heads * shape.tokens * shape.head_dim * 2
    read = shape.cache_bytes * density + (shape.metadata_bytes if metadata else 0) + states
    return read / rate * 1e6


def kernels(shape: Shape, made: list[Layer], policy: Any) -> tuple[dict[str, list[Callable[[], Any]]], list[Chosen]]:
    """Return the stages of a ranked pass, each on every layer, and what they chose."""
    stages: dict[str, list[Callable[[], Any]]] = {"scores": [], "change, scores, select": [], "attend": []}
    chosen = []
    for layer in made:
        context, bounds = layer.context, (layer.context.bounds.lower, layer.context.bounds.upper)
        lengths, like = context.page_lengths, layer.q_next
        ranking = ranking_of(
            like.device,
            like.dtype,
            layout(like),
            tuple(map(layout, bounds)),
            layout(layer.q),
            policy.active,
            None,
            policy.budget,
            policy.budget // shape.page_size,
            "kv_head",
            True,
        )

        def rank(layer: Layer = layer, ranking: Any = ranking, bounds: Any = bounds, lengths: Any = lengths) -> Any:
            return ranking.run(layer.q_next, bounds, lengths, layer.q)

        active, mask = rank()
        chosen.append(Chosen(layer, mask, active))
        part = Part(
            context.k_pages, context.v_pages, context.page_table, lengths, mask, shape.tokens, active, policy.active
        )
        cached = attend_pass(layer.q, (layer.k, layer.v), None, None, 1.0)[1:3]

        def attend(layer: Layer = layer, part: Any = part, cached: Any = cached) -> Any:
            return attend_pass(layer.q_next, (layer.k, layer.v), part, cached, 0.088, 1, layer.q)

        stages["scores"].append(lambda layer=layer, bounds=bounds: page_scores(layer.q_next, *bounds))
        stages["change, scores, select"].append(rank)
        stages["attend"].append(attend)
    return stages, chosen


def time_shape(
    shape: Shape, rate: float, peer_names: tuple[str, ...], sparse_names: tuple[str, ...], repeats: int
) -> list[Row]:
    """Time policies, kernels and peers on one shape."""
    backend = TritonBackend()
    made = layers(shape, backend)
    sparse, density = budget_for(0.10, "losa", shape, backend, made[0])
    rows: list[Row] = []

    def add(name: str, kind: str, timing: Timing, density: float, policy: str = "", metadata: bool = False) -> None:
        floor = roofline(shape, density, metadata, rate)
        rows.append(
            {
                "shape": str(shape),
                "name": name,
                "kind": kind,
                "density": density,
                "roofline_us": floor,
                "policy": policy,
                **timing.as_dict(),
            }
        )

    some = made[: max(4, -(-COLD_BYTES // shape.cache_bytes))]
    for name, works in dense_peers(some, shape, peer_names).items():
        if isinstance(works, str):
            print(f"{shape}: {name} is not here ({works})")
        else:
            add(name, "dense peer", measure(works, repeats), 1.0)
    policies = {
        "dense": "dense",
        "losa": sparse,
        "quest": sparse.replace("losa:", "quest:first_pass=dense,"),
        "mage": MAGE,
        "losa, never refreshed": "losa:active=0",
    }
    for name, policy in policies.items():
        read = relative_density(policy, backend, made[0])
        timing = measure([runner(policy, backend, layer) for layer in made], repeats)
        add(name, "pass", timing, read, policy, name in ("losa", "quest"))
    stages, chosen = kernels(shape, made, PrefixAttention(sparse, backend).policy)
    for name, works in stages.items():
        add(name, "kernels", measure(works, repeats), density)
    for name, found in sparse_peers(chosen, shape, sparse_names).items():
        if isinstance(found, str):
            print(f"{shape}: {name} is not here ({found})")
        else:
            add(name, "sparse peer", measure(found.works, repeats), density)
            rows[-1]["plan_us"] = found.plan_us
    best = min((row["alone_us"] for row in rows if row["kind"] == "dense peer"), default=None)
    chained = min((row["chained_us"] for row in rows if row["kind"] == "dense peer"), default=None)
    for row in rows:
        row["speedup_alone"] = best / row["alone_us"] if best else None
        row["speedup_chained"] = chained / row["chained_us"] if chained else None
        whole = row["kind"] in ("pass", "dense peer")
        row["of_roofline"] = row["roofline_us"] / row["chained_us"] if whole else None
    return rows


def blocks(rows: list[Row], shape: Shape) -> list[Row]:
    """Return what a whole block costs with S passes, the first of them dense, against its ceiling."""
    named = {row["name"]: row for row in rows}
    dense = min(row["chained_us"] for row in rows if row["kind"] == "dense peer")
    losa, density = named["losa"], named["losa"]["density"] + 1 / shape.page_size
    found = []
    for passes in (5, 17):
        ours = named["dense"]["chained_us"] + (passes - 1) * losa["chained_us"]
        ceiling = passes / (1 + (passes - 1) * density)
        speedup = passes * dense / ours
        found.append({"passes": passes, "speedup": speedup, "ceiling": ceiling, "share": speedup / ceiling})
    return found


def ragged_rows(shape: Shape, repeats: int) -> list[Row]:
    """Time passes over a batch of which one sequence has the whole context and the others an eighth of it."""
    made, rows = layers(shape, TritonBackend()), []
    pages = shape.context // shape.page_size
    for index, layer in enumerate(made):
        lengths = layer.context.page_lengths.clone()
        lengths[1:, pages // 8 :] = 0
        made[index] = replace(layer, context=replace(layer.context, page_lengths=lengths))
    for policy in ("dense", "losa:budget=512"):
        for ragged in (False, True):
            backend = TritonBackend(ragged=ragged)
            timing = measure([runner(policy, backend, layer) for layer in made], repeats)
            rows.append(
                {
                    "shape": f"{shape}, ragged",
                    "name": f"{policy}{', ragged=true' * ragged}",
                    "kind": "ragged",
                    "density": relative_density(policy, backend, made[0]),
                    "policy": policy,
                    "of_roofline": None,
                    **timing.as_dict(),
                }
            )
    return rows


def print_rows(rows: list[Row]) -> None:
    """Print a table of one shape."""
    table = Table(title=f"{rows[0]['shape']}, microseconds")
    for column in ("", "read", "alone", "chained", "plain", "x alone", "x chained", "of roofline"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        ratios = [row["speedup_alone"], row["speedup_chained"]] if row["kind"] == "pass" else [None, None]
        table.add_row(
            row["name"] + (f" (plan {row['plan_us']:.0f})" if row.get("plan_us") else ""),
            f"{row['density']:.1%}",
            *(f"{row[key]:.1f}" for key in ("alone_us", "chained_us", "plain_us")),
            *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            "" if row["of_roofline"] is None else f"{row['of_roofline']:.0%}",
        )
    Console(width=120).print(table)


def plot(rows: list[Row], path: Path) -> None:
    """Draw time against context length for batch 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    picked = [row for row in rows if row["shape"].startswith("B1 ") and row["shape"].endswith("p64")]
    for name in dict.fromkeys(row["name"] for row in picked if row["kind"] in ("pass", "dense peer")):
        mine = [row for row in picked if row["name"] == name]
        points = [(int(row["shape"].split()[1][:-1]), row["chained_us"]) for row in mine]
        style = "--" if name in DENSE else "-"  # dashes: other people's kernels
        axes.plot(*zip(*sorted(points), strict=True), style, marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="context, K tokens", ylabel="time of a pass and layer, us")
    axes.set_xticks([16, 32, 64, 128], ["16", "32", "64", "128"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument(
        "--shape",
        action="append",
        choices=[str(shape) for shape in SHAPES],
        help="shapes to time; default: all, and a ragged batch",
    )
    parser.add_argument(
        "--peer",
        action="append",
        choices=sorted((*DENSE, *SPARSE)),
        help="peers to ask; default: all but the slow ones",
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("A CUDA GPU is needed; benchmarks/test_cpu.py times the CPU.")
    asked = options.peer or (*FAST, *SPARSE)
    names, sparse_names = (tuple(name for name in asked if name in known) for known in (DENSE, SPARSE))
    rate = bandwidth()
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, Triton {triton.__version__}, read {rate / 1e12:.2f} TB/s")
    # Of four sequences: so many rows as take the same programs as larger batches.
    for policy in ("losa:budget=512", "dense", MAGE, "quest:budget=512,pages=own"):
        print(f"checked {policy}: relative error {check(Shape(context=16384, batch=4), policy):.1e}")
    rows: list[Row] = []
    whole: dict[str, list[Row]] = {}
    for shape in SHAPES:
        if options.shape and str(shape) not in options.shape:
            continue
        found = time_shape(shape, rate, names, sparse_names, options.repeats)
        print_rows(found)
        rows += found
        if any(row["kind"] == "dense peer" for row in found):
            whole[str(shape)] = blocks(found, shape)
            for block in whole[str(shape)]:
                print(
                    f"block of {block['passes']} passes, the first dense: {block['speedup']:.2f}x, "
                    f"{block['share']:.0%} of its ceiling"
                )
        torch.cuda.empty_cache()
        written = {
            "device": device,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "read_bytes_per_s": rate,
            "rows": rows,
            "blocks": whole,
        }
        options.out.write_text(json.dumps(written, indent=1), encoding="utf-8")
    if not options.shape:
        rows += (found := ragged_rows(Shape(batch=8), options.repeats))
        print_rows(found)
        options.out.write_text(json.dumps(written | {"rows": rows}, indent=1), encoding="utf-8")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
