"""Very short stories, and people who say who they are: plots with slots."""

from __future__ import annotations

from random import Random

from sources import Turn, phrases, pick

PHRASES = phrases()
HEROES = (*PHRASES["animals"], "girl", "boy")


def story(rng: Random, kind: str, name: str) -> str:
    he = {"girl": "she", "boy": "he"}.get(kind, "it")
    opening = f"Once upon a time there was a {kind} named {name} who lived {rng.choice(PHRASES['places'])}. "
    thing, friend = rng.choice(PHRASES["things"]), rng.choice(PHRASES["friends"])
    return opening + rng.choice(PHRASES["plots"]).format(name=name, he=he, thing=thing, friend=friend)


def any_story(rng: Random) -> str:
    return story(rng, rng.choice(HEROES), rng.choice(PHRASES["names"]))


def story_turn(rng: Random, exam: bool) -> Turn:
    kind, name = rng.choice(HEROES), rng.choice(PHRASES["names"])
    ask = pick(rng, PHRASES[rng.choice(("story", "story-about"))], exam)
    return Turn(ask.format(kind=kind, name=name), (story(rng, kind, name),), verbatim=True)


def introduction(rng: Random) -> str:
    """Someone says who they are, most often with "Hello, my name is"."""
    opening, name = rng.choice(PHRASES["introductions"]), rng.choice(PHRASES["names"])
    job, city = rng.choice(PHRASES["jobs"]), rng.choice(PHRASES["cities"])
    life = rng.choice(PHRASES["lives"]).format(job=job, city=city, age=rng.randint(8, 70))
    likes = rng.choice(PHRASES["likes"]).format(hobby=rng.choice(PHRASES["hobbies"]))
    return f"{opening} {name}{rng.choice(('.', ' and'))} {life} {likes}"
