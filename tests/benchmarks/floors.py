"""The least time that a GPU needs for a model's steps, from the model's shape and the GPU's ceilings.

A step is a sum of phases, and a phase takes the larger of its bytes over the bandwidth and its operations over the
matrix rate: the matrices of the layers, attention, the output head, the logits. Nothing is read twice, nothing stands
between two kernels, and norms cost nothing; a sum, because one phase needs what the one before has made.
"""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from weft.cli.engine_load import Sizes
from weft_backend.model_config import ModelConfig

MAX_NUM_SEQS = 256
SIZES = Sizes()
_LOGIT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a GPU can do: bytes and operations a second."""

    bandwidth: float = 4.3e12  # an H200's, measured with copies; the specification says 4.8
    bf16: float = 790e12
    fp8: float = 1450e12

    def of_gpus(self, num_gpus: int) -> Ceilings:
        """The ceilings of several that share the work evenly and exchange nothing."""
        return Ceilings(self.bandwidth * num_gpus, self.bf16 * num_gpus, self.fp8 * num_gpus)


@dataclass(frozen=True, slots=True)
class Floors:
    """Floors of one model on one GPU or group of GPUs, in seconds."""

    config: ModelConfig
    ceilings: Ceilings
    weight_bytes: int = 2  # of an element of the layers' matrices; 1: FP8, also multiplied as such; the head has 2
    kv_bytes: int = 2  # of an element of the cache

    def decode(self, batch: int, seq_len: int) -> float:
        """A step in which every row has ``seq_len`` tokens in the cache."""
        return self._step(batch, batch, batch * seq_len, batch * seq_len)

    def prefill(self, batch: int, prompt_len: int) -> float:
        """Fresh prompts and their first tokens."""
        return self._step(batch * prompt_len, batch, 0, batch * prompt_len**2 / 2)

    def mixed(self, lengths: Sequence[tuple[int, int]], max_num_seqs: int = MAX_NUM_SEQS) -> float:
        """Requests of (prompt, output) tokens, all there from the start, at most ``max_num_seqs`` running at once.

        A prompt adds the operations of its tokens to a step whose matrices are read anyway. The pages may be endless.
        """
        waiting, running, seconds = deque(lengths), list[tuple[int, int]](), 0.0  # running: (cached, left)
        while waiting or running:
            while waiting and len(running) < max_num_seqs:
                prompt_len, output_len = waiting.popleft()
                num_operations = 2 * self._layer_size * prompt_len + self._attention_operations(prompt_len**2 / 2)
                seconds += num_operations / self._matrix_rate
                running.append((prompt_len, output_len - 1))
            running = [(cached + 1, left - 1) for cached, left in running if left]
            num_cached = sum(cached for cached, _ in running)
            seconds += self._step(len(running), len(running), num_cached, num_cached)
        return seconds

    @property
    def _matrix_rate(self) -> float:
        return self.ceilings.fp8 if self.weight_bytes == 1 else self.ceilings.bf16

    @property
    def _layer_size(self) -> int:
        """Elements of the matrices of all layers."""
        config = self.config
        attention = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        num_mlp_matrices = 2 if config.num_positions else 3  # of OPT; the others' MLPs have a gate
        per_layer = config.hidden_size * (attention + num_mlp_matrices * config.intermediate_size)
        return config.num_layers * per_layer

    def _attention_operations(self, num_pairs: float) -> float:
        """Of pairs of a query and a key, in all heads and layers: two products of 2 D operations."""
        return 4 * self.config.num_layers * self.config.num_heads * self.config.head_dim * num_pairs

    def _step(self, num_tokens: int, num_sampled: int, num_cached: int, num_pairs: float) -> float:
        config, ceilings = self.config, self.ceilings
        kv_size = 2 * config.num_layers * config.num_kv_heads * config.head_dim * num_cached
        head_size = config.vocab_size * config.embed_size
        return (
            max(
                self._layer_size * self.weight_bytes / ceilings.bandwidth,
                2 * self._layer_size * num_tokens / self._matrix_rate,
            )
            + max(kv_size * self.kv_bytes / ceilings.bandwidth, self._attention_operations(num_pairs) / ceilings.bf16)
            + max(2 * head_size / ceilings.bandwidth, 2 * head_size * num_sampled / ceilings.bf16)
            + _LOGIT_BYTES * config.vocab_size * num_sampled / ceilings.bandwidth
        )


def floor_of(floors: Floors, result: str) -> float | None:
    """The floor of a result of ``weft bench engine``, by its name and in its unit; None for those that have none.

    The lengths of a mixed load are drawn as there, not the same ones.
    """
    if match := re.fullmatch(r"(decode|prefill)_ms_b(\d+)_\w+", result):
        phase = floors.decode if match[1] == "decode" else floors.prefill
        return 1e3 * phase(int(match[2]), SIZES.prompt_len)
    if match := re.fullmatch(r"mixed(\d+)_out_tok_s", result):
        rng = random.Random(0)
        lengths = [(rng.randint(*SIZES.mixed_lens), rng.randint(*SIZES.mixed_lens)) for _ in range(int(match[1]))]
        return sum(length for _, length in lengths) / floors.mixed(lengths)
    if result == "service256_out_tok_s":
        num_requests, prompt_len, output_len = SIZES.service
        return num_requests * output_len / floors.mixed([(prompt_len, output_len)] * num_requests)
    return 1e3 * floors.prefill(1, SIZES.long_prompt_len) if result == "prefill_ms_4k" else None
