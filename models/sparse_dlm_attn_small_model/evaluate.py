"""Held-out retrieval over policies and budgets, in one process or several."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait

from sparse_dlm_attn import SparseAttentionError
from sparse_dlm_attn.policy import check_count
from sparse_dlm_attn_small_model.comparison import DecodeSettings, Sample, compare
from sparse_dlm_attn_small_model.model import TinyModel
from sparse_dlm_attn_small_model.policy_choice import PolicyChoice, choose_policies
from sparse_dlm_attn_small_model.retrieval import Prompt, make_prompt

PROMPTS_TOGETHER = 4
"""Prompts decoded side by side unless told otherwise: keys and values of 4096 bytes are 34 MB, thrice."""

THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
Job = tuple[str, int]  # task and seed


class WorkerError(SparseAttentionError, RuntimeError):
    """A process of a parallel evaluation died."""


@dataclass(frozen=True)
class Evaluation:
    """Everything that fixes an evaluation."""

    tasks: tuple[str, ...]  # of sparse_dlm_attn_small_model.retrieval
    prompts: int  # a task; they have the seeds seed .. seed + prompts - 1
    length: int  # bytes a prompt
    seed: int
    policies: tuple[str, ...]  # as get_policy understands them; empty for the default ones
    budgets: tuple[int, ...]  # for policies with a budget; the others run once
    settings: DecodeSettings = field(default_factory=DecodeSettings)
    backend: str = "reference"
    weights: str | None = None  # None for the shipped file

    def jobs(self) -> list[Job]:
        """Return (task, seed) of every prompt."""
        return [(task, self.seed + number) for number in range(self.prompts) for task in self.tasks]

    def choices(self) -> list[PolicyChoice]:
        """Return every policy with every budget, each once, `dense` first."""
        return choose_policies(self.policies, self.budgets, self.settings.page_size)

    def prompt(self, job: Job) -> Prompt:
        """Return one prompt."""
        task, seed = job
        return make_prompt(task, length=self.length, seed=seed, block_length=self.settings.block_length)


def evaluate(
    evaluation: Evaluation,
    *,
    workers: int = 1,
    together: int = PROMPTS_TOGETHER,
    on_sample: Callable[[Sample], None] | None = None,
) -> list[Sample]:
    """Run an evaluation; return its samples in the order of `Evaluation.jobs`.

    Each of several ``workers``, processes, keeps to one thread of the linear algebra library and decodes some
    prompts ``together``. That number changes times and memory, and results only within rounding, which may
    turn the choice of a page, so it does not follow from ``workers``. ``on_sample`` is called for every
    prompt, as soon as those decoded with it are done.
    """
    jobs = evaluation.jobs()
    check_count("workers", workers, 1)
    check_count("together", together, 1)
    groups = [jobs[first : first + together] for first in range(0, len(jobs), together)]
    samples: dict[Job, Sample] = {}
    for group, done in _runs(evaluation, groups, min(workers, len(groups))):
        for job, sample in zip(group, done, strict=True):
            samples[job] = sample
            if on_sample is not None:
                on_sample(sample)
    return [samples[job] for job in jobs]


def _runs(evaluation: Evaluation, groups: list[list[Job]], workers: int) -> Iterator[tuple[list[Job], list[Sample]]]:
    """Decode groups of prompts, here or in processes; yield each as soon as it is done."""
    if workers <= 1:
        run = _runner(evaluation)
        yield from ((group, run(group)) for group in groups)
        return
    with _one_thread_each():
        pool = ProcessPoolExecutor(
            workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(evaluation,)
        )
        try:
            pending = {pool.submit(_run_in_worker, group): group for group in groups}
            for future in as_completed(pending):
                yield pending[future], future.result()
            pool.shutdown()
        except BaseException as error:  # stop now, without waiting for prompts that are under way
            pool.shutdown(wait=False, cancel_futures=True)
            for child in active_children():
                child.terminate()
            if isinstance(error, BrokenProcessPool):
                raise WorkerError(
                    "a worker process ended unexpectedly, perhaps for want of memory. Use fewer --workers."
                ) from error
            raise


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let processes started meanwhile use one thread each: more would only fight for the cores."""
    added = [name for name in THREAD_VARIABLES if not os.environ.get(name)]
    os.environ.update(dict.fromkeys(added, "1"))
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _runner(evaluation: Evaluation) -> Callable[[list[Job]], list[Sample]]:
    """Load the model and the policies once; return what decodes some prompts with them."""
    model = TinyModel.load(evaluation.backend, evaluation.weights)
    choices = evaluation.choices()

    def run(group: list[Job]) -> list[Sample]:
        return compare(model, [evaluation.prompt(job) for job in group], choices, evaluation.settings)

    return run


_run: Callable[[list[Job]], list[Sample]] | None = None  # of a worker process, set once by its initializer


def _start_worker(evaluation: Evaluation) -> None:
    """Prepare a worker process."""
    global _run
    import signal
    import threading

    # Ctrl-C reaches every process of the terminal; the parent decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _run = _runner(evaluation)


def _end_with_parent() -> None:
    """End this process when the one that started it is gone: a killed parent cannot stop its pool."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _run_in_worker(group: list[Job]) -> list[Sample]:
    """Decode some prompts in this worker process."""
    assert _run is not None
    return _run(group)
