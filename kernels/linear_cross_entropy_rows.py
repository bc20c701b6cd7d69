"""
Rows of logits in place: log-prob of the target, entropy, and the gradient written over the logits.

    z[v]    = softcap * tanh(logits[v] / softcap) / temperature       without softcap: logits[v] / temperature
    logp    = z[t] - logsumexp_v z[v]
    entropy = -sum_v softmax_v(z) log softmax_v(z)
    d(-logp)/dlogits[v] = (softmax_v(z) - 1[v == t]) * dz[v]/dlogits[v]

How it works. One program per row. It reads the row once for m, the largest z so far, and s, the sum of exp(z
- m) so far, and multiplies s by exp(m_old - m_new) whenever m grows. For the gradient it reads the row a
second time and writes each element where it was read. What a token's loss is multiplied by is one number per
row and is applied elsewhere: see linear_cross_entropy.py. If the row's logsumexp is known already, its
gradient can be computed one block of columns at a time.

A chunk of 1,024 rows of 262,144 bf16 logits: 512 MiB are read twice and written once; besides it, eight bytes
per row.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kit.kernels.backend import row_blocks, tl, triton, uses_triton
from kit.kernels.linear_cross_entropy_chunks import wide

BLOCK_V = 4096  # columns per step; at least 32 * NUM_WARPS, see _gradient_kernel
NUM_WARPS = 8


@triton.jit
def _tanh(x):
    # Triton's own tanh exists on GPUs only. (1 - e) / (1 + e) loses the digits of a small x: the series does
    # not.
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    x2 = x * x
    small = x * (1.0 - x2 * (1 / 3 - x2 * (2 / 15 - x2 * (17 / 315 - x2 * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.3, small, tl.where(x < 0, -large, large))


@triton.jit
def _load_scores(row_ptr, cols, V, inv_temperature, SOFTCAP: tl.constexpr):
    """Return z at cols, -inf past the end, and dz / d(raw logit). SOFTCAP 0 = none."""
    z = tl.load(row_ptr + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
    slope = inv_temperature
    if SOFTCAP > 0:
        capped = _tanh(z / SOFTCAP)
        z = tl.where(cols < V, SOFTCAP * capped, z)
        slope *= 1.0 - capped * capped
    return z * inv_temperature, slope


@triton.jit
def _online_logsumexp(row_ptr, V, inv_temperature, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr):
    """Read the row once: m = the largest z, s = sum exp(z - m), u = sum exp(z - m) (z - m)."""
    m = -1e30  # not -inf: u would start as inf * 0
    s = 0.0
    u = 0.0
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        z, _ = _load_scores(row_ptr, cols, V, inv_temperature, SOFTCAP)
        m_new = tl.maximum(m, tl.max(z, 0))
        shrink = tl.exp(m - m_new)
        e = tl.exp(z - m_new)
        distance = tl.where(z > -1e30, z - m_new, 0.0)  # 0 * -inf is nan
        u = shrink * (u + (m - m_new) * s) + tl.sum(e * distance, 0)
        s = shrink * s + tl.sum(e, 0)
        m = m_new
    return m, s, u


@triton.jit
def _logprob_kernel(
    logits_ptr, targets_ptr, logprobs_ptr, entropy_ptr,
    row_stride, V, inv_temperature,
    SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Compute log-prob of the target and entropy of a row's distribution, one program per row.

    The kernel only reads the logits.
    """
    row = tl.program_id(0).to(tl.int64)  # row * row_stride passes 2**31 in a chunk of 8,193 rows of 262,144
    logits_ptr += row * row_stride
    z_target, _ = _load_scores(logits_ptr, tl.load(targets_ptr + row), V, inv_temperature, SOFTCAP)
    m, s, u = _online_logsumexp(logits_ptr, V, inv_temperature, SOFTCAP, BLOCK_V)
    tl.store(logprobs_ptr + row, z_target - m - tl.log(s))
    tl.store(entropy_ptr + row, tl.log(s) - u / s)


@triton.jit
def _gradient_kernel(
    logits_ptr, targets_ptr, logprobs_ptr,
    row_stride, V, inv_temperature,
    SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Compute log-prob of the target, then write d(-logp) / d(raw logit) over the logits, one program per
    row.

    In place without a race: the target's logit is loaded before the sums of _online_logsumexp, at which all
    threads wait for one another, and from then on each thread reads and writes only its own columns. With
    fewer columns than threads (BLOCK_V < 32 * NUM_WARPS) two threads would own one column, and one could read
    what the other had overwritten.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    z_target, _ = _load_scores(logits_ptr, target, V, inv_temperature, SOFTCAP)
    m, s, _ = _online_logsumexp(logits_ptr, V, inv_temperature, SOFTCAP, BLOCK_V)
    tl.store(logprobs_ptr + row, z_target - m - tl.log(s))

    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        z, slope = _load_scores(logits_ptr, cols, V, inv_temperature, SOFTCAP)
        p = tl.exp(z - m) / s
        dlogits = tl.where(cols == target, p - 1.0, p) * slope
        tl.store(logits_ptr + cols, dlogits.to(logits_ptr.dtype.element_ty), mask=cols < V)


@triton.jit
def _block_gradient_kernel(
    logits_ptr, targets_ptr, logsumexp_ptr,
    row_stride, V, first, inv_temperature,
    SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write the gradient over columns first .. first + V - 1 of rows whose logsumexp is known.

    One program per row and BLOCK_V columns. The logsumexp is that of the whole row.
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    logits_ptr += row * row_stride
    z, slope = _load_scores(logits_ptr, cols, V, inv_temperature, SOFTCAP)
    p = tl.exp(z - tl.load(logsumexp_ptr + row))
    dlogits = tl.where(cols + first == tl.load(targets_ptr + row), p - 1.0, p) * slope
    tl.store(logits_ptr + cols, dlogits.to(logits_ptr.dtype.element_ty), mask=cols < V)


def _score_blocks(
    logits: Tensor, inv_temperature: float, softcap: float
) -> Iterator[tuple[slice, Tensor, Tensor | float]]:
    """Yield (rows, z, dz / d(raw logit)) of a few rows at a time, for the torch path.

    z overwrites fp32 logits; for other dtypes it is a small copy.
    """
    for rows in row_blocks(logits):
        z, slope = logits[rows].to(wide(logits.dtype)), inv_temperature
        if softcap > 0:
            z.div_(softcap).tanh_()
            slope = (1 - z * z).mul_(inv_temperature)
            z.mul_(softcap)
        if inv_temperature != 1:
            z.mul_(inv_temperature)
        yield rows, z, slope


@torch.library.custom_op("kit::token_logprobs", mutates_args=("logits",))
def row_logprobs(
    logits: Tensor, targets: Tensor, inv_temperature: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Return the log-prob of each row's target and the entropy of each row, (R,) fp32 each.

    What the logits hold afterwards is undefined.
    """
    logprobs = logits.new_empty(logits.shape[0], dtype=wide(logits.dtype))
    entropy = torch.empty_like(logprobs)
    if uses_triton(logits):
        with torch.cuda.device_of(logits):
            _logprob_kernel[(logits.shape[0],)](
                logits, targets, logprobs, entropy, logits.stride(0), logits.shape[1], inv_temperature,
                SOFTCAP=softcap, BLOCK_V=BLOCK_V, num_warps=NUM_WARPS,
            )  # fmt: skip
        return logprobs, entropy
    for rows, z, _ in _score_blocks(logits, inv_temperature, softcap):
        z.sub_(z.amax(1, keepdim=True))
        e = z.exp()
        s = e.sum(1)
        logprobs[rows] = z.gather(1, targets[rows, None])[:, 0] - s.log()
        entropy[rows] = s.log() - e.mul_(z).sum(1) / s
    return logprobs, entropy


@torch.library.custom_op("kit::token_gradients_", mutates_args=("logits",))
def row_gradients_(logits: Tensor, targets: Tensor, inv_temperature: float, softcap: float) -> Tensor:
    """Return each target's log-prob, (R,) fp32, and overwrite the logits with d(-logprob) / d(logits)."""
    logprobs = logits.new_empty(logits.shape[0], dtype=wide(logits.dtype))
    if uses_triton(logits):
        with torch.cuda.device_of(logits):
            _gradient_kernel[(logits.shape[0],)](
                logits, targets, logprobs, logits.stride(0), logits.shape[1], inv_temperature,
                SOFTCAP=softcap, BLOCK_V=BLOCK_V, num_warps=NUM_WARPS,
            )  # fmt: skip
        return logprobs
    for rows, z, slope in _score_blocks(logits, inv_temperature, softcap):
        target = targets[rows, None]
        z.sub_(z.amax(1, keepdim=True))
        z_target = z.gather(1, target)
        s = z.exp_().sum(1, keepdim=True)
        logprobs[rows] = (z_target - s.log())[:, 0]
        z.div_(s).scatter_add_(1, target, z.new_full((), -1.0).expand_as(target))
        if isinstance(slope, Tensor) or slope != 1:
            z.mul_(slope)
        if z.dtype != logits.dtype:
            logits[rows] = z
    return logprobs


@torch.library.custom_op("kit::block_gradients_", mutates_args=("logits",))
def block_gradients_(
    logits: Tensor, targets: Tensor, logsumexp: Tensor, first: int, inv_temperature: float, softcap: float
) -> None:
    """Overwrite logits (R, B), columns first .. first + B - 1 of a row, with d(-logprob) / d(logits).

    logsumexp: (R,) fp32, of whole rows.
    """
    if uses_triton(logits):
        R, V = logits.shape
        with torch.cuda.device_of(logits):
            _block_gradient_kernel[(R, triton.cdiv(V, BLOCK_V))](
                logits, targets, logsumexp, logits.stride(0), V, first, inv_temperature,
                SOFTCAP=softcap, BLOCK_V=BLOCK_V, num_warps=NUM_WARPS,
            )  # fmt: skip
        return
    for rows, z, slope in _score_blocks(logits, inv_temperature, softcap):
        z.sub_(logsumexp[rows, None]).exp_()
        target = targets[rows, None] - first
        inside = (target >= 0) & (target < z.shape[1])
        z.scatter_add_(1, target.where(inside, 0), -inside.to(z.dtype))
        if isinstance(slope, Tensor) or slope != 1:
            z.mul_(slope)
        if z.dtype != logits.dtype:
            logits[rows] = z


@row_logprobs.register_fake
def _(logits, targets, inv_temperature, softcap):
    return tuple(logits.new_empty(logits.shape[0], dtype=wide(logits.dtype)) for _ in range(2))


@row_gradients_.register_fake
def _(logits, targets, inv_temperature, softcap):
    return logits.new_empty(logits.shape[0], dtype=wide(logits.dtype))


@block_gradients_.register_fake
def _(logits, targets, logsumexp, first, inv_temperature, softcap):
    return None
