"""Top-k without passing over the row again: the few logits that may be among the k largest, gathered and compared.

Groups of 128 neighbours gave their largest logits. k groups reach the k-th largest of these, so at least k logits do,
and all of them stand in groups that do: for k = 50 of 151,936 logits, about 53 in 51 groups.
"""

from __future__ import annotations

import triton
import triton.language as tl

from weft_kernels.logit_blocks import MAX_INT32, first_of_best, gumbel, load, mean, order


@triton.jit
def _reached_by(orders: tl.tensor, k: tl.tensor) -> tl.tensor:
    """A threshold that k of the integers reach, or up to an eighth more if it can be; the least if there are fewer."""
    low, high = tl.min(orders, axis=0), tl.max(orders, axis=0) + 1
    reached = MAX_INT32
    while (reached > k + k // 8) & (mean(low, high) > low):
        pivot = mean(low, high)
        count = tl.sum((orders >= pivot).to(tl.int32), axis=0)
        low = tl.where(count >= k, pivot, low)
        high = tl.where(count >= k, high, pivot)
        reached = tl.where(count >= k, count, reached)
    return low


@triton.jit
def fill_pool(
    logits: tl.tensor,
    vocab_size: tl.tensor,
    k: tl.tensor,
    group_maxima: tl.tensor,
    num_groups: tl.tensor,
    groups: tl.tensor,  # int32 [POOL], as the next
    pool: tl.tensor,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    POOL: tl.constexpr,
) -> tl.tensor:
    """Write the tokens of the k largest logits and of few more into the pool; their number, above POOL if too many."""
    STEP: tl.constexpr = 4096 // GROUP
    group = tl.arange(0, GROUPS)
    maximum = tl.load(group_maxima + group, mask=group < num_groups, other=float("-inf"))
    floor = _reached_by(order(maximum), k)
    chosen = (order(maximum) >= floor) & (maximum > float("-inf"))
    place = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(groups + place, group, mask=chosen & (place < POOL))
    num_chosen = tl.sum(chosen.to(tl.int32), axis=0)
    size = tl.where(num_chosen > POOL, POOL + 1, 0)
    tl.debug_barrier()
    for start in range(0, tl.where(num_chosen > POOL, 0, num_chosen), STEP):
        index = start + tl.arange(0, STEP)
        first = tl.load(groups + index, mask=index < num_chosen, other=GROUPS) * GROUP
        token = tl.reshape(first[:, None] + tl.arange(0, GROUP)[None, :], [STEP * GROUP])
        x = load(logits, token, vocab_size)
        reaches = (order(x) >= floor) & (x > float("-inf"))
        slot = size + tl.cumsum(reaches.to(tl.int32), axis=0) - 1
        tl.store(pool + slot, token, mask=reaches & (slot < POOL))
        size += tl.sum(reaches.to(tl.int32), axis=0)
    tl.debug_barrier()
    return size


@triton.jit
def draw_from_pool(
    logits: tl.tensor,
    pool: tl.tensor,
    size: tl.tensor,
    k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    maximum: tl.tensor,
    inverse: tl.tensor,
    key: tl.tensor,
    POOL: tl.constexpr,
) -> tl.tensor:
    """The best scored of the tokens that top-k, then top-p, then min-p keep; each is compared with each."""
    STEP: tl.constexpr = 32
    slot = tl.arange(0, POOL)
    token = tl.load(pool + slot, mask=slot < size, other=MAX_INT32)
    x = load(logits, token, MAX_INT32)
    num_above = tl.zeros([POOL], tl.int32)
    weight_above = tl.zeros([POOL], tl.float32)
    for start in range(0, size, STEP):
        other = start + tl.arange(0, STEP)
        y = load(logits, tl.load(pool + other, mask=other < size, other=MAX_INT32), MAX_INT32)
        above = y[None, :] > x[:, None]
        num_above += tl.sum(above.to(tl.int32), axis=1)
        weight_above += tl.sum(tl.where(above, tl.exp((y - maximum) * inverse)[None, :], 0.0), axis=1)
    weight = tl.exp((x - maximum) * inverse)
    kept = (x > float("-inf")) & (num_above < k)
    mass = tl.where(top_p < 1.0, top_p * tl.sum(tl.where(kept, weight, 0.0), axis=0), float("inf"))
    kept = kept & ((weight_above < mass) | (num_above == 0)) & (weight >= min_p)
    return first_of_best(tl.where(kept, x * inverse + gumbel(key, token), float("-inf")), token)
