"""The prompt of a command: a text of the user's, or a held-out retrieval prompt."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from sparse_dlm_attn import InvalidArgumentError, SparseAttentionError, UnknownNameError
from sparse_dlm_attn.files import read_text
from sparse_dlm_attn_tiny import retrieval

__all__ = [
    "DEFAULT_SEED",
    "DEFAULT_TASK",
    "Prompt",
    "PromptError",
    "prompt_of_task",
    "read_prompt",
]

DEFAULT_TASK = "chained"
DEFAULT_SEED = 1617
"""Chosen by its text: the sighting of the White Whale. Both facts lie far from the question."""


class PromptError(SparseAttentionError, ValueError):
    """A retrieval prompt was asked for that cannot be built."""


@dataclass(frozen=True)
class Prompt:
    """What a model is asked to continue.

    Parameters
    ----------
    text : bytes
        All of it.
    source : str
        Where it comes from, for people.
    question : str
        Its question, "" if it has none.
    answer : str or None
        The expected answer, without stop byte, if one is known.
    facts : tuple of (int, int)
        Byte spans that the answer needs, if known.
    task, seed : str, int, optional
        Those of a retrieval prompt.
    """

    text: bytes
    source: str
    question: str = ""
    answer: str | None = None
    facts: tuple[tuple[int, int], ...] = ()
    task: str | None = None
    seed: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the description of this prompt, and its SHA-256 in place of the text."""
        return {
            "source": self.source, "bytes": len(self.text), "sha256": hashlib.sha256(self.text).hexdigest(),
            "task": self.task, "seed": self.seed, "question": self.question, "answer": self.answer,
            "facts": [
                {"start": start, "end": end, "text": self.text[start:end].decode("latin-1")}
                for start, end in self.facts
            ],
        }

    def story(self) -> list[tuple[str, str]]:
        """Return what a reader wants to know about it: (heading, text) pairs."""
        beginning = " ".join(self.text[:200].decode("utf-8", "replace").split())
        lines = [("prompt", f"{len(self.text)} bytes, {self.source}"), ("begins", beginning[:100] + " ...")]
        for start, end in self.facts:
            fact = self.text[start:end].decode("ascii")
            distance = len(self.text) - end
            lines.append(("fact", f"{fact}  (at byte {start}, {distance} bytes before the answer)"))
        if self.question:
            lines.append(("question", self.question))
        if self.answer is not None:
            lines.append(("expected", self.answer))
        return lines


def prompt_of_task(task: str, length: int, seed: int, *, block_length: int) -> Prompt:
    """Return a held-out retrieval prompt.

    Parameters
    ----------
    task : str
        One of `retrieval.TASKS`.
    length : int
        Bytes, a multiple of ``block_length``.
    seed : int
        The same arguments give the same prompt.
    block_length : int
        Tokens a block.

    Raises
    ------
    SparseAttentionError
        If the task is unknown or no such prompt exists.
    """
    if task not in retrieval.TASKS:
        raise UnknownNameError("task", task, retrieval.TASKS)
    try:
        made = retrieval.make_prompt(
            task, length=length, seed=seed, haystack=retrieval.haystack_text(), block_length=block_length
        )
    except retrieval.RetrievalError as error:
        raise PromptError(f"--{error}.") from error
    question = made.text.decode("ascii").rpartition("Question: ")[2].partition("\n")[0]
    source = "from chapters of Moby-Dick that the model has never seen"
    return Prompt(made.text, source, question, made.answer, made.facts, task, seed)


def read_prompt(source: str, question: str | None, answer: str | None, limit: int) -> Prompt:
    """Return the prompt that a user wrote.

    Parameters
    ----------
    source : str
        A path, or "-" for standard input.
    question : str, optional
        Asked after the text, in the form that the model was trained with.
    answer : str, optional
        The expected answer.
    limit : int
        Bytes that the model can read.

    Raises
    ------
    SparseAttentionError
        If the text cannot be read, is empty, is too long or is not UTF-8.
    """
    text = read_text(source, limit)
    if question is not None:
        if not question.strip():
            raise InvalidArgumentError("--question", "must not be empty", repr(question))
        text = text.rstrip() + f"\nQuestion: {question.strip()}\nAnswer: ".encode()
    if len(text) > limit:
        raise InvalidArgumentError(
            "--prompt", f"must be at most {limit} bytes together with the question", f"{len(text)} bytes",
            "Shorten the text.",
        )
    name = "standard input" if source == "-" else source
    return Prompt(text, name, (question or "").strip(), answer)
