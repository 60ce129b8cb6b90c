"""What a checkpoint's config.json says about its model, in our terms. Knows no torch.

Every field of config.json is read here and nowhere else. What we would compute differently than the checkpoint means is
refused by the field's name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft_backend.config_fields import ConfigError, Fields

DTYPES = ("float32", "bfloat16", "float16")
MAX_EOS_TOKEN_IDS = 16  # every row of the batch has room for them beside a request's own stop ids


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding. ``scaling`` is "none", "linear" or "llama3"; the rest are the latter two's numbers."""

    theta: float
    scaling: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 0


@dataclass(frozen=True, slots=True)
class DefaultSampling:
    """Sampling defaults of generation_config.json; None: it has none."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A model's shape and what sets its family apart. Sizes are those of the whole model, over all ranks."""

    architecture: str
    dtype: str  # one of DTYPES
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    embed_size: int  # width of the token embeddings; hidden_size but for OPT-350m
    max_model_len: int  # tokens of prompt and answer together
    norm_eps: float
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    default_sampling: DefaultSampling
    rope: Rope | None = None
    alibi: bool = False
    sliding_window: int | None = None  # keys a query sees, its own included; None: all
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm of each head's queries and keys, before the rotation
    packed_qkv: bool = False  # the checkpoint holds queries, keys and values as one W_pack
    normalized_head: bool = False  # rows of the output matrix are scaled to length 1
    num_positions: int = 0  # learned position embeddings; 0: none
    post_norm: bool = False  # norms stand after attention and MLP instead of before them
    quantization: str | None = None  # "fp8": of the layers' matrices, but not of embeddings and head


def load_model_config(
    path: Path, *, dtype: str = "auto", max_model_len: int | None = None, quantization: str | None = None
) -> ModelConfig:
    """Read config.json and generation_config.json of the checkpoint in the folder ``path``.

    ``dtype`` "auto" takes the checkpoint's own. ``max_model_len`` may lower the model's, not raise it.
    ``quantization`` is what loading does to the weights.
    Raises ConfigError.
    """
    fields = Fields.read(path / "config.json")
    generation_path = path / "generation_config.json"
    generation = Fields.read(generation_path) if generation_path.exists() else Fields({})
    if fields.has("quantization_config"):
        raise ConfigError("quantization_config", "quantized checkpoints are not supported")
    architecture, read_family = _family(fields)
    common = _common(fields) | read_family(fields)
    eos_token_ids = generation.ids("eos_token_id") or fields.ids("eos_token_id")
    _check_ids(eos_token_ids, common["vocab_size"])
    return ModelConfig(
        **common
        | {
            "architecture": architecture,
            "dtype": _resolve_dtype(fields, dtype),
            "max_model_len": _resolve_max_model_len(common["max_model_len"], max_model_len),
            "eos_token_ids": eos_token_ids,
            "default_sampling": _default_sampling(generation),
            "quantization": quantization,
        }
    )


def _family(fields: Fields) -> tuple[str, Callable[[Fields], dict[str, Any]]]:
    architectures = fields.texts("architectures")
    for architecture in architectures:
        if architecture in _FAMILIES:
            return architecture, _FAMILIES[architecture]
    raise ConfigError("architectures", f"{architectures} is not supported; these are: {', '.join(sorted(_FAMILIES))}")


def _common(fields: Fields) -> dict[str, Any]:
    hidden_size, num_heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    num_kv_heads = fields.count("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise ConfigError("num_key_value_heads", f"{num_kv_heads} does not divide num_attention_heads, {num_heads}")
    if not fields.has("head_dim") and hidden_size % num_heads:
        raise ConfigError("num_attention_heads", f"{num_heads} does not divide hidden_size, {hidden_size}")
    return {
        "vocab_size": fields.count("vocab_size"),
        "hidden_size": hidden_size,
        "embed_size": hidden_size,
        "num_layers": fields.count("num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": fields.count("head_dim", hidden_size // num_heads),
    }


def _gated(fields: Fields) -> dict[str, Any]:
    """What Llama and its descendants share."""
    fields.require("hidden_act", "silu")
    return {
        "intermediate_size": fields.count("intermediate_size"),
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", False),
    }


def _rotary(fields: Fields) -> dict[str, Any]:
    rope = _rope(fields)
    # Linear scaling stretches positions: LongChat and Vicuna 16k state the unstretched length and a factor.
    stretch = rope.factor if rope.scaling == "linear" else 1.0
    return {"rope": rope, "max_model_len": int(fields.count("max_position_embeddings") * stretch)}


def _rope(fields: Fields) -> Rope:
    """Rope of either spelling: ``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling``."""
    fields.require("partial_rotary_factor", 1.0)
    scaling = fields.object("rope_parameters" if fields.has("rope_parameters") else "rope_scaling")
    scaling.require("partial_rotary_factor", 1.0)
    theta = scaling.number("rope_theta", fields.number("rope_theta", 10000.0))
    name = "rope_type" if scaling.has("rope_type") else "type"
    match scaling.text(name, "default"):
        case "default":
            return Rope(theta)
        case "linear":
            return Rope(theta, "linear", factor=scaling.number("factor"))
        case "llama3":
            return Rope(
                theta,
                "llama3",
                scaling.number("factor"),
                scaling.number("low_freq_factor"),
                scaling.number("high_freq_factor"),
                scaling.count("original_max_position_embeddings"),
            )
        case other:
            raise ConfigError(f"{scaling.prefix}{name}", f"{other!r} is not supported; default, linear, llama3 are")


def _llama(fields: Fields) -> dict[str, Any]:
    bias = fields.flag("attention_bias", False)
    biases = {"qkv_bias": bias, "o_bias": bias, "mlp_bias": fields.flag("mlp_bias", False)}
    return _gated(fields) | _rotary(fields) | biases


def _mistral(fields: Fields) -> dict[str, Any]:
    window = fields.count("sliding_window") if fields.has("sliding_window") else None
    return _gated(fields) | _rotary(fields) | {"sliding_window": window}


def _qwen2(fields: Fields) -> dict[str, Any]:
    fields.require("use_sliding_window", False)
    return _gated(fields) | _rotary(fields) | {"qkv_bias": True}


def _qwen3(fields: Fields) -> dict[str, Any]:
    fields.require("use_sliding_window", False)
    bias = fields.flag("attention_bias", False)
    return _gated(fields) | _rotary(fields) | {"qk_norm": True, "qkv_bias": bias, "o_bias": bias}


def _baichuan(fields: Fields) -> dict[str, Any]:
    """Baichuan and Baichuan2. The checkpoints come with code instead of fields that tell the sizes apart.

    The published code of the 13B models has no rotary positions, and their config.json gives only model_max_length,
    where that of the 7B models also gives the max_position_embeddings that their rotary positions need.
    Baichuan2 normalizes its head: it is known by its vocabulary, or by the z_loss_weight it was trained with.
    """
    positions = (
        _rotary(fields)
        if fields.has("max_position_embeddings")
        else {"alibi": True, "max_model_len": fields.count("model_max_length")}
    )
    normalized_head = fields.has("z_loss_weight") or fields.count("vocab_size") == 125696
    return _gated(fields) | positions | {"packed_qkv": True, "normalized_head": normalized_head}


def _opt(fields: Fields) -> dict[str, Any]:
    fields.require("activation_function", "relu")
    fields.require("enable_bias", True)
    fields.require("layer_norm_elementwise_affine", True)
    fields.require("_remove_final_layer_norm", False)
    max_model_len = fields.count("max_position_embeddings")
    return {
        "intermediate_size": fields.count("ffn_dim"),
        "norm_eps": 1e-5,
        "tie_word_embeddings": fields.flag("tie_word_embeddings", True),
        "max_model_len": max_model_len,
        "num_positions": max_model_len,
        "embed_size": fields.count("word_embed_proj_dim", fields.count("hidden_size")),
        "post_norm": not fields.flag("do_layer_norm_before", True),
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
    }


_FAMILIES: dict[str, Callable[[Fields], dict[str, Any]]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "OPTForCausalLM": _opt,
    "BaichuanForCausalLM": _baichuan,
    "BaiChuanForCausalLM": _baichuan,  # how Baichuan-7B spells it
}


def _resolve_dtype(fields: Fields, dtype: str) -> str:
    # A checkpoint that does not say gets float32, which holds every other type without loss.
    name = "dtype" if fields.has("dtype") else "torch_dtype"
    resolved = fields.text(name, "float32") if dtype == "auto" else dtype
    if resolved not in DTYPES:
        field = name if dtype == "auto" else "--dtype"
        raise ConfigError(field, f"{resolved!r} is not supported; --dtype takes auto, {', '.join(DTYPES)}")
    return resolved


def _resolve_max_model_len(own: int, override: int | None) -> int:
    if override is None:
        return own
    if not 1 <= override <= own:
        raise ConfigError("--max-model-len", f"{override} is not between 1 and the model's own {own}")
    return override


def _check_ids(eos_token_ids: tuple[int, ...], vocab_size: int) -> None:
    if len(eos_token_ids) > MAX_EOS_TOKEN_IDS:
        raise ConfigError("eos_token_id", f"{len(eos_token_ids)} ids; at most {MAX_EOS_TOKEN_IDS} are supported")
    if any(token_id >= vocab_size for token_id in eos_token_ids):
        raise ConfigError("eos_token_id", f"{list(eos_token_ids)} is not below vocab_size, {vocab_size}")


def _default_sampling(generation: Fields) -> DefaultSampling:
    def number(name: str) -> float | None:
        return generation.number(name, positive=False) if generation.has(name) else None

    return DefaultSampling(
        temperature=number("temperature"),
        top_p=number("top_p"),
        top_k=generation.count("top_k", minimum=0) if generation.has("top_k") else None,
        min_p=number("min_p"),
        repetition_penalty=number("repetition_penalty"),
    )
