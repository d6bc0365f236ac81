"""Held-out retrieval over policies and budgets: how often an answer is exact, and what it cost to read."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait as connection_wait
from pathlib import Path
from typing import Any

from sparse_dlm_attn import SparseAttentionError
from sparse_dlm_attn.policy import check_count
from sparse_dlm_attn_tiny.comparison import DecodeSettings, PolicyResult, compare_together
from sparse_dlm_attn_tiny.model import TinyModel
from sparse_dlm_attn_tiny.policy_choice import PolicyChoice, choose_policies
from sparse_dlm_attn_tiny.prompts import prompt_of_task

__all__ = [
    "Evaluation",
    "PolicyScore",
    "Sample",
    "WorkerError",
    "choices_of",
    "evaluate",
    "scores_of",
]

Job = tuple[str, int]  # task and seed
PROMPTS_TOGETHER = 4
"""Prompts decoded side by side unless told otherwise: keys and values of 4096 bytes are 34 MB each, twice."""

THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


class WorkerError(SparseAttentionError, RuntimeError):
    """A process of a parallel evaluation died."""


@dataclass(frozen=True)
class Evaluation:
    """Everything that fixes an evaluation.

    Parameters
    ----------
    tasks : tuple of str
        Tasks of `sparse_dlm_attn_tiny.retrieval`.
    prompts : int
        Prompts a task; they have the seeds ``seed .. seed + prompts - 1``.
    length : int
        Bytes a prompt.
    seed : int
        First seed.
    policies : tuple of str
        As `get_policy` understands them; empty for the default ones.
    budgets : tuple of int
        Context tokens that a row may read, for policies with a budget; the others run once.
    settings : DecodeSettings
        How to decode.
    backend : str
        Backend by name.
    weights : str or None
        Weights file; None for the shipped one.
    """

    tasks: tuple[str, ...]
    prompts: int
    length: int
    seed: int
    policies: tuple[str, ...]
    budgets: tuple[int, ...]
    settings: DecodeSettings = field(default_factory=DecodeSettings)
    backend: str = "reference"
    weights: str | None = None

    def jobs(self) -> list[Job]:
        """Return (task, seed) of every prompt."""
        return [(task, self.seed + number) for number in range(self.prompts) for task in self.tasks]


@dataclass(frozen=True)
class Sample:
    """All policies on one prompt.

    Parameters
    ----------
    task, seed : str, int
        The prompt.
    answer : str
        Its expected answer.
    prefill_seconds : float
        Wall time of the prefill.
    results : tuple of PolicyResult
        One a policy and budget.
    """

    task: str
    seed: int
    answer: str
    prefill_seconds: float
    results: tuple[PolicyResult, ...]


@dataclass(frozen=True)
class PolicyScore:
    """One policy with one budget, over all prompts.

    Parameters
    ----------
    policy, specification, name : str
        With all parameters, without the common budget, and without parameters.
    parameters : dict
        Every parameter with its value.
    budget : int or None
        The common budget it was given.
    prompts, exact : int
        Prompts, and those answered exactly.
    tasks : dict
        The same a task.
    agreement : float
        Mean share of bytes equal to dense decoding.
    passes : float
        Mean passes a prompt.
    density, byte_share, bytes_read : float
        Over all prompts: tokens loaded / context tokens, bytes / those of dense, bytes; with pass 0 and
        all metadata.
    later_density, later_byte_share, later_bytes_read : float
        The same without pass 0 of each block.
    seconds : float
        Sum of wall times without prefill; prompts decoded together count an equal part each.
    """

    policy: str
    specification: str
    name: str
    parameters: dict[str, Any]
    budget: int | None
    prompts: int
    exact: int
    tasks: dict[str, dict[str, int]]
    agreement: float
    passes: float
    density: float
    byte_share: float
    bytes_read: float
    later_density: float
    later_byte_share: float
    later_bytes_read: float
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Return this score as JSON can say it."""
        return asdict(self)


def choices_of(evaluation: Evaluation) -> list[PolicyChoice]:
    """Return every policy with every budget, each once, `dense` first.

    Parameters
    ----------
    evaluation : Evaluation
        What to run.
    """
    chosen: dict[str, PolicyChoice] = {}
    for budget in evaluation.budgets:
        for choice in choose_policies(evaluation.policies, budget, evaluation.settings.page_size):
            chosen.setdefault(choice.label, choice)
    return sorted(chosen.values(), key=lambda choice: choice.label != "dense")


def evaluate(
    evaluation: Evaluation,
    *,
    workers: int = 1,
    together: int = PROMPTS_TOGETHER,
    on_sample: Callable[[Sample], None] | None = None,
) -> list[Sample]:
    """Run an evaluation.

    Parameters
    ----------
    evaluation : Evaluation
        What to run.
    workers : int
        Processes; with more than one, each keeps to one thread of the linear algebra library.
    together : int
        Prompts that a process decodes side by side. It changes times and memory, and results only within
        rounding, which may turn the choice of a page. So it does not follow from ``workers``.
    on_sample : callable, optional
        Called for every prompt, as soon as those decoded with it are done.

    Returns
    -------
    list of Sample
        In the order of `Evaluation.jobs`, whatever the number of workers.
    """
    jobs = evaluation.jobs()
    check_count("workers", workers, 1)
    check_count("together", together, 1)
    groups = [jobs[first : first + together] for first in range(0, len(jobs), together)]
    samples: dict[Job, Sample] = {}
    for sample in _samples(evaluation, groups, min(workers, len(groups))):
        samples[sample.task, sample.seed] = sample
        if on_sample is not None:
            on_sample(sample)
    return [samples[job] for job in jobs]


def _samples(evaluation: Evaluation, groups: list[list[Job]], workers: int) -> Iterator[Sample]:
    if workers <= 1:
        runner = _Runner(evaluation)
        for group in groups:
            yield from runner.run(group)
        return
    with _one_thread_each():
        pool = ProcessPoolExecutor(
            workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(evaluation,)
        )
        try:
            pending: set[Future[list[Sample]]] = {pool.submit(_run_in_worker, group) for group in groups}
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield from future.result()
            pool.shutdown()
        except BaseException as error:
            _stop(pool)
            if isinstance(error, BrokenProcessPool):
                raise WorkerError(
                    "a worker process ended unexpectedly, perhaps for want of memory. Use fewer --workers."
                ) from error
            raise


def _stop(pool: ProcessPoolExecutor) -> None:
    """Stop now, without waiting for prompts that are under way."""
    pool.shutdown(wait=False, cancel_futures=True)
    for child in active_children():
        child.terminate()


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let processes started meanwhile use one thread each: more would only fight for the cores."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update({name: value or "1" for name, value in before.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


class _Runner:
    """The model and the policies of an evaluation, loaded once a process."""

    def __init__(self, evaluation: Evaluation) -> None:
        weights = None if evaluation.weights is None else Path(evaluation.weights)
        self.evaluation = evaluation
        self.model = TinyModel.load(evaluation.backend, weights)
        self.choices = choices_of(evaluation)

    def run(self, group: Sequence[Job]) -> list[Sample]:
        """Decode some prompts with every policy."""
        settings, length = self.evaluation.settings, self.evaluation.length
        prompts = [
            prompt_of_task(task, length, seed, block_length=settings.block_length) for task, seed in group
        ]
        comparisons = compare_together(self.model, prompts, self.choices, settings)
        return [
            Sample(*job, prompt.answer or "", comparison.prefill_seconds, comparison.results)
            for job, prompt, comparison in zip(group, prompts, comparisons, strict=True)
        ]


_runner: _Runner | None = None  # of a worker process, set once by its initializer


def _start_worker(evaluation: Evaluation) -> None:
    global _runner
    import signal
    import threading

    # Ctrl-C reaches every process of the terminal; the parent decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _runner = _Runner(evaluation)


def _end_with_parent() -> None:
    """End this process when the one that started it is gone: a killed parent cannot stop its pool."""
    parent = parent_process()
    if parent is not None:
        connection_wait([parent.sentinel])
        os._exit(1)


def _run_in_worker(group: list[Job]) -> list[Sample]:
    assert _runner is not None
    return _runner.run(group)


def scores_of(samples: Sequence[Sample]) -> list[PolicyScore]:
    """Return one score for each policy and budget.

    Parameters
    ----------
    samples : sequence of Sample
        All prompts, with the same policies.
    """
    if not samples:
        return []
    return [
        _score([(sample.task, sample.results[place]) for sample in samples])
        for place in range(len(samples[0].results))
    ]


def _score(results: Sequence[tuple[str, PolicyResult]]) -> PolicyScore:
    choice, count = results[0][1].choice, len(results)
    tasks: dict[str, dict[str, int]] = {}
    for task, result in results:
        entry = tasks.setdefault(task, {"prompts": 0, "exact": 0})
        entry["prompts"] += 1
        entry["exact"] += bool(result.exact)

    def total(part: str, name: str) -> float:
        return math.fsum(getattr(getattr(result, part), name) for _, result in results)

    def share(part: str, top: str, bottom: str) -> float:
        below = total(part, bottom)
        return total(part, top) / below if below else 0.0

    return PolicyScore(
        policy=choice.label, specification=choice.specification, name=choice.name,
        parameters=choice.parameters, budget=choice.budget,
        prompts=count, exact=sum(bool(result.exact) for _, result in results), tasks=tasks,
        agreement=math.fsum(result.agreement for _, result in results) / count,
        passes=sum(result.passes for _, result in results) / count,
        density=share("everything", "tokens_read", "context_tokens"),
        byte_share=share("everything", "bytes_read", "dense_bytes"),
        bytes_read=total("everything", "bytes_read"),
        later_density=share("after_first_pass", "tokens_read", "context_tokens"),
        later_byte_share=share("after_first_pass", "bytes_read", "dense_bytes"),
        later_bytes_read=total("after_first_pass", "bytes_read"),
        seconds=math.fsum(result.seconds for _, result in results),
    )
