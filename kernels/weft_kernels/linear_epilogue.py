"""The end of a linear layer in Gluon: from sums in the registers of a warpgroup to outputs in memory."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from weft_kernels.gluon_names import silu_and_mul


@gluon.jit
def _store(y, tensors: gl.tuple, column, token, own, num_tokens, width, RELU: gl.constexpr) -> None:  # type: ignore[no-untyped-def]
    """y, of 64 columns and some tokens, with bias, relu and residual; of the tokens those from ``own`` on."""
    bias, residual, out = tensors
    # A lane has 8 columns of a token, of the 16 that its warp has from the wgmma.
    layout: gl.constexpr = gl.BlockedLayout([8, 1], [2, 16], [4, 1], [0, 1])
    columns = column + gl.arange(0, y.shape[0], layout=gl.SliceLayout(1, layout))
    tokens = token + gl.arange(0, y.shape[1], layout=gl.SliceLayout(0, layout))
    at = tokens[None, :] * width + columns[:, None]
    inside = ((tokens >= own) & (tokens < num_tokens))[None, :] & (columns < width)[:, None]
    y = gl.convert_layout(y, layout)
    if bias is not None:
        y += gl.load(bias + columns, mask=columns < width, other=0.0).to(gl.float32)[:, None]
    if RELU:
        y = gl.maximum(y, 0.0)
    if residual is not None:
        y += gl.load(residual + at, mask=inside, other=0.0).to(gl.float32)
    gl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@gluon.jit
def finish(acc, tensors: gl.tuple, column, token, own, num_tokens, width, ACTIVATION: gl.constexpr) -> None:  # type: ignore[no-untyped-def]
    """Activate and store the sums of 64 or 128 rows."""
    P: gl.constexpr = acc.shape[1]
    if ACTIVATION == "silu_and_mul":
        gate, up = acc.reshape([2, 64, P]).permute([1, 2, 0]).split()
        _store(silu_and_mul(gate, up), tensors, column, token, own, num_tokens, width, False)
    elif acc.shape[0] == 128:
        low, high = acc.reshape([2, 64, P]).permute([1, 2, 0]).split()
        _store(low, tensors, column, token, own, num_tokens, width, ACTIVATION == "relu")
        _store(high, tensors, column + 64, token, own, num_tokens, width, ACTIVATION == "relu")
    else:
        _store(acc, tensors, column, token, own, num_tokens, width, ACTIVATION == "relu")
