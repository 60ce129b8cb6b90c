"""Our models against transformers' (Baichuan: a dense twin), on tiny random checkpoints, in float32."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import KINDS, make_checkpoint
from paged_rows import CPU, Rows, prompt, run_rank
from reference_models import Logits, greedy, load_reference
from torch import Tensor

from weft_backend.model_config import ModelConfig, Rope, load_model_config
from weft_backend.models import Model, load_model

# Largest difference of logits, whose spread is about 1.5. Measured: at most 1.5e-5; see test_tolerance_can_fail.
TOLERANCE = 5e-5
# A nearly right model of each family, which the tolerance must tell from the right one.
NEARLY_RIGHT: dict[str, Callable[[ModelConfig], ModelConfig]] = {
    "llama": lambda config: replace(config, rope=Rope(theta=10010.0)),
    "llama3-rope": lambda config: replace(config, rope=Rope(10000.0, "llama3", 8.0, 1.0, 4.0, 33)),
    "llama-linear-rope": lambda config: replace(config, rope=Rope(10000.0, "linear", 4.1)),
    "mistral": lambda config: replace(config, sliding_window=9),
    "qwen3": lambda config: replace(config, norm_eps=3e-6),
    "opt": lambda config: replace(config, norm_eps=2e-5),
    "baichuan2-13b": lambda config: replace(config, norm_eps=3e-6),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module", params=sorted(KINDS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(request.param, tmp_path_factory.mktemp("models") / request.param, tokenizer=False)


@pytest.fixture(scope="module")
def config(checkpoint: Path) -> ModelConfig:
    return load_model_config(checkpoint)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Logits:
    return load_reference(checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint: Path, config: ModelConfig) -> Model:
    return load_model(config, checkpoint, device=CPU)


def distance(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs).abs().max().item()


def test_whole_prompt(config: ModelConfig, model: Model, reference: Logits) -> None:
    token_ids = prompt(67, seed=0)
    (logits,) = Rows(model, config, 1).step([(0, token_ids)])
    assert distance(logits, reference(token_ids)) < TOLERANCE


def test_chunks_batched_with_others(config: ModelConfig, model: Model, reference: Logits) -> None:
    prompts = [prompt(50, seed=1), prompt(33, seed=2), prompt(1, seed=3)]
    rows = Rows(model, config, 3)
    computed: list[list[Tensor]] = [[], [], []]
    for sizes in ([7, 16, 1], [1, 17, 0], [23, 0, 0], [19, 0, 0]):
        work = [(r, prompts[r][rows.lens[r] : rows.lens[r] + n]) for r, n in enumerate(sizes) if n]
        for (row, _), logits in zip(work, rows.step(work), strict=True):
            computed[row].append(logits)
    for token_ids, parts in zip(prompts, computed, strict=True):
        assert distance(torch.cat(parts), reference(token_ids)) < TOLERANCE


@torch.inference_mode()
def test_wanted_tokens_alone(config: ModelConfig, model: Model) -> None:
    rows = Rows(model, config, 2)
    token_ids, layout = rows.lay_out([(0, prompt(21, seed=6)), (1, prompt(5, seed=7))])
    wanted = torch.tensor([20, 25, 3, 20], dtype=torch.int32)
    hidden, cache = model(token_ids, layout, rows.cache, None), rows.cache.clone()
    rows.cache.fill_(float("nan"))
    assert distance(model(token_ids, layout, rows.cache, wanted), hidden[wanted]) < TOLERANCE
    assert torch.equal(rows.cache.nan_to_num(-1), cache.nan_to_num(-1))  # it has the keys and values of all tokens


def test_greedy_decode_of_64_tokens(config: ModelConfig, model: Model, reference: Logits) -> None:
    prompts = [prompt(9, seed=4), prompt(30, seed=5)]
    rows = Rows(model, config, 2)
    generated: list[list[int]] = [[], []]
    work = list(enumerate(prompts))
    for _ in range(64):
        for row, logits in enumerate(rows.step(work)):
            generated[row].append(int(logits[-1].argmax()))
        work = [(row, ids[-1:]) for row, ids in enumerate(generated)]
    for token_ids, ours in zip(prompts, generated, strict=True):
        assert ours == greedy(reference, token_ids, 64)


@pytest.mark.parametrize("kind", sorted(NEARLY_RIGHT))
def test_tolerance_can_fail(kind: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(kind, tmp_path / kind, tokenizer=False)
    wrong = NEARLY_RIGHT[kind](load_model_config(checkpoint))
    token_ids = prompt(67, seed=0)
    (logits,) = Rows(load_model(wrong, checkpoint, device=CPU), wrong, 1).step([(0, token_ids)])
    assert distance(logits, load_reference(checkpoint)(token_ids)) > 2 * TOLERANCE


@pytest.mark.parametrize("kind", ["llama", "qwen3", "opt"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_as_close_as_in_transformers(kind: str, dtype: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(kind, tmp_path / kind, tokenizer=False)
    config = load_model_config(checkpoint, dtype=dtype)
    token_ids = prompt(67, seed=0)
    exact = load_reference(checkpoint)(token_ids)
    (logits,) = Rows(load_model(config, checkpoint, device=CPU), config, 1).step([(0, token_ids)])
    theirs = load_reference(checkpoint, getattr(torch, dtype))(token_ids)
    assert 0 < (logits - exact).square().mean() < 1.2 * (theirs - exact).square().mean()


def test_sharded_checkpoint_is_the_same_model(tmp_path: Path) -> None:
    whole, sharded = (make_checkpoint("llama", tmp_path / str(n), num_shards=n, tokenizer=False) for n in (1, 3))
    assert len(list(sharded.glob("*.safetensors"))) >= 3
    config, token_ids = load_model_config(whole), prompt(12, seed=6)
    ours, theirs = (
        Rows(load_model(config, path, device=CPU), config, 1).step([(0, token_ids)])[0] for path in (whole, sharded)
    )
    assert torch.equal(ours, theirs)


def test_two_ranks_are_one_model(tmp_path: Path) -> None:
    kinds = {"llama-bias": {"vocab_size": 385}, "qwen3": {}, "opt-350m": {}, "baichuan2-13b": {}}
    checkpoints = [make_checkpoint(k, tmp_path / k, tokenizer=False, **fields) for k, fields in kinds.items()]
    spawn = multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=run_rank, args=(rank, checkpoints, tmp_path / "rendezvous")) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    for checkpoint in checkpoints:
        exact = load_reference(checkpoint)(prompt(21, seed=7))
        full, half = (torch.load(checkpoint / f"logits-{d}.pt", weights_only=True) for d in ("float32", "bfloat16"))
        assert distance(full, exact) < TOLERANCE
        config = load_model_config(checkpoint, dtype="bfloat16")
        (alone,) = Rows(load_model(config, checkpoint, device=CPU), config, 1).step([(0, prompt(21, seed=7))])
        # Measured: 0.95 to 1.24 of one rank's error; partial sums are rounded before they are summed.
        assert 0 < (half - exact).square().mean() < 1.5 * (alone - exact).square().mean()
