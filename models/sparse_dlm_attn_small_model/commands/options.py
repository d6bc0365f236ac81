"""Options that several commands share, and what they mean together."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from sparse_dlm_attn import SPEC_VERSION, InvalidArgumentError, __version__
from sparse_dlm_attn.capabilities import Problem
from sparse_dlm_attn.cli.console import note
from sparse_dlm_attn.cli.options import named_as_options
from sparse_dlm_attn.files import read_text, write_atomically
from sparse_dlm_attn.policy import check_count
from sparse_dlm_attn.registry import split_parameters
from sparse_dlm_attn_small_model.comparison import DecodeSettings
from sparse_dlm_attn_small_model.model import TinyModel, check_block_length
from sparse_dlm_attn_small_model.retrieval import Prompt, make_prompt
from sparse_dlm_attn_small_model.schedule import Schedule
from sparse_dlm_attn_small_model.weights import SHIPPED

DEFAULT_BUDGET = 128
DEFAULT_LENGTH = 4096
DEFAULT_TASK = "chained"
DEFAULT_SEED = 1617
"""Chosen by its text: the sighting of the White Whale. Both facts lie far from the question."""

PromptFile = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        metavar="FILE",
        show_default="a held-out retrieval prompt",
        help="UTF-8 text to continue, or '-' for standard input.",
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
        "--policy",
        help="Policy; repeatable; `sparse-dlm-attn policies` lists them.",
        metavar="NAME[:key=value,...]",
        show_default="a selection",
    ),
]
Budget = Annotated[int, typer.Option(help="Context tokens a row may read, for every policy that does not set its own.")]
BackendName = Annotated[
    str,
    typer.Option(help="Backend that computes; `sparse-dlm-attn backends` lists them.", metavar="NAME[:key=value,...]"),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Where the backend computes, e.g. cuda; the same as --backend NAME:device=...",
        show_default="the backend's own",
    ),
]
BlockLength = Annotated[int, typer.Option(help="Tokens denoised together: 8, 16 or 32.")]
Steps = Annotated[int | None, typer.Option(help="Denoising passes of a block.", show_default="8")]
Threshold = Annotated[
    float | None, typer.Option(help="Instead of --steps: decode every token whose confidence exceeds this (0..1).")
]
PageSize = Annotated[int, typer.Option(help="Context tokens a page.")]
MaxBlocks = Annotated[
    int | None,
    typer.Option(help="Blocks to decode at most.", show_default="what the expected answer needs, 4 if none is known"),
]
Weights = Annotated[
    Path | None, typer.Option(help="Weights file (safetensors) instead of the shipped one.", metavar="FILE")
]


def placed(backend: str, device: str | None) -> str:
    """Return the backend's specification with the device that ``--device`` asked for beside it."""
    if device is None:
        return backend
    if not device.strip() or "," in device:
        raise InvalidArgumentError("--device", "must be one device, such as cpu or cuda:1", repr(device))
    if "device" in split_parameters("backend", backend)[1]:
        raise InvalidArgumentError(
            "--device",
            "must not be given together with a device in --backend",
            f"{device} and {backend}",
            "Leave one of them out.",
        )
    return f"{backend}{',' if '=' in backend else ':'}device={device}"


def check_settings(
    block_length: int, steps: int | None, threshold: float | None, page_size: int, max_blocks: int | None = None
) -> DecodeSettings:
    """Return the settings of a decoding, checked before anything is loaded."""
    for name, value in (("--page-size", page_size), ("--max-blocks", max_blocks)):
        if value is not None:
            check_count(name, value, 1)
    with named_as_options():
        Schedule(check_block_length(block_length), steps, threshold)
    return DecodeSettings(block_length, steps, threshold, page_size, max_blocks)


def load_model(backend: str, weights: Path | None, settings: DecodeSettings) -> TinyModel:
    """Return the model with its backend, once it is known that ``settings`` fit it."""
    model = TinyModel.load(backend, weights)
    limit = model.config.max_context
    if settings.page_size > limit:
        raise InvalidArgumentError(
            "--page-size", f"must be at most {limit} tokens, the model's context", settings.page_size
        )
    if settings.max_blocks is not None and settings.max_blocks * settings.block_length > limit:
        raise InvalidArgumentError(
            "--max-blocks",
            f"must be at most {limit // settings.block_length}, so that the blocks fit the "
            f"model's context of {limit} bytes",
            settings.max_blocks,
        )
    return model


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
    """Return the user's prompt, of at most ``limit`` bytes, or the retrieval prompt that the options name."""
    own = {"--question": question, "--answer": answer}
    made = {"--task": task, "--length": length, "--seed": seed}
    useless = [name for name, value in (made if file is not None else own).items() if value is not None]
    if useless:
        rule = "must not be given together with --prompt" if file is not None else "needs --prompt"
        raise InvalidArgumentError(useless[0], rule, repr({**own, **made}[useless[0]]))
    if file is not None:
        return _read_prompt(file, question, answer, limit)
    with named_as_options():
        return make_prompt(
            DEFAULT_TASK if task is None else task,
            length=default_length if length is None else length,
            seed=DEFAULT_SEED if seed is None else seed,
            block_length=block_length,
        )


def _read_prompt(source: str, question: str | None, answer: str | None, limit: int) -> Prompt:
    """Return the prompt in a file, or in standard input for "-", with the question that it is asked."""
    text = read_text(source, limit)
    if question is not None:
        if not question.strip():
            raise InvalidArgumentError("--question", "must not be empty", repr(question))
        text = text.rstrip() + f"\nQuestion: {question.strip()}\nAnswer: ".encode()
    if len(text) > limit:
        raise InvalidArgumentError(
            "--prompt",
            f"must be at most {limit} bytes together with the question",
            f"{len(text)} bytes",
            "Shorten the text.",
        )
    name = "standard input" if source == "-" else source
    return Prompt(text, name, (question or "").strip(), answer)


def environment_record(backend: str, weights: Path | None, model: TinyModel, page_size: int) -> dict[str, Any]:
    """Return what a report must say about the software that made it.

    ``attention_path`` is how the backend reads the pages of a cache such as the model's: what "auto" came to.
    A backend that has several ways says so by a method ``path_for``; of others it is the name.
    """
    path_for, path = getattr(model.backend, "path_for", None), model.backend.name
    if path_for is not None:
        context = model.empty_cache(page_size=page_size).contexts()[0]
        shape = (1, model.config.query_heads, 1, model.config.head_dim)
        q = model.backend.asarray(np.zeros(shape, dtype=np.float32), dtype="float32")
        path = str(path_for(Problem.of(q, context), context))
    return {
        "sparse_dlm_attn": __version__,
        "specification": SPEC_VERSION,
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "machine": platform.machine(),
        "backend": backend,
        "backend_notes": model.backend.capabilities.notes,
        "attention_path": path,
        "weights": "shipped" if weights is None else str(weights),
        "weights_sha256": hashlib.sha256((weights or SHIPPED).read_bytes()).hexdigest(),
    }


def write(path: Path, data: bytes, option: str) -> None:
    """Write a file that an option names, and say so."""
    write_atomically(path, data, option)
    note(f"wrote {path}")
