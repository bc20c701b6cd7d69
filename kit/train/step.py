"""One optimizer step: rows in, weights updated. Training, the memory plan and the benchmarks run this same
code.

for each row:  hidden states -> fused loss -> backward  loss = sum of token losses / targets in the whole step
then update the weights, unless backward has updated them (kit.train.weight_updates)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kit.models.backbone import head_weight
from kit.packing import PackedBatch
from kit.ranks import Alone, here
from kit.train.head import make_head
from kit.train.loss import LossOfRow
from kit.train.offload import HostGradients
from kit.train.optimizer import make_optimizer
from kit.train.recompute import keep_activations, recompute_layers
from kit.train.savings import Savings
from kit.train.sum_gradients import SharedHostGradients, SumAtEnd
from kit.train.weight_updates import UpdateAtEnd, UpdateFromHost, UpdateInBackward, Updates


class TrainingStep:
    """A model prepared for training, and its optimizer. Call it with the rows of a step; close it after
    training.

    max_grad_norm: clip the gradient's global norm to this; 0 = do not clip.
    Raises ValueError for settings that exclude one another or do not fit the model.
    """

    def __init__(
        self,
        model,
        savings: Savings,
        *,
        lr: float,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        max_grad_norm=0.0,
        seed=0,
        ranks: Alone | None = None,
    ):
        savings.check_clipping(max_grad_norm)
        self.model, self.ranks = model, ranks or here()
        savings.check_ranks(self.ranks.count)
        self.ranks.check_same(vars(savings))
        self.optimizer = make_optimizer(
            model,
            name="adamw8bit" if savings.update_in_backward else savings.optimizer,
            lr=lr,
            weight_decay=weight_decay,
            betas=betas,
            seed=seed,
            offload=savings.offload_optimizer,
            exact_weights=savings.exact_weights,
            share=(self.ranks.rank, self.ranks.count) if savings.offload_gradients else (0, 1),
        )
        if savings.recompute:
            recompute_layers(model, offload=savings.offload_inputs, tile_tokens=savings.tile_tokens)
        self.updates = self._make_updates(savings, max_grad_norm)
        self.head = make_head(model, savings, self.updates)
        model.train()

    def __call__(
        self, batches: Sequence[PackedBatch], loss_of: LossOfRow | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Train on the rows of one step. Return (loss, gradient norm before clipping), fp32 scalars on the
        device.

        batches: the same on all ranks, each of which trains on its share.
        loss_of: a row's share of the step's loss (kit.train.loss); None = mean token cross-entropy.
        Raises NotFinite, with the weights as they were (but see kit.train.weight_updates), if either is not.
        """
        scale = 1 / max(sum(batch.num_targets for batch in batches), 1)
        device = head_weight(self.model).device
        self.updates.begin(len(batches))
        loss = torch.zeros((), device=device)
        for batch in self.ranks.share(batches):
            loss += self.head.backward(batch.to(device), scale, loss_of)
        self.head.finish()
        return loss, self.updates.finish(loss)

    def _make_updates(self, savings: Savings, max_grad_norm: float) -> Updates:
        """Choose when weights are updated."""
        ranks, optimizer = self.ranks, self.optimizer
        if savings.update_in_backward:
            return UpdateInBackward(optimizer)
        if savings.offload_gradients:
            gradients = (
                HostGradients(self.model) if ranks.count == 1 else SharedHostGradients(self.model, ranks)
            )
            return UpdateFromHost(optimizer, gradients, max_grad_norm=max_grad_norm)
        if ranks.count > 1:
            return SumAtEnd(optimizer, ranks, max_grad_norm=max_grad_norm)
        return UpdateAtEnd(optimizer, max_grad_norm=max_grad_norm)

    def close(self) -> None:
        self.updates.close()
        keep_activations(self.model)
        self.model.eval()
