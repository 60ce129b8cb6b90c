"""Linear layers with norm, activation and residual sum, kernel and twin, against float64 math."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from weft_kernels import Activation, Norm, reference, triton_ops
from weft_kernels.launch import is_hopper
from weft_kernels.mma_linear import MmaTile, mma_linear
from weft_kernels.wgmma_linear import WgmmaTile, wgmma_linear
from weft_kernels.wide_linear import WideTile, wide_linear

ERROR = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
OPS = {"twin": reference, "triton": triton_ops}
FP8 = torch.float8_e4m3fn
# Triton's interpreter multiplies no bfloat16 matrices.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]


@dataclass
class Layer:
    """The arguments of one call; ``expected`` is its result in float64."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    weight_scale: Tensor | None
    norm: Norm | None
    residual: Tensor | None
    activation: Activation | None

    @property
    def expected(self) -> Tensor:
        x, weight = self.x.double(), self.weight.double()
        if self.weight_scale is not None:
            weight = weight * self.weight_scale.double()[:, None]
        if self.norm is not None:
            if self.norm.bias is not None:
                x = x - x.mean(-1, keepdim=True)
            x = x / (x.pow(2).mean(-1, keepdim=True) + self.norm.eps).sqrt() * self.norm.weight.double()
            if self.norm.bias is not None:
                x = x + self.norm.bias.double()
        y = x @ weight.T
        if self.bias is not None:
            y = y + self.bias.double()
        if self.activation == "relu":
            y = y.relu()
        if self.activation == "silu_and_mul":
            gate, up = y.chunk(2, dim=-1)
            y = F.silu(gate) * up
        return y if self.residual is None else y + self.residual.double()

    def make_float8_tokens(self) -> None:
        """Those of a layer without a norm are then not rounded: of float8, times a power of two, with the largest
        magnitude."""
        if self.norm is None:
            self.x[:, 0] = 448 / 64
            self.x.copy_((self.x * 64).clamp(-448, 448).to(FP8).to(self.x.dtype) / 64)
            self.x.div_(2 ** (torch.arange(len(self.x), device=self.x.device) % 3)[:, None])

    def run(self, ops: Any) -> Tensor:
        """By ``Ops.linear``, on a copy of the residual."""
        residual = None if self.residual is None else self.residual.clone()
        y: Tensor = ops.linear(
            self.x,
            self.weight,
            self.bias,
            weight_scale=self.weight_scale,
            norm=self.norm,
            residual=residual,
            activation=self.activation,
        )
        assert residual is None or y is residual
        return y

    def run_mma(self, tile: MmaTile) -> Tensor:
        residual = None if self.residual is None else self.residual.clone()
        return mma_linear(self.x, self.weight, self.bias, self.weight_scale, self.norm, residual, self.activation, tile)

    def run_wgmma(self, tile: WgmmaTile) -> Tensor:
        residual = None if self.residual is None else self.residual.clone()
        return wgmma_linear(
            self.x, self.weight, self.bias, self.weight_scale, self.norm, residual, self.activation, tile
        )

    def run_wide(self, tile: WideTile) -> Tensor:
        residual = None if self.residual is None else self.residual.clone()
        return wide_linear(
            self.x, self.weight, self.bias, self.weight_scale, self.norm, residual, self.activation, tile
        )


MakeLayer = Callable[..., Layer]


@pytest.fixture
def make_layer(device: torch.device) -> MakeLayer:
    def make(
        num_tokens: int,
        num_outputs: int,
        size: int,
        *,
        dtype: torch.dtype,
        norm: str | None = None,
        bias: bool = False,
        residual: bool = False,
        activation: Activation | None = None,
        fp8: bool = False,
    ) -> Layer:
        generator = torch.Generator().manual_seed(size)

        def draw(*shape: int) -> Tensor:
            """Random numbers with NaN behind them."""
            poisoned = torch.full((shape[0] + 3, *shape[1:]), float("nan"), dtype=dtype, device=device)
            poisoned[: shape[0]] = torch.randn(shape, generator=generator).to(dtype)
            return poisoned[: shape[0]]

        weight, scale = draw(num_outputs, size) * size**-0.5, None
        if fp8:
            scale = weight.abs().amax(-1).float() / 448
            weight = (weight / scale[:, None]).to(FP8)
        return Layer(
            draw(num_tokens, size) + 0.3,
            weight,
            draw(num_outputs) if bias else None,
            scale,
            Norm(draw(size) * 0.1 + 1, draw(size) if norm == "layer" else None, 1e-5) if norm else None,
            draw(num_tokens, num_outputs) if residual else None,
            activation,
        )

    return make


KINDS: list[dict[str, Any]] = [
    {},
    {"norm": "rms"},
    {"norm": "rms", "activation": "silu_and_mul"},
    {"norm": "layer", "bias": True},
    {"norm": "layer", "bias": True, "activation": "relu"},
    {"residual": True},
    {"residual": True, "bias": True},
]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("num_tokens", [0, 3, 100])
def test_linear(
    name: str, dtype: torch.dtype, kind: dict[str, Any], num_tokens: int, make_layer: MakeLayer, error: Any
) -> None:
    layer = make_layer(num_tokens, 38, 96, dtype=dtype, **kind)
    actual = layer.run(OPS[name])
    assert actual.dtype == dtype
    assert actual.shape == layer.expected.shape
    if num_tokens:
        assert error(actual, layer.expected) < ERROR[dtype]
        assert error(actual, layer.expected * 1.02) > ERROR[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 7, 8])
@pytest.mark.parametrize("tile", [MmaTile(16, 64, 4), MmaTile(32, 128, 8), MmaTile(16, 256, 16)], ids=str)
def test_mma_tiles(
    dtype: torch.dtype, kind: dict[str, Any], num_tokens: int, tile: MmaTile, make_layer: MakeLayer, error: Any
) -> None:
    layer = make_layer(num_tokens, 472, 1392, dtype=dtype, **kind)
    assert error(layer.run_mma(tile), layer.expected) < ERROR[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 7])
@pytest.mark.parametrize("tile", [MmaTile(16, 128, 4), MmaTile(32, 128, 8), MmaTile(16, 128, 16)], ids=str)
def test_mma_tiles_of_float8(
    dtype: torch.dtype, kind: dict[str, Any], num_tokens: int, tile: MmaTile, make_layer: MakeLayer, error: Any
) -> None:
    layer = make_layer(num_tokens, 472, 1392, dtype=dtype, fp8=True, **kind)
    assert error(layer.run_mma(tile), layer.expected) < ERROR[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("magnitude", [1e5, 1e4, 1e-3, 1e-4])
@pytest.mark.parametrize("norm", [None, "rms"])
def test_large_and_tiny_tokens_with_float8_weights(
    magnitude: float, norm: str | None, make_layer: MakeLayer, error: Any
) -> None:
    layer = make_layer(5, 64, 512, dtype=torch.bfloat16, fp8=True, norm=norm)
    layer = replace(layer, x=layer.x * magnitude)
    if layer.norm is not None:
        layer = replace(layer, norm=replace(layer.norm, eps=0.0))
    assert error(layer.run(triton_ops), layer.expected) < ERROR[torch.bfloat16]


@pytest.mark.gpu
def test_no_overflow_in_front_of_a_norm(make_layer: MakeLayer, error: Any) -> None:
    layer = make_layer(5, 64, 256, dtype=torch.float16, norm="rms")
    assert layer.norm is not None
    layer = replace(layer, x=layer.x * 3000, norm=replace(layer.norm, weight=layer.norm.weight * 50))
    assert error(layer.run(triton_ops), layer.expected) < ERROR[torch.float16]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 17, 64])
@pytest.mark.parametrize("tile", [WgmmaTile(64, 64, 8, 6), WgmmaTile(128, 128, 4, 3), WgmmaTile(64, 64, 1, 5)])
def test_wgmma_tiles(
    dtype: torch.dtype, kind: dict[str, Any], num_tokens: int, tile: WgmmaTile, make_layer: MakeLayer, error: Any
) -> None:
    if kind.get("activation") == "silu_and_mul":
        tile = tile._replace(block_n=128, num_splits=1)
    layer = make_layer(num_tokens, 472, 1408, dtype=dtype, **(kind | {"norm": None}))
    first = layer.run_wgmma(tile)
    assert error(first, layer.expected) < ERROR[dtype]
    assert torch.equal(layer.run_wgmma(tile), first)  # the counters are zero again


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("num_tokens", [9, 17, 64])
@pytest.mark.parametrize("tile", [WgmmaTile(64, 256, 4, 5), WgmmaTile(128, 128, 1, 4)], ids=str)
def test_wgmma_tiles_of_float8(
    dtype: torch.dtype, kind: dict[str, Any], num_tokens: int, tile: WgmmaTile, make_layer: MakeLayer, error: Any
) -> None:
    if kind.get("activation") == "silu_and_mul":
        tile = tile._replace(block_n=128, num_splits=1, num_stages=4)
    layer = make_layer(num_tokens, 472, 1536, dtype=dtype, fp8=True, **kind)
    layer.make_float8_tokens()
    assert error(layer.run_wgmma(tile), layer.expected) < (0.01 if layer.norm is None else 0.1)


# A tile for all tokens, and several; more tiles than programs; as few tokens as a piece has.
WIDE = [(WideTile(64, 64, 32, 4, 10), 64), (WideTile(64, 128, 64, 2, 6), 131), (WideTile(128, 64, 64, 1, 6), 300)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("fp8", [False, True], ids=["16 bits", "float8"])
@pytest.mark.parametrize(("tile", "num_tokens"), WIDE, ids=str)
@pytest.mark.parametrize("num_outputs", [472, 8216])
def test_wide_tiles(
    dtype: torch.dtype,
    kind: dict[str, Any],
    fp8: bool,
    tile: WideTile,
    num_tokens: int,
    num_outputs: int,
    make_layer: MakeLayer,
    error: Any,
) -> None:
    if kind.get("activation") == "silu_and_mul":
        tile = tile._replace(block_n=128, num_stages=4)
    if num_outputs > 472:
        tile = tile._replace(num_splits=1)
    tolerance = ERROR[dtype]
    if fp8:
        layer = make_layer(num_tokens, num_outputs, 1392, dtype=dtype, fp8=True, **kind)
        layer.make_float8_tokens()
        tolerance = 0.01 if layer.norm is None else 0.1
    else:
        layer = make_layer(num_tokens, num_outputs, 1400, dtype=dtype, **(kind | {"norm": None}))
    first = layer.run_wide(tile)
    assert error(first, layer.expected) < tolerance
    assert torch.equal(layer.run_wide(tile), first)  # the counters are zero again


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("num_tokens", [3, 100])
def test_fp8_weights(
    name: str, kind: dict[str, Any], num_tokens: int, device: torch.device, make_layer: MakeLayer, error: Any
) -> None:
    layer = make_layer(num_tokens, 48, 64, dtype=torch.float16, fp8=True, **kind)
    # More tokens are themselves rounded to three bits.
    tolerance = ERROR[torch.float16] if name == "twin" or (num_tokens == 3 and is_hopper(device)) else 0.1
    assert error(layer.run(OPS[name]), layer.expected) < tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 8, 9, 64, 65, 128, 144, 200, 256])
@pytest.mark.parametrize("size", [(6144, 4096), (4096, 14336), (1024, 3072), (50272, 768)], ids=str)
def test_realistic_sizes(num_tokens: int, size: tuple[int, int], make_layer: MakeLayer, error: Any) -> None:
    for kind in KINDS:
        layer = make_layer(num_tokens, *size, dtype=torch.bfloat16, **kind)
        assert error(layer.run(triton_ops), layer.expected) < ERROR[torch.bfloat16]
        layer = make_layer(num_tokens, *size, dtype=torch.bfloat16, fp8=True, **kind)
        assert error(layer.run(triton_ops), layer.expected) < (ERROR[torch.bfloat16] if num_tokens <= 8 else 0.1)
