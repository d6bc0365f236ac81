"""The command `evaluate`: accuracy against bytes read, over many held-out prompts."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from sparse_dlm_attn import InvalidArgumentError, UnknownNameError
from sparse_dlm_attn.cli.console import note, print_json, progress, result_console
from sparse_dlm_attn.cli.options import named_as_options
from sparse_dlm_attn.files import check_target
from sparse_dlm_attn.policy import check_count, check_fraction
from sparse_dlm_attn_small_model import plots
from sparse_dlm_attn_small_model.commands import options
from sparse_dlm_attn_small_model.commands.report import score_table
from sparse_dlm_attn_small_model.comparison import scores_of
from sparse_dlm_attn_small_model.evaluate import Evaluation
from sparse_dlm_attn_small_model.evaluate import evaluate as run_evaluation
from sparse_dlm_attn_small_model.retrieval import TASKS

DEFAULT_TASKS = ("single-key", "chained")
MOST_PROMPTS, MOST_WORKERS = 10_000, 256
FULL_PROMPTS, DEFAULT_PROMPTS = 20, 4
FULL_BUDGETS, DEFAULT_BUDGETS = (16, 32, 64, 128, 256), (64, 256)


def evaluate(
    prompts: Annotated[int | None, typer.Option(help="Prompts a task.", show_default="4, with --full 20")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Task; repeatable.", show_default="single-key and chained, with --full all")
    ] = None,
    length: Annotated[int, typer.Option(help="Bytes a prompt.")] = options.DEFAULT_LENGTH,
    seed: Annotated[int, typer.Option(help="First seed; prompt n of a task has seed + n.")] = 0,
    policy: options.Policies = None,
    budget: Annotated[
        list[int] | None,
        typer.Option(
            help="Context tokens a row may read; repeatable.", show_default="64 and 256, with --full 16 to 256"
        ),
    ] = None,
    backend: options.BackendName = "reference",
    device: options.Device = None,
    block_length: options.BlockLength = 16,
    steps: options.Steps = None,
    threshold: options.Threshold = None,
    page_size: options.PageSize = 16,
    full: Annotated[bool, typer.Option("--full", help="All tasks, more prompts, more budgets.")] = False,
    workers: Annotated[int | None, typer.Option(help="Processes.", show_default="one a core")] = None,
    weights: options.Weights = None,
    out: Annotated[Path, typer.Option(help="Results (JSON).", metavar="FILE")] = Path("evaluation.json"),
    plot: Annotated[
        Path | None, typer.Option(help="Draw a picture too (PNG).", metavar="FILE", show_default="none")
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(help="Exit with 1 unless this share of answers is exact; repeatable.", metavar="POLICY=SHARE"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Evaluate policies on held-out retrieval prompts: exact answers against bytes read."""
    backend = options.placed(backend, device)
    for name, value, limit in (("--prompts", prompts, MOST_PROMPTS), ("--workers", workers, MOST_WORKERS)):
        if value is not None:
            check_count(name, value, 1)
            if value > limit:
                raise InvalidArgumentError(name, f"must be at most {limit}", value)
    evaluation = Evaluation(
        tasks=tuple(dict.fromkeys(task or (TASKS if full else DEFAULT_TASKS))),
        prompts=prompts or (FULL_PROMPTS if full else DEFAULT_PROMPTS),
        length=length,
        seed=seed,
        policies=tuple(policy or ()),
        budgets=tuple(dict.fromkeys(budget or (FULL_BUDGETS if full else DEFAULT_BUDGETS))),
        settings=options.check_settings(block_length, steps, threshold, page_size),
        backend=backend,
        weights=None if weights is None else str(weights),
    )
    labels = [choice.label for choice in evaluation.choices()]
    wanted = _requirements(require or (), labels)
    check_target(out, "--out")
    if plot is not None:
        plots.require_matplotlib()
        check_target(plot, "--plot")
    # Fail here, in one process, where a prompt, the backend or weights are no good.
    with named_as_options():
        made = [evaluation.prompt(job) for job in evaluation.jobs()[: len(evaluation.tasks)]]
    model = options.load_model(backend, weights, evaluation.settings)
    model.tokens_of(made[0].text)
    environment = options.environment_record(backend, weights, model, page_size)
    jobs, workers = len(evaluation.jobs()), workers or os.cpu_count() or 1
    note(
        f"{jobs} prompts of {evaluation.length} bytes ({', '.join(evaluation.tasks)}; seeds from "
        f"{evaluation.seed}), {len(labels)} policies and budgets, {min(workers, jobs)} processes"
    )
    with progress() as bars:
        bar = bars.add_task("prompts", total=jobs)
        samples = run_evaluation(evaluation, workers=workers, on_sample=lambda sample: bars.advance(bar))
    scores = scores_of(samples)
    report = {
        "environment": environment,
        "evaluation": dataclasses.asdict(evaluation),
        "scores": [score.as_json() for score in scores],
        "prompts": [
            {
                "task": sample.prompt.task,
                "seed": sample.prompt.seed,
                "answer": sample.prompt.answer,
                "prefill_seconds": round(sample.prefill_seconds, 4),
                "results": [result.as_json() for result in sample.results],
            }
            for sample in samples
        ],
    }
    options.write(out, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode(), "--out")
    if plot is not None:
        tasks = ", ".join(evaluation.tasks)
        title = f"{tasks}: {evaluation.prompts} prompts a task of {evaluation.length} bytes"
        options.write(plot, plots.accuracy_picture(scores, title), "--plot")
    if as_json:
        print_json([score.as_json() for score in scores])
    else:
        console = result_console()
        console.print(score_table(scores, console.width))
    failed = [score for score in scores if score.exact < wanted.get(score.choice.label, 0.0) * score.prompts]
    for score in failed:
        label, share = score.choice.label, wanted[score.choice.label]
        note(f"{label}: {score.exact} of {score.prompts} exact, required {100 * share:g} %")
    if failed:
        raise typer.Exit(1)


def _requirements(texts: Sequence[str], labels: list[str]) -> dict[str, float]:
    """Parse POLICY=SHARE; a policy's own parameters contain "=" too, so the last one counts."""
    wanted = {}
    for text in texts:
        label, _, share = text.rpartition("=")
        try:
            value = float(share)
        except ValueError:
            raise InvalidArgumentError("--require", "must be written POLICY=SHARE", repr(text)) from None
        check_fraction("--require", value)
        if label not in labels:
            raise UnknownNameError("policy in --require", label, labels)
        wanted[label] = value
    return wanted
