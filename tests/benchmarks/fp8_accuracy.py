"""What float8 costs in accuracy: python -m benchmarks.fp8_accuracy [SHAPE] [--layers N]

The built-in model, or one of SHAPE's config.json with random weights and its first N layers, in bfloat16 and with
weights, KV cache or both in float8, beside the same weights computed in float32: the error of the logits, how often the
likeliest token is the same, the divergence of the distributions; and of the built-in model, its exam.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from driving import generated, make_request
from model_engine import PAGE_SIZES, ModelEngine
from tokenizers import Tokenizer
from torch import Tensor

from weft_backend.config import BUILTIN_MODEL
from weft_backend.layers import TensorParallel
from weft_backend.model_config import ModelConfig, load_model_config
from weft_backend.models import Model, build_model, load_model
from weft_kernels import BatchLayout

sys.path.append(str(Path(__file__).parents[2] / "backend" / "training"))

TEXT_LEN, NUM_TEXTS = 512, 8
FLOAT8 = torch.float8_e4m3fn
VARIANTS: dict[str, tuple[str | None, torch.dtype]] = {  # quantization of weights, type of the KV cache
    "bfloat16": (None, torch.bfloat16),
    "float8 weights": ("fp8", torch.bfloat16),
    "float8 KV cache": (None, FLOAT8),
    "both": ("fp8", FLOAT8),
}


@dataclass(frozen=True)
class Accuracy:
    """Over all tokens of the texts, against float32."""

    logits_error: float  # root mean square, over the spread of the logits
    top_1_agreement: float
    divergence: float  # Kullback-Leibler of the variant from float32, nats a token
    exam: float | None  # share of questions answered rightly


@click.command(help=__doc__)
@click.argument("shape", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--layers", default=4, help="Of a shape.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
@click.option("--questions", default=40, help="Of each kind in the exam.")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(shape: Path | None, layers: int, device: str, questions: int, json_path: Path | None) -> None:
    """Print a line for each variant."""
    torch.manual_seed(0)
    place = torch.device(device)
    config = load_model_config(shape or BUILTIN_MODEL, dtype="bfloat16")
    if shape is not None:
        config = replace(config, num_layers=layers)
    load_format = "auto" if shape is None else "dummy"
    model = load_model(config, shape or BUILTIN_MODEL, device=place, load_format=load_format)
    texts = list(random_texts(config)) if shape else list(written_texts())
    wide = replace(config, dtype="float32")
    exact = [logits_of(converted(model, wide, place), wide, text, torch.float32) for text in texts]
    found = {}
    for name, (quantization, kv_dtype) in VARIANTS.items():
        variant = replace(config, quantization=quantization)
        of_variant = converted(model, variant, place)
        right = None if shape else exam(of_variant, variant, kv_dtype, place, questions)
        found[name] = compare(exact, [logits_of(of_variant, variant, text, kv_dtype) for text in texts], right)
        print_line(name, found[name])
    if json_path is not None:
        json_path.write_text(json.dumps({name: asdict(accuracy) for name, accuracy in found.items()}, indent=2))


@torch.no_grad()
def converted(model: Model, config: ModelConfig, device: torch.device) -> Model:
    """A model of another type with the same weights."""
    other = build_model(config, device, TensorParallel())
    for ours, theirs in zip(other.sources(), model.sources(), strict=True):
        ours.fill(theirs.target)
    return other


def random_texts(config: ModelConfig) -> Iterator[list[int]]:
    for _ in range(NUM_TEXTS):
        yield torch.randint(config.vocab_size, (TEXT_LEN,)).tolist()


def written_texts() -> Iterator[list[int]]:
    """What the built-in model was trained to write, drawn anew."""
    text = "".join(import_module("corpus").documents("fp8", 400))
    ids = tokenizer_of_builtin().encode(text).ids
    for first in range(0, NUM_TEXTS * TEXT_LEN, TEXT_LEN):
        yield ids[first : first + TEXT_LEN]


def tokenizer_of_builtin() -> Tokenizer:
    return Tokenizer.from_file(str(BUILTIN_MODEL / "tokenizer.json"))


@torch.inference_mode()
def logits_of(model: Model, config: ModelConfig, token_ids: list[int], kv_dtype: torch.dtype) -> Tensor:
    """Float32 logits [T, V] of one sequence, computed as one prefill chunk over a paged cache."""
    device, num_tokens = model.lm_head.weight.device, len(token_ids)
    page_size = PAGE_SIZES[device.type]
    num_pages = -(-num_tokens // page_size)
    cache_shape = (config.num_layers, 2, num_pages, config.num_kv_heads, page_size, config.head_dim)

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    layout = BatchLayout(
        positions=torch.arange(num_tokens, device=device),
        slots=torch.arange(num_tokens, device=device),
        query_starts=ints(0, num_tokens),
        seq_lens=ints(num_tokens),
        rows=ints(0),
        page_table=ints(*range(num_pages))[None],
        num_decode_rows=ints(0),
        max_decode_rows=0,
        max_chunks=1,
        max_chunk_tokens=num_tokens,
        max_seq_len=num_tokens,
    )
    cache = torch.zeros(cache_shape, dtype=kv_dtype, device=device)
    hidden = model(torch.tensor(token_ids, device=device), layout, cache, None)
    return model.logits(hidden).float()


def exam(model: Model, config: ModelConfig, kv_dtype: torch.dtype, device: torch.device, count: int) -> float:
    """The share of held-out questions whose greedy answer is right, as backend/training/evaluate.py counts."""
    evaluate = import_module("evaluate")
    tokenizer = tokenizer_of_builtin()
    questions = [question for kind in evaluate.draws() for question in evaluate.exam(kind, count)]
    engine = ModelEngine(
        model,
        config,
        device,
        cache_len=64 * 512,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        max_model_len=config.max_model_len,
        kv_cache_dtype=kv_dtype,
    )
    requests = [
        make_request(
            tokenizer.encode(question.prompt).ids,
            max_tokens=evaluate.MAX_NEW_TOKENS,
            stop_token_ids=config.eos_token_ids,
        )
        for question in questions
    ]
    engine.run_requests(requests)
    answers = [tokenizer.decode([i for i in generated(r) if i not in config.eos_token_ids]) for r in requests]
    pairs = zip(questions, answers, strict=True)
    return sum(answer.strip() in question.answers for question, answer in pairs) / len(questions)


def compare(exact: list[Tensor], variant: list[Tensor], right: float | None) -> Accuracy:
    pairs = list(zip(exact, variant, strict=True))
    errors = torch.stack([(ours - theirs).square().mean() for theirs, ours in pairs]).mean().sqrt()
    spread = torch.stack([theirs.var() for theirs, _ in pairs]).mean().sqrt()
    agreement = torch.stack([(ours.argmax(-1) == theirs.argmax(-1)).float().mean() for theirs, ours in pairs]).mean()
    divergence = torch.stack([kl_divergence(ours, theirs) for theirs, ours in pairs]).mean()
    return Accuracy(float(errors / spread), float(agreement), float(divergence), right)


def kl_divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    return F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="batchmean", log_target=True)


def print_line(name: str, accuracy: Accuracy) -> None:
    exam_share: Any = "" if accuracy.exam is None else f", exam {accuracy.exam:.2%}"
    print(
        f"{name:16} logits error {accuracy.logits_error:.3%}, same likeliest token {accuracy.top_1_agreement:.2%}, "
        f"divergence {accuracy.divergence:.2e}{exam_share}",
        flush=True,
    )


if __name__ == "__main__":
    main()
