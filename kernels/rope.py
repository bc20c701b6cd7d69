"""Rotary position embedding of q and k together (Su et al., 2021), in transformers' layout: halves, not
neighbours.

    x = (x1, x2), the two halves of a head:    y1 = x1 cos1 - x2 sin1      dx1 = dy1 cos1 + dy2 sin2
                                               y2 = x2 cos2 + x1 sin2      dx2 = dy2 cos2 - dy1 sin1

How it works. One program per token loads the token's cosines and sines once and turns all its heads, first of
q, then of k, as one tile of heads by half a head. The backward kernel turns the gradients back with the same
code: sin1 and sin2 change places and sign. Both compute in fp32 and round once.

16,384 tokens, 4 + 1 heads of 256, bf16 (Gemma-3-1B): q and k are 40 MiB together. Eager code negates,
concatenates, multiplies twice and adds, for q and for k: some 320 MiB of traffic in ten launches. This moves
96 MiB in one.
"""

import torch
from torch import Tensor

from kit.kernels.backend import side_by_side, tl, triton, uses_triton

WARP_ELEMENTS = 512  # of a half head: 16 per thread, two 16-byte loads of bf16


def rope_reference(q, k, cos, sin):
    """Compute the same in plain torch: what this file means, and what its tests compare with."""

    def turn(x):
        x1, x2 = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat([-x2, x1], dim=-1) * sin[:, None]

    return turn(q), turn(k)


@triton.jit
def _halves(row_ptr, D, BLOCK_HALF: tl.constexpr):
    """Load the two halves of a token's cosines or sines, (BLOCK_HALF,) each."""
    cols = tl.arange(0, BLOCK_HALF)
    first = tl.load(row_ptr + cols, mask=cols < D // 2, other=0.0).to(tl.float32)
    second = tl.load(row_ptr + D // 2 + cols, mask=cols < D // 2, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _turn(
    x_ptr, y_ptr, num_heads, cos1, cos2, sin1, sin2, D, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr
):
    """Turn the heads of one token. x_ptr, y_ptr: its first element. cos1 ...: (BLOCK_HALF,)."""
    heads, cols = tl.arange(0, BLOCK_HEADS), tl.arange(0, BLOCK_HALF)
    inside = (heads < num_heads)[:, None] & (cols < D // 2)[None, :]
    places = heads[:, None] * D + cols[None, :]
    x1 = tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + places + D // 2, mask=inside, other=0.0).to(tl.float32)
    y1 = x1 * cos1[None, :] - x2 * sin1[None, :]
    y2 = x2 * cos2[None, :] + x1 * sin2[None, :]
    tl.store(y_ptr + places, y1.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + places + D // 2, y2.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    q_stride, k_stride, Hq, Hkv, D,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)  # t * q_stride may pass 2**31
    cos1, cos2 = _halves(cos_ptr + t * D, D, BLOCK_HALF)
    sin1, sin2 = _halves(sin_ptr + t * D, D, BLOCK_HALF)
    q, k = q_ptr + t * q_stride, k_ptr + t * k_stride  # the token's first element
    _turn(q, q_out_ptr + t * Hq * D, Hq, cos1, cos2, sin1, sin2, D, BLOCK_Q, BLOCK_HALF)
    _turn(k, k_out_ptr + t * Hkv * D, Hkv, cos1, cos2, sin1, sin2, D, BLOCK_K, BLOCK_HALF)


@triton.jit
def _backward_kernel(
    dq_out_ptr, dk_out_ptr, cos_ptr, sin_ptr, dq_ptr, dk_ptr,
    q_stride, k_stride, Hq, Hkv, D,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    cos1, cos2 = _halves(cos_ptr + t * D, D, BLOCK_HALF)
    sin1, sin2 = _halves(sin_ptr + t * D, D, BLOCK_HALF)
    dq_out, dk_out = dq_out_ptr + t * q_stride, dk_out_ptr + t * k_stride
    _turn(dq_out, dq_ptr + t * Hq * D, Hq, cos1, cos2, -sin2, -sin1, D, BLOCK_Q, BLOCK_HALF)
    _turn(dk_out, dk_ptr + t * Hkv * D, Hkv, cos1, cos2, -sin2, -sin1, D, BLOCK_K, BLOCK_HALF)


def _turn_in_torch(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """Turn heads (T, H, D) in plain torch, without a graph."""
    wide = torch.promote_types(x.dtype, torch.float32)
    half = x.shape[-1] // 2
    sin1, sin2 = sin[:, None].to(wide).split(half, -1)
    if back:
        sin1, sin2 = -sin2, -sin1
    wide_x = x.to(wide)
    x1, x2 = wide_x.split(half, -1)
    y = wide_x * cos[:, None]
    y1, y2 = y.split(half, -1)
    y1.addcmul_(x2, sin1, value=-1)
    y2.addcmul_(x1, sin2)
    return y.to(x.dtype)


def tile(Hq: int, Hkv: int, D: int) -> dict[str, int]:
    """Return what a program holds at once, the heads of one token, and the number of its warps."""
    sizes = {"BLOCK_Q": Hq, "BLOCK_K": Hkv, "BLOCK_HALF": D // 2}
    blocks = {name: triton.next_power_of_2(size) for name, size in sizes.items()}
    warps = blocks["BLOCK_Q"] * blocks["BLOCK_HALF"] // WARP_ELEMENTS
    return blocks | {"num_warps": min(max(1, warps), 8)}


def _launch(kernel, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    (T, Hq, D), Hkv = q.shape, k.shape[1]
    if T:
        sizes = q.stride(0), k.stride(0), Hq, Hkv, D
        with torch.cuda.device_of(q):
            kernel[(T,)](q, k, cos, sin, q_out, k_out, *sizes, **tile(Hq, Hkv, D))
    return q_out, k_out


@torch.library.custom_op("kit::rope", mutates_args=())
def _forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    if uses_triton(q):
        return _launch(_forward_kernel, q, k, cos, sin)
    return _turn_in_torch(q, cos, sin), _turn_in_torch(k, cos, sin)


@torch.library.custom_op("kit::rope_backward", mutates_args=())
def _backward(dq_out: Tensor, dk_out: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    if uses_triton(dq_out):
        return _launch(_backward_kernel, dq_out, dk_out, cos, sin)
    return _turn_in_torch(dq_out, cos, sin, back=True), _turn_in_torch(dk_out, cos, sin, back=True)


@_forward.register_fake
@_backward.register_fake
def _(q, k, cos, sin):
    return q.new_empty(q.shape), k.new_empty(k.shape)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _forward(q, k, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq_out, dk_out):
        # New tensors: torch forbids changing the gradients that come in, as another operation may use them.
        # In place, a step of Gemma-3-1B or Qwen2.5-1.5B would peak at the same byte (simulated).
        return *_backward(side_by_side(dq_out), side_by_side(dk_out), *ctx.saved_tensors), None, None


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn every head of q (T, Hq, D) and k (T, Hkv, D) by its token's angles.

    cos, sin: (T, D), the cosines and sines of the angles; transformers' two halves are the same, but need not
    be. Returns new tensors of the shapes and dtype of q and k, computed in fp32 (float64 for float64) and
    rounded once. Differentiable once, in q and k. Both may be slices of one projection's output; other
    strides cost a copy.

    Raises ValueError for shapes, dtypes or devices that do not fit, an odd D, and cos or sin that require a
    gradient.
    """
    if q.dim() != 3 or k.dim() != 3 or k.shape[::2] != q.shape[::2] or q.shape[-1] % 2:
        raise ValueError(
            f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}; "
            "needed are (T, Hq, D) and (T, Hkv, D), with an even D"
        )
    if not cos.shape == sin.shape == q.shape[::2]:
        raise ValueError(
            f"cos has shape {tuple(cos.shape)} and sin {tuple(sin.shape)}; "
            f"needed is (T, D) = {tuple(q.shape[::2])}"
        )
    if q.dtype != k.dtype or not q.is_floating_point():
        raise ValueError(f"q is {q.dtype} and k {k.dtype}; pass one floating dtype")
    devices = [str(tensor.device) for tensor in (q, k, cos, sin)]
    if len(set(devices)) > 1:
        raise ValueError(f"q, k, cos and sin are on {', '.join(devices)}; move them to one device")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos or sin requires a gradient, which rope does not compute; pass them detached")
    return _Rope.apply(side_by_side(q), side_by_side(k), cos.contiguous(), sin.contiguous())
