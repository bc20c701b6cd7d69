"""Compute the loss of a row from the backbone's hidden states: cross-entropy, or a loss of your own.

A loss is a function of four arguments. It returns the row's share of the step's loss, a scalar tensor:

    hidden (T, H)   the backbone's last hidden states
    weight (V, H)   the weight of the output head; the logits are hidden @ weight.T
    batch           the row (kit.packing.PackedBatch): targets, position_ids, cu_seqlens
    scale           1 / the number of targets in the whole step, so that a step's loss is a mean over tokens

Pass yours to `kit.train.train(..., loss_of=...)`; recipes/change_the_loss.py is an example.
kit.kernels.linear_cross_entropy computes weighted losses and any elementwise objective of the log-probs
without ever holding the (T, V) logits.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kit.kernels.linear_cross_entropy import linear_cross_entropy
from kit.models.backbone import softcap
from kit.packing import PackedBatch

LossOfRow = Callable[[Tensor, Tensor, PackedBatch, float], Tensor]


def cross_entropy(model, logit_rows: int = 0) -> LossOfRow:
    """Return mean token cross-entropy as the loss of a model's rows. logit_rows: as in kit.train.savings."""
    options = {"softcap": softcap(model), "max_rows": logit_rows, "overwrite_hidden": True}

    def loss_of(hidden: Tensor, weight: Tensor, batch: PackedBatch, scale: float) -> Tensor:
        return scale * linear_cross_entropy(hidden, weight, batch.targets, reduction="sum", **options)

    return loss_of
