"""
Cross-entropy straight from hidden states: the (N, V) logits are never held.

    z[i, v]  = softcap * tanh(h_i . w_v / softcap) / temperature          without softcap: z = h_i . w_v / temperature
    logp[i]  = z[i, t_i] - logsumexp_v z[i, v]                            loss = sum_i token_weight[i] * f(logp[i]) / D
    d(-logp[i]) / d(h_i . w_v) = (softmax_v(z_i) - 1[v == t_i]) * dz/d(h_i . w_v)

f(logp) = -logp unless an `objective` is given; D = number of targets that are not ignored ("mean") or 1 ("sum").

How it works. Rows whose target is ignored are dropped, the others go through in chunks: a matmul makes a chunk of logits, and
one kernel (logit_rows.py) reads it twice, for an online logsumexp and for the gradient of -logp, which it writes over them. What
a token's loss is multiplied by (its weight, the slope of f) is one number a row, which commutes with both matmuls that follow:
it is applied to their thin (R, H) side, and the kernel never needs to know it. Both gradients therefore exist when the forward
pass ends, after three matmuls (6NVH flops), and backward only scales them; reduction="none" cannot know what its losses will be
multiplied by, and makes the logits a second time in backward (8NVH).

16,384 tokens, V = 262,144, bf16: the logits alone are 8 GiB, torch's log-softmax and gradient make it 24, and 40 where the logits
are cast to fp32. Here: one chunk of 0.5 GiB, the fp32 sum of dW (4VH bytes: 1.1 GiB at H = 1,152, none for a frozen head), dX.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kit.kernels.linear_cross_entropy_chunks import (
    IGNORE_INDEX,
    HeadGradients,
    checked,
    kept_rows,
    logit_chunks,
    scaled,
    wide,
)
from kit.kernels.linear_cross_entropy_rows import row_gradients_, row_logprobs


def linear_cross_entropy_reference(
    hidden, weight, targets, *, reduction="mean", softcap=None, temperature=1.0
):
    """Compute the same in plain torch: what this file means, and what its tests compare with. Holds the logits several times."""
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
            if not isinstance(losses, Tensor) or losses.shape != leaf.shape or not losses.requires_grad:
                got = (
                    (tuple(losses.shape), f"requires_grad={losses.requires_grad}")
                    if isinstance(losses, Tensor)
                    else losses
                )
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


def _loss_and_gradients(
    hidden, weight, targets, kept, dtype, score, D, token_weight, objective, max_rows, overwrite, wanted
):
    """Return (loss / D, [dhidden, dweight]), None for a gradient that is not needed: 6NVH flops, or 2NVH."""
    head = weight.to(dtype)
    overwrite = overwrite and wanted[0] and hidden.dtype != torch.float16 and hidden.is_contiguous()
    if overwrite:  # each row is read before its gradient is written; these are never read
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
    logits = None  # frees the chunk before finish() makes its copy
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
    logits = None  # frees the chunk before finish() makes its copy
    return [
        g if g is None else g.to(x.dtype) for g, x in zip(gradients.finish(), (hidden, weight), strict=True)
    ]


class _FusedLoss(torch.autograd.Function):
    """Sum of token losses / D, its gradients made on the way."""

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
                "linear_cross_entropy: backward ran a second time, but its gradients were made in the forward pass and handed "
                'out already; call linear_cross_entropy again, or use reduction="none", which makes them anew every time'
            )
        gradients, ctx.gradients = ctx.gradients, None
        return *scaled(gradients, dloss, ctx.dtypes), *[None] * 9


class _TokenLogprobs(torch.autograd.Function):
    """(log-prob of the target, entropy) of every token. Backward makes the logits again (8NVH)."""

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


# What torch.compile sees: one operator a call, because how many rows count, and with it the number of chunks, is not known while
# a graph is made. Eager calls do not come here: their small operators show a memory plan every chunk, and they scale in place.
@torch.library.custom_op("kit::linear_cross_entropy", mutates_args=())
def _loss_op(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weight: Tensor | None, dtype: torch.dtype, score: list[float],
    ignore_index: int, mean: bool, max_rows: int, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, dhidden, dweight), empty where not wanted."""
    kept = kept_rows(targets, weight.shape[0], ignore_index)
    D = max(len(kept), 1) if mean else 1
    settings = targets, kept, dtype, score, D, token_weight, None, max_rows, False, wanted
    loss, gradients = _loss_and_gradients(hidden, weight, *settings)
    return loss, *(hidden.new_empty(0) if g is None else g for g in gradients)


@torch.library.custom_op("kit::linear_logprobs", mutates_args=())
def _logprobs_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    dtype: torch.dtype,
    score: list[float],
    ignore_index: int,
    max_rows: int,
) -> tuple[Tensor, Tensor]:
    return _logprobs(
        hidden, weight, targets, kept_rows(targets, weight.shape[0], ignore_index), dtype, score, max_rows
    )


@torch.library.custom_op("kit::linear_logprobs_backward", mutates_args=())
def _logprobs_backward_op(
    hidden: Tensor, weight: Tensor, targets: Tensor, dlogprobs: Tensor, dtype: torch.dtype, score: list[float],
    ignore_index: int, max_rows: int, wanted: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    kept = kept_rows(targets, weight.shape[0], ignore_index)
    gradients = _logprob_gradients(hidden, weight, targets, kept, dtype, score, max_rows, dlogprobs, wanted)
    return tuple(hidden.new_empty(0) if g is None else g for g in gradients)


def _fake_gradients(hidden, weight, wanted, fp16_stays_wide):
    for x, want in zip((hidden, weight), wanted, strict=True):
        dtype = torch.float32 if fp16_stays_wide and x.dtype == torch.float16 else x.dtype
        yield x.new_empty(x.shape, dtype=dtype) if want else hidden.new_empty(0)


@_loss_op.register_fake
def _(hidden, weight, targets, token_weight, dtype, score, ignore_index, mean, max_rows, wanted):
    return hidden.new_empty((), dtype=wide(dtype)), *_fake_gradients(hidden, weight, wanted, True)


@_logprobs_op.register_fake
def _(hidden, weight, targets, dtype, score, ignore_index, max_rows):
    return tuple(hidden.new_empty(targets.shape, dtype=wide(dtype)) for _ in range(2))


@_logprobs_backward_op.register_fake
def _(hidden, weight, targets, dlogprobs, dtype, score, ignore_index, max_rows, wanted):
    return tuple(_fake_gradients(hidden, weight, wanted, False))


def _keep_gradients(ctx, inputs, output):
    ctx.wanted, ctx.dtypes = inputs[-1], [x.dtype for x in inputs[:2]]
    ctx.save_for_backward(*output[1:])


def _scale_gradients(ctx, dloss, *_):
    gradients = zip(ctx.saved_tensors, ctx.wanted, ctx.dtypes, strict=True)
    return *((g.to(dloss.dtype) * dloss).to(dtype) if want else None for g, want, dtype in gradients), *[
        None
    ] * 8


def _keep_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.settings = inputs[3:]
    ctx.mark_non_differentiable(output[1])


def _make_gradients(ctx, dlogprobs, _):
    wanted = list(ctx.needs_input_grad[:2])
    gradients = _logprobs_backward_op(*ctx.saved_tensors, dlogprobs, *ctx.settings, wanted)
    return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), *[None] * 5


_loss_op.register_autograd(_scale_gradients, setup_context=_keep_gradients)
_logprobs_op.register_autograd(_make_gradients, setup_context=_keep_inputs)


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
    max_rows: int = 0,
    overwrite_hidden: bool = False,
) -> Tensor:
    """Compute the loss of the targets under softmax(hidden @ weight.T) without holding the logits.

    hidden (..., H) and weight (V, H): one floating dtype, or any two under torch.autocast, whose dtype the matmuls then use (the
        sums of dW stay fp32 and reach an fp32 weight unrounded).
    targets (...): int64 or int32, already shifted; ignore_index = no loss. On a GPU the call waits once for the device, to learn
        how many targets count and that they lie in the vocabulary.
    reduction: "mean" divides by the number of targets that are not ignored, with token_weight too: a token's
        weight then means the same whatever its neighbours' are, and weights may be negative or cancel (torch
        divides by the sum of its class weights). No target at all gives 0 and zero gradients (torch: nan).
        "sum" divides by nothing. "none" gives a loss per token, 0 where ignored; its backward makes the
        logits a second time.
    token_weight (...): multiplies each token's loss; a constant, not differentiated, except with "none". With fp16 keep
        weights near 1, and scale the loss.
    objective(logprobs, rows) -> losses: replaces -logprob by any elementwise function of it. Called once per
        chunk with the chunk's log-probs (R,) and rows (R,), int64 indices into the flattened targets, with
        which to look up what belongs to these tokens (old log-probs, advantages); returns their losses (R,).
        Autograd differentiates it by logprobs alone. Chunks are an accident of memory: a loss that mixes
        tokens needs reduction="none". GRPO's clipped surrogate:

            def objective(logprobs, rows):
                ratio = (logprobs - old[rows]).exp()
                return -torch.minimum(ratio * advantage[rows], ratio.clamp(1 - eps, 1 + eps) * advantage[rows])

    softcap: z = softcap * tanh(z / softcap), as Gemma 2; temperature: z / temperature, after it.
    max_rows: rows of logits made at once, at most; 0 = as many as half a GiB holds, 512 at least. Fewer rows need less memory and
        read weight and its gradient more often.
    overwrite_hidden: lets hidden's memory take its gradient (bf16, fp32 and float64; not with "none" nor inside torch.compile),
        which a step then never holds beside it. Only where nothing reads hidden again; autograd refuses where it would.

    Returns fp32 (float64 for float64): a scalar, or the targets' shape with "none". With "mean" and "sum" the gradients are made
    here if autograd wants any, and backward runs once: a second one raises RuntimeError. No gradient of a gradient.
    Raises ValueError for arguments that do not fit, for a target outside 0 .. V - 1 among them.
    """
    rows, flat, dtype, score = checked(hidden, weight, targets, softcap, temperature, max_rows)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction is {reduction!r}; pass "mean", "sum" or "none"')
    if reduction == "none" and objective is not None:
        raise ValueError(
            'objective is given with reduction="none"; apply it yourself to the log-probs (minus the losses)'
        )
    if token_weight is not None:
        if token_weight.shape != targets.shape or token_weight.device != targets.device:
            raise ValueError(
                f"token_weight is {tuple(token_weight.shape)} on {token_weight.device} but targets is {tuple(targets.shape)} on "
                f"{targets.device}; pass one weight per token (weights per class are not supported)"
            )
        if token_weight.requires_grad and reduction != "none" and torch.is_grad_enabled():
            raise ValueError(
                f'token_weight requires grad but reduction is {reduction!r}; detach it, or use reduction="none"'
            )
    if reduction == "none":
        logprobs, _ = _differentiable_logprobs(rows, weight, flat, dtype, score, ignore_index, max_rows)
        losses = -logprobs.reshape(targets.shape)
        return losses if token_weight is None else losses * token_weight
    if (
        not torch.is_grad_enabled()
    ):  # needs_input_grad does not know about no_grad, and would have gradients made for nothing
        rows, weight = rows.detach(), weight.detach()
    token_weight = None if token_weight is None else token_weight.detach().reshape(-1)
    if torch.compiler.is_compiling() and objective is None:
        wanted = [rows.requires_grad, weight.requires_grad]
        return _loss_op(
            rows,
            weight,
            flat,
            token_weight,
            dtype,
            score,
            ignore_index,
            reduction == "mean",
            max_rows,
            wanted,
        )[0]
    settings = token_weight, objective, dtype, score, ignore_index, reduction, max_rows, overwrite_hidden
    return _eager_loss(rows, weight, flat, *settings)


@torch.compiler.disable  # an objective is Python of the caller's: a compiled model runs it between its graphs
def _eager_loss(
    hidden,
    weight,
    targets,
    token_weight,
    objective,
    dtype,
    score,
    ignore_index,
    reduction,
    max_rows,
    overwrite,
):
    kept = kept_rows(targets, weight.shape[0], ignore_index)
    D = max(len(kept), 1) if reduction == "mean" else 1
    return _FusedLoss.apply(
        hidden, weight, targets, kept, dtype, score, D, token_weight, objective, max_rows, overwrite
    )


def _differentiable_logprobs(
    hidden, weight, targets, dtype, score, ignore_index, max_rows
) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling():
        return _logprobs_op(hidden, weight, targets, dtype, score, ignore_index, max_rows)
    kept = kept_rows(targets, weight.shape[0], ignore_index)
    return _TokenLogprobs.apply(hidden, weight, targets, kept, dtype, score, max_rows)


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    max_rows: int = 0,
) -> tuple[Tensor, Tensor]:
    """(log-prob of each target, entropy of each position's distribution in nats), both (...) fp32, 0 where targets is -100.

    Arguments and errors as linear_cross_entropy. The log-probs are differentiable (backward makes the logits a second time), the
    entropy is not. For a training step, linear_cross_entropy with an objective costs a matmul less.
    """
    rows, flat, dtype, score = checked(hidden, weight, targets, softcap, temperature, max_rows)
    logprobs, entropy = _differentiable_logprobs(rows, weight, flat, dtype, score, IGNORE_INDEX, max_rows)
    return logprobs.reshape(targets.shape), entropy.reshape(targets.shape)
