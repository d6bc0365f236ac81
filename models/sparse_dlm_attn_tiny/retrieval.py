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
training never shows them. Needs only the standard library and NumPy.
"""

from __future__ import annotations

import functools
import importlib.resources
import random
import re
import zlib
from dataclasses import dataclass

import numpy as np

from sparse_dlm_attn_tiny.config import STOP_BYTE

TASKS = ("single-key", "multi-key", "several-values", "several-keys", "chained")
"""Names of the tasks `make_prompt` knows."""

CONSONANTS = "bdfghjklmnprstvwyz"
VOWELS = "aeiou"
HELD_OUT_SHARE = 10
MIN_MULTI_KEY_FACTS = 9
MAX_MULTI_KEY_FACTS = 24
FACT_REGION = 0.75

_SENTENCE_END = re.compile(rb"""[.?!]["']?(?=\s)""")


class RetrievalError(ValueError):
    """A prompt was asked for that cannot be built."""


@dataclass(frozen=True)
class RetrievalPrompt:
    """One retrieval question over a long text.

    Parameters
    ----------
    task : str
        One of `TASKS`.
    seed : int
        The seed it was made with.
    text : bytes
        Everything up to and including ``"Answer: "``.
    answer : str
        The only correct answer, without the stop byte.
    facts : tuple of (int, int)
        Byte spans in `text` of the facts the answer needs, in the order in which it needs them.
        Distractors are not listed.
    """

    task: str
    seed: int
    text: bytes
    answer: str
    facts: tuple[tuple[int, int], ...]


def is_held_out_name(name: str) -> bool:
    """Return whether training never shows `name`.

    Parameters
    ----------
    name : str
        A name such as ``"Dumel"``.
    """
    return zlib.crc32(name.encode("ascii")) % HELD_OUT_SHARE == 0


def draw_name(rng: random.Random, *, held_out: bool) -> str:
    """Return a five-letter name such as ``"Dumel"``.

    Parameters
    ----------
    rng : random.Random
        Source of randomness.
    held_out : bool
        Whether the name is one that training never shows.
    """
    while True:
        letters = [
            alphabet[rng.randrange(len(alphabet))]
            for alphabet in (CONSONANTS, VOWELS, CONSONANTS, VOWELS, CONSONANTS)
        ]
        name = "".join(letters).capitalize()
        if is_held_out_name(name) == held_out:
            return name


def draw_names(rng: random.Random, count: int, *, held_out: bool) -> list[str]:
    """Return `count` different names.

    Parameters
    ----------
    rng : random.Random
        Source of randomness.
    count : int
        How many.
    held_out : bool
        Whether they are names that training never shows.
    """
    names: dict[str, None] = {}
    while len(names) < count:
        names[draw_name(rng, held_out=held_out)] = None
    return list(names)


def draw_code(rng: random.Random) -> str:
    """Return a code of five digits.

    Parameters
    ----------
    rng : random.Random
        Source of randomness.
    """
    return f"{rng.randrange(100_000):05d}"


def fact(name: str, *values: str) -> str:
    """Return the sentence that states the code, or the codes, of `name`.

    Parameters
    ----------
    name : str
        The key.
    *values : str
        One code, one other name (a chain), or several codes.
    """
    if len(values) == 1:
        return f"The code of {name} is {values[0]}."
    return f"The codes of {name} are {', '.join(values)}."


def question(*names: str, several_values: bool = False) -> str:
    """Return the question that asks for the code of every name, up to ``"Answer: "``.

    Parameters
    ----------
    *names : str
        The keys asked for.
    several_values : bool
        Whether the (single) key has several codes.
    """
    if len(names) == 1 and not several_values:
        asked = f"What is the code of {names[0]}?"
    elif len(names) == 1:
        asked = f"What are the codes of {names[0]}?"
    else:
        asked = f"What are the codes of {', '.join(names[:-1])} and {names[-1]}?"
    return f"\nQuestion: {asked}\nAnswer: "


def statement(name: str, code: str) -> str:
    """Return ``"Dumel is 48213."``, 15 bytes.

    Parameters
    ----------
    name, code : str
        Key and value.
    """
    return f"{name} is {code}."


def sentence_ends(text: bytes) -> np.ndarray:
    """Return the offsets in `text` just after each sentence, where a fact may be inserted.

    Parameters
    ----------
    text : bytes
        English text.

    Returns
    -------
    numpy.ndarray
        Ascending int64 offsets.
    """
    return np.array([match.end() for match in _SENTENCE_END.finditer(text)], dtype=np.int64)


def answer_blocks(answer: str, block_length: int) -> int:
    """Return how many blocks hold `answer` and its stop byte.

    Parameters
    ----------
    answer : str
        An answer without stop byte.
    block_length : int
        Tokens in a block.
    """
    return -(-(len(answer) + 1) // block_length)


def decoded_answer(output: bytes) -> str:
    """Return what a model answered: its output up to the first stop byte.

    Parameters
    ----------
    output : bytes
        The bytes decoded after the prompt.
    """
    return output.split(bytes([STOP_BYTE]), 1)[0].decode("latin-1")


@functools.cache
def haystack_text() -> bytes:
    """Return the shipped text that training has never seen (Moby Dick, chapters 100 to the end)."""
    data = importlib.resources.files("sparse_dlm_attn_tiny") / "data" / "held_out.txt"
    return data.read_bytes()


@functools.lru_cache(maxsize=4)
def _ends_of(haystack: bytes) -> np.ndarray:
    return sentence_ends(haystack)


def make_prompt(
    task: str,
    *,
    length: int,
    seed: int,
    haystack: bytes,
    block_length: int = 16,
    held_out: bool = True,
    depth: float | None = None,
) -> RetrievalPrompt:
    """Build one prompt of exactly `length` bytes; the same arguments give the same prompt.

    Parameters
    ----------
    task : str
        One of `TASKS`.
    length : int
        Bytes of the prompt, a multiple of `block_length`.
    seed : int
        Fixes names, codes, text and depths.
    haystack : bytes
        English text to hide the facts in, for example `haystack_text()`.
    block_length : int
        The prompt ends on a boundary of blocks of this length.
    held_out : bool
        Whether to use names that training never shows.
    depth : float or None
        Where in the first three quarters of the prompt the needed facts go, 0 (start) to 1;
        None draws a place for each.

    Returns
    -------
    RetrievalPrompt
        The prompt, its answer and where the needed facts are.

    Raises
    ------
    RetrievalError
        If the task is unknown, an argument is out of range, or the facts do not fit.
    """
    _check_request(task, length, block_length, depth)
    rng = random.Random(f"{task}/{seed}/{length}/{held_out}")
    needed, distractors, asked, answer = _draw_task(task, length, rng, held_out)
    ending = asked.encode("ascii")
    inserted = [f" {sentence}".encode("ascii") for sentence in needed + distractors]
    fact_bytes = sum(map(len, inserted))
    filler_bytes = length - fact_bytes - len(ending)
    if filler_bytes < 0 or fact_bytes > FACT_REGION * length:
        raise RetrievalError(
            f"length: {task!r} needs {fact_bytes} bytes of facts in the first three quarters and "
            f"{len(ending)} bytes of question; got length {length}"
        )
    filler = _draw_filler(haystack, filler_bytes, rng)
    places = _draw_places(filler, len(needed), len(inserted), length, fact_bytes, depth, rng)
    body, spans = _insert(filler, inserted, places)
    return RetrievalPrompt(task, seed, body + ending, answer, spans[: len(needed)])


def _check_request(task: str, length: int, block_length: int, depth: float | None) -> None:
    if task not in TASKS:
        raise RetrievalError(f"task: must be one of {', '.join(TASKS)}; got {task!r}")
    if block_length < 1:
        raise RetrievalError(f"block_length: must be at least 1; got {block_length}")
    if length < 1 or length % block_length:
        raise RetrievalError(
            f"length: must be a positive multiple of block_length {block_length}; got {length}"
        )
    if depth is not None and not 0 <= depth <= 1:
        raise RetrievalError(f"depth: must lie in 0..1; got {depth}")


def _draw_task(
    task: str, length: int, rng: random.Random, held_out: bool
) -> tuple[list[str], list[str], str, str]:
    """Return needed facts, distractors, question and answer."""
    names = draw_names(rng, MAX_MULTI_KEY_FACTS + 8, held_out=held_out)
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
        asked = question(first, several_values=True)
        return [needed], plain[3:6], asked, f"{', '.join(codes[:3])}."
    if task == "several-keys":
        answer = " ".join(statement(name, code) for name, code in zip(names[:3], codes, strict=False))
        return plain[:3], plain[3:8], question(first, second, third), answer
    other_chain = [fact(names[3], names[4]), plain[4]]
    needed_facts = [fact(first, second), plain[1]]
    return needed_facts, other_chain + plain[5:8], question(first), statement(second, codes[1])


def _draw_filler(haystack: bytes, size: int, rng: random.Random) -> bytes:
    """Return `size` bytes of the haystack, cut between two sentences at the front."""
    starts = _ends_of(haystack)  # the filler begins with the blank before a sentence
    possible = int(np.searchsorted(starts, len(haystack) - size, side="right"))
    if possible == 0:
        raise RetrievalError(
            f"length: must leave at most {len(haystack)} bytes of filler, which is all the text there is; "
            f"got {size}"
        )
    start = int(starts[rng.randrange(possible)])
    return haystack[start : start + size]


def _draw_places(
    filler: bytes,
    needed: int,
    count: int,
    length: int,
    fact_bytes: int,
    depth: float | None,
    rng: random.Random,
) -> list[int]:
    """Return an offset in the filler for each fact; every fact ends in the first three quarters."""
    last = int(FACT_REGION * length) - fact_bytes
    ends = sentence_ends(filler)
    allowed = [0, *(int(end) for end in ends[ends <= last])]
    places = [allowed[rng.randrange(len(allowed))] for _ in range(count)]
    if depth is not None:
        nearest = min(allowed, key=lambda place: abs(place - depth * last))
        places[:needed] = [nearest] * needed
    return places


def _insert(
    filler: bytes, inserted: list[bytes], places: list[int]
) -> tuple[bytes, tuple[tuple[int, int], ...]]:
    """Insert each sentence at its place; return the text and each sentence's span."""
    spans = [(0, 0)] * len(inserted)
    pieces: list[bytes] = []
    size = taken = 0
    for index in sorted(range(len(inserted)), key=lambda index: (places[index], index)):
        pieces.append(filler[taken : places[index]])
        size += places[index] - taken
        taken = places[index]
        pieces.append(inserted[index])
        spans[index] = (size + 1, size + len(inserted[index]))
        size += len(inserted[index])
    pieces.append(filler[taken:])
    return b"".join(pieces), tuple(spans)
