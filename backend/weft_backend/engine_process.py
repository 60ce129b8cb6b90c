"""The engine process, ``python -m weft_backend.engine_process FD CONFIG``: loads the model and runs the engine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from weft_backend.channel import EngineChannel, Kind
from weft_backend.checkpoint import model_hash, resolve_checkpoint
from weft_backend.config import EngineConfig
from weft_backend.engine import Engine
from weft_backend.engine_host import serve
from weft_backend.errors import StartupError
from weft_backend.kv_cache import PageShape
from weft_backend.layers import TensorParallel
from weft_backend.model_card import describe_defaults, make_card
from weft_backend.model_config import ModelConfig, load_model_config
from weft_backend.model_runner import ModelRunner
from weft_backend.models import Model, build_model, load_model
from weft_backend.scheduler import Scheduler
from weft_backend.stages import Stage
from weft_backend.tokenizer_files import check_vocabulary, chunks, hash_tokenizer, read_tokenizer_files

_GIB = 1 << 30


def build_engine(channel: EngineChannel, config: EngineConfig) -> Engine:
    """Load what the configuration names, one printed line a stage. Raises StartupError."""
    device = resolve_device(config.device)
    if device.type == "cpu":
        _leave_a_core_free()
    with Stage("model") as stage:
        path, model_config = _open_checkpoint(config)
        stage.detail = (
            f"{config.model}: {model_config.architecture}, sampling defaults: {describe_defaults(model_config)}"
        )
    with Stage("tokenizer") as stage:
        tokenizer_hash = _send_tokenizer(channel, path, model_config.vocab_size)
        stage.detail = f"files hash to {tokenizer_hash[:12]}" if tokenizer_hash else "none: token ids only"
    with Stage("memory") as stage:
        stage.detail = plan_memory(config, model_config, device)
    with Stage("weights") as stage:
        seed = config.seed or 0
        model = load_model(model_config, path, device=device, load_format=config.load_format, seed=seed)
        stage.detail = f"{config.load_format}, {model_config.dtype} on {device}"
    with Stage("pages") as stage:
        runner = _make_runner(config, model_config, model, device)
        num_tokens = runner.num_pages * config.block_size
        graphs = "with CUDA graphs" if device.type == "cuda" and not config.enforce_eager else "no CUDA graphs"
        stage.detail = f"{runner.num_pages} of {config.block_size} = {num_tokens} tokens; {graphs}"
    if runner.max_model_len < model_config.max_model_len:
        print(
            f"weft: max_model_len is {runner.max_model_len}, which fits, not {model_config.max_model_len}",
            file=sys.stderr,
        )
    return _assemble(channel, config, model_config, runner, device, model_hash(path), tokenizer_hash)


def resolve_device(name: str) -> torch.device:
    """The device to use; "auto" is a GPU if there is one. Raises StartupError."""
    if name == "cuda" and not torch.cuda.is_available():
        raise StartupError("--device cuda: PyTorch sees no GPU; --device cpu, or auto, runs without one")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _leave_a_core_free() -> None:
    """Leave a core to the I/O process and the frontends: threads that wait for each other and spin lose to any other
    load (265 steps of a tiny model on 2 busy cores: 13.9 s with two threads, 1.8 s with one).
    """
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, min(torch.get_num_threads(), num_cores - 1)))


def plan_memory(config: EngineConfig, model_config: ModelConfig, device: torch.device) -> str:
    """What the weights will take, and what may be used, before anything is loaded. Raises StartupError if too much."""
    model = build_model(model_config, torch.device("meta"), TensorParallel())
    weights = sum(tensor.numel() * tensor.itemsize for tensor in model.parameters())
    page = _page_shape(config, model_config).num_bytes
    detail = f"weights {weights / _GIB:.2f} GiB, {page / config.block_size / 1024:.1f} KiB of KV cache a token"
    if device.type != "cuda":
        return detail
    free, total = torch.cuda.mem_get_info(device)
    usable = total * config.gpu_memory_utilization - (total - free)
    if weights > usable:
        raise StartupError(
            f"the weights need {weights / _GIB:.2f} GiB, but {usable / _GIB:.2f} GiB of the GPU may be used "
            f"({config.gpu_memory_utilization:.0%} of {total / _GIB:.2f} GiB, less {(total - free) / _GIB:.2f} GiB "
            "in use): raise --gpu-memory-utilization, or use a narrower --dtype"
        )
    return f"{detail}; {usable / _GIB:.2f} of {total / _GIB:.2f} GiB may be used"


def _open_checkpoint(config: EngineConfig) -> tuple[Path, ModelConfig]:
    path = resolve_checkpoint(
        config.model,
        revision=config.revision,
        download_dir=config.download_dir,
        weights=config.load_format != "dummy",
    )
    return path, load_model_config(path, dtype=config.dtype, max_model_len=config.max_model_len)


def _send_tokenizer(channel: EngineChannel, path: Path, vocab_size: int) -> str:
    files = read_tokenizer_files(path)
    check_vocabulary(files, vocab_size, path)
    for chunk in chunks(files):
        channel.send(Kind.TOKENIZER, payload=chunk.SerializeToString())
    return hash_tokenizer(files)


def _page_shape(config: EngineConfig, model: ModelConfig) -> PageShape:
    dtype = getattr(torch, model.dtype)
    return PageShape(model.num_layers, model.num_kv_heads, config.block_size, model.head_dim, dtype)


def _make_runner(config: EngineConfig, model_config: ModelConfig, model: Model, device: torch.device) -> ModelRunner:
    return ModelRunner(
        model,
        page_shape=_page_shape(config, model_config),
        vocab_size=model_config.vocab_size,
        device=device,
        max_model_len=model_config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        gpu_memory_utilization=config.gpu_memory_utilization,
        swap_space=config.swap_space,
        enforce_eager=config.enforce_eager,
        num_pages=config.num_pages,
        may_shorten=config.max_model_len is None,
    )


def _assemble(
    channel: EngineChannel,
    config: EngineConfig,
    model_config: ModelConfig,
    runner: ModelRunner,
    device: torch.device,
    model_hash: str,
    tokenizer_hash: str,
) -> Engine:
    card = make_card(
        config,
        model_config,
        max_model_len=runner.max_model_len,
        num_pages=runner.num_pages,
        model_hash=model_hash,
        tokenizer_hash=tokenizer_hash,
    )
    scheduler = Scheduler(
        runner.num_pages,
        config.block_size,
        config.max_num_seqs,
        config.max_num_batched_tokens,
        runner.max_model_len,
        runner.num_host_pages,
        config.enable_prefix_caching,
    )
    depth = 1 if device.type == "cuda" else 0
    return Engine(channel, scheduler, runner, card, pipeline_depth=depth, seed=config.seed)


if __name__ == "__main__":
    sys.exit(serve(int(sys.argv[1]), lambda channel: build_engine(channel, EngineConfig.from_json(sys.argv[2]))))
