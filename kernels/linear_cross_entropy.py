"""
Cross-entropy straight from hidden states, without ever holding the (N, V) logits.

    z[i, v]  = softcap * tanh(h_i . w_v / softcap) / temperature (no softcap: z = h_i . w_v / temperature)
    logp[i]  = z[i, t_i] - logsumexp_v z[i, v]                   loss = sum_i token_weight[i] * f(logp[i]) / D
    d(-logp[i]) / d(h_i . w_v) = (softmax_v(z_i) - 1[v == t_i]) * dz/d(h_i . w_v)

f(logp) = -logp unless an `objective` is given. D = number of targets not ignored ("mean") or 1 ("sum").

How it works. Rows whose target is ignored are dropped; the others are processed in chunks. For each chunk a
matmul computes the logits, and one kernel (linear_cross_entropy_rows.py) reads them twice: once for an online
logsumexp, once for the gradient of -logp, which it writes over them. What a token's loss is multiplied by
(its weight, the slope of f) is one number per row and commutes with the two matmuls that follow, so it is
applied to their thin (R, H) side and the kernel never needs it. Both gradients therefore exist when the
forward pass ends, after three matmuls (6NVH flops), and backward only scales them. reduction="none" cannot
know what its losses will be multiplied by, so it recomputes the logits in backward (8NVH).

16,384 tokens, V = 262,144, bf16: the logits alone are 8 GiB, 24 with torch's log-softmax and gradient, 40
if the logits are cast to fp32. Here: one chunk of 0.5 GiB, dhidden, and the fp32 sum of dweight (4VH bytes:
1.1 GiB at H = 1,152, none for a frozen head).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kit.kernels.cross_entropy import IGNORE_INDEX
from kit.kernels.linear_cross_entropy_chunks import (
    HeadGradients,
    checked,
    kept_rows,
    logit_chunks,
    scaled,
    wide,
)
from kit.kernels.linear_cross_entropy_operators import logprobs_operator, loss_operator
from kit.kernels.linear_cross_entropy_rows import row_gradients_, row_logprobs


def linear_cross_entropy_reference(
    hidden, weight, targets, *, reduction="mean", softcap=None, temperature=1.0
):
    """Compute the same in plain torch: what this file means. Holds the logits several times."""
    logits = (hidden @ weight.T).float() if hidden.dtype != torch.float64 else hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.nn.functional.cross_entropy(
        logits / temperature, targets, reduction=reduction, ignore_index=IGNORE_INDEX
    )


def _token_losses(logprobs, rows, token_weight, objective) -> tuple[Tensor, Tensor | None]:
    """Return the loss of each token, and its slope against -logprob (None = 1 everywhere)."""
    losses, slope = -logprobs, None
    if objective is not None:
        with torch.enable_grad():
            leaf = logprobs.detach().requires_grad_()
            losses = objective(leaf, rows)
            _check_objective(losses, leaf)
            (dlogprobs,) = torch.autograd.grad(losses.sum(), leaf)
        losses, slope = losses.detach(), -dlogprobs

    if token_weight is not None:
        factor = token_weight[rows].to(logprobs.dtype)
        losses, slope = losses * factor, factor if slope is None else slope * factor
    return losses, slope


def _check_objective(losses, logprobs: Tensor) -> None:
    if isinstance(losses, Tensor) and losses.shape == logprobs.shape and losses.requires_grad:
        return
    found = losses
    if isinstance(losses, Tensor):
        found = tuple(losses.shape), f"requires_grad={losses.requires_grad}"
    raise ValueError(
        f"objective returned {found} for log-probs of shape {tuple(logprobs.shape)}; return one "
        "differentiable loss per token, unreduced, computed from the log-probs it was given"
    )


def _loss_and_gradients(
    hidden, weight, targets, kept, dtype, score, D, token_weight, objective, max_rows, overwrite, wanted
):
    """Return (loss / D, [dhidden, dweight]), None for a gradient not wanted: 6NVH flops, 2NVH without any."""
    head = weight.to(dtype)
    overwrite = overwrite and wanted[0] and hidden.dtype != torch.float16 and hidden.is_contiguous()
    if overwrite:  # each row is read before its gradient is written; ignored rows are never read
        ignored = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device).index_fill_(0, kept, False)
        hidden.masked_fill_(ignored[:, None], 0.0)

    gradients = HeadGradients(hidden, weight, wanted, overwrite=overwrite) if any(wanted) else None
    loss = hidden.new_zeros((), dtype=wide(dtype))
    for rows, x, logits in logit_chunks(hidden, head, kept, max_rows):
        if gradients is None:
            logprobs, _ = row_logprobs(logits, targets[rows], *score)
        else:
            logprobs = row_gradients_(logits, targets[rows], *score)
        losses, slope = _token_losses(logprobs, rows, token_weight, objective)
        loss += losses.sum()
        if gradients is not None:
            gradients.add(rows, x, logits, head, slope, 1 / D)

    logits = None  # frees the chunk before finish() allocates its copy
    return loss / D, gradients.finish() if gradients else [None, None]


def _logprobs(hidden, weight, targets, kept, dtype, score, max_rows) -> tuple[Tensor, Tensor]:
    """Return (log-prob of the target, entropy) of every token, 0 if ignored."""
    logprobs = hidden.new_zeros(len(targets), dtype=wide(dtype))
    entropy = torch.zeros_like(logprobs)
    for rows, _, logits in logit_chunks(hidden, weight.to(dtype), kept, max_rows):
        logprobs[rows], entropy[rows] = row_logprobs(logits, targets[rows], *score)
    return logprobs, entropy


def _logprob_gradients(
    hidden, weight, targets, kept, dtype, score, max_rows, dlogprobs, wanted
) -> list[Tensor | None]:
    """Return [dhidden, dweight] of _logprobs, from recomputed logits."""
    head = weight.to(dtype)
    gradients = HeadGradients(hidden, weight, wanted)
    for rows, x, logits in logit_chunks(hidden, head, kept, max_rows):
        row_gradients_(logits, targets[rows], *score)
        gradients.add(rows, x, logits, head, -dlogprobs[rows], 1.0)

    logits = None  # frees the chunk before finish() allocates its copy
    found = zip(gradients.finish(), (hidden, weight), strict=True)
    return [gradient if gradient is None else gradient.to(x.dtype) for gradient, x in found]


class _FusedLoss(torch.autograd.Function):
    """Compute the sum of token losses / D, and its gradients in the same pass."""

    @staticmethod
    def forward(ctx, hidden, weight, *settings):
        loss, ctx.gradients = _loss_and_gradients(hidden, weight, *settings, ctx.needs_input_grad[:2])
        ctx.dtypes = (hidden.dtype, weight.dtype)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy: backward ran a second time, but its gradients were computed in the "
                "forward pass and the first backward used them up; call linear_cross_entropy again, or use "
                'reduction="none", which recomputes them every time'
            )
        gradients, ctx.gradients = ctx.gradients, None
        return *scaled(gradients, dloss, ctx.dtypes), *[None] * 9


class _TokenLogprobs(torch.autograd.Function):
    """Compute (log-prob of the target, entropy) of every token. Backward recomputes the logits (8NVH)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, kept, *settings):
        logprobs, entropy = _logprobs(hidden, weight, targets, kept, *settings)
        ctx.save_for_backward(hidden, weight, targets, kept)
        ctx.settings = settings
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlogprobs, _):
        gradients = _logprob_gradients(*ctx.saved_tensors, *ctx.settings, dlogprobs, ctx.needs_input_grad[:2])
        return *gradients, *[None] * 5


# what torch.compile calls instead of the two autograd functions
_compiled_loss = loss_operator(_loss_and_gradients)
_compiled_logprobs = logprobs_operator(_logprobs, _logprob_gradients)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *,
    reduction: str = "mean",
    ignore_index: int = IGNORE_INDEX,
    token_weight: Tensor | None = None,
    objective: Callable[[Tensor, Tensor], Tensor] | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    max_rows: int = 0,
    overwrite_hidden: bool = False,
) -> Tensor:  # fmt: skip
    """Compute the loss of the targets under softmax(hidden @ weight.T) without holding the logits.

    hidden (..., H) and weight (V, H): one floating dtype; or any two under torch.autocast, whose dtype the
        matmuls then use (the sums of dweight stay fp32 and reach an fp32 weight unrounded).
    targets (...): int64 or int32, already shifted; ignore_index = no loss. On a GPU the call waits once for
        the device, to learn how many targets count and that they lie in the vocabulary.
    reduction: "mean" divides by the number of targets that are not ignored, with token_weight too: a token's
        weight then means the same whatever its neighbours' are, and weights may be negative or cancel (torch
        divides by the sum of its class weights). No target at all gives 0 and zero gradients (torch: nan).
        "sum" divides by nothing. "none" gives a loss per token, 0 where ignored; its backward recomputes the
        logits.
    token_weight (...): multiplies each token's loss; a constant, not differentiated, except with "none". With
        fp16 keep weights near 1, and scale the loss.
    objective(logprobs, rows) -> losses: replaces -logprob by any elementwise function of it. Called once per
        chunk with the chunk's log-probs (R,) and rows (R,), int64 indices into the flattened targets, with
        which to look up what belongs to these tokens (old log-probs, advantages); returns their losses (R,).
        Autograd differentiates it by logprobs alone. Chunks depend on memory only: a loss that mixes tokens
        needs reduction="none". GRPO's clipped surrogate:

            def objective(logprobs, rows):
                ratio = (logprobs - old[rows]).exp()
                clipped = ratio.clamp(1 - eps, 1 + eps)
                return -torch.minimum(ratio * advantage[rows], clipped * advantage[rows])

    softcap: z = softcap * tanh(z / softcap), as in Gemma 2. temperature: z / temperature, after the softcap.
    max_rows: most rows of logits per chunk; 0 = as many as fit half a GiB, at least 512. Fewer rows need less
        memory, and read weight and its gradient more often.
    overwrite_hidden: write dhidden over hidden, which saves a tensor of its size (bf16, fp32 and float64; not
        with "none" nor inside torch.compile). Only if nothing reads hidden again; autograd checks it.

    Returns fp32 (float64 for float64): a scalar, or the targets' shape with "none". With "mean" and "sum" the
    gradients are computed here if autograd wants any, and backward runs once: a second one raises
    RuntimeError. There is no gradient of a gradient.
    Raises ValueError for arguments that do not fit, among them a target outside 0 .. V - 1.
    """
    rows, flat, dtype, score = checked(hidden, weight, targets, softcap, temperature, max_rows)
    _check_reduction(reduction, objective, token_weight, targets)
    if reduction == "none":
        logprobs, _ = _differentiable_logprobs(rows, weight, flat, dtype, score, ignore_index, max_rows)
        losses = -logprobs.reshape(targets.shape)
        return losses if token_weight is None else losses * token_weight

    # needs_input_grad ignores no_grad: gradients would be computed for nothing
    if not torch.is_grad_enabled():
        rows, weight = rows.detach(), weight.detach()
    mean, token_weight = (
        reduction == "mean",
        None if token_weight is None else token_weight.detach().reshape(-1),
    )
    if torch.compiler.is_compiling() and objective is None:
        wanted = [rows.requires_grad, weight.requires_grad]
        settings = dtype, score, ignore_index, mean, max_rows, wanted
        return _compiled_loss(rows, weight, flat, token_weight, *settings)[0]
    settings = dtype, score, ignore_index, mean, max_rows, overwrite_hidden
    return _eager_loss(rows, weight, flat, token_weight, objective, *settings)


def _check_reduction(reduction, objective, token_weight, targets) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction is {reduction!r}; pass "mean", "sum" or "none"')
    if reduction == "none" and objective is not None:
        raise ValueError(
            'objective is given with reduction="none"; apply it yourself to the log-probs (minus the losses)'
        )
    if token_weight is None:
        return
    if token_weight.shape != targets.shape or token_weight.device != targets.device:
        raise ValueError(
            f"token_weight is {tuple(token_weight.shape)} on {token_weight.device} but targets is "
            f"{tuple(targets.shape)} on {targets.device}; pass one weight per token (weights per class are "
            "not supported)"
        )
    if token_weight.requires_grad and reduction != "none" and torch.is_grad_enabled():
        raise ValueError(
            f'token_weight requires grad but reduction is {reduction!r}; detach it, or use reduction="none"'
        )


@torch.compiler.disable  # an objective is the caller's Python: a compiled model runs it between its graphs
def _eager_loss(
    hidden, weight, targets, token_weight, objective, dtype, score, ignore_index, mean, max_rows, overwrite
):
    kept = kept_rows(targets, weight.shape[0], ignore_index)
    D = max(len(kept), 1) if mean else 1
    settings = dtype, score, D, token_weight, objective, max_rows, overwrite
    return _FusedLoss.apply(hidden, weight, targets, kept, *settings)


def _differentiable_logprobs(
    hidden, weight, targets, dtype, score, ignore_index, max_rows
) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling():
        return _compiled_logprobs(hidden, weight, targets, dtype, score, ignore_index, max_rows)
    kept = kept_rows(targets, weight.shape[0], ignore_index)
    return _TokenLogprobs.apply(hidden, weight, targets, kept, dtype, score, max_rows)


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *,
    temperature: float = 1.0,
    softcap: float | None = None,
    max_rows: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (log-prob of each target, entropy of each position's distribution in nats).

    Both are (...) fp32, 0 where targets is -100. Arguments and errors are those of linear_cross_entropy. The
    log-probs are differentiable (backward recomputes the logits), the entropy is not. For a training step,
    linear_cross_entropy with an objective costs one matmul less.
    """
    rows, flat, dtype, score = checked(hidden, weight, targets, softcap, temperature, max_rows)
    logprobs, entropy = _differentiable_logprobs(rows, weight, flat, dtype, score, IGNORE_INDEX, max_rows)
    return logprobs.reshape(targets.shape), entropy.reshape(targets.shape)
