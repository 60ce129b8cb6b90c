"""Sums, differences, products, counting and comparing. A tenth of all number pairs is kept for the exam.

Pairs with a number below ten are always trained: a tiny model should know 2 + 2 by heart.
"""

from __future__ import annotations

from random import Random
from zlib import crc32

from sources import Turn, capitalized, phrases, pick

PHRASES = phrases()
UNITS = PHRASES["units"]


def kept_for_exam(operation: str, a: int, b: int) -> bool:
    return operation != "x" and min(a, b) >= 10 and crc32(f"{min(a, b)} {operation} {max(a, b)}".encode()) % 10 == 0


def draw(rng: Random, operation: str, low: int, high: int, exam: bool) -> tuple[int, int]:
    while True:
        a, b = rng.randint(low, high), rng.randint(low, high)
        if kept_for_exam(operation, a, b) == exam:
            return a, b


def equation(a: int, operation: str, b: int) -> tuple[str, int]:
    result = {"+": a + b, "-": a - b, "x": a * b}[operation]
    return f"{a} {operation} {b} = {result}.", result


def solved(rng: Random, forms: tuple[str, ...], operation: str, a: int, b: int) -> Turn:
    answer, result = equation(a, operation, b)
    return Turn(rng.choice(forms).format(a=a, b=b), (answer,), f"{result}.")


def sum_turn(rng: Random, exam: bool) -> Turn:
    a, b = draw(rng, "+", 10, 99, exam)
    return solved(rng, PHRASES["add"], "+", a, b)


def small_sum_turn(rng: Random, exam: bool) -> Turn:
    """A sum with a number below ten, now and then in words; the exam is the last phrasings."""
    a, b = rng.sample((rng.randint(0, 9), rng.randint(0, rng.choice((9, 20, 99)))), 2)
    answer, result = equation(a, "+", b)
    words = max(a, b) < len(UNITS) and rng.random() < 0.3
    form = pick(rng, PHRASES["add"], exam)
    return Turn(form.format(a=UNITS[a] if words else a, b=UNITS[b] if words else b), (answer,), f"{result}.")


def long_sum_turn(rng: Random, exam: bool) -> Turn:
    a, b = draw(rng, "+", 10, 999, exam)
    return solved(rng, PHRASES["add"], "+", a, b)


def difference_turn(rng: Random, exam: bool) -> Turn:
    a, b = draw(rng, "-", 10 if exam else 0, 99, exam)
    if rng.random() < 0.7:
        a, b = max(a, b), min(a, b)
    return solved(rng, PHRASES["subtract"], "-", a, b)


def product_turn(rng: Random, exam: bool) -> Turn:
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    answer, result = equation(a, "x", b)
    return Turn(pick(rng, PHRASES["multiply"], exam).format(a=a, b=b), (answer,), f"{result}.")


def listed(numbers: range) -> str:
    return ", ".join(map(str, numbers)) + "."


def count_turn(rng: Random, exam: bool) -> Turn:
    while True:
        a = rng.choice((1, 1, rng.randint(0, 90)))
        b = a + rng.randint(2, 20)
        if (crc32(f"{a} to {b}".encode()) % 10 == 0) == exam:
            break
    if rng.random() < 0.25:
        return Turn(rng.choice(PHRASES["count-down"]).format(a=a, b=b), (listed(range(b, a - 1, -1)),))
    forms = PHRASES["count"] + (PHRASES["count-up"] if a == 1 else ())
    return Turn(rng.choice(forms).format(a=a, b=b), (listed(range(a, b + 1)),))


def neighbour_turn(rng: Random, exam: bool) -> Turn:
    a = rng.randint(1, 120)
    word, b = rng.choice((("after", a + 1), ("before", a - 1)))
    ask = pick(rng, PHRASES["neighbour"], exam).format(w=word, W=capitalized(word), a=a)
    return Turn(ask, (f"The number {word} {a} is {b}.",), f"{b}.")


def compare_turn(rng: Random, exam: bool) -> Turn:
    a, b = draw(rng, "?", 10 if exam else 0, 99, exam)
    b += a == b
    word, result = rng.choice((("bigger", max(a, b)), ("larger", max(a, b)), ("smaller", min(a, b))))
    ask = rng.choice(PHRASES["compare"]).format(w=word, a=a, b=b)
    return Turn(ask, (f"{result} is {word} than {a + b - result}.",), f"{result}.")


def parity_turn(rng: Random, exam: bool) -> Turn:
    a = rng.randint(0, 120)
    word = "odd" if a % 2 else "even"
    return Turn(pick(rng, PHRASES["parity"], exam).format(a=a), (f"{a} is {word}.",), f"{word.capitalize()}.")


def plain_sum(rng: Random, exam: bool) -> tuple[str, str]:
    """A sum as plain text: (opening, rest)."""
    operation = rng.choice("++-" if exam else "++-x")
    low, high = (0, 12) if operation == "x" else (10 if exam else 0, 99)
    a, b = draw(rng, operation, low, high, exam)
    text, result = equation(a, operation, b)
    return text.removesuffix(f" {result}."), f" {result}."


def plain_count(rng: Random) -> str:
    a = rng.choice((1, rng.randint(0, 90)))
    return listed(range(a, a + rng.randint(3, 15)))
