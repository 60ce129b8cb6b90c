"""The engine process, ``python -m weft_backend.engine_process FD CONFIG``: loads the model and runs the engine."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch

from weft_backend.channel import EngineChannel, Kind
from weft_backend.checkpoint import model_hash, resolve_checkpoint
from weft_backend.config import EngineConfig
from weft_backend.engine import Engine
from weft_backend.engine_host import end_now, serve
from weft_backend.errors import StartupError
from weft_backend.layers import TensorParallel
from weft_backend.model_card import describe_defaults, make_card
from weft_backend.model_config import ModelConfig, load_model_config
from weft_backend.model_runner import ModelRunner
from weft_backend.rank import follow, load_rank, make_runner, meet_followers, plan_memory, resolve_device, use_device
from weft_backend.ranks import Followers, LeadRunner
from weft_backend.scheduler import Scheduler
from weft_backend.stages import Stage
from weft_backend.tokenizer_files import check_vocabulary, chunks, hash_tokenizer, read_tokenizer_files


def build_engine(channel: EngineChannel, config: EngineConfig) -> Engine:
    """Load what the configuration names, one printed line a stage. Raises StartupError."""
    followers = Followers(config.tensor_parallel_size, partial(follow, config))
    device = resolve_device(config, rank=0)
    use_device(device, followers.size)
    with Stage("model") as stage:
        path, model_config = _open_checkpoint(config)
        stage.detail = (
            f"{config.model}: {model_config.architecture}, sampling defaults: {describe_defaults(model_config)}"
        )
    with Stage("tokenizer") as stage:
        tokenizer_hash = _send_tokenizer(channel, path, model_config.vocab_size, config.require_tokenizer)
        stage.detail = f"files hash to {tokenizer_hash[:12]}" if tokenizer_hash else "none: token ids only"
    with Stage("memory") as stage:
        stage.detail = plan_memory(config, model_config, device)
    followers.watch(partial(end_now, channel))
    tp = meet_followers(followers, path, model_config, device)
    runner = _load_runner(config, path, model_config, device, tp)
    card = make_card(
        config,
        model_config,
        max_model_len=runner.max_model_len,
        num_pages=runner.num_pages,
        model_hash=model_hash(path),
        tokenizer_hash=tokenizer_hash,
    )
    depth = 1 if device.type == "cuda" else 0
    led = LeadRunner(runner, followers) if followers.size > 1 else runner
    return Engine(channel, _make_scheduler(config, runner), led, card, pipeline_depth=depth, seed=config.seed)


def _open_checkpoint(config: EngineConfig) -> tuple[Path, ModelConfig]:
    path = resolve_checkpoint(
        config.model,
        revision=config.revision,
        download_dir=config.download_dir,
        weights=config.load_format != "dummy",
    )
    return path, load_model_config(
        path, dtype=config.dtype, max_model_len=config.max_model_len, quantization=config.quantization
    )


def _load_runner(
    config: EngineConfig, path: Path, model_config: ModelConfig, device: torch.device, tp: TensorParallel
) -> ModelRunner:
    with Stage("weights") as stage:
        model, num_kernels = load_rank(config, path, model_config, device, tp)
        quantized = f" quantized to {config.quantization}" if config.quantization else ""
        kernels = f"; {num_kernels} kernels compiled" if device.type == "cuda" else ""
        stage.detail = f"{config.load_format}, {model_config.dtype}{quantized} on {device}{kernels}"
    with Stage("pages") as stage:
        runner = make_runner(config, model_config, model, device, tp)
        num_tokens = runner.num_pages * config.block_size
        graphs = "with CUDA graphs" if device.type == "cuda" and not config.enforce_eager else "no CUDA graphs"
        stage.detail = f"{runner.num_pages} of {config.block_size} = {num_tokens} tokens; {graphs}"
    if runner.max_model_len < model_config.max_model_len:
        print(
            f"weft: max_model_len is {runner.max_model_len}, which fits, not {model_config.max_model_len}",
            file=sys.stderr,
        )
    return runner


def _make_scheduler(config: EngineConfig, runner: ModelRunner) -> Scheduler:
    return Scheduler(
        runner.num_pages,
        config.block_size,
        config.max_num_seqs,
        config.max_num_batched_tokens,
        runner.max_model_len,
        runner.num_host_pages,
        config.enable_prefix_caching,
    )


def _send_tokenizer(channel: EngineChannel, path: Path, vocab_size: int, is_required: bool) -> str:
    files = read_tokenizer_files(path)
    if is_required and not files:
        raise StartupError(
            f"{path} has no tokenizer (tokenizer.json, tokenizer.model, or vocab.json and merges.txt): "
            "only `weft backend` alone can serve it, in token ids"
        )
    check_vocabulary(files, vocab_size, path)
    for chunk in chunks(files):
        channel.send(Kind.TOKENIZER, payload=chunk.SerializeToString())
    return hash_tokenizer(files)


if __name__ == "__main__":
    sys.exit(serve(int(sys.argv[1]), lambda channel: build_engine(channel, EngineConfig.from_json(sys.argv[2]))))
