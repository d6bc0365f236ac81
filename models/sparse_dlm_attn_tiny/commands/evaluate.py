"""The command `evaluate`: accuracy against bytes read, over many held-out prompts."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparse_dlm_attn import InvalidArgumentError, UnknownNameError
from sparse_dlm_attn.cli.console import note, print_json, progress, result_console
from sparse_dlm_attn.files import check_target, write_atomically
from sparse_dlm_attn.policy import check_count, check_fraction
from sparse_dlm_attn_tiny.commands import options

if TYPE_CHECKING:
    from sparse_dlm_attn_tiny.evaluate import Evaluation, PolicyScore, Sample
    from sparse_dlm_attn_tiny.model import TinyModel

__all__ = ["evaluate"]

DEFAULT_TASKS = ("single-key", "chained")
DEFAULT_LENGTH = 4096
MOST_PROMPTS, MOST_WORKERS = 10_000, 256
FULL_PROMPTS, DEFAULT_PROMPTS = 20, 4
FULL_BUDGETS, DEFAULT_BUDGETS = (16, 32, 64, 128, 256), (64, 256)


def evaluate(
    context: typer.Context,
    prompts: Annotated[
        int | None, typer.Option(help="Prompts a task.", show_default="4, with --full 20")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Task; repeatable.", show_default="single-key and chained, with --full all"),
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Bytes a prompt.", show_default="4096, with --table its own")
    ] = None,
    seed: Annotated[int, typer.Option(help="First seed; prompt n of a task has seed + n.")] = 0,
    policy: options.Policies = None,
    budget: Annotated[
        list[int] | None,
        typer.Option(
            help="Context tokens a row may read; repeatable.",
            show_default="64 and 256, with --full 16 to 256",
        ),
    ] = None,
    backend: options.BackendName = "reference",
    device: options.Device = None,
    block_length: options.BlockLength = 16,
    steps: options.Steps = None,
    threshold: options.Threshold = None,
    page_size: options.PageSize = 16,
    table: Annotated[
        str | None,
        typer.Option(help="Instead: a paper's comparison, sparsed or losa, which fixes tasks and policies."),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="All tasks, more prompts, more budgets.")] = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes.", show_default="one a core")
    ] = None,
    weights: options.Weights = None,
    out: Annotated[Path, typer.Option(help="Results (JSON).", metavar="FILE")] = Path("evaluation.json"),
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw a picture too (PNG).", metavar="FILE", show_default="none"),
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(help="Exit with 1 unless this share of answers is exact; repeatable.",
                     metavar="POLICY=SHARE"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Evaluate policies on held-out retrieval prompts: exact answers against bytes read."""
    from sparse_dlm_attn_tiny.evaluate import Evaluation, choices_of, scores_of
    from sparse_dlm_attn_tiny.retrieval import TASKS

    backend = options.placed(backend, device)
    _check_range("--prompts", prompts, MOST_PROMPTS)
    _check_range("--workers", workers, MOST_WORKERS)
    if table is not None:
        from sparse_dlm_attn_tiny.commands.table import check_alone, evaluate_table
        from sparse_dlm_attn_tiny.tables import table_named

        check_alone(
            context, "task", "policy", "budget", "block_length", "steps", "threshold", "page_size", "full",
            "workers", "require",
        )
        table_named(table)
        _check_targets(out, plot)
        evaluate_table(
            table, prompts=prompts, length=length, seed=seed, backend=backend, weights=weights, out=out,
            picture=plot, as_json=as_json,
        )
        return
    evaluation = Evaluation(
        tasks=tuple(dict.fromkeys(task or (TASKS if full else DEFAULT_TASKS))),
        prompts=prompts or (FULL_PROMPTS if full else DEFAULT_PROMPTS),
        length=DEFAULT_LENGTH if length is None else length, seed=seed,
        policies=tuple(policy or ()),
        budgets=tuple(dict.fromkeys(budget or (FULL_BUDGETS if full else DEFAULT_BUDGETS))),
        settings=options.check_settings(block_length, steps, threshold, page_size, None), backend=backend,
        weights=None if weights is None else str(weights),
    )
    labels = [choice.label for choice in choices_of(evaluation)]
    wanted = _requirements(require or (), labels)
    _check_targets(out, plot)
    model = _check_prompts(evaluation, weights)
    environment = options.environment_record(backend, weights, model, page_size)
    samples = _run(evaluation, workers or os.cpu_count() or 1, len(labels))
    scores = scores_of(samples)
    record = _record(evaluation, samples, scores, environment)
    write_atomically(out, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode(), "--out")
    note(f"wrote {out}")
    if plot is not None:
        _draw(plot, evaluation, scores)
    _print(scores, as_json)
    _judge(scores, wanted)


def _check_range(name: str, value: int | None, most: int) -> None:
    if value is None:
        return
    check_count(name, value, 1)
    if value > most:
        raise InvalidArgumentError(name, f"must be at most {most}", value)


def _requirements(texts: Any, labels: list[str]) -> dict[str, float]:
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


def _check_targets(out: Path, plot: Path | None) -> None:
    """Refuse now what could not be written later."""
    from sparse_dlm_attn_tiny.plots import require_matplotlib

    check_target(out, "--out")
    if plot is not None:
        require_matplotlib()
        check_target(plot, "--plot")


def _check_prompts(evaluation: Evaluation, weights: Path | None) -> TinyModel:
    """Return the model; fail here, in one process, where a prompt, the backend or weights are no good."""
    from sparse_dlm_attn_tiny.prompts import prompt_of_task

    for task in evaluation.tasks:
        prompt = prompt_of_task(
            task, evaluation.length, evaluation.seed, block_length=evaluation.settings.block_length
        )
    model: TinyModel = options.load_model(evaluation.backend, weights, evaluation.settings)
    model.tokens_of(prompt.text)
    return model


def _run(evaluation: Evaluation, workers: int, policies: int) -> list[Sample]:
    from sparse_dlm_attn_tiny.evaluate import evaluate as run_evaluation

    jobs = evaluation.jobs()
    note(
        f"{len(jobs)} prompts of {evaluation.length} bytes ({', '.join(evaluation.tasks)}; seeds from "
        f"{evaluation.seed}), {policies} policies and budgets, {min(workers, len(jobs))} processes"
    )
    with progress() as bars:
        bar = bars.add_task("prompts", total=len(jobs))
        return run_evaluation(
            evaluation, workers=workers, on_sample=lambda sample: bars.advance(bar)
        )


def _record(
    evaluation: Evaluation, samples: list[Sample], scores: list[PolicyScore], environment: dict[str, Any]
) -> dict[str, Any]:
    return {
        "environment": environment,
        "evaluation": dataclasses.asdict(evaluation),
        "scores": [score.as_json() for score in scores],
        "prompts": [
            {
                "task": sample.task, "seed": sample.seed, "answer": sample.answer,
                "prefill_seconds": round(sample.prefill_seconds, 4),
                "results": [_without_parameters(result.as_json()) for result in sample.results],
            }
            for sample in samples
        ],
    }


def _without_parameters(result: dict[str, Any]) -> dict[str, Any]:
    """Leave out what the scores say once for all prompts."""
    return {key: value for key, value in result.items() if key not in ("name", "parameters", "budget")}


def _draw(picture: Path, evaluation: Evaluation, scores: list[PolicyScore]) -> None:
    from sparse_dlm_attn_tiny.plots import accuracy_picture

    title = (
        f"{', '.join(evaluation.tasks)}: {evaluation.prompts} prompts a task of {evaluation.length} bytes"
    )
    write_atomically(picture, accuracy_picture(scores, title), "--plot")
    note(f"wrote {picture}")


def _print(scores: list[PolicyScore], as_json: bool) -> None:
    from sparse_dlm_attn_tiny.report import score_table

    if as_json:
        print_json([score.as_json() for score in scores])
        return
    console = result_console()
    console.print(score_table(scores, console.width))


def _judge(scores: list[PolicyScore], wanted: dict[str, float]) -> None:
    """Exit with 1 if a policy stayed below what was required of it."""
    failed = False
    for score in scores:
        share = wanted.get(score.policy)
        if share is not None and score.exact < share * score.prompts:
            note(f"{score.policy}: {score.exact} of {score.prompts} exact, required {100 * share:g} %")
            failed = True
    if failed:
        raise typer.Exit(1)
