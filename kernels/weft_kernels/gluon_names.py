"""What the Gluon kernels share: the layout of tiles in shared memory, names that differ in triton 3.6, programmatic
dependent launch, copies of weights, and the gate."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
SWIZZLED_FLOAT8 = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)

barrier = getattr(gl, "barrier", None) or gl.thread_barrier
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

NEGATIVE_LOG2_E = gl.constexpr(-1.4426950408889634)


@gluon.jit
def let_next_begin() -> None:
    """The next kernel may begin once all programs have come here."""
    gl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def wait_for_kernel_before() -> None:
    """Until all of it has ended."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def copy_weights(  # type: ignore[no-untyped-def]
    weight: tma.tensor_descriptor, column, width, k, loaded, rows: gl.shared_memory_descriptor, wanted=True
) -> None:
    """Start the copy of the rows of weights that make outputs from ``column`` on, or of their gates and their ups."""
    OWNED: gl.constexpr = weight.block_shape[0]
    async_load(weight, [column, k], loaded, rows.slice(0, OWNED), pred=wanted)
    if rows.shape[0] > OWNED:
        async_load(weight, [width + column, k], loaded, rows.slice(OWNED, OWNED), pred=wanted)


@gluon.jit
def silu_and_mul(gate: gl.tensor, up: gl.tensor) -> gl.tensor:
    """``silu(gate) * up``; with exp and a quotient matrices of many tokens were 12 % slower: many instructions."""
    power = gl.exp2(gate * NEGATIVE_LOG2_E)
    sigmoid = gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], gl.float32, is_pure=True, pack=1
    )
    return gate * sigmoid * up
