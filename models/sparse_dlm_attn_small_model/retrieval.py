"""Retrieval tasks: facts hidden in English text, a question at the end, an exact answer.

All tasks share one language, so that a model needs one lookup mechanism for all of them::

    The code of Dumel is 48213.                  a fact
    The code of Kavor is Dumel.                  a fact whose value is another key (a chain)
    The codes of Rimon are 48213, 55102, 90412.  a fact with several values

    Question: What is the code of Kavor?
    Answer: Dumel is 48213.<stop>

The chained answer with its stop byte is exactly 16 bytes. When the prompt ends on a boundary of a
16-token block, the key of the second lookup is therefore decoded in the same block as the code.

Training and evaluation both use this module. Names whose CRC-32 is divisible by ten are held out:
training never shows them.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import math
import random
import re
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparse_dlm_attn.errors import InvalidArgumentError, UnknownNameError
from sparse_dlm_attn.policy import check_count

TASKS = ("single-key", "multi-key", "several-values", "several-keys", "chained")
"""Names of the tasks `make_prompt` knows."""

CONSONANTS, VOWELS = "bdfghjklmnprstvwyz", "aeiou"
HELD_OUT_SHARE = 10
MIN_MULTI_KEY_FACTS, MAX_MULTI_KEY_FACTS = 9, 24
FACT_REGION = 0.75
_SENTENCE_END = re.compile(rb"""[.?!]["']?(?=\s)""")


@dataclass(frozen=True)
class Prompt:
    """What a model is asked to continue."""

    text: bytes  # all of it; a retrieval prompt ends with "Answer: "
    source: str  # where it comes from, for people
    question: str = ""
    answer: str | None = None  # the only correct one, without the stop byte, if one is known
    facts: tuple[tuple[int, int], ...] = ()  # byte spans of those that the answer needs, in that order
    task: str | None = None
    seed: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the description of this prompt, and its SHA-256 in place of the text."""
        return {
            "source": self.source,
            "bytes": len(self.text),
            "sha256": hashlib.sha256(self.text).hexdigest(),
            "task": self.task,
            "seed": self.seed,
            "question": self.question,
            "answer": self.answer,
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
            where = f"(at byte {start}, {len(self.text) - end} bytes before the answer)"
            lines.append(("fact", f"{self.text[start:end].decode('ascii')}  {where}"))
        if self.question:
            lines.append(("question", self.question))
        if self.answer is not None:
            lines.append(("expected", self.answer))
        return lines


def is_held_out_name(name: str) -> bool:
    """Return whether training never shows a name such as ``"Dumel"``."""
    return zlib.crc32(name.encode("ascii")) % HELD_OUT_SHARE == 0


def draw_name(rng: random.Random, *, held_out: bool) -> str:
    """Return a five-letter name such as ``"Dumel"``, one that training never shows or one of the others."""
    while True:
        letters = [
            alphabet[rng.randrange(len(alphabet))] for alphabet in (CONSONANTS, VOWELS, CONSONANTS, VOWELS, CONSONANTS)
        ]
        name = "".join(letters).capitalize()
        if is_held_out_name(name) == held_out:
            return name


def draw_code(rng: random.Random) -> str:
    """Return a code of five digits."""
    return f"{rng.randrange(100_000):05d}"


def fact(name: str, *values: str) -> str:
    """Return the sentence that states the value of ``name``: one code, another name, or several codes."""
    if len(values) == 1:
        return f"The code of {name} is {values[0]}."
    return f"The codes of {name} are {', '.join(values)}."


def question(*names: str, several_values: bool = False) -> str:
    """Return the question for the code of every name, or the several codes of one, up to ``"Answer: "``."""
    if len(names) > 1:
        asked = f"What are the codes of {', '.join(names[:-1])} and {names[-1]}?"
    else:
        asked = f"What {'are the codes' if several_values else 'is the code'} of {names[0]}?"
    return f"\nQuestion: {asked}\nAnswer: "


def statement(name: str, code: str) -> str:
    """Return ``"Dumel is 48213."``, 15 bytes."""
    return f"{name} is {code}."


def sentence_ends(text: bytes) -> np.ndarray[Any, Any]:
    """Return the offsets just after each sentence, ascending int64, where a fact may be inserted."""
    return np.array([match.end() for match in _SENTENCE_END.finditer(text)], dtype=np.int64)


def answer_blocks(answer: str, block_length: int) -> int:
    """Return how many blocks hold an answer and its stop byte."""
    return -(-(len(answer) + 1) // block_length)


@functools.cache
def haystack_text() -> bytes:
    """Return the shipped text that training has never seen (Moby Dick, chapters 100 to the end)."""
    data = importlib.resources.files("sparse_dlm_attn_small_model") / "data" / "held_out.txt"
    return data.read_bytes()


@functools.cache
def _haystack_ends() -> np.ndarray[Any, Any]:
    """Return the `sentence_ends` of the shipped text."""
    return sentence_ends(haystack_text())


def make_prompt(task: str, *, length: int, seed: int, block_length: int = 16) -> Prompt:
    """Build one held-out prompt of exactly ``length`` bytes; the same arguments give the same prompt.

    Parameters
    ----------
    task : str
        One of `TASKS`.
    length : int
        Bytes of the prompt, a multiple of ``block_length``: it ends on a boundary of blocks.
    seed : int
        Fixes names, codes, text and places.
    block_length : int
        Tokens in a block.

    Raises
    ------
    InvalidArgumentError, UnknownNameError
        If a length is out of range or too small for the facts, or if the task is unknown.
    """
    if task not in TASKS:
        raise UnknownNameError("task", task, TASKS)
    check_count("block_length", block_length, 1)
    if length < 1 or length % block_length:
        rule = f"must be a positive multiple of block_length={block_length}"
        raise InvalidArgumentError("length", rule, length)
    rng = random.Random(f"{task}/{seed}/{length}/True")
    needed, distractors, asked, answer = _draw_task(task, length, rng)
    ending = asked.encode("ascii")
    inserted = [f" {sentence}".encode("ascii") for sentence in needed + distractors]
    fact_bytes = sum(map(len, inserted))
    filler_bytes = length - fact_bytes - len(ending)
    if filler_bytes < 0 or fact_bytes > FACT_REGION * length:
        least = max(fact_bytes + len(ending), math.ceil(fact_bytes / FACT_REGION))
        raise InvalidArgumentError(
            "length", f"must be at least {least}, so that facts and question of {task!r} fit", length
        )
    filler = _draw_filler(filler_bytes, rng)
    ends = sentence_ends(filler)
    allowed = [0, *ends[ends <= int(FACT_REGION * length) - fact_bytes].tolist()]
    places = [allowed[rng.randrange(len(allowed))] for _ in inserted]
    body, spans = _insert(filler, inserted, places)
    source = "from chapters of Moby-Dick that the model has never seen"
    question_text = asked.rpartition("Question: ")[2].partition("\n")[0]
    return Prompt(body + ending, source, question_text, answer, spans[: len(needed)], task, seed)


def _draw_task(task: str, length: int, rng: random.Random) -> tuple[list[str], list[str], str, str]:
    """Return needed facts, distractors, question and answer."""
    drawn: dict[str, None] = {}
    while len(drawn) < MAX_MULTI_KEY_FACTS + 8:
        drawn[draw_name(rng, held_out=True)] = None
    names = list(drawn)
    codes = [draw_code(rng) for _ in names]
    plain = [fact(name, code) for name, code in zip(names, codes, strict=True)]
    first, second, third = names[:3]
    if task == "single-key":
        return plain[:1], [], question(first), f"{codes[0]}."
    if task == "multi-key":
        count = min(MIN_MULTI_KEY_FACTS + length // 512, MAX_MULTI_KEY_FACTS)
        return plain[:1], plain[1:count], question(first), f"{codes[0]}."
    if task == "several-values":
        needed = fact(first, *codes[:3])
        return [needed], plain[3:6], question(first, several_values=True), f"{', '.join(codes[:3])}."
    if task == "several-keys":
        answer = " ".join(map(statement, names[:3], codes))
        return plain[:3], plain[3:8], question(first, second, third), answer
    other_chain = [fact(names[3], names[4]), plain[4]]
    needed_facts = [fact(first, second), plain[1]]
    return needed_facts, other_chain + plain[5:8], question(first), statement(second, codes[1])


def _draw_filler(size: int, rng: random.Random) -> bytes:
    """Return ``size`` bytes of the shipped text, cut between two sentences at the front."""
    haystack, starts = haystack_text(), _haystack_ends()  # the filler begins with the blank before a sentence
    possible = int(np.searchsorted(starts, len(haystack) - size, side="right"))
    if possible == 0:
        rule = f"must leave at most {len(haystack)} bytes of filler, which is all the text there is"
        raise InvalidArgumentError("length", rule, size)
    start = int(starts[rng.randrange(possible)])
    return haystack[start : start + size]


def _insert(filler: bytes, inserted: list[bytes], places: list[int]) -> tuple[bytes, tuple[tuple[int, int], ...]]:
    """Insert each sentence at its place; return the text and each sentence's span."""
    spans = [(0, 0)] * len(inserted)
    text, taken = b"", 0
    for index in sorted(range(len(inserted)), key=lambda index: (places[index], index)):
        text += filler[taken : places[index]] + inserted[index]
        taken = places[index]
        spans[index] = (len(text) - len(inserted[index]) + 1, len(text))  # without the blank in front
    return text + filler[taken:], tuple(spans)
