"""Options that several commands share, and what they mean together. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from sparse_dlm_attn import InvalidArgumentError, Problem
from sparse_dlm_attn.cli.options import named_as_options
from sparse_dlm_attn.policy import check_count
from sparse_dlm_attn.registry import split_parameters

if TYPE_CHECKING:
    from sparse_dlm_attn_tiny.comparison import DecodeSettings
    from sparse_dlm_attn_tiny.model import TinyModel
    from sparse_dlm_attn_tiny.prompts import Prompt

__all__ = ["check_settings", "environment_record", "load_model", "pick_prompt"]

DEFAULT_BUDGET = 128
DEFAULT_LENGTH = 4096

PromptFile = Annotated[
    str | None,
    typer.Option(
        "--prompt", help="UTF-8 text to continue, or '-' for standard input.", metavar="FILE",
        show_default="a held-out retrieval prompt",
    ),
]
Question = Annotated[
    str | None,
    typer.Option(help="Asked after the text of --prompt, e.g. 'What is the code of Rimon?'.", metavar="TEXT"),
]
Answer = Annotated[
    str | None, typer.Option(help="Expected answer to --question, to mark answers exact.", metavar="TEXT")
]
Task = Annotated[str | None, typer.Option(help="Task of the retrieval prompt.", show_default="chained")]
Length = Annotated[int | None, typer.Option(help="Bytes of the retrieval prompt.", show_default="4096")]
Seed = Annotated[int | None, typer.Option(help="Seed of the retrieval prompt.", show_default="1617")]
Policies = Annotated[
    list[str] | None,
    typer.Option(
        "--policy", help="Policy; repeatable; `sparse-dlm-attn policies` lists them.",
        metavar="NAME[:key=value,...]", show_default="a selection",
    ),
]
Budget = Annotated[
    int, typer.Option(help="Context tokens a row may read, for every policy that does not set its own.")
]
BackendName = Annotated[
    str,
    typer.Option(help="Backend that computes; `sparse-dlm-attn backends` lists them.",
                 metavar="NAME[:key=value,...]"),
]
Device = Annotated[
    str | None,
    typer.Option(help="Where the backend computes, e.g. cuda; the same as --backend NAME:device=...",
                 show_default="the backend's own"),
]
BlockLength = Annotated[int, typer.Option(help="Tokens denoised together: 8, 16 or 32.")]
Steps = Annotated[int | None, typer.Option(help="Denoising passes of a block.", show_default="8")]
Threshold = Annotated[
    float | None,
    typer.Option(help="Instead of --steps: decode every token whose confidence exceeds this (0..1)."),
]
PageSize = Annotated[int, typer.Option(help="Context tokens a page.")]
MaxBlocks = Annotated[
    int | None,
    typer.Option(
        help="Blocks to decode at most.", show_default="what the expected answer needs, 4 if none is known"
    ),
]
Weights = Annotated[
    Path | None, typer.Option(help="Weights file (safetensors) instead of the shipped one.", metavar="FILE")
]


def check_settings(
    block_length: int, steps: int | None, threshold: float | None, page_size: int, max_blocks: int | None
) -> DecodeSettings:
    """Return the settings of a decoding, checked before anything is loaded.

    Raises
    ------
    InvalidArgumentError
        If one is out of range, or if both --steps and --threshold are given.
    """
    from sparse_dlm_attn_tiny.comparison import DecodeSettings
    from sparse_dlm_attn_tiny.model import check_block_length
    from sparse_dlm_attn_tiny.schedule import Schedule

    for name, value in (("--page-size", page_size), ("--max-blocks", max_blocks)):
        if value is not None:
            check_count(name, value, 1)
    if steps is not None and threshold is not None:
        raise InvalidArgumentError(
            "--steps", "must not be given together with --threshold", f"{steps} and {threshold}",
            "Leave one of them out.",
        )
    with named_as_options():
        Schedule(check_block_length(block_length), steps, threshold)
    return DecodeSettings(block_length, steps, threshold, page_size, max_blocks)


def pick_prompt(
    file: str | None,
    question: str | None,
    answer: str | None,
    task: str | None,
    length: int | None,
    seed: int | None,
    block_length: int,
    limit: int,
    default_length: int = DEFAULT_LENGTH,
) -> Prompt:
    """Return the user's prompt, or the retrieval prompt that the other options describe.

    Raises
    ------
    SparseAttentionError
        If options contradict each other or the prompt cannot be had.
    """
    from sparse_dlm_attn_tiny import prompts

    own = {"--question": question, "--answer": answer}
    made = {"--task": task, "--length": length, "--seed": seed}
    useless = [name for name, value in (made if file is not None else own).items() if value is not None]
    if useless:
        rule = "must not be given together with --prompt" if file is not None else "needs --prompt"
        raise InvalidArgumentError(useless[0], rule, repr({**own, **made}[useless[0]]))
    if file is not None:
        return prompts.read_prompt(file, question, answer, limit)
    return prompts.prompt_of_task(
        prompts.DEFAULT_TASK if task is None else task,
        default_length if length is None else length,
        prompts.DEFAULT_SEED if seed is None else seed,
        block_length=block_length,
    )


def placed(backend: str, device: str | None) -> str:
    """Return the backend's specification with the device that was asked for beside it.

    Parameters
    ----------
    backend : str
        ``"name"`` or ``"name:key=value,..."``.
    device : str or None
        What ``--device`` gave.

    Raises
    ------
    InvalidArgumentError
        If ``device`` is no name, or ``backend`` names a device too.
    """
    if device is not None and (not device.strip() or "," in device):
        raise InvalidArgumentError("--device", "must be one device, such as cpu or cuda:1", repr(device))
    if device is not None and "device" in split_parameters("backend", backend)[1]:
        raise InvalidArgumentError(
            "--device", "must not be given together with a device in --backend", f"{device} and {backend}",
            "Leave one of them out.",
        )
    return backend if device is None else f"{backend}{',' if '=' in backend else ':'}device={device}"


def load_model(backend: str, weights: Path | None, settings: DecodeSettings) -> Any:
    """Return the model with its backend, once it is known that ``settings`` fit it.

    Raises
    ------
    SparseAttentionError
        If backend or weights cannot be had, or a length exceeds the model's context.
    """
    from sparse_dlm_attn_tiny.model import TinyModel

    model = TinyModel.load(backend, weights)
    limit = model.config.max_context
    if settings.page_size > limit:
        raise InvalidArgumentError(
            "--page-size", f"must be at most {limit} tokens, the model's context", settings.page_size
        )
    if settings.max_blocks is not None and settings.max_blocks * settings.block_length > limit:
        raise InvalidArgumentError(
            "--max-blocks", f"must be at most {limit // settings.block_length}, so that the blocks fit the "
            f"model's context of {limit} bytes", settings.max_blocks,
        )
    return model


def environment_record(
    backend: str, weights: Path | None, model: TinyModel, page_size: int
) -> dict[str, Any]:
    """Return what a report must say about the software that made it.

    ``attention_path`` is how the backend reads the pages of a cache such as the model's: what "auto" came to.
    A backend that has several ways says so by a method ``path_for``; of others it is the name.
    """
    import platform
    from importlib.metadata import version

    from sparse_dlm_attn import SPEC_VERSION, __version__

    return {
        "sparse_dlm_attn": __version__,
        "specification": SPEC_VERSION,
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "machine": platform.machine(),
        "backend": backend,
        "backend_notes": model.backend.capabilities.notes,
        "attention_path": _attention_path(model, page_size),
        "weights": "shipped" if weights is None else str(weights),
        "weights_sha256": _sha256(weights),
    }


def _attention_path(model: TinyModel, page_size: int) -> str:
    context = model.empty_cache(page_size=page_size).contexts()[0]
    shape = (1, model.config.query_heads, 1, model.config.head_dim)
    q = model.backend.asarray(np.zeros(shape, dtype=np.float32), dtype="float32")
    path_for = getattr(model.backend, "path_for", None)
    return model.backend.name if path_for is None else str(path_for(Problem.of(q, context), context))


def _sha256(weights: Path | None) -> str:
    import hashlib

    from sparse_dlm_attn_tiny.weights import SHIPPED

    return hashlib.sha256((weights or SHIPPED).read_bytes()).hexdigest()
