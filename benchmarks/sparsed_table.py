"""The comparison of the SparseD paper on the small model: sparse and caching methods over whole sequences.

    PYTHONPATH=.:reference:backends:models \
        python benchmarks/sparsed_table.py --backend torch --out sparsed.json --plot sparsed.png

Every method decodes the same prompts; ten minutes of processor time. `evaluate` compares over a prefix.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparse_dlm_attn import get_policy
from sparse_dlm_attn.cli.console import result_console, table
from sparse_dlm_attn_small_model import plots
from sparse_dlm_attn_small_model.commands.options import environment_record
from sparse_dlm_attn_small_model.commands.report import share_text
from sparse_dlm_attn_small_model.comparison import PolicyResult, PolicyScore
from sparse_dlm_attn_small_model.decoding import Order, decode_full_sequence
from sparse_dlm_attn_small_model.model import TinyModel
from sparse_dlm_attn_small_model.policy_choice import PolicyChoice
from sparse_dlm_attn_small_model.retrieval import answer_blocks, make_prompt

BLOCK, STEPS = 16, 8
TASKS = ("chained", "several-values")
CAPTION = "pairs: row-key pairs attended to; rows: rows computed; % of dense, all passes."


class Row(NamedTuple):
    """One line of the table: a policy and how it decodes."""

    label: str
    policy: str
    page_size: int = 32
    order: Order = "confidence"


def rows_for(length: int) -> list[Row]:
    """Return the paper's accuracy table and its ablation for prompts of some bytes."""
    side, sinks = length // 4, length // 10
    # The ablation needs a share at which pages are short.
    sparse, scarce = "sparsed:span=32", "sparsed:span=32,ratio=0.05"
    return [
        Row("dense", "dense"),
        Row("sliding window", f"sliding-window:window={side},after={side}", 16),
        Row("StreamingLLM", f"streaming-llm:sinks={sinks},window={side},after={side}", 16),
        Row("dKV-Cache, decode", "dkv-cache"),
        Row("dKV-Cache, greedy", "dkv-cache:mode=greedy", order="random"),
        Row("dense, random order", "dense", order="random"),
        Row("Fast-dLLM, prefix", "fast-dllm:mode=prefix"),
        Row("Fast-dLLM, dual", "fast-dllm"),
        Row("Sparse-dLLM", "sparse-dllm", 1),
        Row("SparseD", sparse),
        Row("SparseD, paper's counts", f"{sparse},variant=paper"),
        Row("SparseD, share 0.05", scarce),
        Row("0.05 - skipping", f"{scarce},warmup=0"),
        Row("0.05 - reusing", f"{scarce},frozen=false"),
        Row("0.05 - isolated", f"{scarce},isolated=false"),
    ]


def run(model: TinyModel, length: int, prompts: int) -> list[tuple[Row, PolicyScore]]:
    """Decode every prompt of a length with every line of the table."""
    results = defaultdict(list)
    for seed in range(prompts):
        for task in TASKS:
            prompt = make_prompt(task, length=length, seed=seed, block_length=BLOCK)
            for row in rows_for(length):
                choice = PolicyChoice(row.label, get_policy(row.policy), None, row.label)
                decoded = decode_full_sequence(
                    model,
                    prompt.text,
                    policy=choice.policy,
                    block_length=BLOCK,
                    steps=STEPS,
                    new_tokens=answer_blocks(prompt.answer, BLOCK) * BLOCK,
                    page_size=row.page_size,
                    order=row.order,
                    seed=seed,
                )
                results[row].append((task, PolicyResult.of(choice, decoded, prompt.answer)))
    return [(row, PolicyScore.of(found)) for row, found in results.items()]


def cell(row: Row, length: int, score: PolicyScore) -> dict[str, Any]:
    """One line at one length, as JSON can say it."""
    return {
        **row._asdict(),
        "length": length,
        "prompts": score.prompts,
        "exact": score.exact,
        "tasks": {task: counts["exact"] for task, counts in score.tasks.items()},
        "passes": score.passes,
        "pair_share": score.everything.pair_share,
        "row_share": score.everything.row_share,
        "seconds": score.seconds,
    }


def picture(cells: list[dict[str, Any]]) -> bytes:
    """Exact answers as bars by length."""
    drawing = plots.figure(10, 4.8)
    axis = drawing.subplots()
    axis.set_title("SparseD: accuracy of sparse and of caching methods over whole sequences", fontsize=11)
    lengths = sorted({each["length"] for each in cells})
    height = 0.8 / len(lengths)
    for number, length in enumerate(lengths):
        here = [each for each in cells if each["length"] == length]
        places = np.arange(len(here)) + (number - (len(lengths) - 1) / 2) * height
        shares = [100 * each["exact"] / each["prompts"] for each in here]
        axis.barh(places, shares, height, label=f"{length} bytes")
    axis.set_yticks(range(len(here)), [each["label"] for each in here], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("exact answers, %")
    axis.set_xlim(0, 103)
    axis.grid(alpha=0.3)
    drawing.legend(*axis.get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    return plots.png(drawing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", default="reference")
    parser.add_argument("--prompts", type=int, default=4, help="a task and length, with seeds from 0")
    parser.add_argument("--lengths", type=int, nargs="+", default=[384, 768], help="bytes a prompt")
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--plot", type=Path, help="PNG")
    given = parser.parse_args()
    model = TinyModel.load(given.backend)
    cells = [cell(row, length, score) for length in given.lengths for row, score in run(model, length, given.prompts)]
    lines = [
        [
            each["label"],
            str(each["length"]),
            f"{each['exact']}/{each['prompts']}",
            *map(str, each["tasks"].values()),
            share_text(each["pair_share"]),
            share_text(each["row_share"]),
            f"{each['passes']:.1f}",
        ]
        for each in cells
    ]
    figures = ["bytes", "exact", *TASKS, "pairs", "rows", "passes"]
    result_console().print(table(["method"], figures, lines, CAPTION))
    if given.out is not None:
        environment = environment_record(given.backend, None, model, Row._field_defaults["page_size"])
        report = {"environment": environment, "cells": cells}
        given.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    if given.plot is not None:
        given.plot.write_bytes(picture(cells))


if __name__ == "__main__":
    main()
