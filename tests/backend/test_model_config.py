from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import KINDS, make_checkpoint

from weft.limits import default_limits
from weft_backend.config_fields import ConfigError
from weft_backend.model_config import MAX_EOS_TOKEN_IDS, DefaultSampling, ModelConfig, Rope, load_model_config
from weft_backend.model_runner import MAX_STOP_TOKEN_IDS

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "torch_dtype": "bfloat16",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BAICHUAN = LLAMA | {"architectures": ["BaichuanForCausalLM"], "max_position_embeddings": None, "model_max_length": 512}
OPT = LLAMA | {"architectures": ["OPTForCausalLM"], "ffn_dim": 96}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def write(path: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def load(path: Path, config: dict[str, Any], **options: Any) -> ModelConfig:
    return load_model_config(write(path, config), **options)


def test_a_row_has_room_for_a_requests_stop_ids_and_the_models() -> None:
    assert default_limits().max_stop_token_ids + MAX_EOS_TOKEN_IDS <= MAX_STOP_TOKEN_IDS


def test_a_plain_llama(tmp_path: Path) -> None:
    assert load(tmp_path, LLAMA) == ModelConfig(
        architecture="LlamaForCausalLM",
        dtype="bfloat16",
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        embed_size=64,
        max_model_len=2048,
        norm_eps=1e-5,
        tie_word_embeddings=False,
        eos_token_ids=(2,),
        default_sampling=DefaultSampling(),
        rope=Rope(10000.0),
    )


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_checkpoints_of_every_family_are_read(kind: str, tmp_path: Path) -> None:
    config = load_model_config(make_checkpoint(kind, tmp_path / kind, tokenizer=False))
    fields = KINDS[kind][1]
    assert config.num_heads == fields["num_attention_heads"]
    assert config.dtype == "float32"
    assert config.eos_token_ids == (2,)
    assert config.alibi == (kind == "baichuan2-13b")
    assert (config.rope is None) == (kind in {"opt", "opt-350m", "baichuan2-13b"})


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        ({"rope_theta": 5e5}, Rope(5e5)),
        ({"rope_theta": 500000, "rope_scaling": None}, Rope(5e5)),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192)),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192)),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, Rope(10000.0, "linear", 4.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, Rope(1e6)),
    ],
)
def test_either_spelling_of_rope(fields: dict[str, Any], rope: Rope, tmp_path: Path) -> None:
    assert load(tmp_path, LLAMA | fields).rope == rope


def test_linear_scaling_stretches_the_length(tmp_path: Path) -> None:
    assert load(tmp_path, LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}}).max_model_len == 8192
    assert load(tmp_path, LLAMA | {"rope_scaling": LLAMA3}).max_model_len == 2048


@pytest.mark.parametrize(
    ("config", "alibi", "normalized_head", "max_model_len"),
    [
        (BAICHUAN, True, False, 512),
        (BAICHUAN | {"z_loss_weight": 0}, True, True, 512),
        (BAICHUAN | {"vocab_size": 125696}, True, True, 512),
        (BAICHUAN | {"max_position_embeddings": 1024}, False, False, 1024),
        (BAICHUAN | {"architectures": ["BaiChuanForCausalLM"], "max_position_embeddings": 1024}, False, False, 1024),
    ],
)
def test_baichuan_sizes_are_told_apart(
    config: dict[str, Any], alibi: bool, normalized_head: bool, max_model_len: int, tmp_path: Path
) -> None:
    loaded = load(tmp_path, config)
    assert (loaded.alibi, loaded.normalized_head, loaded.max_model_len) == (alibi, normalized_head, max_model_len)
    assert (loaded.rope is None) == alibi


def test_generation_config_wins(tmp_path: Path) -> None:
    generation = {"eos_token_id": [7, 9], "temperature": 0.6, "top_p": 0.9, "top_k": 0, "do_sample": True}
    config = load_model_config(write(tmp_path, LLAMA, generation))
    assert config.eos_token_ids == (7, 9)
    assert config.default_sampling == DefaultSampling(temperature=0.6, top_p=0.9, top_k=0)


def test_options(tmp_path: Path) -> None:
    assert load(tmp_path, LLAMA, dtype="float16").dtype == "float16"
    assert load(tmp_path, LLAMA, max_model_len=100).max_model_len == 100
    assert load(tmp_path, OPT, max_model_len=100).num_positions == 2048
    assert load(tmp_path, LLAMA | {"torch_dtype": None, "dtype": "float16"}).dtype == "float16"
    assert load(tmp_path, LLAMA | {"torch_dtype": None}).dtype == "float32"


@pytest.mark.parametrize(
    ("field", "config", "options"),
    [
        ("architectures", LLAMA | {"architectures": ["GPT2LMHeadModel"]}, {}),
        ("architectures", LLAMA | {"architectures": None}, {}),
        ("quantization_config", LLAMA | {"quantization_config": {"quant_method": "awq"}}, {}),
        ("hidden_size", LLAMA | {"hidden_size": "64"}, {}),
        ("hidden_size", LLAMA | {"hidden_size": None}, {}),
        ("num_hidden_layers", LLAMA | {"num_hidden_layers": 0}, {}),
        ("num_hidden_layers", LLAMA | {"num_hidden_layers": True}, {}),
        ("num_attention_heads", LLAMA | {"num_attention_heads": 5}, {}),
        ("num_key_value_heads", LLAMA | {"num_key_value_heads": 3}, {}),
        ("rms_norm_eps", LLAMA | {"rms_norm_eps": -1.0}, {}),
        ("hidden_act", LLAMA | {"hidden_act": "gelu"}, {}),
        ("activation_function", OPT | {"activation_function": "gelu"}, {}),
        ("partial_rotary_factor", LLAMA | {"partial_rotary_factor": 0.5}, {}),
        ("rope_scaling.type", LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, {}),
        ("rope_scaling.rope_type", LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, {}),
        ("rope_parameters.factor", LLAMA | {"rope_parameters": {"rope_type": "linear"}}, {}),
        (
            "use_sliding_window",
            LLAMA | {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True},
            {},
        ),
        ("eos_token_id", LLAMA | {"eos_token_id": 300}, {}),
        ("eos_token_id", LLAMA | {"eos_token_id": [2, -1]}, {}),
        ("eos_token_id", LLAMA | {"eos_token_id": list(range(17))}, {}),
        ("torch_dtype", LLAMA | {"torch_dtype": "float8_e4m3fn"}, {}),
        ("--dtype", LLAMA, {"dtype": "int8"}),
        ("--max-model-len", LLAMA, {"max_model_len": 2049}),
        ("--max-model-len", LLAMA, {"max_model_len": 0}),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    field: str, config: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, config, **options)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_damaged_file_is_named(name: str, text: str, tmp_path: Path) -> None:
    write(tmp_path, LLAMA)
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        load_model_config(tmp_path)
    assert caught.value.field == name


def test_reading_a_config_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from weft_backend.model_config import load_model_config\n"
        "load_model_config(pathlib.Path(sys.argv[1]))\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(write(tmp_path, LLAMA))], check=True)
