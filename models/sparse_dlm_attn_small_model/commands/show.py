"""The command `show`: which pages of the context each pass of a policy reads."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer

from sparse_dlm_attn import InvalidArgumentError
from sparse_dlm_attn.cli.console import result_console
from sparse_dlm_attn.files import check_target
from sparse_dlm_attn.policy import check_count
from sparse_dlm_attn_small_model import plots
from sparse_dlm_attn_small_model.commands import options
from sparse_dlm_attn_small_model.commands.decode import compare_with_progress
from sparse_dlm_attn_small_model.policy_choice import PolicyChoice, choose_policies
from sparse_dlm_attn_small_model.records import PassRecord

SHOWN_POLICIES = ("losa", "quest", "mage", "sliding-window")


def show(
    prompt: options.PromptFile = None,
    question: options.Question = None,
    task: options.Task = None,
    length: options.Length = None,
    seed: options.Seed = None,
    policy: options.Policies = None,
    budget: options.Budget = options.DEFAULT_BUDGET,
    backend: options.BackendName = "reference",
    device: options.Device = None,
    block_length: options.BlockLength = 16,
    steps: options.Steps = None,
    threshold: options.Threshold = None,
    page_size: options.PageSize = 16,
    block: Annotated[int, typer.Option(help="Block to show, counted from 0.")] = 0,
    weights: options.Weights = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Picture to write (PNG).", metavar="FILE", show_default="pages.png, none with --ascii"),
    ] = None,
    as_text: Annotated[bool, typer.Option("--ascii", help="Draw the map in the terminal.")] = False,
) -> None:
    """Show which pages of the context each pass reads, as a picture or in the terminal."""
    check_count("--block", block)
    backend = options.placed(backend, device)
    settings = options.check_settings(block_length, steps, threshold, page_size)
    choices = choose_policies(policy or SHOWN_POLICIES, [budget], page_size, baseline=False)
    picture = out if out is not None or as_text else Path("pages.png")
    if picture is not None:
        plots.require_matplotlib()
        check_target(picture, "--out")
    model = options.load_model(backend, weights, settings)
    most = model.config.max_context // block_length
    if block >= most:
        raise InvalidArgumentError(
            "--block", f"must be below {most}, so that the blocks before it fit the model's context", block
        )
    asked = options.pick_prompt(prompt, question, None, task, length, seed, block_length, model.config.max_context)
    passes: dict[str, list[PassRecord]] = defaultdict(list)

    def keep(choice: PolicyChoice, record: PassRecord) -> None:
        if record.block == block:
            passes[choice.label].append(record)

    sample = compare_with_progress(model, asked, choices, dataclasses.replace(settings, max_blocks=block + 1), keep)
    for result in sample.results:
        if result.blocks <= block:
            raise InvalidArgumentError(
                "--block", f"must be below {result.blocks}: the answer of {result.choice.label} ends", block
            )
    panels = list(passes.items())
    marked = sorted({page for start, end in asked.facts for page in range(start // page_size, -(-end // page_size))})
    if as_text:
        _print(panels, marked)
    if picture is not None:
        title = f"Pages read in block {block}, {len(asked.text)} bytes of context, {page_size} a page"
        options.write(picture, plots.heatmap_picture(panels, marked, title), "--out")


def _print(panels: list[tuple[str, list[PassRecord]]], marked: list[int]) -> None:
    """Draw the maps in the terminal."""
    console = result_console()
    for label, passes in panels:
        console.print(label, style="bold", markup=False)
        for line in plots.ascii_heatmap(passes, console.width, marked):
            console.print(line, markup=False, no_wrap=True)
    console.print(
        f"Share of layers and KV heads that loaded a page: '{plots.SHADES}' is none to all."
        + (" ^ holds a fact that the answer needs." if marked else ""),
        markup=False,
        soft_wrap=True,
    )
