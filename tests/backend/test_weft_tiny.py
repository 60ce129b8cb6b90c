"""The built-in model: it loads in transformers, is small, and knows what its exam asks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "backend" / "weft_backend" / "weft_tiny"


@pytest.fixture(scope="module")
def training() -> Iterator[ModuleType]:
    """The exam's module; the training scripts are no package, so their folder is on the path for as long."""
    folder = str(ROOT / "backend" / "training")
    sys.path.insert(0, folder)
    try:
        yield import_module("evaluate")
    finally:
        sys.path.remove(folder)


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def test_it_is_small(model: Any) -> None:
    assert 3e6 <= model.num_parameters() <= 10e6
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 12 * 2**20


@pytest.mark.parametrize(
    "kind", ["capitals", "single facts", "two-digit sums", "two-digit differences", "plain text: capitals"]
)
def test_it_passes_its_exam(training: ModuleType, model: Any, tokenizer: Tokenizer, kind: str) -> None:
    share, wrong = training.accuracy(model, tokenizer, training.exam(kind, 40))
    assert share >= 0.95, wrong


def test_nothing_of_the_exam_is_trained_on(training: ModuleType) -> None:
    trained = "\n".join(training.corpus.documents("1 0", 3000))
    for kind in ("capitals", "single facts", "two-digit sums", "off the subject"):
        assert not [question for question in training.exam(kind, 40) if question.prompt[-80:] in trained]


@pytest.mark.parametrize(
    ("prompt", "text"),
    [("The capital of France is", " Paris."), ("2 + 2 =", " 4."), ("1, 2, 3, 4, 5,", " 6, 7, 8")],
)
def test_it_continues_plain_text(
    training: ModuleType, model: Any, tokenizer: Tokenizer, prompt: str, text: str
) -> None:
    (continued,) = training.answers(model, tokenizer, [prompt])
    assert continued.startswith(text)


def test_the_chat_template_writes_what_was_trained_on(training: ModuleType) -> None:
    hugging_face: Any = AutoTokenizer.from_pretrained(MODEL)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi "}]
    answered = [*messages, {"role": "assistant", "content": "Hello!"}]
    text = training.corpus.chat("Be brief.", [("Hi", "Hello!")])
    assert hugging_face.apply_chat_template(answered, tokenize=False) == text
    prompt = hugging_face.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    assert prompt.endswith("<|im_start|>assistant\n")


def test_digits_are_single_tokens_and_any_text_survives(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("1234 + 56").tokens == ["1", "2", "3", "4", "Ġ+", "Ġ", "5", "6"]
    text = "naïve 你好 👩‍👩‍👧 e\u0301\n\ttab"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_both_ends_stop_it(model: Any, tokenizer: Tokenizer) -> None:
    stops = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    assert model.config.eos_token_id == model.generation_config.eos_token_id == stops
