from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer

from weft_backend.errors import StartupError
from weft_backend.tokenizer_files import (
    MAX_CHUNK_BYTES,
    check_vocabulary,
    chunks,
    hash_tokenizer,
    read_tokenizer_files,
)

CORPUS = [
    "The capital of France is Paris, and the capital of Italy is Rome. Hello, my name is Weft.",
    "One and one is two; two and three is five. The president of the United States is a person.",
    "In weaving the weft runs across the warps, over and under, over and under, and so on and so on.",
    "你好，世界。今天天气很好，我们去公园散步吧。法国的首都是巴黎。",
    "こんにちは世界。ありがとうございます。",
    "def main(args):\n    for i in range(10):\n        print(i, args[i])\n    return 0\n",
    "1234567890 3.14159 2024-01-02 100% $5.00 aaaa aaaaaa abababab",
] * 3

STRINGS = [
    *CORPUS[:7],
    "",
    " ",
    "   ",
    "a",
    " a",
    "a ",
    "  two  spaces  between  ",
    "tabs\tand\nnewlines\r\n\n\n",
    "🙂 👩‍👩‍👧‍👦 🇫🇷 flags and 🏽 modifiers",
    "naïve café e\u0301 \u0915\u094d\u0937\u093f Ångström ﬁ ½ Ａ",
    "混合 text 与 English，以及 emoji 😀。",
    "العربية עברית ไทย 한국어",
    "▁already▁escaped",
    "<0x0A> is no byte here",
    "aaaaaaaaaaaaaaa",
    "x" * 500,
    "\u200b\u00a0\u3000zero width and wide spaces",
    "unk \U0010ffff end",
]


def train(path: Path, **options: Any) -> sentencepiece.SentencePieceProcessor:
    """A small tokenizer.model in the folder ``path``."""
    settings = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"} | options
    with (path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=file,
            vocab_size=600,
            hard_vocab_limit=False,
            minloglevel=2,
            **settings,
        )
    return sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))


def write_config(path: Path, **config: Any) -> None:
    defaults = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps(defaults | config))


def converted(path: Path) -> Tokenizer:
    return Tokenizer.from_str(read_tokenizer_files(path)["tokenizer.json"].decode())


LLAMA = {"remove_extra_whitespaces": False}
BAICHUAN = {"remove_extra_whitespaces": False, "add_dummy_prefix": False}


@pytest.mark.parametrize("options", [LLAMA, BAICHUAN, {}], ids=["llama", "baichuan", "one space"])
@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("byte_fallback", [True, False])
def test_ids_are_those_of_sentencepiece(
    tmp_path: Path, options: dict[str, Any], rule: str, model_type: str, byte_fallback: bool
) -> None:
    reference = train(
        tmp_path, model_type=model_type, normalization_rule_name=rule, byte_fallback=byte_fallback, **options
    )
    write_config(tmp_path)
    tokenizer = converted(tmp_path)
    for text in STRINGS:
        if rule == "nmt_nfkc":
            text = text.replace("\r\n", "\n")  # known differences, see the converter
        if model_type == "unigram":
            text = text.replace("<0x0A>", "")
        assert tokenizer.encode(text, add_special_tokens=False).ids == reference.encode(text), repr(text)


def test_decoding_gives_the_text_back(tmp_path: Path) -> None:
    train(tmp_path, **LLAMA)
    write_config(tmp_path)
    tokenizer = converted(tmp_path)
    for text in STRINGS:
        if "▁" not in text:  # which stands for a space
            assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, False), (True, True)])
def test_bos_and_eos_are_added_as_the_config_says(tmp_path: Path, bos: bool, eos: bool) -> None:
    reference = train(tmp_path, **LLAMA)
    write_config(tmp_path, add_bos_token=bos, add_eos_token=eos)
    ids = converted(tmp_path).encode("Hello").ids
    assert ids == [1] * bos + reference.encode("Hello") + [2] * eos


def test_control_tokens_in_text_are_control_tokens(tmp_path: Path) -> None:
    train(tmp_path, user_defined_symbols=["<sep>"], **LLAMA)
    write_config(tmp_path, added_tokens_decoder={"600": {"content": "<pad>", "special": True}})
    vocab_size = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).vocab_size()
    write_config(tmp_path, added_tokens_decoder={str(vocab_size): {"content": "<pad>", "special": True}})
    tokenizer = converted(tmp_path)
    encoding = tokenizer.encode("a<sep>b</s><pad>", add_special_tokens=False)
    assert encoding.tokens[-2:] == ["</s>", "<pad>"]
    assert "<sep>" in encoding.tokens
    assert encoding.ids[-1] == vocab_size
    assert tokenizer.decode(encoding.ids) == "a<sep> b"


def test_an_added_token_on_a_taken_id_is_refused(tmp_path: Path) -> None:
    train(tmp_path, **LLAMA)
    write_config(tmp_path, added_tokens_decoder={"5": {"content": "<pad>", "special": True}})
    with pytest.raises(StartupError, match="<pad>"):
        read_tokenizer_files(tmp_path)


def test_vocab_and_merges_become_a_byte_level_tokenizer(tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "</s>", *alphabet, "he", "hel"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\nhe l\n")
    write_config(tmp_path, bos_token="</s>", add_bos_token=True)
    tokenizer = converted(tmp_path)
    encoding = tokenizer.encode("hello")
    assert encoding.tokens == ["</s>", "hel", "l", "o"]
    for text in STRINGS:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tokenizer_json_is_served_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"anything")
    (tmp_path / "chat_template.jinja").write_text("{{ x }}")
    (tmp_path / "tokenizer.model").write_bytes(b"not read")
    (tmp_path / "config.json").write_text("{}")
    files = read_tokenizer_files(tmp_path)
    assert files == {"tokenizer.json": b"anything", "chat_template.jinja": b"{{ x }}"}


def test_a_checkpoint_without_a_tokenizer_has_no_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert read_tokenizer_files(tmp_path) == {}
    assert hash_tokenizer({}) == ""
    assert list(chunks({})) == []


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer_config.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    train(tmp_path)
    (tmp_path / name).write_bytes(b"\xff\xffdamaged")
    with pytest.raises(StartupError, match=name.replace(".", r"\.")):
        read_tokenizer_files(tmp_path)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_damaged_byte_level_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    (tmp_path / "merges.txt").write_text("a b\n")
    (tmp_path / name).write_text("{a b c")
    with pytest.raises(StartupError, match=name.replace(".", r"\.")):
        read_tokenizer_files(tmp_path)


def test_a_tokenizer_of_a_larger_model_is_refused(tmp_path: Path) -> None:
    vocab_size = train(tmp_path).vocab_size()
    write_config(tmp_path, added_tokens_decoder={str(vocab_size): {"content": "<pad>", "special": True}})
    files = read_tokenizer_files(tmp_path)
    check_vocabulary(files, vocab_size, tmp_path)
    check_vocabulary({}, 1, tmp_path)
    with pytest.raises(StartupError, match=f"{tmp_path}.*ids up to {vocab_size - 1}.*vocab_size {vocab_size - 1}"):
        check_vocabulary(files, vocab_size - 1, tmp_path)


def test_a_truncated_tokenizer_json_is_named(tmp_path: Path) -> None:
    train(tmp_path)
    write_config(tmp_path)
    files = read_tokenizer_files(tmp_path)
    files["tokenizer.json"] = files["tokenizer.json"][:-100]
    with pytest.raises(StartupError, match=r"tokenizer\.json is damaged"):
        check_vocabulary(files, 1000, tmp_path)


def test_chunks_carry_size_and_hash_of_the_whole_file() -> None:
    data = bytes(range(256)) * (10 * 1024)  # 2.5 MiB
    made = list(chunks({"b.json": data, "a.json": b"{}"}))
    assert [chunk.name for chunk in made] == ["a.json", "b.json", "b.json", "b.json"]
    assert all(len(chunk.data) <= MAX_CHUNK_BYTES for chunk in made)
    assert b"".join(chunk.data for chunk in made[1:]) == data
    assert {chunk.sha256 for chunk in made[1:]} == {hashlib.sha256(data).hexdigest()}
    assert {chunk.total_bytes for chunk in made[1:]} == {len(data)}


def test_the_hash_covers_names_and_contents() -> None:
    hashes = {hash_tokenizer(files) for files in ({"a": b"1"}, {"a": b"2"}, {"b": b"1"}, {"a": b"1", "b": b"1"})}
    assert len(hashes) == 4
    assert hash_tokenizer({"a": b"1", "b": b"2"}) == hash_tokenizer({"b": b"2", "a": b"1"})
