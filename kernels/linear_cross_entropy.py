"""
Cross-entropy straight from hidden states: the (N, V) logits are never held.

    z[i, v]  = softcap * tanh(h_i . w_v / softcap) / temperature          without softcap: z = h_i . w_v / temperature
    logp[i]  = z[i, t_i] - logsumexp_v z[i, v]                            loss = sum_i token_weight[i] * f(logp[i]) / D
    d(-logp[i]) / d(h_i . w_v) = (softmax_v(z_i) - 1[v == t_i]) * dz/d(h_i . w_v)

f(logp) = -logp unless an `objective` is given; D = number of targets that are not ignored ("mean") or 1 ("sum").

How it works. Rows whose target is ignored are dropped, the others go through in chunks: a matmul makes a chunk of logits, and
one kernel reads it twice, for an online logsumexp in fp32 and for the gradient of -logp, which it writes over the logits. What a
token's loss is multiplied by (its weight, the slope of f) is one number a row, which commutes with both matmuls that follow: it
is applied to their thin (R, H) side, and the kernel never needs to know it. Both gradients therefore exist when the forward pass
ends, after three matmuls (6NVH flops), and backward only scales them; reduction="none" cannot know what its losses will be
multiplied by, and makes the logits a second time in backward (8NVH).

16,384 tokens, V = 262,144, bf16: the logits alone are 8 GiB, torch's log-softmax and gradient make it 24, and 40 where the logits
are cast to fp32. Here: one chunk of 0.5 GiB, the fp32 sum of dW (4VH bytes: 1.1 GiB at H = 1,152, none for a frozen head), dX.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kit.kernels.backend import tl, triton, uses_triton
from kit.kernels.linear_head import HeadGradients, logit_chunks, scaled, wide

IGNORE_INDEX = -100  # torch's default, and what every collator writes
CPU_BLOCK_BYTES = 2 * 2**20  # of logits, torch path: four passes over a block that stays in the L2 cache cost one trip to memory
BLOCK_V = 4096  # columns a step; at least 32 * NUM_WARPS, see _gradient_kernel
NUM_WARPS = 8


def linear_cross_entropy_reference(hidden, weight, targets, *, reduction="mean", softcap=None, temperature=1.0):
    """The same function in plain torch: the meaning of this file, and its test. Holds the logits several times."""
    logits = (hidden @ weight.T).float() if hidden.dtype != torch.float64 else hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.nn.functional.cross_entropy(logits / temperature, targets, reduction=reduction, ignore_index=IGNORE_INDEX)


@triton.jit
def _tanh(x):
    # Triton's own tanh exists on GPUs only. (1 - e) / (1 + e) loses the digits of a small x: there, the series.
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    x2 = x * x
    small = x * (1.0 - x2 * (1 / 3 - x2 * (2 / 15 - x2 * (17 / 315 - x2 * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.3, small, tl.where(x < 0, -large, large))


@triton.jit
def _load_scores(row_ptr, cols, V, inv_temperature, SOFTCAP: tl.constexpr):
    """z at cols, -inf past the end, and dz / d(raw logit). SOFTCAP 0 = none."""
    z = tl.load(row_ptr + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
    slope = inv_temperature
    if SOFTCAP > 0:
        capped = _tanh(z / SOFTCAP)
        z = tl.where(cols < V, SOFTCAP * capped, z)
        slope *= 1.0 - capped * capped
    return z * inv_temperature, slope


@triton.jit
def _online_logsumexp(row_ptr, V, inv_temperature, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr):
    """One reading of the row: m = the largest z, s = sum exp(z - m), u = sum exp(z - m) (z - m), rescaled whenever m grows."""
    m = -1e30  # not -inf: u would start as inf * 0
    s = 0.0
    u = 0.0
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        z, _ = _load_scores(row_ptr, cols, V, inv_temperature, SOFTCAP)
        m_new = tl.maximum(m, tl.max(z, 0))
        shrink = tl.exp(m - m_new)
        e = tl.exp(z - m_new)
        u = shrink * (u + (m - m_new) * s) + tl.sum(e * tl.where(z > -1e30, z - m_new, 0.0), 0)  # 0 * -inf is nan
        s = shrink * s + tl.sum(e, 0)
        m = m_new
    return m, s, u


@triton.jit
def _logprob_kernel(
    logits_ptr, targets_ptr, logprobs_ptr, entropy_ptr, row_stride, V, inv_temperature,
    SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program a row: log-prob of the target, and entropy of the row's distribution. Only reads the logits."""
    row = tl.program_id(0).to(tl.int64)  # row * row_stride passes 2**31 in a chunk of 8,193 rows of 262,144
    logits_ptr += row * row_stride
    z_target, _ = _load_scores(logits_ptr, tl.load(targets_ptr + row), V, inv_temperature, SOFTCAP)
    m, s, u = _online_logsumexp(logits_ptr, V, inv_temperature, SOFTCAP, BLOCK_V)
    tl.store(logprobs_ptr + row, z_target - m - tl.log(s))
    tl.store(entropy_ptr + row, tl.log(s) - u / s)


@triton.jit
def _gradient_kernel(
    logits_ptr, targets_ptr, logprobs_ptr, row_stride, V, inv_temperature, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr
):
    """One program a row: log-prob of the target; then d(-logp) / d(raw logit) over the logits.

    In place without a race: the target's logit is loaded before the sums of _online_logsumexp, at which all threads wait for one
    another, and from then on each thread reads and writes only its own columns. With fewer columns than threads (BLOCK_V <
    32 * NUM_WARPS) two threads would own one column, and one could read what the other had overwritten.
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


def _score_blocks(logits: Tensor, inv_temperature: float, softcap: float) -> Iterator[tuple[slice, Tensor, Tensor | float]]:
    """Torch path: (rows, z - max z, dz / d(raw logit)) a few rows at a time. z is made over fp32 logits, or in a small copy."""
    step = max(1, CPU_BLOCK_BYTES // (logits.shape[1] * logits.element_size()))
    for start in range(0, logits.shape[0], step):
        rows = slice(start, start + step)
        z, slope = logits[rows].to(wide(logits.dtype)), inv_temperature
        if softcap > 0:
            z.div_(softcap).tanh_()
            slope = (1 - z * z).mul_(inv_temperature)
            z.mul_(softcap)
        if inv_temperature != 1:
            z.mul_(inv_temperature)
        yield rows, z.sub_(z.amax(1, keepdim=True)), slope


# The operators are what fake tensors (the memory plan) cannot run by themselves; all the rest is ordinary torch.
@torch.library.custom_op("kit::token_logprobs", mutates_args=("logits",))
def _row_logprobs(logits: Tensor, targets: Tensor, inv_temperature: float, softcap: float) -> tuple[Tensor, Tensor]:
    """Log-prob of each row's target and entropy of each row, (R,) fp32. The logits are scratch afterwards."""
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
        e = z.exp()
        s = e.sum(1)
        logprobs[rows] = z.gather(1, targets[rows, None])[:, 0] - s.log()
        entropy[rows] = s.log() - e.mul_(z).sum(1) / s
    return logprobs, entropy


@torch.library.custom_op("kit::token_gradients_", mutates_args=("logits",))
def _row_gradients_(logits: Tensor, targets: Tensor, inv_temperature: float, softcap: float) -> Tensor:
    """Log-prob of each row's target, (R,) fp32; logits become d(-logprob) / d(logits)."""
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
        z_target = z.gather(1, target)
        s = z.exp_().sum(1, keepdim=True)
        logprobs[rows] = (z_target - s.log())[:, 0]
        z.div_(s).scatter_add_(1, target, z.new_full((), -1.0).expand_as(target))
        if isinstance(slope, Tensor) or slope != 1:
            z.mul_(slope)
        if z.dtype != logits.dtype:
            logits[rows] = z
    return logprobs


@torch.library.custom_op("kit::kept_rows", mutates_args=())
def _kept_rows(targets: Tensor, V: int, ignore_index: int) -> Tensor:
    """Indices of the targets that count. On a GPU this waits for the device: the number of matmul rows depends on it. Reading
    the range right after that wait costs microseconds, and an index past the end would make the kernels read foreign memory."""
    kept = (targets != ignore_index).nonzero()[:, 0]
    if len(kept):
        low, high = torch.stack(targets[kept].aminmax()).tolist()
        if low < 0 or high >= V:
            raise ValueError(
                f"targets reach from {low} to {high} but weight has {V} rows, ids 0 to {V - 1}, and ignore_index is "
                f"{ignore_index}; check that tokenizer and model belong together, or pass the targets' own ignore_index"
            )
    return kept


@_row_logprobs.register_fake
def _(logits, targets, inv_temperature, softcap):
    return tuple(logits.new_empty(logits.shape[0], dtype=wide(logits.dtype)) for _ in range(2))


@_row_gradients_.register_fake
def _(logits, targets, inv_temperature, softcap):
    return logits.new_empty(logits.shape[0], dtype=wide(logits.dtype))


@_kept_rows.register_fake
def _(targets, V, ignore_index):
    return torch.empty_like(targets)  # fake targets have no values: all are kept, so a memory plan is an upper bound


def _token_losses(logprobs, rows, token_weight, objective) -> tuple[Tensor, Tensor | None]:
    """Loss of each token, and its slope against -logprob (None = 1 everywhere)."""
    losses, slope = -logprobs, None
    if objective is not None:
        with torch.enable_grad():
            leaf = logprobs.detach().requires_grad_()
            losses = objective(leaf, rows)
            if not isinstance(losses, Tensor) or losses.shape != leaf.shape or not losses.requires_grad:
                got = (tuple(losses.shape), f"requires_grad={losses.requires_grad}") if isinstance(losses, Tensor) else losses
                raise ValueError(
                    f"objective returned {got} for log-probs of shape {tuple(leaf.shape)}; "
                    "return one differentiable loss per token, unreduced, computed from the log-probs it was given"
                )
            (dlogprobs,) = torch.autograd.grad(losses.sum(), leaf)
        losses, slope = losses.detach(), -dlogprobs
    if token_weight is not None:
        factor = token_weight[rows].to(logprobs.dtype)
        losses, slope = losses * factor, factor if slope is None else slope * factor
    return losses, slope


class _FusedLoss(torch.autograd.Function):
    """Sum of token losses / D, its gradients made on the way (6NVH)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, kept, dtype, score, D, token_weight, objective):
        head = weight.to(dtype)
        wanted = ctx.needs_input_grad[:2]
        gradients = HeadGradients(hidden, weight, wanted) if any(wanted) else None
        loss = hidden.new_zeros((), dtype=wide(dtype))
        for rows, x, logits in logit_chunks(hidden, head, kept):
            if gradients is None:
                logprobs, _ = _row_logprobs(logits, targets[rows], *score)
            else:
                logprobs = _row_gradients_(logits, targets[rows], *score)
            losses, slope = _token_losses(logprobs, rows, token_weight, objective)
            loss += losses.sum()
            if gradients is not None:
                gradients.add(rows, x, logits, head, slope, 1 / D)
        logits = None  # frees the chunk before finish() makes its copy
        ctx.gradients, ctx.dtypes = (gradients.finish() if gradients else [None, None]), (hidden.dtype, weight.dtype)
        return loss / D

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy: backward ran a second time, but its gradients were made in the forward pass and handed "
                'out already; call linear_cross_entropy again, or use reduction="none", which makes them anew every time'
            )
        gradients, ctx.gradients = ctx.gradients, None
        return *scaled(gradients, dloss, ctx.dtypes), *[None] * 7


class _TokenLogprobs(torch.autograd.Function):
    """(log-prob of the target, entropy) of every token, 0 where ignored. Backward makes the logits again (8NVH)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, kept, dtype, score):
        logprobs = hidden.new_zeros(len(targets), dtype=wide(dtype))
        entropy = torch.zeros_like(logprobs)
        for rows, _, logits in logit_chunks(hidden, weight.to(dtype), kept):
            logprobs[rows], entropy[rows] = _row_logprobs(logits, targets[rows], *score)
        ctx.save_for_backward(hidden, weight, targets, kept)
        ctx.dtype, ctx.score = dtype, score
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlogprobs, _):
        hidden, weight, targets, kept = ctx.saved_tensors
        head = weight.to(ctx.dtype)
        gradients = HeadGradients(hidden, weight, ctx.needs_input_grad[:2])
        for rows, x, logits in logit_chunks(hidden, head, kept):
            _row_gradients_(logits, targets[rows], *ctx.score)
            gradients.add(rows, x, logits, head, -dlogprobs[rows], 1.0)
        logits = None  # frees the chunk before finish() makes its copy
        dhidden, dweight = (g if g is None else g.to(x.dtype) for g, x in zip(gradients.finish(), (hidden, weight), strict=True))
        return dhidden, dweight, *[None] * 4


def _checked(hidden, weight, targets, softcap, temperature) -> tuple[Tensor, Tensor, torch.dtype, tuple[float, float]]:
    """(hidden (N, H), targets (N,), compute dtype, (1 / temperature, softcap or 0)). Raises ValueError."""
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"weight is a {type(weight).__name__}, not a tensor: a module may add something to its weight (a LoRA adapter does), "
            "and this function would leave that out; keep adapters off the output head (peft: leave lm_head out of "
            "target_modules) or merge them, then pass module.weight"
        )
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}; needed are (..., H) and (V, H): "
            "pass the head's weight as nn.Linear keeps it, not transposed"
        )
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"hidden has positions {tuple(hidden.shape[:-1])} but targets has {tuple(targets.shape)}; "
            "shift both before the call: hidden[:, :-1] and targets[:, 1:], or targets padded with ignore_index at the end"
        )
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets is {targets.dtype} but class indices are needed; pass targets.long()")
    if not hidden.device == weight.device == targets.device:
        raise ValueError(
            f"hidden is on {hidden.device}, weight on {weight.device}, targets on {targets.device}; move them to one device"
        )
    if not hidden.is_floating_point() or not weight.is_floating_point():
        raise ValueError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}; both must be floating point: a quantised head (4 or 8 bit) "
            "must be dequantised first, or better left out of quantisation"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap} but must be positive; pass None for no cap")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature} but must be positive; pass 1.0 for the model's own distribution")
    dtype, device = hidden.dtype, hidden.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    elif weight.dtype != dtype:
        raise ValueError(f"hidden is {dtype} but weight is {weight.dtype}; cast one, or call under torch.autocast({device!r})")
    return hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long(), dtype, (1 / temperature, softcap or 0.0)


@torch.compiler.disable  # the number of rows depends on the targets' values: a compiled model calls this between its graphs
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = IGNORE_INDEX,
    token_weight: Tensor | None = None,
    objective: Callable[[Tensor, Tensor], Tensor] | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Loss of the targets under softmax(hidden @ weight.T), without holding the logits.

    hidden (..., H) and weight (V, H): one floating dtype, or any two under torch.autocast, whose dtype the matmuls then use (the
        sums of dW stay fp32 and reach an fp32 weight unrounded).
    targets (...): int64 or int32, already shifted; ignore_index = no loss. On a GPU the call waits once for the device, to learn
        how many targets count and that they lie in the vocabulary.
    reduction: "mean" divides by the number of targets that are not ignored, with token_weight too: a token's weight then means
        the same whatever its neighbours' are, and weights may be negative or cancel (torch divides by the sum of its class
        weights). No target at all gives 0 and zero gradients (torch: nan). "sum" divides by nothing. "none" gives a loss a token,
        0 where ignored; its backward makes the logits a second time.
    token_weight (...): multiplies each token's loss; a constant, not differentiated, except with "none". With fp16 keep
        weights near 1, and scale the loss.
    objective(logprobs, rows) -> losses: replaces -logprob by any elementwise function of it. Called once a chunk with the chunk's
        log-probs (R,) and rows (R,), int64 indices into the flattened targets, with which to look up what belongs to these tokens
        (old log-probs, advantages); returns their losses (R,). Autograd differentiates it by logprobs alone. Chunks are an
        accident of memory: a loss that mixes tokens needs reduction="none". GRPO's clipped surrogate:

            def objective(logprobs, rows):
                ratio = (logprobs - old[rows]).exp()
                return -torch.minimum(ratio * advantage[rows], ratio.clamp(1 - eps, 1 + eps) * advantage[rows])

    softcap: z = softcap * tanh(z / softcap), as Gemma 2; temperature: z / temperature, after it.

    Returns fp32 (float64 for float64): a scalar, or the targets' shape with "none". With "mean" and "sum" the gradients are made
    here if autograd wants any, and backward runs once: a second one raises RuntimeError. No gradient of a gradient.
    Raises ValueError for arguments that do not fit, for a target outside 0 .. V - 1 among them.
    """
    rows, flat, dtype, score = _checked(hidden, weight, targets, softcap, temperature)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction is {reduction!r}; pass "mean", "sum" or "none"')
    if reduction == "none" and objective is not None:
        raise ValueError('objective is given with reduction="none"; apply it yourself to the log-probs (minus the losses)')
    if token_weight is not None:
        if token_weight.shape != targets.shape or token_weight.device != targets.device:
            raise ValueError(
                f"token_weight is {tuple(token_weight.shape)} on {token_weight.device} but targets is {tuple(targets.shape)} on "
                f"{targets.device}; pass one weight per token (weights per class are not supported)"
            )
        if token_weight.requires_grad and reduction != "none" and torch.is_grad_enabled():
            raise ValueError(f'token_weight requires grad but reduction is {reduction!r}; detach it, or use reduction="none"')
    kept = _kept_rows(flat, weight.shape[0], ignore_index)
    if reduction == "none":
        logprobs, _ = _TokenLogprobs.apply(rows, weight, flat, kept, dtype, score)
        losses = -logprobs.reshape(targets.shape)
        return losses if token_weight is None else losses * token_weight
    D = max(len(kept), 1) if reduction == "mean" else 1
    if not torch.is_grad_enabled():  # needs_input_grad does not know about no_grad, and would have gradients made for nothing
        rows, weight = rows.detach(), weight.detach()
    token_weight = None if token_weight is None else token_weight.detach().reshape(-1)
    return _FusedLoss.apply(rows, weight, flat, kept, dtype, score, D, token_weight, objective)


@torch.compiler.disable
def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """(log-prob of each target, entropy of each position's distribution in nats), both (...) fp32, 0 where targets is -100.

    Arguments and errors as linear_cross_entropy. The log-probs are differentiable (backward makes the logits a second time), the
    entropy is not. For a training step, linear_cross_entropy with an objective costs a matmul less.
    """
    rows, flat, dtype, score = _checked(hidden, weight, targets, softcap, temperature)
    kept = _kept_rows(flat, weight.shape[0], IGNORE_INDEX)
    logprobs, entropy = _TokenLogprobs.apply(rows, weight, flat, kept, dtype, score)
    return logprobs.reshape(targets.shape), entropy.reshape(targets.shape)
