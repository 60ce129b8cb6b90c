"""Configuration of a backend, frozen. ``weft_backend.__main__`` makes it from the command line."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from weft_backend.errors import StartupError

BUILTIN_MODEL = Path(__file__).parent / "weft_tiny"
BUILTIN_MODEL_NAME = "weft-tiny"
FLOAT8_NAMES = ("fp8", "fp8_e4m3")  # of the same type
_INT32_MAX = (1 << 31) - 1
_LARGEST = {
    "num_pages": _INT32_MAX,
    "max_num_batched_tokens": _INT32_MAX,
    "max_queued_tokens": _INT32_MAX,
    "max_num_seqs": 1 << 16,
    "tensor_parallel_size": 64,
}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What the engine process needs to know. Fields whose 0 or None means "fit" are resolved by the engine process."""

    model: str = str(BUILTIN_MODEL)  # a folder or a hub id
    served_model_name: str = BUILTIN_MODEL_NAME
    revision: str | None = None
    download_dir: str | None = None
    load_format: str = "auto"  # auto, safetensors or dummy
    device: str = "auto"  # auto, cuda or cpu
    dtype: str = "auto"  # auto, float32, bfloat16 or float16
    quantization: str | None = None  # fp8: the layers' weights become float8_e4m3fn while they are loaded
    kv_cache_dtype: str = "auto"  # auto, which is dtype, or one of FLOAT8_NAMES
    max_model_len: int | None = None  # None: the model's, or what fits into memory
    block_size: int = 64  # tokens per page, a power of two
    num_pages: int | None = None  # None: what fits into memory
    gpu_memory_utilization: float = 0.9  # share of the device's memory to use
    swap_space: float = 0.0  # GiB of host memory for prefixes that leave the device, per GPU
    max_num_batched_tokens: int = 8192  # per step
    max_num_seqs: int = 256
    max_queued_tokens: int | None = None  # None: the limit of weft.limits
    enable_prefix_caching: bool = True
    enforce_eager: bool = False  # no CUDA graphs
    seed: int | None = None  # of requests that name none, and of dummy weights; None: drawn, and 0 for the weights
    tensor_parallel_size: int = 1  # GPUs, or processes on the CPU, that share the model
    require_tokenizer: bool = False  # a service of text needs one; without it a model serves token ids

    def __post_init__(self) -> None:
        _check(self, "gpu_memory_utilization", 0 < self.gpu_memory_utilization <= 1, "in (0, 1]")
        _check(self, "served_model_name", self.served_model_name != "", "a name, not empty")
        for name, most in _LARGEST.items():
            value = getattr(self, name)
            _check(self, name, value is None or 1 <= value <= most, f"in [1, {most}]")
        _check(self, "quantization", self.quantization in (None, "fp8"), "fp8")
        _check(self, "kv_cache_dtype", self.kv_cache_dtype in ("auto", *FLOAT8_NAMES), "auto, fp8 or fp8_e4m3")
        # What the attention kernels take; the CPU would take any, but then a setting would not move to a GPU.
        _check(self, "block_size", self.block_size >= 1 and self.block_size.bit_count() == 1, "a power of two")
        room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30) / self.tensor_parallel_size
        range_ = f"at least 0 GiB, and at most {room:.1f} GiB, which is this machine's memory per GPU"
        _check(self, "swap_space", 0 <= self.swap_space <= room, range_)
        _check(self, "seed", self.seed is None or -(1 << 63) <= self.seed < 1 << 63, "a signed number of 64 bits")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise StartupError(
                f"--max-num-batched-tokens {self.max_num_batched_tokens} is below --max-num-seqs {self.max_num_seqs}: "
                "each running sequence needs a token a step"
            )

    def to_json(self) -> str:
        """Text that ``from_json`` reads; how the engine process is told."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> EngineConfig:
        """The configuration that ``to_json`` wrote."""
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True)
class BackendConfig:
    """What the I/O process needs to know. Times are seconds."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    address: str = "127.0.0.1:50052"  # host:port or unix:/path
    metrics_address: tuple[str, int] | None = None  # None: no metrics
    drain_timeout: float = 30.0
    watchdog_timeout: float = 60.0  # without an engine step while requests are open, after which the engine is killed
    heartbeat_interval: float = 5.0  # of silence from us on a session, after which a heartbeat is sent
    session_timeout: float = 20.0  # of silence from a frontend, after which its session ends
    ack_window: int = 1024  # step frames a frontend may leave unacknowledged; 10 s of 10 ms steps

    def __post_init__(self) -> None:
        _check(self, "drain_timeout", 0 <= self.drain_timeout < math.inf, "at least 0 s")
        _check(self, "watchdog_timeout", 0 < self.watchdog_timeout < math.inf, "more than 0 s")
        if self.metrics_address is not None and not 0 < self.metrics_address[1] < 1 << 16:
            raise StartupError(f"--metrics-port {self.metrics_address[1]}: must be a port, below 65536")


def _check(config: EngineConfig | BackendConfig, name: str, is_met: bool, range_: str) -> None:
    """Raise StartupError, which names the field by its flag, unless its value is in its range."""
    if not is_met:
        raise StartupError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be {range_}")
