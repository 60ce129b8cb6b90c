"""A scheduler and a runner over a real model, without the engine's channel."""

from __future__ import annotations

from typing import Any

import torch
from driving import drive, make_request

from weft_backend.kv_cache import PageShape
from weft_backend.model_config import ModelConfig
from weft_backend.model_runner import LaunchedStep, ModelRunner
from weft_backend.models import Model
from weft_backend.scheduler import Scheduler
from weft_backend.sequence import Request
from weft_backend.step import SequenceOutput, StepPlan, StepResult

PAGE_SIZES = {"cpu": 8, "cuda": 16}  # the smallest that the device's kernels take


class ModelEngine:
    """Runs requests through a model, and counts what the plans did; sizes are tokens.

    With ``depth`` 1 a step is launched before the one before it is collected. On a GPU steps are replayed as CUDA
    graphs unless ``enforce_eager``.
    """

    def __init__(
        self,
        model: Model,
        config: ModelConfig,
        device: torch.device,
        *,
        depth: int = 1,
        enforce_eager: bool = False,
        cache_len: int = 512,
        host_cache_len: int = 0,
        max_num_seqs: int = 6,
        max_num_batched_tokens: int = 64,
        max_model_len: int = 128,
        kv_cache_dtype: torch.dtype | None = None,
    ) -> None:
        self.depth = depth
        self.vocab_size = config.vocab_size
        self.num_prefill_steps = self.num_swapped_in = self.num_copied = 0
        self.outputs: list[SequenceOutput] = []  # of the last run
        page_size = PAGE_SIZES[device.type]
        dtype = kv_cache_dtype or getattr(torch, config.dtype)
        shape = PageShape(config.num_layers, config.num_kv_heads, page_size, config.head_dim, dtype)
        self.runner = ModelRunner(
            model,
            page_shape=shape,
            vocab_size=config.vocab_size,
            device=device,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            swap_space=host_cache_len // page_size * shape.num_bytes / (1 << 30),
            enforce_eager=enforce_eager,
            num_pages=cache_len // page_size,
        )
        self.scheduler = Scheduler(
            self.runner.num_pages,
            page_size,
            max_num_seqs,
            max_num_batched_tokens,
            max_model_len,
            self.runner.num_host_pages,
        )

    def launch(self, plan: StepPlan) -> LaunchedStep:
        self.num_prefill_steps += plan.num_decode_rows < len(plan.rows)
        self.num_swapped_in += len(plan.page_moves.swap_in)
        self.num_copied += len(plan.page_moves.copy)
        return self.runner.launch(plan)

    def collect(self, launched: LaunchedStep) -> StepResult:
        return self.runner.collect(launched)

    def run(self, prompts: list[list[int]], **sampling: Any) -> list[Request]:
        """Requests of the same sampling, run together to their ends."""
        requests = [make_request(prompt, **sampling) for prompt in prompts]
        self.run_requests(requests)
        return requests

    def run_requests(self, requests: list[Request]) -> None:
        """Run requests together to their ends."""
        self.outputs = drive(self.scheduler, self, requests, self.depth)
