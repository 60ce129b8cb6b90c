"""The memory of the KV cache: how many pages fit, and the pages themselves, on the device and in swap space."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from weft_backend.errors import StartupError
from weft_backend.step import PageMoves
from weft_backend.upload import Uploader
from weft_kernels import Ops

CPU_CACHE_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class PageShape:
    """What one page holds: keys and values of ``page_size`` tokens in every layer of this rank."""

    num_layers: int
    num_kv_heads: int
    page_size: int
    head_dim: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        num_elements = self.num_layers * 2 * self.num_kv_heads * self.page_size * self.head_dim
        return num_elements * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class KVCachePlan:
    """How much memory the KV cache takes, and what sets the limit."""

    shape: PageShape
    num_pages: int
    num_host_pages: int
    limited_by: str  # for the error if it is too little
    flag: str | None  # that changes the limit, if one does

    @property
    def num_tokens(self) -> int:
        return max(self.num_pages, 0) * self.shape.page_size

    def check_room(self, max_model_len: int) -> None:
        """Raises StartupError if there is no room, or not for one sequence of ``max_model_len`` tokens."""
        if not self.num_tokens:
            raise StartupError(f"the KV cache gets no memory ({self.limited_by}){self._advice(': raise')}")
        if self.num_tokens < max_model_len:
            raise StartupError(
                f"the KV cache has room for {self.num_tokens} tokens ({self.limited_by}), too few for one sequence of "
                f"{max_model_len}: lower --max-model-len to {self.num_tokens}{self._advice(', or raise')}"
            )

    def allocate(self, device: torch.device) -> KVCache:
        """The pages. Raises StartupError if the machine has not so much memory."""
        try:
            return KVCache(self.shape, self.num_pages, self.num_host_pages, device)
        except (MemoryError, torch.OutOfMemoryError) as error:
            size = _gib(self.num_pages * self.shape.num_bytes)
            problem = f"there is no memory for a KV cache of {size} ({self.limited_by}){self._advice(': lower')}"
            raise StartupError(problem) from error

    def _advice(self, what: str) -> str:
        return f"{what} {self.flag}" if self.flag else ""


def plan_for_pages(shape: PageShape, num_pages: int, swap_space: float) -> KVCachePlan:
    """As many pages as were asked for. Args: ``swap_space`` in GiB."""
    return KVCachePlan(shape, num_pages, _num_host_pages(shape, swap_space), f"{num_pages} pages", "--num-pages")


def plan_for_cpu(shape: PageShape, max_model_len: int, max_num_seqs: int, swap_space: float) -> KVCachePlan:
    """As many pages as the largest batch can use, but at most ``CPU_CACHE_BYTES``. Args: ``swap_space`` in GiB."""
    pages_of_a_sequence = -(-max_model_len // shape.page_size)
    num_pages = min(max_num_seqs * pages_of_a_sequence, CPU_CACHE_BYTES // shape.num_bytes)
    limit = f"{_gib(CPU_CACHE_BYTES)} on the CPU, {shape.num_bytes} bytes per {shape.page_size} tokens"
    return KVCachePlan(shape, num_pages, _num_host_pages(shape, swap_space), limit, None)


def plan_for_cuda(shape: PageShape, device: torch.device, utilization: float, swap_space: float) -> KVCachePlan:
    """What ``utilization`` of the GPU leaves beside weights and the largest step; call it after running that step.

    Memory of other processes on the GPU counts as used. CUDA graphs take theirs from what ``utilization`` leaves.
    """
    torch.cuda.empty_cache()  # that step's blocks, cut to its own sizes
    free, total = torch.cuda.mem_get_info(device)
    outside = total - free - torch.cuda.memory_reserved(device)
    peak = torch.cuda.max_memory_allocated(device)
    num_pages = (int(total * utilization) - outside - peak) // shape.num_bytes
    limit = (
        f"{utilization:.0%} of {_gib(total)}, less {_gib(peak)} for weights and the largest step and {_gib(outside)} "
        f"outside of PyTorch; {shape.num_bytes} bytes per {shape.page_size} tokens"
    )
    return KVCachePlan(shape, num_pages, _num_host_pages(shape, swap_space), limit, "--gpu-memory-utilization")


def _num_host_pages(shape: PageShape, swap_space: float) -> int:
    """Pages in ``swap_space`` GiB of host memory."""
    return int(swap_space * (1 << 30)) // shape.num_bytes


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on the CPU the system gives the memory when it is first written (1 GiB at once took 0.6 s, and stayed)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB"


class KVCache:
    """Device pages ``[L, 2, P, Hkv, page, D]`` and host pages ``[N, L, 2, Hkv, page, D]``.

    A host page is contiguous, so that each swap is one copy over the bus (and one on the device, which gathers or
    scatters the layers). Host memory is pinned when the device is a GPU.
    """

    def __init__(self, shape: PageShape, num_pages: int, num_host_pages: int, device: torch.device) -> None:
        self.num_pages = num_pages
        self.num_host_pages = num_host_pages
        self.page_size = shape.page_size
        self._device = device
        page = (shape.num_kv_heads, shape.page_size, shape.head_dim)
        self.pages = _zeros((shape.num_layers, 2, num_pages, *page), shape.dtype, device)
        self.host_pages = torch.empty(
            (num_host_pages, shape.num_layers, 2, *page), dtype=shape.dtype, pin_memory=device.type == "cuda"
        )

    def apply(self, moves: PageMoves, uploader: Uploader, ops: Ops) -> None:
        """Do the moves, in the order of their fields, without waiting for them."""
        for page, host_page in moves.swap_out.tolist():
            self.host_pages[host_page].copy_(self.pages[:, :, page], non_blocking=True)
        for host_page, page in moves.swap_in.tolist():
            self.pages[:, :, page].copy_(self.host_pages[host_page], non_blocking=True)
        if len(moves.copy):
            (from_to,) = uploader.upload(moves.copy.astype(np.int64))
            ops.copy_pages(self.pages, from_to)
