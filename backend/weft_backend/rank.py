"""What every rank of a model does: take a device, meet the other ranks, load its share, and run steps.

A model on one GPU has one rank, rank 0, which meets nobody.
"""

from __future__ import annotations

import gc
import os
import socket
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from weft_backend.config import FLOAT8_NAMES, EngineConfig
from weft_backend.errors import StartupError
from weft_backend.kv_cache import PageShape
from weft_backend.layers import SINGLE, TensorParallel
from weft_backend.model_config import ModelConfig
from weft_backend.model_runner import ModelRunner
from weft_backend.models import Model, build_model, load_model
from weft_backend.ranks import Followers, led_plans
from weft_backend.rehearsal import rehearse
from weft_backend.stages import Stage

_GIB = 1 << 30
FLOAT8_CAPABILITY = (8, 9)  # Ada, the first GPUs whose instructions convert float8
_LOOPBACK = "127.0.0.1"
# NVLink multicast, which a process that ends badly may leave unusable for others, is not needed: sums of a decode step
# are small.
_NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}


def resolve_device(config: EngineConfig, rank: int) -> torch.device:
    """The rank's device; "auto" is a GPU if there is one. Raises StartupError."""
    num_gpus, size = torch.cuda.device_count(), config.tensor_parallel_size
    if config.device == "cpu" or (config.device == "auto" and not num_gpus):
        return torch.device("cpu")
    if not num_gpus:
        raise StartupError("--device cuda: PyTorch sees no GPU; --device cpu, or auto, runs without one")
    if size > num_gpus:
        raise StartupError(f"--tensor-parallel-size {size}: PyTorch sees {num_gpus} GPUs")
    device = torch.device("cuda", rank)
    _check_float8(config, device)
    return device


def _check_float8(config: EngineConfig, device: torch.device) -> None:
    capability = torch.cuda.get_device_capability(device)
    if capability >= FLOAT8_CAPABILITY:
        return
    for flag, value in (("--quantization", config.quantization), ("--kv-cache-dtype", config.kv_cache_dtype)):
        if value in FLOAT8_NAMES:
            needed, given = (f"{major}.{minor}" for major, minor in (FLOAT8_CAPABILITY, capability))
            raise StartupError(
                f"{flag} {value}: needs a GPU of compute capability {needed} or more; "
                f"{torch.cuda.get_device_name(device)} has {given}"
            )


def use_device(device: torch.device, size: int) -> None:
    """Make a GPU the process's current one, or take a share of the cores.

    A core is left to the I/O process and the frontends: threads that wait for each other and spin lose to any other
    load (265 steps of a tiny model on 2 busy cores: 13.9 s with two threads, 1.8 s with one).
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, min(torch.get_num_threads(), (num_cores - 1) // size)))


def plan_memory(config: EngineConfig, model_config: ModelConfig, device: torch.device) -> str:
    """What a rank's weights will take, and what may be used, before anything is loaded.

    Raises StartupError if that is too little, or if the ranks cannot share the model evenly.
    """
    tp = TensorParallel(0, config.tensor_parallel_size)
    model = build_model(model_config, torch.device("meta"), tp)
    weights = sum(tensor.numel() * tensor.itemsize for tensor in model.parameters())
    page = page_shape(config, model_config).num_bytes
    detail = f"weights {weights / _GIB:.2f} GiB, {page / config.block_size / 1024:.1f} KiB of KV cache a token"
    if tp.size > 1:
        detail += f", on each of {tp.size} ranks"
    if device.type != "cuda":
        return detail
    free, total = torch.cuda.mem_get_info(device)
    usable = total * config.gpu_memory_utilization - (total - free)
    if weights > usable:
        raise StartupError(
            f"the weights need {weights / _GIB:.2f} GiB, but {usable / _GIB:.2f} GiB of the GPU may be used "
            f"({config.gpu_memory_utilization:.0%} of {total / _GIB:.2f} GiB, less {(total - free) / _GIB:.2f} GiB "
            "in use): raise --gpu-memory-utilization or --tensor-parallel-size, or use a narrower --dtype"
        )
    return f"{detail}; {usable / _GIB:.2f} of {total / _GIB:.2f} GiB may be used"


def meet_followers(followers: Followers, path: Path, model_config: ModelConfig, device: torch.device) -> TensorParallel:
    """As rank 0, let the others load the model, and join them."""
    if followers.size == 1:
        return SINGLE
    with Stage("ranks") as stage:
        listener = socket.create_server((_LOOPBACK, 0))  # by itself the store would listen to the network
        port = listener.getsockname()[1]
        store = TCPStore(_LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
        followers.send((path, model_config, port))
        tp = _join(0, followers.size, device, store)
        stage.detail = f"{tp.size}; sums over {'peer memory and ' if tp.peer_sum else ''}{dist.get_backend()}"
    return tp


def _join(rank: int, size: int, device: torch.device, store: Store) -> TensorParallel:
    os.environ.update(_NO_MULTICAST)
    if device.type == "cpu":
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        return TensorParallel(rank, size)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=size, device_id=device)
    from weft_backend.layers.peer_sum import PeerSum  # takes Triton

    others = (other for other in range(size) if other != rank)
    reachable = all(torch.cuda.can_device_access_peer(rank, other) for other in others)
    return TensorParallel(rank, size, PeerSum(rank, size, device) if reachable else None)


def page_shape(config: EngineConfig, model: ModelConfig) -> PageShape:
    """A page's share on each rank."""
    num_kv_heads = model.num_kv_heads // config.tensor_parallel_size
    dtype = torch.float8_e4m3fn if config.kv_cache_dtype in FLOAT8_NAMES else getattr(torch, model.dtype)
    return PageShape(model.num_layers, num_kv_heads, config.block_size, model.head_dim, dtype)


def load_rank(
    config: EngineConfig, path: Path, model_config: ModelConfig, device: torch.device, tp: TensorParallel
) -> tuple[Model, int]:
    """The rank's share of the model in ``path``, and how many of a GPU's kernels were compiled meanwhile."""
    with _compiling(config, model_config, device, tp) if device.type == "cuda" else nullcontext([]) as compiled:
        seed = config.seed or 0
        model = load_model(model_config, path, device=device, load_format=config.load_format, seed=seed, tp=tp)
    return model, len(compiled)


def _compiling(
    config: EngineConfig, model_config: ModelConfig, device: torch.device, tp: TensorParallel
) -> AbstractContextManager[list[str]]:
    from weft_kernels.compilation import compiling  # takes Triton

    sizes = (config.max_num_seqs, config.max_num_batched_tokens)
    return compiling(partial(rehearse, model_config, page_shape(config, model_config), device, tp, *sizes), device)


def make_runner(
    config: EngineConfig, model_config: ModelConfig, model: Model, device: torch.device, tp: TensorParallel
) -> ModelRunner:
    """The rank's runner; every rank has as many pages. Raises StartupError if there is too little memory."""
    return ModelRunner(
        model,
        page_shape=page_shape(config, model_config),
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
        tp=tp,
    )


def follow(config: EngineConfig, rank: int, leader: Connection) -> None:
    """Be a rank other than 0: load what rank 0 names, then launch what it launches. Raises EOFError when it is gone."""
    device, size = resolve_device(config, rank), config.tensor_parallel_size
    use_device(device, size)  # the GPU makes itself ready while rank 0 reads files
    path, model_config, port = leader.recv()
    tp = _join(rank, size, device, TCPStore(_LOOPBACK, port))
    model, _ = load_rank(config, path, model_config, device, tp)
    runner = make_runner(config, model_config, model, device, tp)
    gc.collect()
    gc.freeze()  # see engine_host.serve
    for plan in led_plans(leader):
        runner.launch(plan)
