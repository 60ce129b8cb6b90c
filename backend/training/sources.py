"""Reads the sentences under data/ into relations, intents and completions. Knows nothing about chats or tokens.

Every list of phrasings is split: the last sixth (at least one) is the exam and is never trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypeVar

DATA = Path(__file__).parent / "data"
T = TypeVar("T")


@dataclass(frozen=True)
class Turn:
    """A user message and the answers that are right; the first is the usual one, `brief` the shortest one."""

    user: str
    answers: tuple[str, ...]
    brief: str | None = None
    verbatim: bool = False  # the answer copies letters of the message, so its spelling must stay as it is


@dataclass(frozen=True)
class Relation:
    """Pairs (x, y) with ways to ask for one side, to answer, and to state it plainly."""

    name: str
    asks: tuple[str, ...]
    answer: str
    statements: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]

    def turn(self, rng: Random, exam: bool) -> Turn:
        """In the exam, every plain statement about the pair is a right answer too."""
        pair = rng.choice(self.pairs)
        ask = fill(pick(rng, self.asks, exam), pair)
        right = (self.answer, *self.statements) if exam else (self.answer,)
        brief = pair[0] if self.name == "capital-of" else pair[1]
        return Turn(ask, tuple(fill(form, pair) for form in right), capitalized(brief) + ".")

    def statement(self, rng: Random, exam: bool) -> str:
        return fill(pick(rng, self.statements, exam), rng.choice(self.pairs))

    def cloze(self, rng: Random, exam: bool) -> tuple[str, str]:
        """A plain statement cut before its last slot: (opening, rest)."""
        opening, brace, slot = pick(rng, self.statements, exam).rpartition("{")
        pair = rng.choice(self.pairs)
        return fill(opening, pair).rstrip(), fill(brace + slot, pair)


@dataclass(frozen=True)
class Intent:
    """Messages that mean the same, and the answers to them."""

    name: str
    asks: tuple[str, ...]
    answers: tuple[str, ...]

    def turn(self, rng: Random, exam: bool) -> Turn:
        return Turn(pick(rng, self.asks, exam), self.answers)


def pick(rng: Random, forms: Sequence[T], exam: bool) -> T:
    """One of the trained forms, or one of those kept for the exam."""
    split = len(forms) - max(1, len(forms) // 6)
    return rng.choice(forms[split:] if exam else forms[:split])


def capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def fill(form: str, pair: tuple[str, str]) -> str:
    x, y = pair
    return form.format(x=x, y=y, X=capitalized(x), Y=capitalized(y)).replace("..", ".")


def lines(name: str) -> Iterator[str]:
    for line in (DATA / name).read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("# "):
            yield line


def alternatives(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(" | "))


def phrases() -> dict[str, tuple[str, ...]]:
    """The lists of phrases.txt by name."""
    named = (line.split(": ", 1) for line in lines("phrases.txt"))
    return {name: alternatives(text.replace("\\n", "\n")) for name, text in named}


def sections(name: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The `[name]` sections of a file, each with its lines by their first character."""
    title, body = "", dict[str, str]()
    for line in lines(name):
        if line.startswith("["):
            if body:
                yield title, body
            title, body = line[1:-1], {}
        else:
            body[line[0]] = line[2:]
    yield title, body


def intents(name: str) -> tuple[Intent, ...]:
    return tuple(Intent(title, alternatives(body["?"]), alternatives(body["="])) for title, body in sections(name))


def countries() -> tuple[tuple[str, ...], ...]:
    """Rows of (country, capital, continent)."""
    return tuple(tuple(cell.strip() for cell in line.split("|")) for line in lines("countries.txt"))


def relations() -> dict[str, Relation]:
    table = countries()
    found = {}
    for title, body in sections("relations.txt"):
        if "<" in body:
            x, y = (int(column) for column in body["<"].split())
            pairs = tuple((row[x], row[y]) for row in table)
        else:
            cells = (cell.split(": ") for cell in body["-"].split("; "))
            pairs = tuple((left, right) for left, right in cells)
        found[title] = Relation(title, alternatives(body["?"]), body["="], alternatives(body["."]), pairs)
    return found


def completions() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Openings of plain text, each with the ways it goes on (with the space that joins them)."""
    found = []
    for line in lines("completions.txt"):
        opening, endings = line.split(" => ")
        joined = (ending if ending[0] in ",!?." else " " + ending for ending in endings.split(" | "))
        found.append((opening, tuple(joined)))
    return tuple(found)


@dataclass(frozen=True)
class OffSubject:
    """Questions that the model should decline: frames, nouns and verbs to put in them, and the answers."""

    frames: tuple[str, ...]
    nouns: tuple[str, ...]
    verbs: tuple[str, ...]
    answers: tuple[str, ...]

    def turn(self, rng: Random, exam: bool) -> Turn:
        n, m = pick(rng, self.nouns, exam), pick(rng, self.nouns, exam)
        return Turn(pick(rng, self.frames, exam).format(n=n, m=m, v=rng.choice(self.verbs)), self.answers)


def off_subject() -> OffSubject:
    body = {line[0]: alternatives(line[2:]) for line in lines("topics.txt")}
    return OffSubject(body["?"], body["n"], body["v"], body["="])
