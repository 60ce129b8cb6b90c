"""Tiny random checkpoints of every supported family, as Hugging Face folders.

``make_checkpoint(kind, path)`` writes config.json, generation_config.json, safetensors and a tokenizer. Weights are
drawn wide enough that greedy decoding has no near ties, and the same for the same kind, seed and overrides.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_model
from reference_models import BaichuanTwin
from torch import nn

VOCAB_SIZE = 384  # 256 bytes, 3 special tokens, the rest merges
BOS, START, EOS = "<|bos|>", "<|start|>", "<|end|>"  # ids 0, 1, 2
CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
_TEXT = [
    "The capital of France is Paris, and the capital of Italy is Rome. Hello, my name is Weft.",
    "One and one is two; two and three is five. The president of the United States is a person.",
    "The future of this is in the weaving: the weft runs across the warps, over and under. 你好,世界。 🙂 é ü ñ",
]

_DECODER: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_OPT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 64,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
_BAICHUAN: dict[str, Any] = {
    "architectures": ["BaichuanForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"},
    "model_type": "baichuan",
    "hidden_act": "silu",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "model_max_length": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# kind -> (model_type, fields of config.json)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _DECODER),
    "llama3-rope": ("llama", _DECODER | {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama-linear-rope": (
        "llama",
        _DECODER | {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "llama-bias": ("llama", _DECODER | {"attention_bias": True, "mlp_bias": True}),
    "vicuna": ("llama", _DECODER | {"num_key_value_heads": 4}),
    "mistral": ("mistral", _DECODER | {"sliding_window": 8}),
    "qwen2": ("qwen2", _DECODER | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", _DECODER | {"head_dim": 32, "tie_word_embeddings": True}),
    "opt": ("opt", _OPT),
    "opt-350m": ("opt", _OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "baichuan-7b": ("baichuan", _BAICHUAN | {"max_position_embeddings": 256}),
    "baichuan2-13b": ("baichuan", _BAICHUAN | {"num_attention_heads": 8, "z_loss_weight": 0}),
}
_SENTENCEPIECE_KINDS = {"vicuna", "baichuan-7b", "baichuan2-13b"}


def make_checkpoint(
    kind: str, path: Path, *, seed: int = 0, num_shards: int = 1, tokenizer: bool = True, **overrides: Any
) -> Path:
    """Writes a checkpoint of one of ``KINDS`` into the new folder ``path`` and returns it.

    ``overrides`` replace fields of config.json. With ``num_shards`` over 1 the weights come as that many files or
    more, with an index. The tokenizer is a byte-level BPE in tokenizer.json; for vicuna and baichuan it is a
    sentencepiece tokenizer.model, as published. It fits a vocabulary of ``VOCAB_SIZE``.
    """
    path.mkdir(parents=True)
    model = random_model(kind, seed=seed, **overrides)
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    shard_size = num_bytes if num_shards == 1 else num_bytes // num_shards
    if isinstance(model, BaichuanTwin):
        save_torch_model(model, path, max_shard_size=shard_size)
        (path / "modeling_baichuan.py").write_text("raise RuntimeError('code of a checkpoint was executed')\n")
    else:
        model.save_pretrained(path, max_shard_size=shard_size)
    write_config(model, path)
    if tokenizer:
        (write_sentencepiece_tokenizer if kind in _SENTENCEPIECE_KINDS else write_bpe_tokenizer)(path)
    return path


def random_model(kind: str, *, seed: int = 0, **overrides: Any) -> Any:
    """A transformers model of one of ``KINDS``, or a BaichuanTwin, on the current default device."""
    model_type, fields = KINDS[kind]
    fields = fields | overrides
    if model_type == "baichuan":
        model: Any = BaichuanTwin(fields)
    else:
        from transformers import AutoConfig, AutoModelForCausalLM

        from_config: Any = AutoModelForCausalLM.from_config
        model = from_config(AutoConfig.for_model(model_type, **fields), attn_implementation="eager")
    draw_weights(model, seed, std=1.6 / math.sqrt(fields["hidden_size"]))
    return model


def write_config(model: Any, path: Path) -> None:
    """Writes config.json."""
    if isinstance(model, BaichuanTwin):
        (path / "config.json").write_text(json.dumps(model.config, indent=2))
    else:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(path)


@torch.no_grad()
def draw_weights(model: nn.Module, seed: int, std: float) -> None:
    """Draws every parameter anew: gains of norms around 1, all else around 0; no bias stays zero.

    Biases are drawn small, for a bias of the last norm over tied embeddings makes every token the same.
    """
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        is_bias, is_gain = name.endswith("bias"), "norm" in name and name.endswith("weight")
        parameter.normal_(1.0 if is_gain else 0.0, 0.05 if is_bias else 0.2 if is_gain else std, generator=generator)


def write_bpe_tokenizer(path: Path) -> None:
    """Writes tokenizer.json and a tokenizer_config.json with a chat template; encoding prepends the BOS id 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, START, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    _write_tokenizer_config(path, "PreTrainedTokenizerFast")


def write_sentencepiece_tokenizer(path: Path) -> None:
    """Writes a BPE tokenizer.model with byte fallback, ids 0 to 2 as in the other tokenizer, and its config."""
    import sentencepiece

    with (path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_TEXT),
            model_writer=file,
            model_type="bpe",
            vocab_size=VOCAB_SIZE,
            byte_fallback=True,
            bos_id=0,
            bos_piece=BOS,
            unk_id=1,
            unk_piece=START,
            eos_id=2,
            eos_piece=EOS,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    _write_tokenizer_config(path, "LlamaTokenizer")


def _write_tokenizer_config(path: Path, tokenizer_class: str) -> None:
    config = {
        "tokenizer_class": tokenizer_class,
        "bos_token": BOS,
        "eos_token": EOS,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
