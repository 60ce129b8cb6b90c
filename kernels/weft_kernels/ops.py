"""The one face of both implementations: the modules ``reference`` (CPU) and ``triton_ops`` (CUDA) satisfy ``Ops``.

Sizes in the signatures: ``T`` tokens, ``B`` rows, ``S`` sampled rows, ``H`` hidden size, ``I`` intermediate size,
``Hq`` and ``Hkv`` query and key-value heads, ``D`` head dim, ``P`` pages, ``V`` vocabulary. Tensors are contiguous and
on one device; activations are float32, bfloat16 or float16, weights and caches the same or float8_e4m3fn, to which
values are clamped at ±448. Sums are accumulated in float32.

The CUDA implementation never waits for the device and takes its grids from shapes and from the layout's host integers,
so every operation may be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from weft_kernels.layout import BatchLayout
from weft_kernels.tables import RowTables, SamplingTable

Activation = Literal["relu", "silu_and_mul"]
FLOAT8_MAX = 448.0  # of float8_e4m3fn


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm, ``x / sqrt(mean(x²) + eps) * weight``, if there is no bias, else LayerNorm; over the last dimension."""

    weight: Tensor  # [H]
    bias: Tensor | None  # [H]
    eps: float


@dataclass(frozen=True, slots=True)
class HeadTransform:
    """What heads go through before attention: queries and keys an RMSNorm, as in Qwen3, and then the rotation."""

    cos_sin: Tensor | None  # float32 [max_pos, D], cosines ‖ sines, rotating halves (NeoX style); None: no rotation
    q_norm: Tensor | None = None  # [D], of each query head; None: no norm
    k_norm: Tensor | None = None  # [D], of each key head
    eps: float = 1e-6


class Ops(Protocol):
    """What models and sampler call; see ``reference`` for the math of each."""

    def normalize(self, x: Tensor, norm: Norm) -> Tensor:
        """The norm of x: [T, H] -> [T, H]."""

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        weight_scale: Tensor | None = None,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        activation: Activation | None = None,
    ) -> Tensor:
        """``activation(norm(x) weightᵀ + bias)``: x [T, K], weight [N, K] -> [T, N].

        "silu_and_mul" makes ``silu(gate) * up`` of gate ‖ up, so N / 2 columns of N. With a ``residual`` [T, N] the
        result is added to it in place, and the residual returned. A weight of float8_e4m3fn stands for
        ``weight * weight_scale[:, None]``, float32 [N].
        """

    def attention(
        self,
        qkv: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        layout: BatchLayout,
        scale: float,
        transform: HeadTransform,
        sliding_window: int = 0,
        alibi_slopes: Tensor | None = None,
    ) -> Tensor:
        """Transform the queries and keys of q ‖ k ‖ v, write keys and values to their slots, and take the causal
        attention of every token over its own sequence: ``qkv`` [T, (Hq + 2 Hkv) D] -> [T, Hq, D].

        ``k_cache``, ``v_cache`` [P, Hkv, page_size, D]. A row's queries stand at its last positions; one at position i
        sees keys 0 to i, or with ``sliding_window`` w > 0 only those above i - w. ``alibi_slopes`` float32 [Hq] adds
        slope * (key position - query position) to the scaled scores. Padded decode rows give zeros.
        """

    def sample(self, logits: Tensor, rows: Tensor, positions: Tensor, table: SamplingTable) -> tuple[Tensor, Tensor]:
        """Draw a token for each of ``S`` rows: logits [S, V] of any float type, int32 [S] rows and positions of the
        tokens drawn -> ids int32 [S], and bool [S], whether the logits could be drawn from: False for a row with NaN
        or +inf, or nothing but -inf, whose id is then any valid one.

        Temperature below 1e-5 takes the likeliest token (the lowest id of equals). Else logits / temperature are cut
        to the top_k largest (0: off), then to the fewest with top_p of their probability (1: off), then to those
        with at least min_p of the largest probability (0: off); tokens equal to the last one kept are kept. The draw
        depends on a row's own values alone, so batches do not matter.
        """

    def start_rows(self, tables: RowTables, records: Tensor, token_ids: Tensor, num_new_rows: Tensor) -> None:
        """Fill the tables of rows that begin, all but their pages, and mark them as not finished: those of the first
        ``num_new_rows`` (int32 [1]) of ``N`` records.

        int32 [N, 5 + C + K] records: the row, where its tokens begin in the int32 ``token_ids``, how many they are, the
        halves of its seed (the lower one first), its ``params`` and its ``stop_ids``. No row is named twice.
        """

    def lay_out(
        self,
        tables: RowTables,
        rows: Tensor,
        starts: Tensor,
        query_starts: Tensor,
        num_tokens: int,
        max_chunks: int,
        page_size: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where the tokens of a step lie: int32 [B] rows and positions of their first tokens, int32 [B + 1] where each
        row's tokens begin -> (token ids, positions, slots), int64 [T], and seq_lens, int32 [B], as in ``BatchLayout``.

        Rows without tokens stand at the end; places that are no row's hold id 0 at position 0. Finished rows get slots
        -1 and length 0. ``max_chunks`` 0 promises that token b is row b's; T = B alone does not.
        """

    def update_pages(self, page_table: Tensor, updates: Tensor, num_updates: Tensor) -> None:
        """Set page table entries to the first ``num_updates`` (int32 [1]) of int32 [U, 3] (row, column, page)."""

    def advance(self, tables: RowTables, rows: Tensor, positions: Tensor, tokens: Tensor, usable: Tensor) -> Tensor:
        """Write sampled tokens into the histories and mark the rows that end.

        int32 [S] rows, positions that the tokens take, and tokens; bool [S] of ``sample``. Returns int32 [2, S]: the
        tokens, and how each row stands (``tables``); -1 and RUNNING for a row that had ended before, whose tables stay
        as they were.
        """

    def copy_pages(self, kv_cache: Tensor, from_to: Tensor) -> None:
        """Copy pages in every layer: kv_cache [L, 2, P, Hkv, page_size, D], from_to int64 [N, 2] (from, to).

        All sources are read before any target is written; targets are distinct.
        """
