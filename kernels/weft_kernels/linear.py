"""Linear layers with what stands around them: the norm before, and activation and residual sum after."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from weft_kernels.norm import normalize
from weft_kernels.ops import Activation, Norm
from weft_kernels.silu_and_mul import silu_and_mul


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
    """x [T, K], weight [N, K] -> [T, N], or the residual, to which it is added. See ``Ops.linear``."""
    if norm is not None:
        x = normalize(x, norm)
    if weight_scale is not None:
        weight = (weight.float() * weight_scale[:, None]).to(x.dtype)
    if residual is not None and bias is None and activation is None:
        return residual.addmm_(x, weight.t())
    y = F.linear(x, weight, bias)
    if activation == "relu":
        y = F.relu(y)
    elif activation == "silu_and_mul":
        y = silu_and_mul(y)
    return y if residual is None else residual.add_(y)
