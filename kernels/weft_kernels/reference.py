"""Plain-torch twins of every op: the oracle of the kernels' tests, and what serves on the CPU. See ``Ops``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from weft_kernels.layout import BatchLayout
from weft_kernels.noise import gumbel
from weft_kernels.ops import FLOAT8_MAX, Activation, HeadTransform, Norm
from weft_kernels.tables import LENGTH, NOT_FINITE, RUNNING, STOP, RowTables, SamplingTable

GREEDY_BELOW = 1e-5
NUM_CANDIDATES = 256  # 64 × 32k logits: topk(256) takes 10 ms, a full sort 157 ms; nearly every nucleus is smaller


def _widen(x: Tensor) -> Tensor:
    return x.float() if x.itemsize < 4 else x


def normalize(x: Tensor, norm: Norm) -> Tensor:
    wide = _widen(x)
    if norm.bias is not None:
        bias = norm.bias.to(wide.dtype)
        return F.layer_norm(wide, x.shape[-1:], norm.weight.to(wide.dtype), bias, norm.eps).to(x.dtype)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps) * norm.weight).to(x.dtype)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weight_scale: Tensor | None = None,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    activation: Activation | None = None,
) -> Tensor:
    if norm is not None:
        x = normalize(x, norm)
    if weight_scale is not None:
        weight = (weight.float() * weight_scale[:, None]).to(x.dtype)
    y = F.linear(x, weight, bias)
    if activation == "relu":
        y = F.relu(y)
    elif activation == "silu_and_mul":
        y = silu_and_mul(y)
    return y if residual is None else residual.add_(y)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    gate, up = _widen(gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def _rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate x [T, H, D] by cos_sin [T, D]."""
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def attention(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    layout: BatchLayout,
    scale: float,
    transform: HeadTransform,
    sliding_window: int = 0,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    q = rope_and_write_kv(qkv, k_cache, v_cache, layout, transform)
    return paged_attention(q, k_cache, v_cache, layout, scale, sliding_window, alibi_slopes)


def rope_and_write_kv(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, layout: BatchLayout, transform: HeadTransform
) -> Tensor:
    """The queries [T, Hq, D], transformed; keys, transformed, and values go to their slots."""
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    q, k, v = heads.tensor_split((-2 * num_kv_heads, -num_kv_heads), dim=1)
    q, k = _widen(q), _widen(k)
    if transform.q_norm is not None:
        q = normalize(q, Norm(transform.q_norm, None, transform.eps))
    if transform.k_norm is not None:
        k = normalize(k, Norm(transform.k_norm, None, transform.eps))
    if transform.cos_sin is not None:
        angles = transform.cos_sin[layout.positions]
        q, k = _rotate(q, angles), _rotate(k, angles)
    _write(k_cache, k, layout.slots)
    _write(v_cache, v, layout.slots)
    return q.to(qkv.dtype).contiguous()


def _write(cache: Tensor, values: Tensor, slots: Tensor) -> None:
    """Write values [T, Hkv, D] to their slots, saturated at the cache's type; slot -1 writes nothing."""
    written = slots >= 0
    if not bool(written.all()):
        slots, values = slots[written], values[written]
    if cache.dtype == torch.float8_e4m3fn:
        values = values.clamp(-FLOAT8_MAX, FLOAT8_MAX)
    page_size = cache.shape[2]
    cache[slots // page_size, :, slots % page_size] = values.to(cache.dtype)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    layout: BatchLayout,
    scale: float,
    sliding_window: int,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """Attention of queries [T, Hq, D] over the pages of their rows."""
    out = torch.zeros_like(q)
    num_decode = int(layout.num_decode_rows)
    if num_decode:
        decoded = _decode(q[:num_decode], k_cache, v_cache, layout, scale, sliding_window, alibi_slopes)
        out[:num_decode] = decoded
    starts, seq_lens = layout.query_starts.tolist(), layout.seq_lens.tolist()
    for row in range(num_decode, len(seq_lens)):
        start, end, seq_len = starts[row], starts[row + 1], seq_lens[row]
        if seq_len and end > start:
            pages = layout.page_table[layout.rows[row], : -(-seq_len // k_cache.shape[2])]
            keys, values = (_gather(cache, pages[None])[0, :, :seq_len] for cache in (k_cache, v_cache))
            out[start:end] = _prefill(q[start:end], keys, values, scale, sliding_window, alibi_slopes)
    return out


def _gather(cache: Tensor, pages: Tensor) -> Tensor:
    """The tokens of pages [B, N], head by head: [B, Hkv, N * page_size, D], a copy."""
    _, num_kv_heads, page_size, head_dim = cache.shape
    tiles = pages.unsqueeze(1) * num_kv_heads + torch.arange(num_kv_heads, device=pages.device)[:, None]
    gathered = cache.view(-1, page_size * head_dim).index_select(0, tiles.flatten())
    return _widen(gathered).view(pages.shape[0], num_kv_heads, -1, head_dim)


def _gather_seen(cache: Tensor, pages: Tensor, unseen: Tensor) -> Tensor:
    """``_gather`` with zeros where unseen [B, N * page_size]: what lies there may be NaN, left by a sequence that has
    gone, and neither a bias nor a weight of zero would silence it."""
    gathered = _gather(cache, pages)
    gathered.transpose(1, 2)[unseen.nonzero(as_tuple=True)] = 0.0
    return gathered


def _decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    layout: BatchLayout,
    scale: float,
    sliding_window: int,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """One query a row, all rows at once, padded to the longest: q [B, Hq, D] -> [B, Hq, D]."""
    num_rows, _, head_dim = q.shape
    _, num_kv_heads, page_size, _ = k_cache.shape
    seq_lens = layout.seq_lens[:num_rows, None]
    num_pages = max(1, -(-int(seq_lens.max()) // page_size))
    positions = torch.arange(num_pages * page_size, device=q.device)
    pages = layout.page_table[layout.rows[:num_rows], :num_pages]
    pages = pages.masked_fill(positions[::page_size] >= seq_lens, 0)
    unseen = positions >= seq_lens
    if sliding_window:
        unseen |= positions < seq_lens - sliding_window
    grouped = _widen(q).reshape(num_rows, num_kv_heads, -1, head_dim) * scale
    scores = grouped @ _gather_seen(k_cache, pages, unseen).transpose(2, 3)
    bias = scores.new_zeros(unseen.shape).masked_fill_(unseen, torch.finfo(scores.dtype).min)[:, None, None]
    if alibi_slopes is not None:
        distances = (positions - (seq_lens - 1)).to(scores.dtype)[:, None, None]
        bias = bias + alibi_slopes.view(1, num_kv_heads, -1, 1) * distances
    scores += bias
    return (scores.softmax(-1) @ _gather_seen(v_cache, pages, unseen)).view(q.shape).to(q.dtype)


def _prefill(
    q: Tensor, keys: Tensor, values: Tensor, scale: float, sliding_window: int, alibi_slopes: Tensor | None
) -> Tensor:
    """The last queries of one sequence: q [L, Hq, D], keys and values [Hkv, N, D] -> [L, Hq, D]."""
    query_len, _, head_dim = q.shape
    num_kv_heads, seq_len, _ = keys.shape
    key_positions = torch.arange(seq_len, device=q.device)
    distances = key_positions - key_positions[seq_len - query_len :, None]
    seen = distances <= 0
    if sliding_window:
        seen &= distances > -sliding_window
    mask = seen
    if alibi_slopes is not None:
        bias = alibi_slopes.view(num_kv_heads, -1, 1, 1) * distances
        mask = bias.to(keys.dtype).masked_fill_(~seen, float("-inf"))
    grouped = _widen(q).view(query_len, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    shape = (*grouped.shape[:2], seq_len, head_dim)
    attended = F.scaled_dot_product_attention(
        grouped, keys[:, None].expand(shape), values[:, None].expand(shape), attn_mask=mask, scale=scale
    )
    return attended.permute(2, 0, 1, 3).reshape(q.shape).to(q.dtype)


def sample(logits: Tensor, rows: Tensor, positions: Tensor, table: SamplingTable) -> tuple[Tensor, Tensor]:
    wide, rows = _widen(logits), rows.long()
    token_ids = wide.argmax(-1).to(torch.int32)
    temperature = table.temperature[rows]
    drawn = (temperature >= GREEDY_BELOW).nonzero().squeeze(1)
    if len(drawn):
        parameters = (column[rows[drawn]] for column in (table.top_k, table.top_p, table.min_p))
        scaled = wide[drawn] * temperature[drawn].reciprocal().unsqueeze(1)
        kept = _truncate(scaled, *parameters)
        scores = kept + gumbel(table.seeds[rows[drawn]], positions[drawn].long(), logits.shape[1])
        token_ids[drawn] = scores.argmax(-1).to(torch.int32)
    return token_ids, torch.isfinite(wide.amax(-1))


def _truncate(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Logits [S, V] with those that top_k, then top_p, then min_p drop set to -inf."""
    vocab_size = logits.shape[1]
    cut = ((top_k > 0) & (top_k < vocab_size)) | (top_p < 1)
    if bool(cut.any()):
        floor = logits.new_full((len(logits), 1), float("-inf"))
        floor[cut] = _floor(logits[cut], top_k[cut], top_p[cut])
        logits = logits.masked_fill(logits < floor, float("-inf"))
    if bool((min_p > 0).any()):
        relative = torch.exp(logits - logits.amax(-1, keepdim=True))
        logits = logits.masked_fill(relative < min_p.unsqueeze(1), float("-inf"))
    return logits


def _floor(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The smallest logit [S, 1] that top_k and then top_p keep; from a few candidates if those hold the answer."""
    vocab_size = logits.shape[1]
    limited = ((top_k > 0) & (top_k < vocab_size)).unsqueeze(1)
    limits = torch.where(limited, top_k.unsqueeze(1), 1).long()
    top_p = top_p.unsqueeze(1)
    few = min(max(NUM_CANDIDATES, int(limits.max())), vocab_size)
    for num_candidates in (few, vocab_size):
        candidates = logits.topk(num_candidates).values
        kth = candidates.gather(1, limits - 1).masked_fill_(~limited, float("-inf"))
        total = torch.logsumexp(logits.masked_fill(logits < kth, float("-inf")), -1, keepdim=True)
        before = torch.exp(candidates - total).cumsum(-1).roll(1, -1)
        before[:, 0] = -1.0  # the likeliest stays, whatever top_p
        kept = (candidates >= kth) & ((before < top_p) | (top_p >= 1))
        last = kept.sum(-1, keepdim=True).clamp(min=1) - 1
        if bool((limited | (last < num_candidates - 1)).all()):
            break
    return candidates.gather(1, last)


def copy_pages(kv_cache: Tensor, from_to: Tensor) -> None:
    kv_cache[:, :, from_to[:, 1]] = kv_cache[:, :, from_to[:, 0]]


def start_rows(tables: RowTables, records: Tensor, token_ids: Tensor, num_new_rows: Tensor) -> None:
    sizes = [3, 2, len(tables.params), tables.stop_ids.shape[1]]
    heads, seeds, params, stop_ids = torch.split(records[: int(num_new_rows)], sizes, dim=1)
    for row, first, num_tokens in heads.tolist():
        tables.token_ids[row, :num_tokens] = token_ids[first : first + num_tokens]
    rows = heads[:, 0].long()
    tables.sampling.seeds.view(torch.int32).view(-1, 2)[rows] = seeds
    tables.params[:, rows] = params.T
    tables.stop_ids[rows] = stop_ids
    tables.finished[rows] = False


def lay_out(
    tables: RowTables,
    rows: Tensor,
    starts: Tensor,
    query_starts: Tensor,
    num_tokens: int,
    max_chunks: int,
    page_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, tokens = rows.long(), torch.arange(num_tokens, dtype=torch.int32, device=rows.device)
    owners = torch.searchsorted(query_starts[1:], tokens, right=True)
    exists = owners < len(rows)
    owners = owners.clamp_(max=len(rows) - 1)
    positions = (starts[owners] + tokens - query_starts[owners]).long().masked_fill_(~exists, 0)
    owning = rows[owners]
    slots = tables.page_table[owning, positions // page_size].long() * page_size + positions % page_size
    slots.masked_fill_(~exists | tables.finished[owning], -1)
    seq_lens = (starts + query_starts.diff()).masked_fill_(tables.finished[rows], 0)
    return tables.token_ids[owning, positions].long().masked_fill_(~exists, 0), positions, slots, seq_lens


def update_pages(page_table: Tensor, updates: Tensor, num_updates: Tensor) -> None:
    rows, columns, pages = updates[: int(num_updates)].unbind(1)
    page_table[rows.long(), columns.long()] = pages


def advance(tables: RowTables, rows: Tensor, positions: Tensor, tokens: Tensor, usable: Tensor) -> Tensor:
    rows = rows.long()
    stopped = (tokens[:, None] == tables.stop_ids[rows]).any(1) & (positions >= tables.min_lens[rows])
    codes = torch.where(positions + 1 >= tables.max_lens[rows], LENGTH, RUNNING)
    codes = torch.where(stopped, STOP, codes)
    codes = torch.where(usable, codes, NOT_FINITE)
    ran = ~tables.finished[rows]
    columns = torch.where(ran & usable, positions, tables.token_ids.shape[1] - 1)
    tables.token_ids[rows, columns.long()] = tokens
    tables.finished[rows] = ~ran | (codes != RUNNING)
    return torch.stack([torch.where(ran, tokens, -1), torch.where(ran, codes, RUNNING)]).int()
