"""Losses of other libraries, from hidden states, weight and targets, and the matmuls that each needs."""

from __future__ import annotations

import torch
from torch import Tensor


def three_matmuls(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int) -> None:
    """Compute logits, dhidden and dweight, which every exact loss needs, in chunks and reused buffers."""
    hidden, weight = hidden.detach(), weight.detach()
    logits = weight.new_empty(chunk, len(weight))
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)
    for start in range(0, len(hidden), chunk):
        rows = hidden[start : start + chunk]
        part = torch.mm(rows, weight.T, out=logits[: len(rows)])
        torch.mm(part, weight, out=dhidden[start : start + chunk])
        torch.addmm(dweight, part.T, rows, beta=float(start > 0), out=dweight)


def liger(hidden, weight, targets) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets)[0]


def cce(hidden, weight, targets, **options) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy

    return cut_cross_entropy(hidden, weight, targets, **options)
