"""
Cross-entropy of logits that exist, with one copy of them in memory instead of three.

    loss[i]                 = logsumexp_v(z[i, v]) - z[i, t_i]                          0 where t_i is ignored
    d loss[i] / d z[i, v]   = softmax_v(z_i) - 1[v == t_i]

How it works. The forward kernel reads each row once. It keeps m, the largest logit so far, and s, the sum of
exp(z - m) so far, and multiplies s by exp(m_old - m_new) whenever m grows. It stores two numbers per row, the
loss and logsumexp = m + log s. The backward kernel needs nothing else, because softmax = exp(z - logsumexp)
is computed one element at a time, so it writes each gradient where its logit was.

    !!  BACKWARD OVERWRITES THE LOGITS WITH THEIR GRADIENT.  After loss.backward() the tensor you passed holds
    !!  d loss / d logits; for a leaf, logits and logits.grad are the same memory. Read what you need from it
    !!  before, or pass logits.clone(). Autograd notices the overwriting: another backward that still needs
    !!  the logits raises an error and never returns a wrong gradient.

16,384 tokens, V = 262,144, bf16: the logits are 8 GiB. torch adds a log-softmax and a gradient of the same
size: 24 GiB (40 if the logits are first cast to fp32). Here it stays at 8 GiB. linear_cross_entropy.py
removes these 8 GiB as well.
"""

import torch
from torch import Tensor

from kit.kernels.backend import row_blocks, tl, triton, uses_triton

IGNORE_INDEX = -100  # torch's default, and what every collator writes
BLOCK_V = 4096  # columns per step: 16 per thread, which are two 16-byte loads of bf16
NUM_WARPS = 8  # of 32 threads; with fewer than 256 columns in BLOCK_V two threads would write the same one


def cross_entropy_reference(logits, targets, *, reduction="mean", ignore_index=IGNORE_INDEX):
    """Compute the same in plain torch: what this file means, and what its tests compare with."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.nn.functional.cross_entropy(logits, targets, reduction=reduction, ignore_index=ignore_index)


@triton.jit
def _forward_kernel(
    logits_ptr, targets_ptr, loss_ptr, logsumexp_ptr,
    row_stride, V, ignore_index,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Compute the loss and the logsumexp of a row, one program per row."""
    row = tl.program_id(0).to(tl.int64)  # row * row_stride passes 2**31 from 8,192 rows of 262,144 on
    logits_ptr += row * row_stride

    # one pass over the row: the largest logit m, and s = sum of exp(z - m), rescaled whenever m grows
    m = -1e30  # not -inf: a first block of nothing but masked logits (-inf) would compute -inf - -inf = nan
    s = 0.0
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        z = tl.load(logits_ptr + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(z, 0))
        s = s * tl.exp(m - m_new) + tl.sum(tl.exp(z - m_new), 0)
        m = m_new
    logsumexp = m + tl.log(s)

    # a target outside the row reads nothing and gives nan: checking it would make the host wait for the GPU
    target = tl.load(targets_ptr + row)
    z_target = tl.load(logits_ptr + target, mask=(target >= 0) & (target < V), other=float("nan"))
    loss = logsumexp - z_target.to(tl.float32)
    tl.store(loss_ptr + row, tl.where(target == ignore_index, 0.0, loss))
    tl.store(logsumexp_ptr + row, logsumexp)


@triton.jit
def _backward_kernel(
    logits_ptr, targets_ptr, logsumexp_ptr, dloss_ptr,
    row_stride, V, ignore_index,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write the gradient over the logits, one program per row and BLOCK_V columns."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)

    z = tl.load(logits_ptr + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
    p = tl.exp(z - tl.load(logsumexp_ptr + row))
    dz = tl.where(cols == target, p - 1.0, p) * tl.load(dloss_ptr + row)
    dz = tl.where(target == ignore_index, 0.0, dz)
    tl.store(logits_ptr + cols, dz.to(logits_ptr.dtype.element_ty), mask=cols < V)


def _check_targets(targets, V, ignore_index):
    outside = targets[(targets < 0) | (targets >= V)]
    if outside.numel():
        raise ValueError(
            f"targets contains {int(outside[0])} but logits has {V} columns, ids 0 to {V - 1}, and "
            f"ignore_index is {ignore_index}; check that tokenizer and model belong together, or pass the "
            "ignore_index that the targets use"
        )


@torch.library.custom_op("kit::cross_entropy", mutates_args=())
def _forward(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return (loss, logsumexp) of every row."""
    (N, V), wide = logits.shape, torch.promote_types(logits.dtype, torch.float32)
    loss, logsumexp = logits.new_empty(N, dtype=wide), logits.new_empty(N, dtype=wide)
    ignored = targets == ignore_index
    if logits.device.type == "cpu":  # where reading values does not wait for a device
        _check_targets(targets[~ignored], V, ignore_index)
    if uses_triton(logits):
        if N:
            sizes = logits.stride(0), V, ignore_index
            with torch.cuda.device_of(logits):
                _forward_kernel[(N,)](logits, targets, loss, logsumexp, *sizes, BLOCK_V, num_warps=NUM_WARPS)
        return loss, logsumexp

    inside = targets.masked_fill(ignored, 0)[:, None]
    for rows in row_blocks(logits):
        z = logits[rows].to(wide)
        logsumexp[rows] = z.logsumexp(1)
        loss[rows] = logsumexp[rows] - z.gather(1, inside[rows])[:, 0]
    return loss.masked_fill_(ignored, 0), logsumexp


@torch.library.custom_op("kit::cross_entropy_backward_", mutates_args=("logits",))
def _backward_(logits: Tensor, targets: Tensor, logsumexp: Tensor, dloss: Tensor, ignore_index: int) -> None:
    """Overwrite the logits with their gradient."""
    N, V = logits.shape
    if uses_triton(logits):
        if N:
            sizes = logits.stride(0), V, ignore_index
            with torch.cuda.device_of(logits):
                _backward_kernel[(N, triton.cdiv(V, BLOCK_V))](
                    logits, targets, logsumexp, dloss, *sizes, BLOCK_V, num_warps=NUM_WARPS
                )
        return

    ignored = (targets == ignore_index)[:, None]
    inside = targets[:, None].masked_fill(ignored, 0)
    for rows in row_blocks(logits):
        z = logits[rows].to(logsumexp.dtype)
        z.sub_(logsumexp[rows, None]).exp_()
        z.scatter_add_(1, inside[rows], z.new_full((), -1.0).expand_as(inside[rows]))
        z.mul_(dloss[rows, None]).masked_fill_(ignored[rows], 0)
        if z.dtype != logits.dtype:  # else z is the logits
            logits[rows] = z


@_forward.register_fake
def _(logits, targets, ignore_index):
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(logits.shape[0], dtype=wide), logits.new_empty(logits.shape[0], dtype=wide)


@_backward_.register_fake
def _(logits, targets, logsumexp, dloss, ignore_index):
    return None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, ignore_index):
        loss, logsumexp = _forward(logits, targets, ignore_index)
        ctx.save_for_backward(logits, targets, logsumexp)
        ctx.ignore_index, ctx.overwritten = ignore_index, False
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        if ctx.overwritten:
            raise RuntimeError(
                "cross_entropy: backward ran a second time, but the first overwrote the logits; "
                "call cross_entropy again"
            )
        logits, targets, logsumexp = ctx.saved_tensors
        dlogits = logits.detach()
        dloss = dloss.contiguous()  # .sum() passes down a dloss with stride 0
        _backward_(dlogits, targets, logsumexp, dloss, ctx.ignore_index)
        ctx.overwritten = True
        return dlogits, None, None


def cross_entropy(
    logits: Tensor, targets: Tensor, *, reduction: str = "mean", ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Compute the cross-entropy of logits (..., V) against targets (...), which are already shifted.

    BACKWARD OVERWRITES THE LOGITS with their gradient (see the top of this file), and runs once. If the rows
    of logits are not at one distance in memory, as in logits[:, :-1], a copy is made and overwritten instead.

    logits: any floating dtype. targets: int64.
    reduction: "mean" divides by the number of targets != ignore_index, and gives 0 if there are none (torch:
        nan); or "sum", or "none".

    Returns fp32 (float64 for float64). Raises ValueError for arguments that do not fit. On a CPU a target
    outside 0 .. V - 1 raises too; on a GPU it makes the loss nan, because checking would make the host wait
    for the device.
    """
    if logits.dim() < 1 or logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)} but targets {tuple(targets.shape)}; needed are (..., V) "
            "and (...): shift both before the call, logits[:, :-1] and targets[:, 1:]"
        )
    if targets.dtype != torch.int64 or not logits.is_floating_point():
        raise ValueError(
            f"logits is {logits.dtype} and targets {targets.dtype}; pass floating logits and targets.long()"
        )
    if logits.device != targets.device:
        raise ValueError(
            f"logits is on {logits.device} but targets on {targets.device}; move them to one device"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction is {reduction!r}; pass "mean", "sum" or "none"')

    V = logits.shape[-1]
    flat, target = logits.reshape(-1, V), targets.reshape(-1).contiguous()
    # expanded rows share memory: one gradient would hit several
    if flat.stride(1) != 1 or flat.stride(0) < V:
        flat = flat.contiguous()
    loss = _CrossEntropy.apply(flat, target, ignore_index)
    if reduction == "none":
        return loss.reshape(targets.shape)
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (target != ignore_index).sum().clamp(min=1)
