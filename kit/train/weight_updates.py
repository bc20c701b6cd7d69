"""Update weights after the backward pass, or inside it: each parameter as soon as its gradient is complete.

- UpdateAtEnd keeps all gradients beside the weights
- UpdateFromHost does the same with gradients in CPU memory: several rows, a global norm, and on the card the
  gradients of one layer or two
- UpdateInBackward saves the traffic and the CPU memory, too. A gradient exists from its layer's backward pass
  to its update. The price: the other gradients are not known yet, so there is no global norm to clip by (each
  parameter's own norm can be clipped instead), and no gradient can wait for a second row of the same step

A tied embedding is one parameter with two gradients, the head's and the lookup's: kit.train.head passes their
sum on, once.

A step whose loss or gradient is not finite raises NotFinite. The first two ways then change no weight and no
state: they read loss and norm before the update, and the card waits once per step, not per gradient.
UpdateInBackward can do so for the loss, before the backward pass. A gradient that overflows during it is seen
too late: by then, the layers above are updated. So the model in memory has lost the step before; go on from
the last checkpoint.

Under torchrun, SumAtEnd and SumFromHost take the places of the first two: the same on the gradients' sums
over all ranks.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch

from kit.models.backbone import head_weight
from kit.ranks import Alone, Ranks
from kit.train.offload import PIECE, HostGradients
from kit.train.optimizer import AdamW8bit
from kit.train.savings import Savings
from kit.train.sum_gradients import GradientSums, SharedHostGradients


class NotFinite(ValueError):
    """The loss or the gradient of a step is NaN or infinite."""


@torch.library.custom_op("kit::all_finite", mutates_args=())
def all_finite(values: torch.Tensor) -> bool:
    """Return whether all values are finite, for which it waits for a card. Fake tensors count as finite."""
    return bool(values.isfinite().all())


@all_finite.register_fake
def _(values):
    return True


def check_finite(loss: torch.Tensor, norm: torch.Tensor | None = None) -> None:
    """Raise NotFinite if the loss of a step is not finite, or the norm of its gradient; None = not known."""
    if not all_finite(torch.stack([x.detach().float() for x in (loss, norm) if x is not None])):
        said = "" if norm is None else f" and gradient norm {norm.item()}"
        raise NotFinite(f"loss is {loss.item()}{said}")


class Updates(Protocol):
    """Apply the gradients of a step. Call begin before its first backward pass and finish after the last.

    A tied head computes its gradient itself, so no hook is called for it. It calls set_aside and bring_back
    during a row, and use after the last one.
    """

    def begin(self, num_rows: int) -> None:
        """Forget the step before. num_rows: of this step, on all ranks."""

    def before_backward(self, loss: torch.Tensor) -> None:
        """Raise NotFinite if the row's loss is not finite and its backward pass would update weights."""

    def set_aside(self, parameter: torch.nn.Parameter) -> None:
        """parameter.grad is not needed until bring_back or the end. No-op unless gradients leave the card."""

    def bring_back(self, parameter: torch.nn.Parameter) -> None:
        """Undo set_aside: parameter.grad is the sum of all gradients that were set aside."""

    def use(self, parameter: torch.nn.Parameter) -> None:
        """Apply parameter.grad, which is complete. No-op if gradients are applied together in finish()."""

    def finish(self, loss: torch.Tensor) -> torch.Tensor:
        """Finish updating all weights. Return the gradient's norm before clipping, an fp32 scalar.

        loss: this rank's part, which is replaced by the step's.
        Raises NotFinite if the norm or the step's loss is not finite.
        """

    def close(self) -> None:
        """Remove all hooks and gradients from the model."""


def make_updates(
    model,
    savings: Savings,
    optimizer: torch.optim.Optimizer,
    *,
    max_grad_norm: float,
    max_tensor_norm: float,
    ranks: Alone,
) -> Updates:
    """Choose when weights are updated. Savings.check_clipping has checked the norms.

    Raises ValueError for updates in the backward pass on several ranks.
    """
    if savings.update_in_backward:
        if ranks.count > 1:
            raise ValueError(
                f"update_in_backward is on but {ranks.count} ranks sum their gradients before any is used; "
                "pass --no_update_in_backward --offload_gradients, which keeps about as little on the card"
            )
        return UpdateInBackward(optimizer, max_tensor_norm=max_tensor_norm)
    if savings.offload_gradients:
        if ranks.count > 1:
            return SumFromHost(optimizer, model, ranks, max_grad_norm=max_grad_norm)
        return UpdateFromHost(optimizer, model.model.layers, max_grad_norm=max_grad_norm)
    if ranks.count > 1:
        return SumAtEnd(optimizer, ranks, max_grad_norm=max_grad_norm)
    return UpdateAtEnd(optimizer, max_grad_norm=max_grad_norm)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class UpdateAtEnd(Updates):
    """Keep all gradients, clip them by their global norm and apply them together.

    max_grad_norm: the norm to clip to; 0 = no clipping.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, max_grad_norm: float):
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.parameters = parameters_of(optimizer)

    def begin(self, num_rows: int) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def finish(self, loss: torch.Tensor) -> torch.Tensor:
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm or math.inf)
        check_finite(loss, norm)
        self.optimizer.step()
        return norm

    def close(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


class SumAtEnd(UpdateAtEnd):
    """UpdateAtEnd on several ranks: sum the gradients while the last row's backward pass goes on.

    Every rank keeps all optimizer states and updates all weights. Call close() to remove the hooks.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, ranks: Ranks, *, max_grad_norm: float):
        super().__init__(optimizer, max_grad_norm=max_grad_norm)
        self.sums = GradientSums(self.parameters, ranks)
        self.hooks = [p.register_post_accumulate_grad_hook(self.use) for p in self.parameters]

    def begin(self, num_rows: int) -> None:
        super().begin(num_rows)
        self.sums.begin(num_rows)

    def before_backward(self, loss: torch.Tensor) -> None:
        self.sums.begin_row()

    def use(self, parameter: torch.nn.Parameter) -> None:
        self.sums.ready(parameter)

    def finish(self, loss: torch.Tensor) -> torch.Tensor:
        self.sums.finish(loss)
        return super().finish(loss)

    def close(self) -> None:
        super().close()
        for hook in self.hooks:
            hook.remove()


class UpdateFromHost(Updates):
    """Add up gradients in CPU memory, clip them by their global norm and apply them one after another.

    The weights are those of UpdateAtEnd, bit for bit on a CPU. max_grad_norm: as there. layers: of the model;
    the gradients of one of them may be on the card while they are copied. keep: what adds gradients up. Call
    close() to remove the hooks.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        layers: Sequence[torch.nn.Module],
        *,
        max_grad_norm: float,
        keep: Callable[[Sequence[torch.nn.Parameter], int], HostGradients] = HostGradients,
    ):
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        parameters = parameters_of(optimizer)
        trained = [[p for p in layer.parameters() if p.requires_grad] for layer in layers]
        self.gradients = keep(parameters, max(sum(p.nbytes for p in layer) for layer in trained))
        self.hooks = [
            parameter.register_post_accumulate_grad_hook(self.set_aside) for parameter in parameters
        ]

    def begin(self, num_rows: int) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.gradients.clear()

    def set_aside(self, parameter: torch.nn.Parameter) -> None:
        self.gradients.add(parameter)

    def bring_back(self, parameter: torch.nn.Parameter) -> None:
        parameter.grad = self.gradients.pop(parameter)

    @torch.no_grad()
    def finish(self, loss: torch.Tensor) -> torch.Tensor:
        norm = self.gradients.norm()
        check_finite(loss, norm)
        factor = ((self.max_grad_norm or math.inf) / (norm + 1e-6)).clamp(max=1.0)
        in_pieces = isinstance(self.optimizer, AdamW8bit)
        for parameter, first, gradient in self.gradients.returned(PIECE if in_pieces else sys.maxsize):
            gradient.mul_(factor)
            if in_pieces:
                self.optimizer.update(parameter, gradient, first=first)
            else:  # a step of torch's AdamW updates the parameters that have a gradient
                parameter.grad = gradient.view_as(parameter)
                self.optimizer.step()
                parameter.grad = None
            del gradient  # before the next one is allocated
        if in_pieces:
            self.optimizer.wait()
        return norm

    def close(self) -> None:
        self.begin(0)
        for hook in self.hooks:
            hook.remove()


class SumFromHost(UpdateFromHost):
    """UpdateFromHost on several ranks: each adds up the gradients of the parameters that it owns.

    It updates these, and gets the other weights from their owners.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model, ranks: Ranks, *, max_grad_norm: float):
        weight = head_weight(model)
        is_tied = weight is model.get_input_embeddings().weight and weight.requires_grad
        keep = partial(SharedHostGradients, ranks=ranks, tied=weight if is_tied else None)
        super().__init__(optimizer, model.model.layers, max_grad_norm=max_grad_norm, keep=keep)

    def begin(self, num_rows: int) -> None:
        super().begin(num_rows)
        self.gradients.begin(num_rows)

    def before_backward(self, loss: torch.Tensor) -> None:
        self.gradients.begin_row()

    def finish(self, loss: torch.Tensor) -> torch.Tensor:
        self.gradients.sum_(loss)
        norm = super().finish(loss)
        self.gradients.spread()
        return norm


class UpdateInBackward(Updates):
    """Update every parameter in a hook on it, and free its gradient.

    optimizer: one with `update(parameter)` and `wait()`. max_tensor_norm: each parameter's gradient is
    clipped to this norm; 0 = no clipping. `begin` raises ValueError for a step of several rows. Call close()
    to remove the hooks.
    """

    def __init__(self, optimizer, *, max_tensor_norm: float = 0.0):
        self.optimizer = optimizer
        self.max_tensor_norm = max_tensor_norm
        self.squares: list[torch.Tensor] = []
        parameters = parameters_of(optimizer)
        self.hooks = [parameter.register_post_accumulate_grad_hook(self.use) for parameter in parameters]

    def begin(self, num_rows: int) -> None:
        if num_rows != 1:
            raise ValueError(
                f"this step has {num_rows} rows but update_in_backward uses each gradient up before the next "
                "row; pass --batch_traces 1 (a step is then one row of packed traces), or "
                "--no_update_in_backward to add gradients up"
            )
        self.optimizer.zero_grad(set_to_none=True)  # what a step that stopped half-way has left
        self.squares = []

    @torch.no_grad()
    def use(self, parameter: torch.nn.Parameter) -> None:
        norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        self.squares.append(norm.square())
        if self.max_tensor_norm:
            parameter.grad.mul_((self.max_tensor_norm / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.update(parameter)
        parameter.grad = None

    def before_backward(self, loss: torch.Tensor) -> None:
        check_finite(loss)

    def finish(self, loss: torch.Tensor) -> torch.Tensor:
        self.optimizer.wait()
        norm = torch.stack(self.squares).sum().sqrt()
        check_finite(loss, norm)
        return norm

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()
