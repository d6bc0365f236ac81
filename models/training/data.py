"""Training sequences: English text with facts in it, and questions with their answers.

A document is made of episodes. An episode is text with facts inserted between sentences, followed
by questions about facts of this or an earlier episode. The last question of a document ends on a
block boundary and its answer fills the document's last blocks, as in decoding.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import Synchronized

import numpy as np
import torch

from sparse_dlm_attn_small_model import retrieval
from sparse_dlm_attn_small_model.config import STOP_BYTE

TEXT, STATEMENT, ANSWER, FILL = 0, 1, 2, 3
"""What a byte is: English; a fact or question; an answer with its stop byte; stop bytes after it."""

LAST_ANSWER = 4
"""Flag added to the bytes of a document's last blocks, where the last answer is."""


@dataclass(frozen=True)
class Mixture:
    """What documents of one training stage are made of."""

    lengths: tuple[int, ...]  # lengths of the sequences in half a row
    # Probability that a question is one that was already asked in the document. Lookup forms quickly with
    # repetition, but with it a model may copy the earlier answer.
    repeat: float = 0.0
    restate: float = 0.1  # share of questions replaced by restatements ("Again, Dumel is 48213.")
    # Weights of a single code, several values, several keys and a chain.
    tasks: tuple[float, float, float, float] = (0.4, 0.15, 0.15, 0.3)
    # Range of the share of an episode's bytes that are questions and answers.
    question_share: tuple[float, float] = (0.35, 0.65)
    max_episodes: int = 1  # most episodes in a document
    distractors: int = 4  # most items per episode that nobody asks about


@dataclass(frozen=True)
class Item:
    """Facts and the question about them."""

    facts: tuple[str, ...]  # sentences that state what the answer needs
    question: str  # the question up to "Answer: "
    answer: str  # the answer without stop byte
    pairs: tuple[tuple[str, str], ...] = ()  # names and codes that may be restated


@dataclass
class TextSource:
    """English text that can be cut between sentences."""

    data: bytes  # the whole text
    ends: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.ends = retrieval.sentence_ends(self.data).tolist()

    def take(self, rng: random.Random, size: int) -> tuple[bytes, list[int]]:
        """Return `size` bytes that start between sentences, and the sentence ends in them."""
        usable = bisect.bisect_right(self.ends, len(self.data) - size)
        start = self.ends[rng.randrange(usable)]
        low = bisect.bisect_right(self.ends, start)
        high = bisect.bisect_right(self.ends, start + size)
        places = [0, *(end - start for end in self.ends[low:high])]
        return self.data[start : start + size], places


class DocumentBuilder:
    """Builds one document of exactly `length` bytes; stop bytes fill answers up to a multiple of `block_length`."""

    def __init__(
        self, source: TextSource, rng: random.Random, length: int, block_length: int, mixture: Mixture
    ) -> None:
        self.source, self.rng, self.length = source, rng, length
        self.block_length, self.mixture = block_length, mixture
        self.text, self.kinds = bytearray(), bytearray()
        self.used_names: set[str] = set()
        self.waiting: list[Item] = []
        self.asked: list[Item] = []
        self.restatements: list[tuple[str, str]] = []

    def build(self) -> tuple[bytearray, bytearray]:
        """Return the bytes and what each of them is."""
        rng, mixture = self.rng, self.mixture
        episodes = rng.randint(1, mixture.max_episodes)
        last = self._new_items(1)[0]
        last_blocks = retrieval.answer_blocks(last.answer, self.block_length)
        last_start = self.length - last_blocks * self.block_length
        questions_end = last_start - len(last.question)
        for episode in range(episodes):
            end = questions_end * (episode + 1) // episodes
            self._episode(end, [last] if episode == 0 else [])
        self._add_text(questions_end - len(self.text))
        self._add(last.question, STATEMENT)
        self._add_answer(last.answer, LAST_ANSWER)
        self._add(chr(STOP_BYTE) * (self.length - len(self.text)), FILL + LAST_ANSWER)
        return self.text, self.kinds

    def _episode(self, end: int, also: list[Item]) -> None:
        """Add text with facts, then questions, up to offset `end` or a little less."""
        rng = self.rng
        span = end - len(self.text)
        question_bytes = int(span * rng.uniform(*self.mixture.question_share))
        body = span - question_bytes
        # With repetition the same questions come several times, so fewer facts are needed.
        wanted = max(1, int(question_bytes / 58 * (1 - 0.7 * self.mixture.repeat)))
        items = [] if rng.random() < 0.1 else self._new_items(wanted)
        extra = [] if rng.random() < 0.3 else self._new_items(rng.randint(0, self.mixture.distractors))
        items = self._fit(also, items, int(0.8 * body))
        extra = self._fit(items, extra, int(0.8 * body))[len(items) :]
        self._add_body(body, [fact for item in items + extra for fact in item.facts])
        new = [item for item in items if item not in also]
        self.waiting += new
        self.restatements += [pair for item in new for pair in item.pairs]
        rng.shuffle(self.waiting)
        self._ask(end)

    def _fit(self, fixed: list[Item], items: list[Item], room: int) -> list[Item]:
        """Return `fixed` and as many of `items` as have room for their facts."""
        chosen = list(fixed)
        room -= sum(len(fact) + 1 for item in fixed for fact in item.facts)
        for item in items:
            room -= sum(len(fact) + 1 for fact in item.facts)
            if room < 0:
                break
            chosen.append(item)
        return chosen

    def _ask(self, end: int) -> None:
        """Ask waiting questions, and old ones again, while they fit before `end`."""
        rng = self.rng
        while self.waiting or (self.asked and self.mixture.repeat):
            again = bool(self.asked) and rng.random() < self.mixture.repeat
            if not again and not self.waiting:
                break
            if self.restatements and rng.random() < self.mixture.restate:
                name, code = rng.choice(self.restatements)
                if len(self.text) + 60 > end:
                    break
                self._add_text(rng.randrange(30))
                self._add(f" Again, {name} is", STATEMENT)
                self._add(f" {code}.", ANSWER)
                continue
            item = rng.choice(self.asked) if again else self.waiting[-1]
            blocks = retrieval.answer_blocks(item.answer, self.block_length) + 1
            gap = self._gap_before(item.question)
            if len(self.text) + gap + len(item.question) + blocks * self.block_length > end:
                break
            if not again:
                self.asked.append(self.waiting.pop())
            self._add_text(gap)
            self._add(item.question, STATEMENT)
            self._add_answer(item.answer, 0)
            fill = -len(self.text) % self.block_length
            self._add(chr(STOP_BYTE) * fill, FILL)

    def _gap_before(self, question: str) -> int:
        """Return how much text to put before a question; half of the answers start a block."""
        if self.rng.random() < 0.5:
            return -(len(self.text) + len(question)) % self.block_length
        return self.rng.randrange(self.block_length)

    def _new_names(self, count: int) -> list[str]:
        names: list[str] = []
        while len(names) < count:
            name = retrieval.draw_name(self.rng, held_out=False)
            if name not in self.used_names:
                self.used_names.add(name)
                names.append(name)
        return names

    def _new_items(self, count: int) -> list[Item]:
        return [self._new_item() for _ in range(count)]

    def _new_item(self) -> Item:
        rng, fact, question = self.rng, retrieval.fact, retrieval.question
        task = rng.choices(range(4), weights=self.mixture.tasks)[0]
        if task == 1:
            name = self._new_names(1)[0]
            codes = [retrieval.draw_code(rng) for _ in range(rng.choice((2, 3, 3, 4)))]
            asked = question(name, several_values=True)
            return Item((fact(name, *codes),), asked, f"{', '.join(codes)}.")
        count = {0: 1, 2: rng.choice((2, 3, 3)), 3: 2}[task]
        names = self._new_names(count)
        codes = [retrieval.draw_code(rng) for _ in names]
        facts = tuple(fact(name, code) for name, code in zip(names, codes, strict=True))
        pairs = [retrieval.statement(name, code) for name, code in zip(names, codes, strict=True)]
        known = tuple(zip(names, codes, strict=True))
        if task == 0:
            return Item(facts, question(names[0]), f"{codes[0]}.", known)
        if task == 2:
            return Item(facts, question(*names), " ".join(pairs), known)
        # A chain: the first name's value is the second name.
        link = fact(names[0], names[1])
        return Item((link, facts[1]), question(names[0]), pairs[1], known[1:])

    def _add(self, text: str | bytes, kind: int) -> None:
        data = text.encode("ascii") if isinstance(text, str) else text
        self.text += data
        self.kinds += bytes([kind]) * len(data)

    def _add_answer(self, answer: str, flag: int) -> None:
        self._add(answer + chr(STOP_BYTE), ANSWER + flag)

    def _add_text(self, size: int) -> None:
        if size > 0:
            self._add(self.source.take(self.rng, size)[0], TEXT)

    def _add_body(self, size: int, facts: list[str]) -> None:
        """Add `size` bytes of text with the facts at random sentence ends."""
        inserted = [f" {fact}" for fact in facts]
        chunk, ends = self.source.take(self.rng, size - sum(map(len, inserted)))
        self.rng.shuffle(inserted)
        places = sorted(self.rng.choice(ends) for _ in inserted)
        taken = 0
        for place, sentence in zip(places, inserted, strict=True):
            self._add(chunk[taken:place], TEXT)
            self._add(sentence, STATEMENT)
            taken = place
        self._add(chunk[taken:], TEXT)


@dataclass(frozen=True)
class Batch:
    """Half a row of documents, or a whole row for a full-sequence batch."""

    stage: int  # stage whose mixture it follows
    full_sequence: bool  # whether every token may see its whole document
    block_length: int  # tokens in a block
    tokens: torch.Tensor  # uint8, the bytes and what each of them is
    kinds: torch.Tensor


def make_batch(source: TextSource, seed: str, stage: int, mixture: Mixture) -> Batch:
    """Build one batch; the same arguments give the same batch."""
    rng = random.Random(seed)
    full_sequence = rng.random() < 0.1
    block_length = rng.choices((16, 8, 32), weights=(0.65, 0.15, 0.2))[0]
    texts, kinds = bytearray(), bytearray()
    for length in mixture.lengths * (2 if full_sequence else 1):
        text, kind = DocumentBuilder(source, rng, length, block_length, mixture).build()
        texts += text
        kinds += kind
    tokens, roles = (torch.from_numpy(np.frombuffer(x, np.uint8).copy()) for x in (texts, kinds))
    return Batch(stage, full_sequence, block_length, tokens, roles)


class BatchStream(torch.utils.data.IterableDataset):
    """Endless batches, built by the workers of a DataLoader for the stage whose number `stage` holds."""

    def __init__(self, text: bytes, seed: int, mixtures: Sequence[Mixture], stage: Synchronized) -> None:
        self.text, self.seed, self.mixtures, self.stage = text, seed, mixtures, stage

    def __iter__(self) -> Iterator[Batch]:
        source = TextSource(self.text)
        worker = torch.utils.data.get_worker_info()
        number = worker.id if worker else 0
        count = 0
        while True:
            stage = self.stage.value
            seed = f"{self.seed}/{number}/{count}"
            yield make_batch(source, seed, stage, self.mixtures[stage])
            count += 1
