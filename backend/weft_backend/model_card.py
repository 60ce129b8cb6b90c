"""What an engine tells of itself: the model card."""

from __future__ import annotations

import dataclasses
import time

from weft.engine.v1.model_pb2 import ModelCard, SamplingDefaults
from weft.engine.v1.sampling_pb2 import SamplingParams
from weft.limits import InvalidField, check_sampling, default_limits
from weft_backend.config import EngineConfig
from weft_backend.errors import StartupError
from weft_backend.model_config import ModelConfig


def make_card(
    config: EngineConfig,
    model: ModelConfig,
    *,
    max_model_len: int,
    num_pages: int,
    model_hash: str,
    tokenizer_hash: str,
) -> ModelCard:
    """The card of an engine that is ready now, with what was resolved when it was built.

    Raises StartupError if requests would be refused for the model's own sampling defaults.
    """
    limits = default_limits()
    defaults = dataclasses.asdict(model.default_sampling)
    if config.max_queued_tokens is not None:
        limits.max_queued_tokens = config.max_queued_tokens
    card = ModelCard(
        name=config.served_model_name,
        architecture=model.architecture,
        vocab_size=model.vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=model.eos_token_ids,
        dtype=model.dtype,
        block_size=config.block_size,
        num_pages=num_pages,
        max_num_seqs=config.max_num_seqs,
        model_hash=model_hash,
        tokenizer_hash=tokenizer_hash,
        limits=limits,
        default_sampling=SamplingDefaults(**defaults),
        created=int(time.time()),
    )
    try:
        check_sampling(SamplingParams(**defaults), card, field="generation_config.json")
    except InvalidField as error:
        raise StartupError(str(error)) from error
    return card


def describe_defaults(model: ModelConfig) -> str:
    """The sampling defaults that requests get from generation_config.json, for the log."""
    values = dataclasses.asdict(model.default_sampling)
    return ", ".join(f"{name} {value:g}" for name, value in values.items() if value is not None) or "none"
