"""
RMSNorm over the last dimension, of rows of hidden states or of the heads of q and k (Zhang & Sennrich, 2019).

    r[n]    = 1 / sqrt(mean_h(x[n, h]^2) + eps)
    y[n, h] = x[n, h] * r[n] * (offset + w[h])

    offset is 0, or 1 in Gemma, whose weights are stored less 1. With g = dy * (offset + w) and x' = x * r:

    dx[n, h] = r[n] * (g[n, h] - x'[n, h] * mean_h(g[n] * x'[n]))
    dw[h]    = sum_n dy[n, h] * x'[n, h]

How it works. A program of the forward kernel holds a few whole rows, so that each is read once. It computes
in fp32, rounds once, and stores r for the backward pass. A program of the backward kernel walks down a share
of the rows: it writes their dx and adds up its part of dw in registers. Each part is one row of fp32, and a
second kernel sums the parts: there are no atomics, so the bits repeat. In one kernel, the program that ends
last would have to sum all parts, 1.1 MiB at H = 1,152, alone.

16,384 tokens, H = 1,152, bf16: x and y are 36 MiB each. Eager code casts x to fp32, squares, averages, scales
and casts back: six passes that move 0.5 GiB. The forward kernel moves 72 MiB, the backward kernel 108 MiB.
Besides x, 64 KiB (r) are kept.
"""

import torch
from torch import Tensor

from kit.kernels.backend import row_blocks, side_by_side, tl, triton, uses_triton

TILE = 2_048  # elements that a program holds at once: 8 per thread, one 16-byte load of bf16
MAX_H = 16_384  # a row must fit in the registers of one program: 64 elements per thread with 8 warps
NUM_WARPS = 8
MAX_PROGRAMS = 256  # of the backward pass; the same on every card, so that dw has the same bits
SUMMED = 32  # columns of the parts that a program sums: 128 bytes of each


def rms_norm_reference(x, weight, eps, *, offset=0.0):
    """Compute the same in plain torch: what this file means, and what its tests compare with."""
    wide = x if x.dtype == torch.float64 else x.float()
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normalised * (offset + weight.to(wide.dtype))).to(x.dtype)


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, y_ptr, r_ptr,
    N, K, x_stride, H, eps, offset,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # rows * H may pass 2**31
    cols = tl.arange(0, BLOCK_H)
    inside = (rows < N)[:, None] & (cols < H)[None, :]
    places = rows[:, None] * H + cols[None, :]  # (BLOCK_N, BLOCK_H)
    starts = rows // K * x_stride + rows % K * H  # in x, where every K rows are in one piece

    x = tl.load(x_ptr + starts[:, None] + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, 1) / H + eps)
    scale = offset + tl.load(weight_ptr + cols, mask=cols < H, other=0.0).to(tl.float32)
    y = x * r[:, None] * scale[None, :]

    tl.store(y_ptr + places, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(r_ptr + rows, r, mask=rows < N)


@triton.jit
def _backward_kernel(
    dy_ptr, x_ptr, weight_ptr, r_ptr, dx_ptr, parts_ptr,
    N, H, offset, steps,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_H)
    scale = offset + tl.load(weight_ptr + cols, mask=cols < H, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_H,), tl.float32)

    for step in range(steps):  # this program's rows lie one behind another
        rows = (program * steps + step) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (rows < N)[:, None] & (cols < H)[None, :]
        places = rows[:, None] * H + cols[None, :]
        r = tl.load(r_ptr + rows, mask=rows < N, other=0.0)
        x = tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32) * r[:, None]
        dy = tl.load(dy_ptr + places, mask=inside, other=0.0).to(tl.float32)

        dweight += tl.sum(dy * x, 0)
        g = dy * scale[None, :]
        dx = r[:, None] * (g - x * (tl.sum(g * x, 1) / H)[:, None])
        tl.store(dx_ptr + places, dx.to(dx_ptr.dtype.element_ty), mask=inside)

    tl.store(parts_ptr + program * H + cols, dweight, mask=cols < H)


@triton.jit
def _sum_kernel(parts_ptr, dweight_ptr, H, num_parts, MAX_PROGRAMS: tl.constexpr, SUMMED: tl.constexpr):
    """Sum the parts of dw, (num_parts, H), and round once. One launch where torch needs two."""
    parts = tl.arange(0, MAX_PROGRAMS)
    cols = tl.program_id(0) * SUMMED + tl.arange(0, SUMMED)
    inside = (parts < num_parts)[:, None] & (cols < H)[None, :]
    dweight = tl.sum(tl.load(parts_ptr + parts[:, None] * H + cols[None, :], mask=inside, other=0.0), 0)
    tl.store(dweight_ptr + cols, dweight.to(dweight_ptr.dtype.element_ty), mask=cols < H)


def tile(H: int) -> dict[str, int]:
    """Return the rows and columns that a program holds at once."""
    BLOCK_H = triton.next_power_of_2(H)
    return {"BLOCK_N": max(1, TILE // BLOCK_H), "BLOCK_H": BLOCK_H, "num_warps": NUM_WARPS}


@torch.library.custom_op("kit::rms_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """Return y (N, H) and r (N,) of x (N / K, K, H), whose K rows are in one piece."""
    (N, K, H), x_stride = x.shape, x.stride(0)
    N *= K
    wide = torch.promote_types(x.dtype, torch.float32)
    y, r = x.new_empty(N, H), x.new_empty(N, dtype=wide)
    if uses_triton(x):
        held = tile(H)
        programs = triton.cdiv(N, held["BLOCK_N"])
        if N:
            with torch.cuda.device_of(x):
                _forward_kernel[(programs,)](x, weight, y, r, N, K, x_stride, H, eps, offset, **held)
        return y, r

    x = x.reshape(N, H)
    scale = offset + weight.to(wide)
    for rows in row_blocks(x):
        z = x[rows].to(wide)
        r[rows] = torch.linalg.vecdot(z, z).div_(H).add_(eps).rsqrt_()
        y[rows] = (z * r[rows, None]).mul_(scale)
    return y, r


@torch.library.custom_op("kit::rms_norm_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    """Return (dx, dw). A frozen weight's gradient costs one row of registers, and is dropped."""
    N, H = x.shape
    dx = torch.empty_like(x)
    if uses_triton(x) and N:
        held, dweight = tile(H), torch.empty_like(weight)
        steps = triton.cdiv(triton.cdiv(N, held["BLOCK_N"]), MAX_PROGRAMS)
        programs = triton.cdiv(N, held["BLOCK_N"] * steps)
        parts = x.new_empty(programs, H, dtype=torch.float32)
        with torch.cuda.device_of(x):
            _backward_kernel[(programs,)](dy, x, weight, r, dx, parts, N, H, offset, steps, **held)
            sums = triton.cdiv(H, SUMMED)
            _sum_kernel[(sums,)](parts, dweight, H, programs, MAX_PROGRAMS, SUMMED, num_warps=NUM_WARPS)
        return dx, dweight

    scale = offset + weight.to(r.dtype)
    dweight = torch.zeros_like(scale)
    for rows in row_blocks(x):
        z, upstream = x[rows].to(r.dtype) * r[rows, None], dy[rows].to(r.dtype)
        dweight += (upstream * z).sum(0)
        g = upstream * scale
        z *= (torch.linalg.vecdot(g, z) / H)[:, None]
        dx[rows] = (g - z).mul_(r[rows, None])
    return dx, dweight.to(weight.dtype)


@_forward.register_fake
def _(x, weight, eps, offset):
    N, H = x.shape[0] * x.shape[1], x.shape[2]
    return x.new_empty(N, H), x.new_empty(N, dtype=torch.promote_types(x.dtype, torch.float32))


@_backward.register_fake
def _(dy, x, weight, r, offset):
    return torch.empty_like(x), torch.empty_like(weight)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset):
        y, r = _forward(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, r)
        ctx.offset = offset
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, r = ctx.saved_tensors
        rows = x.reshape(dy.shape).contiguous()
        dx, dweight = _backward(dy.contiguous(), rows, weight, r, ctx.offset)
        return dx.view(x.shape), dweight if ctx.needs_input_grad[1] else None, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """Divide vectors x (..., H) by their root mean square and scale them by offset + weight (H,).

    x and weight: any floating dtype, which may differ. Computed in fp32 (float64 for float64) and rounded
    once to x's dtype; transformers' Llama and Qwen2 round a second time, before the scale. Differentiable
    once, in x and weight. Heads (T, K, H) may be a slice of a projection's output; other strides cost a copy.
    Source: Zhang & Sennrich, 2019, equation 4; Gemma's offset: transformers' Gemma3RMSNorm.

    Raises ValueError for shapes, dtypes or devices that do not fit, and for H above 16,384.
    """
    if x.dim() < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} but weight {tuple(weight.shape)}; needed are (..., H) and (H,): "
            "reshape x so that what is normalised comes last"
        )
    if not (x.is_floating_point() and weight.is_floating_point()):
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}; pass floating tensors")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device} but weight on {weight.device}; move them to one device")
    if not 1 <= x.shape[-1] <= MAX_H:
        raise ValueError(f"x has vectors of {x.shape[-1]:,} elements; from 1 to {MAX_H:,} can be normalised")

    H = x.shape[-1]
    rows = side_by_side(x.reshape(-1, 1, H) if x.is_contiguous() or x.dim() != 3 else x)
    return _RMSNorm.apply(rows, weight.contiguous(), eps, offset).reshape(x.shape)
