"""A model's batch made by hand, without a scheduler; a module of its own, so that a spawned process can import it."""

from __future__ import annotations

from pathlib import Path

import torch
from checkpoints import VOCAB_SIZE
from torch import Tensor

from weft_backend.layers import TensorParallel
from weft_backend.model_config import ModelConfig, load_model_config
from weft_backend.models import Model, load_model
from weft_kernels import BatchLayout

CPU = torch.device("cpu")
PAGE_SIZE = 4
MAX_LEN = 128


class Rows:
    """A paged batch made by hand: every row has its own pages, in an order that no other row shares."""

    def __init__(self, model: Model, config: ModelConfig, num_rows: int, tp: int = 1) -> None:
        num_pages = MAX_LEN // PAGE_SIZE
        self.model = model
        self.table = torch.randperm(num_rows * num_pages, generator=torch.Generator().manual_seed(1)).to(torch.int32)
        self.table = self.table.view(num_rows, num_pages)
        shape = (config.num_layers, 2, num_rows * num_pages, config.num_kv_heads // tp, PAGE_SIZE, config.head_dim)
        self.cache = torch.full(shape, float("nan"), dtype=getattr(torch, config.dtype))
        self.lens = [0] * num_rows

    @torch.inference_mode()
    def step(self, work: list[tuple[int, list[int]]]) -> list[Tensor]:
        """Compute (row, token ids) pairs, those of one token as decode rows; returns each one's logits [T, V]."""
        work = sorted(work, key=lambda item: len(item[1]) > 1)
        hidden = self.model(*self.lay_out(work), self.cache, None)
        logits = torch.split(self.model.logits(hidden).float(), [len(ids) for _, ids in work])
        by_row = dict(zip([row for row, _ in work], logits, strict=True))
        return [by_row[row] for row in sorted(by_row)]

    def lay_out(self, work: list[tuple[int, list[int]]]) -> tuple[Tensor, BatchLayout]:
        """The token ids of (row, token ids) pairs, those of one token first, and where they lie."""
        starts = [self.lens[row] for row, _ in work]
        positions = torch.cat([torch.arange(s, s + len(ids)) for s, (_, ids) in zip(starts, work, strict=True)])
        rows = torch.cat([torch.full((len(ids),), row) for row, ids in work])
        slots = self.table[rows, positions // PAGE_SIZE].long() * PAGE_SIZE + positions % PAGE_SIZE
        query_lens = [len(ids) for _, ids in work]
        for row, ids in work:
            self.lens[row] += len(ids)
        layout = BatchLayout(
            positions=positions,
            slots=slots,
            query_starts=torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32),
            seq_lens=torch.tensor([self.lens[row] for row, _ in work], dtype=torch.int32),
            rows=torch.tensor([row for row, _ in work], dtype=torch.int32),
            page_table=self.table,
            num_decode_rows=torch.tensor([query_lens.count(1)], dtype=torch.int32),
            max_decode_rows=query_lens.count(1),
            max_chunks=len(query_lens) - query_lens.count(1),
            max_chunk_tokens=sum(n for n in query_lens if n > 1),
            max_seq_len=max(self.lens),
        )
        return torch.tensor([i for _, ids in work for i in ids]), layout


def prompt(num_tokens: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (num_tokens,), generator=generator).tolist()


def run_rank(rank: int, checkpoints: list[Path], rendezvous: Path) -> None:
    """Both ranks of each checkpoint's model compute a prompt; rank 0 keeps the logits beside the checkpoint."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    for checkpoint in checkpoints:
        for dtype in ("float32", "bfloat16"):
            config = load_model_config(checkpoint, dtype=dtype)
            model = load_model(config, checkpoint, device=CPU, tp=TensorParallel(rank, 2))
            (logits,) = Rows(model, config, 1, tp=2).step([(0, prompt(21, seed=7))])
            if rank == 0:
                torch.save(logits, checkpoint / f"logits-{dtype}.pt")
    torch.distributed.destroy_process_group()
