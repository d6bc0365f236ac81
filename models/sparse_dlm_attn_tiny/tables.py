"""The tables of the SparseD and LoSA papers, in shape: the same comparisons, on the small model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparse_dlm_attn import UnknownNameError, get_policy
from sparse_dlm_attn_tiny.decoding import Order, decode_blocks, decode_full_sequence
from sparse_dlm_attn_tiny.model import TinyModel
from sparse_dlm_attn_tiny.prompts import Prompt, prompt_of_task
from sparse_dlm_attn_tiny.records import Decoded
from sparse_dlm_attn_tiny.retrieval import answer_blocks

__all__ = ["TABLES", "Cell", "Row", "Table", "run_table", "table_named"]

BLOCK = 16
STEPS = 8


@dataclass(frozen=True)
class Row:
    """One line of a table: a policy and how it decodes.

    Parameters
    ----------
    label : str
        Name in the table.
    policy : str
        As `get_policy` understands it.
    budget : int or None
        Context tokens that a row may read, where the table has budgets.
    page_size : int
        Tokens a page.
    order : {"confidence", "random"}
        Order of decoding; whole sequences only.
    """

    label: str
    policy: str
    budget: int | None = None
    page_size: int = 16
    order: Order = "confidence"


@dataclass(frozen=True)
class Table:
    """A comparison of a paper.

    Parameters
    ----------
    name : str
        Name to ask for it by.
    title : str
        What it is, for people.
    whole : bool
        Whether each pass sees the whole sequence in both directions; else block by block over a prefix.
    tasks : tuple of str
        Tasks of `sparse_dlm_attn_tiny.retrieval`.
    lengths : tuple of int
        Bytes a prompt.
    prompts : int
        Prompts a task and length.
    rows : callable
        The lines for prompts of a length.
    """

    name: str
    title: str
    whole: bool
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    prompts: int
    rows: Callable[[int], tuple[Row, ...]]


@dataclass(frozen=True)
class Cell:
    """One line of a table at one length, over all its prompts.

    Parameters
    ----------
    label, policy : str
        The line.
    budget : int or None
        Its budget.
    length : int
        Bytes a prompt.
    prompts, exact : int
        Prompts, and those answered exactly.
    tasks : dict
        Exact answers a task.
    passes : float
        Mean passes a prompt.
    density, byte_share : float
        Over all passes: context tokens loaded, and bytes read, of those of dense.
    later_density, later_byte_share : float
        The same without pass 0 of each block or window.
    pair_share, row_share : float
        Over all passes: row-key pairs attended to, and rows computed, of those of dense.
    seconds : float
        Sum of wall times without prefill.
    """

    label: str
    policy: str
    budget: int | None
    length: int
    prompts: int
    exact: int
    tasks: dict[str, int]
    passes: float
    density: float
    byte_share: float
    later_density: float
    later_byte_share: float
    pair_share: float
    row_share: float
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Return this cell as JSON can say it."""
        return asdict(self)


def sparsed_rows(length: int) -> tuple[Row, ...]:
    """Return SparseD's accuracy table and its ablation for prompts of ``length`` bytes."""
    side, sinks = length // 4, length // 10
    sparse, scarce = "span=32", "span=32,ratio=0.05"  # the ablation needs a share at which pages are short
    return (
        Row("dense", "dense", page_size=32),
        Row("sliding window", f"sliding-window:window={side},after={side}"),
        Row("StreamingLLM", f"streaming-llm:sinks={sinks},window={side},after={side}"),
        Row("dKV-Cache, decode", "dkv-cache", page_size=32),
        Row("dKV-Cache, greedy", "dkv-cache:mode=greedy", page_size=32, order="random"),
        Row("dense, random order", "dense", page_size=32, order="random"),
        Row("Fast-dLLM, prefix", "fast-dllm:mode=prefix", page_size=32),
        Row("Fast-dLLM, dual", "fast-dllm", page_size=32),
        Row("Sparse-dLLM", "sparse-dllm", page_size=1),
        Row("SparseD", f"sparsed:{sparse}", page_size=32),
        Row("SparseD, paper's counts", f"sparsed:{sparse},variant=paper", page_size=32),
        Row("SparseD, share 0.05", f"sparsed:{scarce}", page_size=32),
        Row("0.05 - skipping", f"sparsed:{scarce},warmup=0", page_size=32),
        Row("0.05 - reusing", f"sparsed:{scarce},frozen=false", page_size=32),
        Row("0.05 - isolated", f"sparsed:{scarce},isolated=false", page_size=32),
    )


def losa_rows(length: int) -> tuple[Row, ...]:
    """Return LoSA's accuracy and density over budgets, with its controls, for prompts of ``length`` bytes."""
    pages = math.ceil(length / BLOCK)
    rows = [
        Row("dense", "dense"),
        Row("dense pass 0, never refreshed", "losa:active=0"),
        Row("SparseD, its own share", "sparsed"),
    ]
    for budget in (16, 32, 64, 128):
        share = (budget / BLOCK - 0.5) / pages  # so that floor(pages * share) + 1 is what the budget buys
        rows += [
            Row("QUEST", f"quest:budget={budget}", budget),
            Row("QUEST, dense pass 0", f"quest:budget={budget},first_pass=dense", budget),
            Row("SparseD", f"sparsed:ratio={share:.6f}", budget),
            Row("LoSA", f"losa:budget={budget}", budget),
        ]
    return tuple(rows)


TABLES = {
    table.name: table
    for table in (
        Table(
            "sparsed", "SparseD: accuracy of sparse and of caching methods over whole sequences", True,
            ("chained", "several-values"), (384, 768), 4, sparsed_rows,
        ),
        Table(
            "losa", "LoSA: accuracy and density over budgets, block by block over a prefix", False,
            ("chained", "multi-key"), (4096,), 10, losa_rows,
        ),
    )
}


def table_named(name: str) -> Table:
    """Return a table by name.

    Raises
    ------
    UnknownNameError
        If there is none of that name.
    """
    if name not in TABLES:
        raise UnknownNameError("table", name, TABLES)
    return TABLES[name]


def run_table(
    table: Table,
    model: TinyModel,
    *,
    prompts: int,
    lengths: Sequence[int],
    seed: int = 0,
    on_row: Callable[[], None] | None = None,
) -> list[Cell]:
    """Decode every prompt with every line of a table.

    Parameters
    ----------
    table : Table
        The table.
    model : TinyModel
        The model, with its backend.
    prompts : int
        Prompts a task and length; they have the seeds ``seed .. seed + prompts - 1``.
    lengths : sequence of int
        Bytes a prompt.
    seed : int
        First seed.
    on_row : callable, optional
        Called after every decoding.

    Returns
    -------
    list of Cell
        Length by length, in the order of the table's lines.
    """
    cells: list[Cell] = []
    for length in lengths:
        rows = table.rows(length)
        done: list[list[tuple[str, bool, Decoded]]] = [[] for _ in rows]
        for number in range(prompts):
            for task in table.tasks:
                prompt = prompt_of_task(task, length, seed + number, block_length=BLOCK)
                decode = _whole if table.whole else _blocks(model, prompt)
                for row, results in zip(rows, done, strict=True):
                    decoded = decode(model, prompt, row)
                    exact = decoded.stopped and decoded.output == (prompt.answer or "").encode()
                    results.append((task, exact, decoded))
                    if on_row is not None:
                        on_row()
        cells += [_cell(row, length, results) for row, results in zip(rows, done, strict=True)]
    return cells


def _whole(model: TinyModel, prompt: Prompt, row: Row) -> Decoded:
    return decode_full_sequence(
        model, prompt.text, policy=get_policy(row.policy), steps=STEPS, block_length=BLOCK,
        new_tokens=answer_blocks(prompt.answer or "", BLOCK) * BLOCK, page_size=row.page_size,
        order=row.order, seed=prompt.seed or 0,
    )


def _blocks(model: TinyModel, prompt: Prompt) -> Callable[[TinyModel, Prompt, Row], Decoded]:
    """Return a decoder that shares one prefill among all lines."""
    prefix = model.prefill(prompt.text, block_length=BLOCK)

    def decode(model: TinyModel, prompt: Prompt, row: Row) -> Decoded:
        return decode_blocks(
            model, prompt.text, policy=get_policy(row.policy), block_length=BLOCK, steps=STEPS,
            max_blocks=answer_blocks(prompt.answer or "", BLOCK), prefix=prefix, page_size=row.page_size,
        )

    return decode


def _cell(row: Row, length: int, results: Sequence[tuple[str, bool, Decoded]]) -> Cell:
    totals = [(decoded.traffic(True), decoded.traffic(False)) for _, _, decoded in results]

    def share(later: bool, top: str, bottom: str) -> float:
        above = math.fsum(getattr(total[later], top) for total in totals)
        below = math.fsum(getattr(total[later], bottom) for total in totals)
        return above / below if below else 0.0

    tasks: dict[str, int] = {}
    for task, exact, _ in results:
        tasks[task] = tasks.get(task, 0) + exact
    return Cell(
        label=row.label, policy=row.policy, budget=row.budget, length=length, prompts=len(results),
        exact=sum(tasks.values()), tasks=tasks,
        passes=sum(len(decoded.passes) for _, _, decoded in results) / len(results),
        density=share(False, "tokens_read", "context_tokens"),
        byte_share=share(False, "bytes_read", "dense_bytes"),
        later_density=share(True, "tokens_read", "context_tokens"),
        later_byte_share=share(True, "bytes_read", "dense_bytes"),
        pair_share=share(False, "pairs", "dense_pairs"),
        row_share=share(False, "computed_rows", "rows"),
        seconds=math.fsum(decoded.seconds for _, _, decoded in results),
    )


def decodings(table: Table, prompts: int, lengths: Sequence[int]) -> int:
    """Return how many decodings a table takes.

    Parameters
    ----------
    table : Table
        The table.
    prompts : int
        Prompts a task and length.
    lengths : sequence of int
        Bytes a prompt.
    """
    return sum(len(table.rows(length)) * len(table.tasks) * prompts for length in lengths)
