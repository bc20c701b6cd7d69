"""One optimizer step: rows in, weights updated. Training, the memory plan and the benchmarks run this same code.

for each row:  hidden states -> fused loss -> backward        loss = sum of token losses / targets in the whole step
update the weights, or find them updated: kit.updates
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kit.activations import keep_activations, recompute_layers
from kit.kernels.blocked_head import dweight_blocks, loss_without_dweight
from kit.kernels.linear_cross_entropy import linear_cross_entropy
from kit.models import head_weight, hidden_states, softcap
from kit.optim import AdamW8bit, make_optimizer
from kit.packing import PackedBatch
from kit.savings import Savings
from kit.updates import UpdateAtEnd, UpdateInBackward


class TrainingStep:
    """A model made ready to train, and its optimizer. Call it with the rows of a step; close it when training is over.

    max_grad_norm: the gradient's global norm is clipped to it, or, with update_in_backward, each parameter's own; 0 = not.
    Raises ValueError for savings that exclude one another or do not fit the model.
    """

    def __init__(self, model, savings: Savings, *, lr: float, weight_decay=0.0, betas=(0.9, 0.999), max_grad_norm=0.0, seed=0):
        self.model = model
        optimizer = "adamw8bit" if savings.update_in_backward else savings.optimizer
        self.optimizer = make_optimizer(model, lr=lr, name=optimizer, weight_decay=weight_decay, betas=betas, seed=seed,
                                        offload=savings.offload_optimizer)  # fmt: skip
        if savings.recompute:
            recompute_layers(model, offload=savings.offload_inputs, tile_tokens=savings.tile_tokens)
        if savings.update_in_backward:
            self.updates = UpdateInBackward(self.optimizer, max_tensor_norm=max_grad_norm)
        else:
            self.updates = UpdateAtEnd(self.optimizer, max_grad_norm=max_grad_norm)
        if savings.head_update == "blocked":
            self.head = BlockedHead(model, self.optimizer, self.updates)
        else:
            self.head = AutogradHead(model)
        model.train()

    def __call__(self, batches: Sequence[PackedBatch]) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean token loss, gradient norm before clipping), fp32 scalars on the device."""
        scale = 1 / max(sum(batch.num_targets for batch in batches), 1)
        device = head_weight(self.model).device
        self.updates.begin(len(batches))
        loss = torch.zeros((), device=device)
        for batch in batches:
            loss += self.head.backward(batch.to(device), scale)
        self.head.finish()
        return loss, self.updates.finish()

    def close(self) -> None:
        self.updates.close()
        keep_activations(self.model)
        self.model.eval()


class AutogradHead:
    """The fused loss under autograd: the head's gradient is made with the loss and waits for the rest."""

    def __init__(self, model):
        self.model = model

    def backward(self, batch: PackedBatch, scale: float) -> torch.Tensor:
        hidden = hidden_states(self.model, batch)
        weight = head_weight(self.model)
        loss = linear_cross_entropy(hidden, weight, batch.targets, reduction="sum", softcap=softcap(self.model)) * scale
        del hidden
        loss.backward()
        return loss.detach()

    def finish(self) -> None:
        """Autograd is done with the head."""


class BlockedHead:
    """The tied embedding stays out of autograd: after the backward pass its gradient, the head's part and the lookup's, is made
    and used a block of the vocabulary at a time. Raises ValueError where head and embedding are two weights, or frozen.

    The lookup's part is added by index_add_, on a GPU in no fixed order: last bits differ from run to run there.
    """

    def __init__(self, model, optimizer: AdamW8bit, updates: UpdateInBackward):
        self.embedding = model.get_input_embeddings()
        weight = head_weight(model)
        if weight is not self.embedding.weight or not weight.requires_grad:
            obstacle = "frozen" if weight is self.embedding.weight else "not tied"
            raise ValueError(
                f"head_update is blocked but the head is {obstacle}: blocks need a trained embedding that is its own head; "
                "pass --head_update whole"
            )
        if updates.max_tensor_norm:
            raise ValueError(
                f"max_grad_norm is {updates.max_tensor_norm} but head_update is blocked, which never has the embedding's whole "
                "gradient to measure; pass --max_grad_norm 0, or --head_update whole"
            )
        self.model, self.optimizer, self.updates = model, optimizer, updates

    def backward(self, batch: PackedBatch, scale: float) -> torch.Tensor:
        with torch.no_grad():
            embedded = self.embedding(batch.input_ids[None])
        embedded.requires_grad_()
        hidden = hidden_states(self.model, batch, inputs_embeds=embedded)
        weight, cap = head_weight(self.model), softcap(self.model)
        with torch.no_grad():
            loss, dhidden, kept, logsumexp = loss_without_dweight(hidden, weight, batch.targets, scale, softcap=cap)
        self.pending = (hidden.detach(), weight, batch.targets, kept, logsumexp, scale), cap, batch.input_ids, embedded
        torch.autograd.backward(hidden, dhidden)
        return loss

    @torch.no_grad()
    def finish(self) -> None:
        arguments, cap, ids, embedded = self.pending
        self.pending = None
        weight = arguments[1]
        dlookup = embedded.grad[0].float()
        if hasattr(self.embedding, "embed_scale"):  # Gemma scales what it looks up, by a number of the weight's dtype
            dlookup *= self.embedding.embed_scale.to(weight.dtype).float()
        if self.embedding.padding_idx is not None:  # whose row gets nothing from a lookup, as in nn.Embedding
            dlookup *= (ids != self.embedding.padding_idx)[:, None]
        square = torch.zeros((), device=weight.device)
        for first, dweight in dweight_blocks(*arguments, softcap=cap):
            inside = (ids >= first) & (ids < first + len(dweight))
            dweight.index_add_(0, (ids - first).where(inside, 0), dlookup * inside[:, None])
            square += dweight.square().sum()
            self.optimizer.update(weight, dweight, first=first * weight.shape[1])
        self.updates.squares.append(square)
