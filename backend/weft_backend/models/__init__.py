"""The models that are served, by the class name in their checkpoint's config.json."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from weft_backend.config_fields import ConfigError
from weft_backend.layers import SINGLE, TensorParallel
from weft_backend.model_config import ModelConfig
from weft_backend.models.base import Decoder, Model
from weft_backend.models.llama import LlamaDecoder
from weft_backend.models.opt import OPTDecoder
from weft_backend.weights import fill_with_noise, load_weights
from weft_kernels import ops_for

__all__ = ["LOAD_FORMATS", "Model", "build_model", "load_model"]

LOAD_FORMATS = ("auto", "safetensors", "dummy")
_DECODERS: dict[str, type[Decoder]] = {
    "LlamaForCausalLM": LlamaDecoder,
    "MistralForCausalLM": LlamaDecoder,
    "Qwen2ForCausalLM": LlamaDecoder,
    "Qwen3ForCausalLM": LlamaDecoder,
    "BaichuanForCausalLM": LlamaDecoder,
    "BaiChuanForCausalLM": LlamaDecoder,
    "OPTForCausalLM": OPTDecoder,
}


def build_model(config: ModelConfig, device: torch.device, tp: TensorParallel) -> Model:
    """The rank's share of the model on ``device``, its weights not yet set."""
    with device, _default_dtype(getattr(torch, config.dtype)):
        decoder = _DECODERS[config.architecture](config, tp, ops_for(device))
        return Model(config, decoder, tp).eval()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


@torch.no_grad()
def load_model(
    config: ModelConfig,
    path: Path,
    *,
    device: torch.device,
    load_format: str = "auto",
    seed: int = 0,
    tp: TensorParallel = SINGLE,
) -> Model:
    """The model of the checkpoint in the folder ``path``, ready to run.

    ``load_format`` "dummy" draws weights from ``seed`` and reads no weight file; "auto" and "safetensors" read them.
    Raises CheckpointError if a weight is missing, of another shape, unknown or damaged; ConfigError if the format is
    unknown or the ranks of ``tp`` cannot share the model evenly.
    """
    if load_format not in LOAD_FORMATS:
        raise ConfigError("load_format", f"{load_format!r} is not one of {', '.join(LOAD_FORMATS)}")
    model = build_model(config, device, tp)
    if load_format == "dummy":
        fill_with_noise(model.sources(), seed)
    else:
        load_weights(model.sources(), path)
    if config.normalized_head:
        model.lm_head.normalize()  # Baichuan2 does it before every use
    return model
