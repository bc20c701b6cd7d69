"""Train the head: compute a row's loss (kit/train/loss.py) and put the head's gradient where it belongs.

Call backward(batch, scale, loss_of) once per row, then finish() once per step. There are three ways:
- AutogradHead, if head and embedding are two weights, or the head is frozen
- TiedHead, if they are one trained weight: its gradient is computed as a whole
- BlockedHead, for the same weight: a block of the vocabulary at a time, which costs one more matmul
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kit.kernels.linear_cross_entropy_blocks import dweight_blocks, loss_without_dweight
from kit.models.backbone import head_weight, hidden_states, softcap
from kit.models.families import family_of
from kit.packing import PackedBatch
from kit.train.loss import LossOfRow, cross_entropy
from kit.train.saved_tensors import catch_gradient
from kit.train.savings import WHOLE_ONLY, Savings
from kit.train.weight_updates import Updates


def make_head(model, savings: Savings, updates: Updates) -> AutogradHead:
    """Choose how the head is trained.

    Raises ValueError if head_update is "blocked" and the model has no tied, trained head.
    """
    weight = head_weight(model)
    tied = weight is model.get_input_embeddings().weight
    if savings.head_update == "blocked":
        if not tied or not weight.requires_grad:
            raise ValueError(
                f"head_update is blocked but the head is {'frozen' if tied else 'not tied'}: blocks need a "
                "trained embedding that is its own head; pass --head_update whole"
            )
        return BlockedHead(model, updates, savings.logit_rows)
    if tied and weight.requires_grad:
        return TiedHead(model, updates, savings.logit_rows)
    return AutogradHead(model, updates, savings.logit_rows)


class AutogradHead:
    """Leave the head to autograd, which computes its gradient together with the loss, like any other."""

    def __init__(self, model, updates: Updates, logit_rows: int):
        self.model, self.updates, self.logit_rows = model, updates, logit_rows

    def backward(self, batch: PackedBatch, scale: float, loss_of: LossOfRow | None = None) -> torch.Tensor:
        """Return the row's loss after its backward pass. loss_of: None = mean token cross-entropy."""
        loss_of = loss_of or cross_entropy(self.model, self.logit_rows)
        loss = loss_of(hidden_states(self.model, batch), head_weight(self.model), batch, scale)
        self.updates.before_backward(loss)
        loss.backward()
        return loss.detach()

    def finish(self) -> None:
        """No-op: autograd has computed the head's gradient."""


class _Lookup:
    """Look up embeddings outside of autograd, which would allocate a gradient of all V rows for a few."""

    def __init__(self, model, ids: torch.Tensor):
        self.embedding, self.ids = model.get_input_embeddings(), ids
        self.scale = family_of(model.config).embedding_scale
        self.gradients: list[torch.Tensor] = []

    def rows(self) -> torch.Tensor:
        """Return the embedded tokens, (1, T, H)."""
        with torch.no_grad():
            embedded = self.embedding(self.ids[None])
        return catch_gradient(embedded, self.gradients)

    def gradient(self) -> torch.Tensor:
        """Return the gradient of the looked-up rows, (T, H) in fp32. Call after the backward pass."""
        dlookup = self.gradients.pop()[0].float()
        if self.scale:  # a number, which the lookup rounds to the weight's dtype
            dlookup *= getattr(self.embedding, self.scale).to(self.embedding.weight.dtype).float()
        if self.embedding.padding_idx is not None:  # its row gets nothing from a lookup, as in nn.Embedding
            dlookup *= (self.ids != self.embedding.padding_idx)[:, None]
        return dlookup


class TiedHead(AutogradHead):
    """Add the lookup's rows to the head's gradient: head and embedding are one trained weight.

    Autograd would allocate the lookup's gradient at the size of the weight, and their sum as a third tensor:
    1.1 GiB more at V = 262,144 and H = 1,152 in bf16. The gradients of a row of the weight are summed in fp32
    and rounded once. On a GPU, index_add_ adds in no fixed order, so the last bits may differ from run to
    run.
    """

    def backward(self, batch: PackedBatch, scale: float, loss_of: LossOfRow | None = None) -> torch.Tensor:
        loss_of = loss_of or cross_entropy(self.model, self.logit_rows)
        lookup = _Lookup(self.model, batch.input_ids)
        weight = head_weight(self.model)
        leaf = weight.detach().requires_grad_()
        leaf.grad = weight.grad  # of the step's earlier rows, unless it was set aside

        # the layers' backward passes do not need it
        def set_aside(leaf: torch.Tensor) -> None:
            weight.grad, leaf.grad = leaf.grad, None
            self.updates.set_aside(weight)

        leaf.register_post_accumulate_grad_hook(set_aside)

        # no name for the hidden states: the backward pass frees them
        loss = loss_of(hidden_states(self.model, batch, inputs_embeds=lookup.rows()), leaf, batch, scale)
        self.updates.before_backward(loss)
        loss.backward()

        self.updates.bring_back(weight)
        _add_rows_(weight.grad, batch.input_ids, lookup.gradient())
        self.updates.set_aside(weight)
        return loss.detach()

    def finish(self) -> None:
        """Apply the weight's gradient."""
        self.updates.use(head_weight(self.model))


@torch.no_grad()
def _add_rows_(total: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor) -> None:
    """Compute total[ids] += rows, (T, H) in fp32. An id may occur many times."""
    T, ids = len(ids), ids.long()  # scatter_reduce_ and index_copy_ take no other index
    positions = torch.arange(T, device=ids.device)
    first_of_id = torch.full((len(total),), T, device=ids.device)
    first_of_id.scatter_reduce_(0, ids, positions, "amin")
    first = first_of_id[ids]  # (T,): the first position with the same id

    sums = torch.zeros_like(rows).index_add_(0, first, rows)  # at each id's first position
    total.index_copy_(0, ids, (total[ids] + sums[first]).to(total.dtype))  # equal ids write equal rows


class BlockedHead(AutogradHead):
    """Never hold the weight's gradient as a whole.

    After a row's backward pass, the head's part and the lookup's are computed one block of the vocabulary at
    a time. Each block is applied at once, or leaves the card. On a GPU, index_add_ adds the lookup's part in
    no fixed order, so the last bits may differ from run to run.
    """

    def backward(self, batch: PackedBatch, scale: float, loss_of: LossOfRow | None = None) -> torch.Tensor:
        """Return the row's loss after its backward pass. Raises ValueError for any loss but cross-entropy."""
        if loss_of is not None:
            raise ValueError(WHOLE_ONLY)
        lookup = _Lookup(self.model, batch.input_ids)
        hidden = hidden_states(self.model, batch, inputs_embeds=lookup.rows())
        weight, cap = head_weight(self.model), softcap(self.model)
        with torch.no_grad():
            loss, dhidden, kept, logsumexp = loss_without_dweight(
                hidden, weight, batch.targets, scale, softcap=cap, max_rows=self.logit_rows
            )
        self.updates.before_backward(loss)
        torch.autograd.backward(hidden, dhidden)
        hidden, dhidden = hidden.detach(), None
        blocks = dweight_blocks(hidden, weight, batch.targets, kept, logsumexp, scale, softcap=cap)
        self.updates.use_parts(weight, _with_lookup(blocks, lookup))
        return loss


@torch.no_grad()
def _with_lookup(blocks: Iterator[tuple[int, Tensor]], lookup: _Lookup) -> Iterator[tuple[int, Tensor]]:
    """Yield (first element, gradient) of each block of the weight, with the lookup's rows added.

    blocks: (first row, the head's gradient).
    """
    dlookup = lookup.gradient()
    sorted_ids, order = lookup.ids.sort()
    places = sorted_ids.cpu()  # copied once, instead of asking the card for each block's first and last id
    for first, dweight in blocks:
        _add_lookup_(dweight, first, sorted_ids, order, places, dlookup)
        yield first * dweight.shape[1], dweight


@torch.library.custom_op("kit::add_lookup_", mutates_args=("block",))
def _add_lookup_(
    block: torch.Tensor,
    first: int,
    sorted_ids: torch.Tensor,
    order: torch.Tensor,
    places: torch.Tensor,
    rows: torch.Tensor,
) -> None:
    """Compute block[ids - first] += rows, for the ids in first .. first + len(block) - 1 and no others.

    block: (B, H) fp32. sorted_ids, order: (T,), the ids in order, and where each is in rows, (T, H) fp32.
    places: sorted_ids on the CPU. This is an operator because the number of rows that a block gets depends on
    values, which a simulated step does not have.
    """
    bounds = torch.tensor([first, first + len(block)], dtype=places.dtype)
    begin, end = torch.searchsorted(places, bounds).tolist()
    block.index_add_(0, sorted_ids[begin:end] - first, rows.index_select(0, order[begin:end]))


@_add_lookup_.register_fake
def _(block, first, sorted_ids, order, places, rows):
    return None
