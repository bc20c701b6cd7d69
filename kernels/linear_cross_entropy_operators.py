"""
What torch.compile sees of linear_cross_entropy: one operator per call.

A compiled graph cannot hold the loop over chunks: how many rows count, and with it the number of chunks, is
not known while the graph is traced. So the whole computation becomes an operator of torch.library, with a
gradient and a fake implementation, which gives shapes and dtypes. Eager calls do not come here. They call
small operators chunk by chunk, which a memory plan sees one by one, and scale their gradients in place.

There are no kernels here and no formulas: linear_cross_entropy.py passes its functions in, and they run
unchanged inside the operators.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kit.kernels.linear_cross_entropy_chunks import kept_rows, wide


def _fake_gradients(hidden, weight, wanted, fp16_stays_wide) -> Iterator[Tensor]:
    """Yield empty tensors with the gradients' shapes and dtypes, or without elements if not wanted."""
    for x, want in zip((hidden, weight), wanted, strict=True):
        dtype = torch.float32 if fp16_stays_wide and x.dtype == torch.float16 else x.dtype
        yield x.new_empty(x.shape, dtype=dtype) if want else hidden.new_empty(0)


def _or_empty(hidden: Tensor, gradients: list[Tensor | None]) -> list[Tensor]:
    """An operator returns tensors: one without elements stands for None."""
    return [hidden.new_empty(0) if gradient is None else gradient for gradient in gradients]


def loss_operator(loss_and_gradients: Callable) -> Callable:
    """Register and return kit::linear_cross_entropy, which computes (loss, dhidden, dweight)."""

    @torch.library.custom_op("kit::linear_cross_entropy", mutates_args=())
    def operator(
        hidden: Tensor, weight: Tensor, targets: Tensor, token_weight: Tensor | None,
        dtype: torch.dtype, score: list[float], ignore_index: int, mean: bool, max_rows: int,
        wanted: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        kept = kept_rows(targets, weight.shape[0], ignore_index)
        D = max(len(kept), 1) if mean else 1
        settings = targets, kept, dtype, score, D, token_weight, None, max_rows, False, wanted
        loss, gradients = loss_and_gradients(hidden, weight, *settings)
        return loss, *_or_empty(hidden, gradients)

    @operator.register_fake
    def _(hidden, weight, targets, token_weight, dtype, score, ignore_index, mean, max_rows, wanted):
        return hidden.new_empty((), dtype=wide(dtype)), *_fake_gradients(hidden, weight, wanted, True)

    def keep_gradients(ctx, inputs, output):
        ctx.wanted, ctx.dtypes = inputs[-1], [x.dtype for x in inputs[:2]]
        ctx.save_for_backward(*output[1:])

    def scale_gradients(ctx, dloss, *_):
        scaled = [
            (gradient.to(dloss.dtype) * dloss).to(dtype) if want else None
            for gradient, want, dtype in zip(ctx.saved_tensors, ctx.wanted, ctx.dtypes, strict=True)
        ]
        return *scaled, *[None] * 8

    operator.register_autograd(scale_gradients, setup_context=keep_gradients)
    return operator


def logprobs_operator(logprobs: Callable, logprob_gradients: Callable) -> Callable:
    """Register and return kit::linear_logprobs, which computes (log-probs, entropy)."""

    @torch.library.custom_op("kit::linear_logprobs", mutates_args=())
    def operator(
        hidden: Tensor, weight: Tensor, targets: Tensor,
        dtype: torch.dtype, score: list[float], ignore_index: int, max_rows: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        kept = kept_rows(targets, weight.shape[0], ignore_index)
        return logprobs(hidden, weight, targets, kept, dtype, score, max_rows)

    @torch.library.custom_op("kit::linear_logprobs_backward", mutates_args=())
    def backward_operator(
        hidden: Tensor, weight: Tensor, targets: Tensor, dlogprobs: Tensor,
        dtype: torch.dtype, score: list[float], ignore_index: int, max_rows: int, wanted: list[bool],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        kept = kept_rows(targets, weight.shape[0], ignore_index)
        settings = targets, kept, dtype, score, max_rows, dlogprobs, wanted
        return tuple(_or_empty(hidden, logprob_gradients(hidden, weight, *settings)))

    @operator.register_fake
    def _(hidden, weight, targets, dtype, score, ignore_index, max_rows):
        return tuple(hidden.new_empty(targets.shape, dtype=wide(dtype)) for _ in range(2))

    @backward_operator.register_fake
    def _(hidden, weight, targets, dlogprobs, dtype, score, ignore_index, max_rows, wanted):
        return tuple(_fake_gradients(hidden, weight, wanted, False))

    def keep_inputs(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3])
        ctx.settings = inputs[3:]
        ctx.mark_non_differentiable(output[1])

    def compute_gradients(ctx, dlogprobs, _):
        wanted = list(ctx.needs_input_grad[:2])
        gradients = backward_operator(*ctx.saved_tensors, dlogprobs, *ctx.settings, wanted)
        return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), *[None] * 5

    operator.register_autograd(compute_gradients, setup_context=keep_inputs)
    return operator
