"""Trains weft-tiny from nothing and writes it as a Hugging Face folder; the data and the tokenizer are made on the way.

    python backend/training/train.py --out DIR [--device cuda|cpu] [--steps N]

The text is seeded; weights differ in their last bits from one machine to another, the table hardly at all.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import corpus
import evaluate
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SEED = 1
SHARD_DOCUMENTS = 20_000
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + ('system' if message['role'] == 'developer' else message['role']) + '\\n' }}"
    "{{- message['content'] | trim + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "bos_token_id": None,
    "eos_token_id": [2, 0],
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
SPECIAL_TOKENS = [corpus.END, corpus.START, corpus.STOP]


@dataclass(frozen=True)
class Data:
    """All documents in one row: ids [tokens], starts [documents], learned [tokens] (false where others speak)."""

    ids: torch.Tensor
    learned: torch.Tensor
    starts: torch.Tensor


def make_tokenizer(num_documents: int) -> Tokenizer:
    """Byte-level BPE; each digit is a token of its own, so that sums can be learned."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (re.split(r"<\|\w+\|>", document) for document in corpus.documents("tokenizer", num_documents))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def shard(tokenizer_json: str, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One part of the data: (ids, learned, starts) of its documents, each closed by the end-of-text token."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    texts = [text + corpus.END for text in corpus.documents(f"{SEED} {index}", SHARD_DOCUMENTS)]
    rows = [one.ids for one in tokenizer.encode_batch_fast(texts)]
    ids = np.concatenate([np.asarray(row, dtype=np.int16) for row in rows])
    starts = np.cumsum([0, *(len(row) for row in rows[:-1])])
    opened = np.flatnonzero(ids == tokenizer.token_to_id(corpus.START))
    closed = np.flatnonzero(ids == tokenizer.token_to_id(corpus.STOP))
    theirs = ids[opened + 1] != tokenizer.encode("assistant").ids[0]
    edges = np.zeros(len(ids), dtype=np.int8)
    edges[opened[theirs]] = 1
    edges[closed[theirs]] = -1
    return ids, np.cumsum(edges) == 0, starts


def make_data(tokenizer: Tokenizer, num_shards: int, device: str) -> Data:
    with ProcessPoolExecutor() as pool:
        parts = list(pool.map(shard, [tokenizer.to_str()] * num_shards, range(num_shards)))
    offsets = np.cumsum([0, *(len(ids) for ids, _, _ in parts[:-1])])
    ids, learned = (np.concatenate([part[column] for part in parts]) for column in (0, 1))
    starts = np.concatenate([part[2] + offset for part, offset in zip(parts, offsets, strict=True)])
    return Data(*(torch.from_numpy(array).to(device) for array in (ids, learned, starts)))


def batches(data: Data, steps: int, rows: int, length: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs [rows, length] that begin at a document, and targets with -100 where nothing is learned."""
    generator = torch.Generator(data.ids.device).manual_seed(SEED)
    usable = data.starts[data.starts < len(data.ids) - length - 1]
    steps_in_row = torch.arange(length + 1, device=data.ids.device)
    for _ in range(steps):
        chosen = torch.randint(len(usable), (rows,), generator=generator, device=data.ids.device)
        places = usable[chosen][:, None] + steps_in_row
        ids, learned = data.ids[places].long(), data.learned[places]
        yield ids[:, :-1], torch.where(learned, ids, -100)[:, 1:]


def learning_rate(step: int, steps: int, peak: float = 3e-3, warmup: int = 200) -> float:
    """Linear warm-up, then a cosine down to a hundredth of the peak."""
    decayed = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps))
    return peak * min(1.0, (step + 1) / warmup) * decayed


def train(model: LlamaForCausalLM, data: Data, steps: int, rows: int, length: int) -> None:
    device = data.ids.device.type
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    forward = torch.compile(model) if device == "cuda" else model
    started = time.perf_counter()
    for step, (inputs, targets) in enumerate(batches(data, steps, rows, length)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        with torch.autocast(device, torch.bfloat16):
            logits = forward(input_ids=inputs, use_cache=False).logits
        loss = functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % max(1, steps // 40) == 0 or step == steps - 1:
            seconds = time.perf_counter() - started
            rate = (step + 1) * inputs.numel() / seconds
            print(f"step {step:6d}  loss {loss.item():.4f}  {seconds:6.1f} s  {rate:,.0f} tokens/s", flush=True)


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.to(torch.bfloat16).contiguous() for name, weight in model.state_dict().items()}
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    stops = {"eos_token_id": CONFIG["eos_token_id"], "pad_token_id": CONFIG["pad_token_id"]}
    tokens = {"eos_token": corpus.STOP, "pad_token": corpus.END, "model_max_length": CONFIG["max_position_embeddings"]}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, content in (
        ("config.json", CONFIG),
        ("generation_config.json", stops),
        ("tokenizer_config.json", {**kind, **tokens, "chat_template": CHAT_TEMPLATE}),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=11_000)
    parser.add_argument("--rows", type=int, default=32, help="rows of a batch")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--shards", type=int, default=100, help=f"parts of {SHARD_DOCUMENTS} documents")
    parser.add_argument("--questions", type=int, default=300, help="exam questions of each kind")
    options = parser.parse_args()
    torch.manual_seed(SEED)
    started = time.perf_counter()
    tokenizer = make_tokenizer(60_000)
    data = make_data(tokenizer, options.shards, options.device)
    share = data.learned.float().mean().item()
    seconds = time.perf_counter() - started
    print(f"{len(data.starts):,} documents, {len(data.ids):,} tokens, {share:.0%} learned, {seconds:.1f} s", flush=True)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(options.device)
    print(f"{model.num_parameters():,} parameters", flush=True)
    train(model, data, options.steps, options.rows, options.length)
    export(model, tokenizer, options.out)
    exported = AutoModelForCausalLM.from_pretrained(options.out, dtype=torch.bfloat16).to(options.device)
    for line in evaluate.table(exported, tokenizer, options.questions):
        print(line, flush=True)


if __name__ == "__main__":
    main()
