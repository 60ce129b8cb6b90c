"""Temperature, top-k, top-p, min-p and the draw in three launches, without sorting.

The draw is the Gumbel-max trick (Gumbel, 1954): the argmax of logit / temperature + noise follows the softmax. The
noise is that of ``weft_kernels.noise``, bit for bit, and stays the same however often a row is passed over.

1. ``_scan_kernel``, a program for each chunk of a row: the largest logit, and the token with the best score, which
   without truncation is all there is to it; with top-k the largest logit of each group of the chunk.
2. ``_truncate_kernel``, likewise, for rows with top-p or min-p but no top-k: the best score among what min-p keeps;
   the weight of the chunk, and of those logits above the drawn token's.
3. ``_decide_kernel``, a program for each row: with top-k the draw from a pool (``top_k_pool``), else the chunks' best,
   if top-p keeps it. If not, or if the pool overflows, the row is passed over again (``rejection``).

Chunks depend on the vocabulary alone and sums run in one order, so a row's token does not depend on its batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft_kernels import reference
from weft_kernels.logit_blocks import MAX_INT32, draw, first_of_best, load, noise_key
from weft_kernels.rejection import draw_within_top_k, first_kept
from weft_kernels.tables import SamplingTable
from weft_kernels.top_k_pool import draw_from_pool, fill_pool

CHUNK = 4096  # H200, 256 × 151,936, drawn with a temperature: 90 us; 98 with 2,048, 107 with 8 warps
GROUP = 128
POOL = 256
MAX_BLOCK = 8192  # of the passes over a row
CHUNK_WARPS = 4
ROW_WARPS = 16  # 8 take 2 us less for a row with top-k, and 35 more where top-p sends a row through a pass again
GREEDY_BELOW = tl.constexpr(reference.GREEDY_BELOW)
VIEWS = ["rows", "positions", "scores", "weights", "weights_above"]  # or Triton compiles anew where they lie otherwise


@triton.jit
def _cuts_at(k: tl.tensor, vocab_size: tl.tensor) -> tl.tensor:
    return (k > 0) & (k < vocab_size)


@triton.jit
def _load_key(seeds: tl.tensor, row: tl.tensor, positions: tl.tensor, sample: tl.tensor) -> tl.tensor:
    return noise_key(tl.load(seeds + row), tl.load(positions + sample))


@triton.jit
def _best_of_chunks(scores: tl.tensor, tokens: tl.tensor, chunks: tl.tensor, exists: tl.tensor) -> tl.tensor:
    score = tl.load(scores + chunks, mask=exists, other=float("-inf"))
    return first_of_best(score, tl.load(tokens + chunks, mask=exists, other=MAX_INT32))


@triton.jit(do_not_specialize_on_alignment=VIEWS)
def _scan_kernel(
    logits: tl.tensor,  # [S, V]
    rows: tl.tensor,  # int32 [S], as is positions
    positions: tl.tensor,
    temperature: tl.tensor,  # [R], as are the next four
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    seeds: tl.tensor,
    maxima: tl.tensor,  # [S, chunks], as are the next two
    scores: tl.tensor,
    tokens: tl.tensor,
    group_maxima: tl.tensor,  # [S, chunks, groups of a chunk]
    vocab_size: int,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    sample = tl.program_id(1).to(tl.int64)
    row = tl.load(rows + sample)
    heat = tl.load(temperature + row)
    logits += sample * vocab_size
    token = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    here = sample * tl.num_programs(0) + tl.program_id(0)
    x = load(logits, token, vocab_size)
    maximum = tl.max(x, axis=0)
    tl.store(maxima + here, maximum)
    if heat < GREEDY_BELOW:
        tl.store(scores + here, maximum)
        tl.store(tokens + here, first_of_best(x, token))
    elif _cuts_at(tl.load(top_k + row), vocab_size):
        GROUPS: tl.constexpr = CHUNK // GROUP
        largest = tl.max(tl.reshape(x, [GROUPS, GROUP]), axis=1)
        tl.store(group_maxima + here * GROUPS + tl.arange(0, GROUPS), largest)
    elif (tl.load(min_p + row) <= 0.0) & (maximum < float("inf")):
        key = _load_key(seeds, row, positions, sample)
        best, best_at = draw(logits, x, token, tl.div_rn(1.0, heat), key)
        tl.store(scores + here, best)
        tl.store(tokens + here, best_at)


@triton.jit(do_not_specialize_on_alignment=VIEWS)
def _truncate_kernel(
    logits: tl.tensor,
    rows: tl.tensor,
    positions: tl.tensor,
    temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    seeds: tl.tensor,
    maxima: tl.tensor,
    scores: tl.tensor,
    tokens: tl.tensor,
    weights: tl.tensor,  # [S, chunks], as is the next
    weights_above: tl.tensor,
    vocab_size: int,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,  # their number, rounded up to a power of two
) -> None:
    sample = tl.program_id(1).to(tl.int64)
    row = tl.load(rows + sample)
    heat, least = tl.load(temperature + row), tl.load(min_p + row)
    cuts = (tl.load(top_p + row) < 1.0) | (least > 0.0)
    if (heat >= GREEDY_BELOW) & cuts & (not _cuts_at(tl.load(top_k + row), vocab_size)):
        logits += sample * vocab_size
        token = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
        here = sample * tl.num_programs(0) + tl.program_id(0)
        chunks = sample * tl.num_programs(0) + tl.arange(0, CHUNKS)
        exists = tl.arange(0, CHUNKS) < tl.num_programs(0)
        maximum = tl.max(tl.load(maxima + chunks, mask=exists, other=float("-inf")), axis=0)
        if (maximum > float("-inf")) & (maximum < float("inf")):
            inverse = tl.div_rn(1.0, heat)
            x = load(logits, token, vocab_size)
            weight = tl.exp((x - maximum) * inverse)
            tl.store(weights + here, tl.sum(weight, axis=0))
            if least > 0.0:
                kept = tl.where(weight >= least, x, float("-inf"))
                best, best_at = draw(logits, kept, token, inverse, _load_key(seeds, row, positions, sample))
                tl.store(scores + here, best)
                tl.store(tokens + here, best_at)
            else:
                drawn = tl.load(logits + _best_of_chunks(scores, tokens, chunks, exists)).to(tl.float32)
                tl.store(weights_above + here, tl.sum(tl.where(x > drawn, weight, 0.0), axis=0))


@triton.jit(do_not_specialize_on_alignment=VIEWS)
def _decide_kernel(
    logits: tl.tensor,
    rows: tl.tensor,
    positions: tl.tensor,
    temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    seeds: tl.tensor,
    maxima: tl.tensor,
    scores: tl.tensor,
    tokens: tl.tensor,
    group_maxima: tl.tensor,
    weights: tl.tensor,
    weights_above: tl.tensor,
    pools: tl.tensor,  # int32 [S, 2, POOL]
    out: tl.tensor,  # int32 [S]
    usable_out: tl.tensor,  # bool [S]
    vocab_size: int,
    num_chunks: int,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,  # of a chunk
    POOL: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    sample = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + sample)
    logits += sample * vocab_size
    chunks, exists = sample * num_chunks + tl.arange(0, CHUNKS), tl.arange(0, CHUNKS) < num_chunks
    maximum = tl.max(tl.load(maxima + chunks, mask=exists, other=float("-inf")), axis=0)
    usable = (maximum > float("-inf")) & (maximum < float("inf"))
    heat, k = tl.load(temperature + row), tl.load(top_k + row)
    p, least = tl.load(top_p + row), tl.load(min_p + row)
    random = heat >= GREEDY_BELOW
    inverse = tl.div_rn(1.0, tl.where(random, heat, 1.0))
    key = _load_key(seeds, row, positions, sample)
    token, mass, undecided = tl.full([], 0, tl.int32), float("inf"), False
    if usable & random & _cuts_at(k, vocab_size):
        groups, pool = pools + sample * 2 * POOL, pools + sample * 2 * POOL + POOL
        size = tl.full([], POOL + 1, tl.int32)
        if k <= POOL:
            num_groups = num_chunks * GROUPS
            group_maxima += sample * num_groups
            size = fill_pool(
                logits, vocab_size, k, group_maxima, num_groups, groups, pool, GROUP, CHUNKS * GROUPS, POOL
            )
        if size <= POOL:
            token = draw_from_pool(logits, pool, size, k, p, least, maximum, inverse, key, POOL)
        else:
            token, mass = draw_within_top_k(logits, vocab_size, k, p, least, maximum, inverse, key, BLOCK)
            undecided = True
    elif usable:
        token = _best_of_chunks(scores, tokens, chunks, exists)
        k = vocab_size
        if random & (p < 1.0):
            mass = p * tl.sum(tl.load(weights + chunks, mask=exists, other=0.0), axis=0)
            undecided = least > 0.0
            if least <= 0.0:
                undecided = tl.sum(tl.load(weights_above + chunks, mask=exists, other=0.0), axis=0) >= mass
    if undecided:
        token = first_kept(logits, vocab_size, token, k, mass, least, maximum, inverse, key, BLOCK)
    tl.store(out + sample, token)
    tl.store(usable_out + sample, usable)


def sample(logits: Tensor, rows: Tensor, positions: Tensor, table: SamplingTable) -> tuple[Tensor, Tensor]:
    """One token a row of logits [S, V], and whether the logits could be drawn from. See ``Ops.sample``."""
    num_samples, vocab_size = logits.shape
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    assert logits.is_contiguous()
    ids = torch.empty(num_samples, dtype=torch.int32, device=logits.device)
    usable = torch.empty(num_samples, dtype=torch.bool, device=logits.device)
    if not num_samples:
        return ids, usable
    inputs = (logits, rows, positions, table.temperature, table.top_k, table.top_p, table.min_p, table.seeds)
    per_chunk = torch.empty(4, num_samples, num_chunks, device=logits.device)
    tokens = torch.empty(num_samples, num_chunks, dtype=torch.int32, device=logits.device)
    group_maxima = torch.empty(num_samples, num_chunks * (CHUNK // GROUP), device=logits.device)
    pools = torch.empty(num_samples, 2, POOL, dtype=torch.int32, device=logits.device)
    best, weights = (per_chunk[0], per_chunk[1], tokens), (per_chunk[2], per_chunk[3])
    grid, chunks = (num_chunks, num_samples), triton.next_power_of_2(num_chunks)
    _scan_kernel[grid](*inputs, *best, group_maxima, vocab_size, CHUNK=CHUNK, GROUP=GROUP, num_warps=CHUNK_WARPS)
    _truncate_kernel[grid](*inputs, *best, *weights, vocab_size, CHUNK=CHUNK, CHUNKS=chunks, num_warps=CHUNK_WARPS)
    _decide_kernel[(num_samples,)](
        *inputs, *best, group_maxima, *weights, pools, ids, usable, vocab_size, num_chunks, GROUP=GROUP,
        GROUPS=CHUNK // GROUP, POOL=POOL, CHUNKS=chunks, BLOCK=min(MAX_BLOCK, triton.next_power_of_2(vocab_size)),
        num_warps=ROW_WARPS,
    )  # fmt: skip
    return ids, usable
