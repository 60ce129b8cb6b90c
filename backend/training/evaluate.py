"""The exam: questions that were never trained on, answered greedily, and the table of accuracies.

    python backend/training/evaluate.py [DIR] [--device cuda|cpu] [--count N]

An answer counts only if the whole text is one of the right answers, stop included.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import corpus
import sums
import torch
from sources import Turn
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

BUILT_IN = Path(__file__).parent.parent / "weft_backend" / "weft_tiny"
MAX_NEW_TOKENS = 128
Draw = Callable[[Random], "Question"]


@dataclass(frozen=True)
class Question:
    """A prompt as the model reads it, and the texts that are right."""

    prompt: str
    answers: tuple[str, ...]


def chat_question(rng: Random, turns: Sequence[Turn]) -> Question:
    """The last turn asks; the turns before it are the conversation so far."""
    *before, last = turns
    history = corpus.chat(rng.choice((None, corpus.DEFAULT_SYSTEM)), [(turn.user, turn.answers[0]) for turn in before])
    prompt = f"{history}{corpus.START}user\n{last.user}{corpus.STOP}\n{corpus.START}assistant\n"
    return Question(prompt, last.answers if last.brief is None else (*last.answers, last.brief))


def topic_question(topic: corpus.Topic, rng: Random) -> Question:
    return chat_question(rng, [topic(rng, True)])


def plain_question(draw: Callable[[Random, bool], tuple[str, str]], rng: Random) -> Question:
    opening, rest = draw(rng, True)
    return Question(opening, (rest.strip(),))


def draws() -> dict[str, Draw]:
    """Kind -> draws one question of it. Stories are left out: there is no single right one."""
    topics = {kind: topic for kind, (_, topic) in corpus.TOPICS.items() if kind != "stories"}
    relations = list(corpus.RELATIONS.values())
    found: dict[str, Draw] = {kind: partial(topic_question, topic) for kind, topic in topics.items()}
    found["what the user said before"] = lambda rng: chat_question(rng, corpus.remembered(rng, True))
    found["follow-up questions"] = lambda rng: chat_question(rng, corpus.same_again(rng, True))
    found["plain text: capitals"] = partial(plain_question, corpus.RELATIONS["capital"].cloze)
    found["plain text: all relations"] = partial(
        plain_question, lambda rng, exam: rng.choice(relations).cloze(rng, exam)
    )
    found["plain text: two-digit sums and differences"] = partial(plain_question, sums.plain_sum)
    return found


def exam(kind: str, count: int, seed: str = "exam") -> list[Question]:
    """Up to `count` different questions of one kind, the same for the same seed."""
    rng, draw = Random(f"{seed} {kind}"), draws()[kind]
    drawn = dict.fromkeys(draw(rng) for _ in range(2 * count))
    return list(drawn)[:count]


@torch.inference_mode()
def answers(model: PreTrainedModel, tokenizer: Tokenizer, prompts: Sequence[str], batch: int = 512) -> Iterator[str]:
    """The greedy continuation of each prompt up to a stop token (which is left out)."""
    stops = [tokenizer.token_to_id(corpus.STOP), tokenizer.token_to_id(corpus.END)]
    tokenizer.enable_padding(direction="left", pad_id=stops[1], pad_token=corpus.END)
    for at in range(0, len(prompts), batch):
        encoded = tokenizer.encode_batch(list(prompts[at : at + batch]))
        ids = torch.tensor([one.ids for one in encoded], device=model.device)
        mask = torch.tensor([one.attention_mask for one in encoded], device=model.device)
        out = model.generate(  # type: ignore[operator]  # transformers types generate as a tensor
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=stops,
            pad_token_id=stops[1],
        )
        for row in out[:, ids.shape[1] :].tolist():
            end = next((place for place, token in enumerate(row) if token in stops), len(row))
            yield tokenizer.decode(row[:end])


def last_words(prompt: str) -> str:
    return repr(prompt.removesuffix(f"{corpus.STOP}\n{corpus.START}assistant\n")[-60:].rpartition("\n")[2])


def accuracy(model: PreTrainedModel, tokenizer: Tokenizer, questions: Sequence[Question]) -> tuple[float, list[str]]:
    """The share answered rightly, and the wrong ones as lines to read."""
    given = answers(model, tokenizer, [question.prompt for question in questions])
    wrong = [
        f"{last_words(question.prompt)} -> {text[:60]!r}"
        for question, text in zip(questions, given, strict=True)
        if text.strip() not in question.answers
    ]
    return 1 - len(wrong) / len(questions), wrong


def table(model: PreTrainedModel, tokenizer: Tokenizer, count: int) -> Iterator[str]:
    yield "| kind | questions | right | one that was wrong |"
    yield "| --- | --- | --- | --- |"
    for kind in draws():
        questions = exam(kind, count)
        share, wrong = accuracy(model, tokenizer, questions)
        example = wrong[0].replace("|", "\\|") if wrong else ""
        yield f"| {kind} | {len(questions)} | {share:.1%} | {example} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=BUILT_IN)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--count", type=int, default=300)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32).to(options.device)
    tokenizer = Tokenizer.from_file(str(options.folder / "tokenizer.json"))
    for line in table(model, tokenizer, options.count):
        print(line, flush=True)


if __name__ == "__main__":
    main()
