"""
The gate of a feed-forward: SwiGLU or GeGLU (Shazeer, 2020).

    s     = sigmoid(u(gate))          "silu": u(x) = x;  "gelu_tanh": u(x) = 2 sqrt(2 / pi) (x + 0.044715 x^3)
    y     = gate * s * up             gelu's tanh form, since 1 + tanh(z) = 2 sigmoid(2 z)
    dup   = dy * gate * s
    dgate = dy * up * (s + gate * s * (1 - s) * u'(gate))

How it works. Every element is read once, computed in fp32, rounded once and written. Only gate and up are
kept for the backward pass. Its kernel computes the activation a second time and writes each gradient where
its input was.

    !!  BACKWARD OVERWRITES GATE AND UP WITH THEIR GRADIENTS.  After it, the two tensors that you passed hold
    !!  dgate and dup; for a leaf, gate and gate.grad are the same memory. Read what you need before, or pass
    !!  clones. Autograd notices the overwriting: another backward that still needs gate or up raises
    !!  an error.

16,384 tokens, 6,912 wide, bf16 (Gemma-3-1B): gate and up are 216 MiB each. Eager code also keeps the
activation, and its backward pass allocates three tensors of that size; here the backward pass allocates none.
"""

import math

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from kit.kernels.backend import row_blocks, tl, triton, uses_triton

BLOCK = 1_024  # columns per program: 8 per thread, one 16-byte load of bf16
NUM_WARPS = 4
ACTIVATIONS = ("silu", "gelu_tanh")
SLOPE, CUBE = 2 * math.sqrt(2 / math.pi), 0.044715  # of gelu's tanh form


def glu_reference(gate, up, *, activation="silu"):
    """Compute the same in plain torch: what this file means, and what its tests compare with."""
    return _activate(gate, activation) * up


def _activate(x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(x)
    return torch.nn.functional.gelu(x, approximate="tanh")


@triton.jit
def _forward_kernel(
    gate_ptr, up_ptr, y_ptr,
    gate_stride, up_stride, width, slope, cube,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # row * stride may pass 2**31
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=inside).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + cols, mask=inside).to(tl.float32)
    y = gate * tl.sigmoid(gate * (slope + cube * gate * gate)) * up
    tl.store(y_ptr + row * width + cols, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    gate_ptr, up_ptr, dy_ptr,
    gate_stride, up_stride, width, slope, cube,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    gate_ptr += row * gate_stride + cols
    up_ptr += row * up_stride + cols
    gate = tl.load(gate_ptr, mask=inside).to(tl.float32)
    up = tl.load(up_ptr, mask=inside).to(tl.float32)
    dy = tl.load(dy_ptr + row * width + cols, mask=inside).to(tl.float32)
    u = gate * (slope + cube * gate * gate)
    s = tl.sigmoid(u)
    du = slope + 3 * cube * gate * gate
    dgate = dy * up * (s + gate * s * tl.sigmoid(-u) * du)  # 1 - s would lose digits where s is near 1
    tl.store(gate_ptr, dgate.to(gate_ptr.dtype.element_ty), mask=inside)
    tl.store(up_ptr, (dy * gate * s).to(up_ptr.dtype.element_ty), mask=inside)


def _coefficients(activation: str) -> tuple[float, float]:
    """Return (slope, cube) of u(x) = slope x + cube x^3."""
    return (1.0, 0.0) if activation == "silu" else (SLOPE, SLOPE * CUBE)


def _launch(kernel, gate: Tensor, up: Tensor, y: Tensor, activation: str) -> None:
    N, width = gate.shape
    sizes = (gate.stride(0), up.stride(0), width, *_coefficients(activation))
    if N and width:
        with torch.cuda.device_of(gate):
            kernel[(N, triton.cdiv(width, BLOCK))](gate, up, y, *sizes, BLOCK, num_warps=NUM_WARPS)


@torch.library.custom_op("kit::glu", mutates_args=())
def _forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    y = gate.new_empty(gate.shape)
    if uses_triton(gate):
        _launch(_forward_kernel, gate, up, y, activation)
        return y
    wide = torch.promote_types(gate.dtype, torch.float32)
    for rows in row_blocks(gate):
        y[rows] = _activate(gate[rows].to(wide), activation).mul_(up[rows])
    return y


@torch.library.custom_op("kit::glu_backward_", mutates_args=("gate", "up"))
def _backward_(gate: Tensor, up: Tensor, dy: Tensor, activation: str) -> None:
    """Overwrite gate and up with their gradients."""
    if uses_triton(gate):
        return _launch(_backward_kernel, gate, up, dy, activation)
    wide = torch.promote_types(gate.dtype, torch.float32)
    for rows in row_blocks(gate):
        x, upstream = gate[rows].to(wide), dy[rows].to(wide)
        dactive = upstream * up[rows]
        up[rows] = _activate(x, activation).mul_(upstream)
        if activation == "silu":
            gate[rows] = torch.ops.aten.silu_backward(dactive, x)
        else:
            gate[rows] = torch.ops.aten.gelu_backward(dactive, x, approximate="tanh")


@_forward.register_fake
def _(gate, up, activation):
    return gate.new_empty(gate.shape)


@_backward_.register_fake
def _(gate, up, dy, activation):
    return None


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation):
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.overwritten = activation, False
        return _forward(gate, up, activation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        if ctx.overwritten:
            raise RuntimeError(
                "glu: backward ran a second time, but the first overwrote gate and up; call glu again"
            )
        gate, up = (tensor.detach() for tensor in ctx.saved_tensors)
        _backward_(gate, up, dy.contiguous(), ctx.activation)
        ctx.overwritten = True
        needs_gate, needs_up, _ = ctx.needs_input_grad
        return gate if needs_gate else None, up if needs_up else None, None


def _rows(x: Tensor) -> Tensor:
    """Return x as (N, width), rows at one distance: a copy if they are not, or if they share memory."""
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return flat if flat.stride(1) == 1 and flat.stride(0) >= flat.shape[1] else flat.contiguous()


def _overlap(gate: Tensor, up: Tensor) -> bool:
    """Return whether some element of gate (N, width) is an element of up as well."""
    if StorageWeakRef(gate.untyped_storage()) != StorageWeakRef(up.untyped_storage()):
        return False
    low, high = sorted((gate, up), key=Tensor.storage_offset)
    distance, (N, width), stride = high.storage_offset() - low.storage_offset(), low.shape, low.stride(0)
    if not low.numel() or distance >= (N - 1) * stride + width:
        return False  # low ends before high begins
    shift = distance % stride  # of high's rows against low's
    return high.stride(0) != stride or min(shift, stride - shift) < width


def glu(gate: Tensor, up: Tensor, *, activation: str = "silu") -> Tensor:
    """Compute activation(gate) * up, element by element.

    gate, up: (..., I), one floating dtype; the halves of one projection's output may be passed as they are.
    activation: "silu" (Llama, Qwen2) or "gelu_tanh" (Gemma). Returns (..., I) in that dtype, computed in fp32
    (float64 for float64) and rounded once. BACKWARD OVERWRITES GATE AND UP (see the top of this file), and
    runs once. If the two share elements, up is copied first.

    Raises ValueError for shapes, dtypes or devices that do not fit, and for an unknown activation.
    """
    if gate.shape != up.shape or gate.dim() < 1:
        raise ValueError(
            f"gate has shape {tuple(gate.shape)} but up {tuple(up.shape)}; needed is (..., I) of both"
        )
    if gate.dtype != up.dtype or not gate.is_floating_point() or gate.device != up.device:
        raise ValueError(
            f"gate is {gate.dtype} on {gate.device} but up {up.dtype} on {up.device}; "
            "pass one floating dtype on one device"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f'activation is {activation!r}; pass "silu" or "gelu_tanh"')
    rows, up_rows = _rows(gate), _rows(up)
    if _overlap(rows, up_rows):
        up_rows = up_rows.clone()
    return _GLU.apply(rows, up_rows, activation).reshape(gate.shape)
