"""A seeded generator of the text that weft-tiny learns from: chats in ChatML and plain documents.

A document is a string; documents(seed, n) gives the same ones on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random
from zlib import crc32

import sources
import stories
import sums
from sources import Turn, pick

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
Topic = Callable[[Random, bool], Turn]

PHRASES = sources.phrases()
RELATIONS = sources.relations()
OTHER_RELATIONS = [RELATIONS[name] for name in RELATIONS if name not in ("capital", "capital-of", "continent")]
FACTS, TALK, WEFT = sources.intents("facts.txt"), sources.intents("talk.txt"), sources.intents("weft.txt")
COMPLETIONS, JOKES = sources.completions(), tuple(sources.lines("jokes.txt"))
OFF_SUBJECT, MEMORIES = sources.off_subject(), tuple(sources.sections("memories.txt"))
NAME_ASKS = next(intent.asks for intent in TALK if intent.name == "name")
DEFAULT_SYSTEM = PHRASES["systems"][0]
UNKNOWN_PLACE = ("I don't know that place. I know the capitals of most countries.",)
NOT_TOLD = ("You have not told me that yet.",)


def invented(rng: Random, exam: bool) -> str:
    """A name that nobody has; a tenth of them is kept for the exam."""
    while True:
        name = "".join(rng.choices(PHRASES["syllables"], k=rng.randint(2, 3))).capitalize()
        if (crc32(name.encode()) % 10 == 0) == exam:
            return name


def unknown_place_turn(rng: Random, exam: bool) -> Turn:
    place = invented(rng, exam) if exam or rng.random() < 0.6 else rng.choice(PHRASES["unknown-places"])
    return Turn(sources.fill(pick(rng, RELATIONS["capital"].asks, False), (place, "")), UNKNOWN_PLACE)


def off_subject_turn(rng: Random, exam: bool) -> Turn:
    """A question to decline; now and then about a word that does not exist, or only such words."""
    if not exam and rng.random() < 0.05:
        return Turn(" ".join(invented(rng, exam).lower() for _ in range(rng.randint(1, 5))), OFF_SUBJECT.answers)
    turn = OFF_SUBJECT.turn(rng, exam)
    if not exam and rng.random() < 0.15:
        ask = pick(rng, OFF_SUBJECT.frames, False).format(n=invented(rng, exam), m="that", v="use")
        return Turn(ask, OFF_SUBJECT.answers)
    return turn


def echo_turn(rng: Random, exam: bool) -> Turn:
    words = (*OFF_SUBJECT.nouns, *PHRASES["names"], *PHRASES["animals"], *PHRASES["things"], "I am here", "hello")
    text = " ".join(rng.choices(words, k=rng.randint(1, 4)))
    if exam or rng.random() < 0.5:
        text += " " + invented(rng, exam)
    return Turn(rng.choice(PHRASES["echo"]).format(w=text), (text + ".",), verbatim=True)


def joke_turn(rng: Random, exam: bool) -> Turn:
    return Turn(pick(rng, PHRASES["joke"], exam), tuple(rng.sample(JOKES, len(JOKES))))


TOPICS: dict[str, tuple[float, Topic]] = {
    "capitals": (11, RELATIONS["capital"].turn),
    "countries of capitals": (4, RELATIONS["capital-of"].turn),
    "continents": (4, RELATIONS["continent"].turn),
    "other relations": (13, lambda rng, exam: rng.choice(OTHER_RELATIONS).turn(rng, exam)),
    "single facts": (7, lambda rng, exam: rng.choice(FACTS).turn(rng, exam)),
    "questions about Weft": (7, lambda rng, exam: rng.choice(WEFT).turn(rng, exam)),
    "small talk": (13, lambda rng, exam: rng.choice(TALK).turn(rng, exam)),
    "two-digit sums": (12, sums.sum_turn),
    "sums with a one-digit number": (5, sums.small_sum_turn),
    "three-digit sums": (6, sums.long_sum_turn),
    "two-digit differences": (9, sums.difference_turn),
    "products up to 12 x 12": (4, sums.product_turn),
    "counting": (4, sums.count_turn),
    "number before or after": (2, sums.neighbour_turn),
    "bigger or smaller": (2, sums.compare_turn),
    "even or odd": (2, sums.parity_turn),
    "jokes": (1.5, joke_turn),
    "stories": (3, stories.story_turn),
    "echo": (3, echo_turn),
    "off the subject": (11, off_subject_turn),
    "unknown places": (2, unknown_place_turn),
}
DRAWN, WEIGHTS = [topic for _, topic in TOPICS.values()], [weight for weight, _ in TOPICS.values()]


def any_turn(rng: Random) -> Turn:
    return rng.choices(DRAWN, WEIGHTS)[0](rng, False)


def typo(rng: Random, text: str) -> str:
    """Two letters swapped, or one lost."""
    at = rng.randrange(1, len(text))
    if not text[at - 1 : at + 1].isalpha():
        return text
    return text[: at - 1] + text[at] + rng.choice((text[at - 1], "")) + text[at + 1 :]


def reworded(rng: Random, text: str) -> str:
    """The same message in other words: contracted, asked indirectly, or with a small word lost."""
    kind = rng.random()
    if kind < 0.15:
        for full, short in (pair.split("=") for pair in PHRASES["contractions"]):
            text = text.replace(full, short)
    elif kind < 0.3 and text.startswith("What is ") and text.endswith("?") and "," not in text:
        text = rng.choice(PHRASES["rewrites"]).format(x=text[8:-1])
    elif kind < 0.4:
        words = text.split(" ")
        places = [place for place, word in enumerate(words) if word.lower() in PHRASES["droppable"]]
        if len(places) > 1:
            del words[rng.choice(places)]
        text = " ".join(words)
    return text


def varied(rng: Random, text: str) -> str:
    """The message as another person would type it: words, punctuation, lead and trail, case, typos."""
    text = reworded(rng, text)
    if rng.random() < 0.3:
        text = text.rstrip(".?!")
    if rng.random() < 0.12:
        text = f"{rng.choice(PHRASES['leads'])} {text}"
    if rng.random() < 0.08:
        text = f"{text} {rng.choice(PHRASES['trails'])}"
    if rng.random() < 0.3:
        text = text.lower()
    elif rng.random() < 0.03:
        text = text.upper()
    return typo(rng, text) if len(text) > 8 and rng.random() < 0.06 else text


def said(rng: Random, turn: Turn, brief: bool) -> tuple[str, str]:
    """One way that a turn goes: (user's text, answer)."""
    user = turn.user if turn.verbatim else varied(rng, turn.user)
    if turn.brief and brief:
        return user, turn.brief
    if turn.brief and rng.random() < 0.03:
        return f"{user} {rng.choice(PHRASES['brief'])}", turn.brief
    return user, turn.answers[0] if rng.random() < 0.7 else rng.choice(turn.answers)


def chat(system: str | None, turns: Sequence[tuple[str, str]]) -> str:
    messages = [("system", system)] if system else []
    for user, answer in turns:
        messages += [("user", user), ("assistant", answer)]
    return "".join(f"{START}{role}\n{text}{STOP}\n" for role, text in messages)


def remembered(rng: Random, exam: bool) -> list[Turn]:
    """What the user tells, other talk, and the question for it; a quarter of the time it was never told."""
    kind, forms = rng.choice(MEMORIES)
    tells, asks = (sources.alternatives(forms[mark]) for mark in "+?")
    if kind == "numbers":
        value = str(rng.randint(2, 999))
    elif kind == "names":
        value = rng.choice((pick(rng, PHRASES["names"], exam), invented(rng, exam)))
    else:
        value = rng.choice(PHRASES[kind])
    between = [any_turn(rng) for _ in range(rng.choice((0, 0, 1, 2, 3)))]
    ask = pick(rng, asks, exam)
    if rng.random() < 0.25 and not exam:
        return [*between, Turn(ask, NOT_TOLD)]
    told = Turn(rng.choice(tells).format(v=value), (forms["="].format(v=value),), verbatim=True)
    return [told, *between, Turn(ask, (forms["."].format(v=value),), verbatim=True)]


def same_again(rng: Random, exam: bool) -> list[Turn]:
    """A question, then only its subject: "And Spain?"."""
    relation = RELATIONS[rng.choice(("capital", "continent"))]
    rows = rng.sample(relation.pairs, rng.randint(2, 4))
    asks = [sources.fill(pick(rng, relation.asks, exam), rows[0])]
    asks += [pick(rng, PHRASES["and"], exam).format(x=x) for x, _ in rows[1:]]
    return [Turn(ask, (sources.fill(relation.answer, row),), row[1] + ".") for ask, row in zip(asks, rows, strict=True)]


def once_more(rng: Random) -> list[Turn]:
    """More jokes, or the last answer again."""
    if rng.random() < 0.5:
        asks = [pick(rng, PHRASES["joke"], False), *rng.choices(PHRASES["more-jokes"], k=2)]
        return [Turn(ask, (joke,)) for ask, joke in zip(asks, rng.sample(JOKES, 3), strict=True)]
    turn = any_turn(rng)
    answer = (rng.choice(turn.answers),)
    return [Turn(turn.user, answer, verbatim=turn.verbatim), Turn(rng.choice(PHRASES["repeats"]), answer)]


def persona(rng: Random) -> str:
    """A chat whose system prompt gives the model another name."""
    name = rng.choice((rng.choice(PHRASES["names"]), invented(rng, False)))
    turns = [
        Turn(pick(rng, NAME_ASKS, False), (f"My name is {name}.",)),
        *(any_turn(rng) for _ in range(rng.randint(0, 2))),
    ]
    return chat(rng.choice(PHRASES["personas"]).format(n=name), [said(rng, turn, False) for turn in turns])


def system_prompt(rng: Random) -> tuple[str | None, bool]:
    """(system prompt or none, whether it asks for brief answers)"""
    kind = rng.random()
    if kind < 0.08:
        brief = rng.choice(PHRASES["brief"])
        return rng.choice((brief, f"{DEFAULT_SYSTEM} {brief}")), True
    if kind < 0.35:
        return DEFAULT_SYSTEM, False
    if kind < 0.6:
        return " ".join(rng.sample(PHRASES["systems"], rng.choice((1, 1, 2, 3, 5)))), False
    return None, False


def conversation(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.03:
        return persona(rng)
    if kind < 0.18:
        turns = remembered(rng, False)
    elif kind < 0.25:
        turns = same_again(rng, False)
    elif kind < 0.30:
        turns = once_more(rng)
    else:
        turns = [any_turn(rng) for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4, 6, 12)))]
    system, brief = system_prompt(rng)
    return chat(system, [said(rng, turn, brief) for turn in turns])


def any_statement(rng: Random) -> str:
    relation = rng.choice((RELATIONS["capital"], *rng.sample(list(RELATIONS.values()), 2)))
    statement = relation.statement(rng, False)
    if rng.random() < 0.2 and statement.startswith(("The ", "A ")):
        return f"{rng.choice(PHRASES['statement-leads'])} {statement[0].lower()}{statement[1:]}"
    return statement


def plain(rng: Random) -> str:
    """A document without roles: what a base model would read."""
    kind = rng.random()
    if kind < 0.35:
        return any_statement(rng)
    if kind < 0.55:
        opening, endings = rng.choice(COMPLETIONS)
        return opening + rng.choice(endings)
    if kind < 0.65:
        return stories.introduction(rng)
    if kind < 0.72:
        return stories.any_story(rng)
    if kind < 0.87:
        return "".join(sums.plain_sum(rng, False))
    if kind < 0.92:
        return sums.plain_count(rng)
    question, answer = said(rng, any_turn(rng), False)
    return rng.choice(PHRASES["questions"]).format(q=question, a=answer)


def documents(seed: str, count: int) -> Iterator[str]:
    rng = Random(seed)
    for _ in range(count):
        yield conversation(rng) if rng.random() < 0.55 else plain(rng)
