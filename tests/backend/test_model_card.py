from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import make_checkpoint

from weft.engine.v1.model_pb2 import ModelCard
from weft_backend.config import EngineConfig
from weft_backend.errors import StartupError
from weft_backend.model_card import make_card
from weft_backend.model_config import load_model_config


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint("vicuna", tmp_path / "tiny", tokenizer=False)


def card_of(checkpoint: Path, generation: str, config: EngineConfig | None = None) -> ModelCard:
    (checkpoint / "generation_config.json").write_text(generation)
    model, sizes = load_model_config(checkpoint), {"max_model_len": 100, "num_pages": 7}
    return make_card(config or EngineConfig(), model, **sizes, model_hash="m", tokenizer_hash="t")


def test_defaults_are_those_of_generation_config(checkpoint: Path) -> None:
    defaults = card_of(checkpoint, '{"temperature": 0.5, "top_k": 20}').default_sampling
    assert {field.name: value for field, value in defaults.ListFields()} == {"temperature": 0.5, "top_k": 20}


def test_what_was_resolved_and_the_operators_limit_are_told(checkpoint: Path) -> None:
    card = card_of(checkpoint, "{}", EngineConfig(max_queued_tokens=5, block_size=32, max_num_seqs=3))
    assert (card.max_model_len, card.num_pages, card.model_hash, card.tokenizer_hash) == (100, 7, "m", "t")
    assert (card.limits.max_queued_tokens, card.block_size, card.max_num_seqs) == (5, 32, 3)


def test_defaults_that_every_request_would_be_refused_for_are_refused(checkpoint: Path) -> None:
    with pytest.raises(StartupError, match=r"generation_config.json.top_p: must be in"):
        card_of(checkpoint, '{"top_p": 1.5}')
