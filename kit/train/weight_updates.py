"""Update weights after the backward pass, or inside it: each parameter as soon as its gradient is complete.

- UpdateAtEnd keeps all gradients beside the weights
- UpdateFromHost does the same with gradients in CPU memory: several rows, a global norm, and on the card the
  gradients of one layer or two
- UpdateInBackward saves the traffic and the CPU memory, too. A gradient exists from its layer's backward pass
  to its update. The price: the other gradients are not known yet, so there is no global norm to clip by, and
  no gradient can wait for a second row of the same step

A tied embedding is one parameter with two gradients, the head's and the lookup's: kit.train.head passes their
sum on, once.

A step whose loss or gradient is not finite raises NotFinite. The first two ways then change no weight and no
state: they read loss and norm before the update, and the card waits once per step, not per gradient.
UpdateInBackward can do so for the loss, before the backward pass. A gradient that overflows during it is seen
too late: by then, the layers above are updated. The model in memory is then half updated; resume from the
last checkpoint.

Several ranks apply their gradients' sums instead: kit.train.sum_gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

import torch
from torch import nn

from kit.train.offload import PIECE, HostGradients
from kit.train.optimizer import AdamW8bit

Parts = Iterable[tuple[int, torch.Tensor]]


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


class Updates:
    """Apply the gradients of a step. Call begin before its first backward pass and finish after the last.

    A tied head computes its gradient itself, so no hook is called for it. It calls set_aside and bring_back
    during a row, and use after the last one. Call close() to remove all hooks and gradients from the model.

    hook: is called with each parameter when a backward pass has added to its gradient; None = nothing is.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, hook: Callable[[nn.Parameter], None] | None = None):
        self.optimizer = optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.hooks = [p.register_post_accumulate_grad_hook(hook) for p in self.parameters if hook]

    def begin(self, num_rows: int) -> None:
        """Forget the step before, or what is left of it. num_rows: of this step, on all ranks."""
        self.optimizer.zero_grad(set_to_none=True)

    def before_backward(self, loss: torch.Tensor) -> None:
        """Raise NotFinite if the row's loss is not finite and its backward pass would update weights."""

    def set_aside(self, parameter: nn.Parameter) -> None:
        """parameter.grad is not needed until bring_back or the end. No-op unless gradients leave the card."""

    def bring_back(self, parameter: nn.Parameter) -> None:
        """Undo set_aside: parameter.grad is the sum of all gradients that were set aside."""

    def use(self, parameter: nn.Parameter) -> None:
        """Apply parameter.grad, which is complete. No-op if gradients are applied together in finish()."""

    def use_parts(self, parameter: nn.Parameter, parts: Parts) -> None:
        """Take a row's gradient of a parameter that never exists as a whole.

        parts: pairs (first, gradient of the flattened elements from `first` on), in order and complete.
        """
        raise NotImplementedError

    def finish(self, loss: torch.Tensor) -> torch.Tensor:
        """Finish updating all weights. Return the gradient's norm before clipping, an fp32 scalar.

        loss: this rank's part, which is replaced by the step's.
        Raises NotFinite if the norm or the step's loss is not finite.
        """
        raise NotImplementedError

    def close(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        for hook in self.hooks:
            hook.remove()


class UpdateAtEnd(Updates):
    """Keep all gradients, clip them by their global norm and apply them together.

    max_grad_norm: the norm to clip to; 0 = no clipping. hook: as in Updates.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, max_grad_norm: float, hook=None):
        super().__init__(optimizer, hook)
        self.max_grad_norm = max_grad_norm

    def finish(self, loss: torch.Tensor) -> torch.Tensor:
        norm = torch.nn.utils.get_total_norm(p.grad for p in self.parameters if p.grad is not None)
        check_finite(loss, norm)
        if self.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        self.optimizer.step()
        return norm


class UpdateFromHost(Updates):
    """Add up gradients in CPU memory, clip them by their global norm and apply them one after another.

    The weights are those of UpdateAtEnd, bit for bit on a CPU. max_grad_norm: as there. gradients: of the
    optimizer's parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, gradients: HostGradients, *, max_grad_norm: float):
        super().__init__(optimizer, self.set_aside)
        self.gradients, self.max_grad_norm = gradients, max_grad_norm

    def begin(self, num_rows: int) -> None:
        super().begin(num_rows)
        self.gradients.begin(num_rows)

    def before_backward(self, loss: torch.Tensor) -> None:
        self.gradients.begin_row()

    def set_aside(self, parameter: nn.Parameter) -> None:
        self.gradients.add(parameter)

    def bring_back(self, parameter: nn.Parameter) -> None:
        parameter.grad = self.gradients.pop(parameter)

    def use_parts(self, parameter: nn.Parameter, parts: Parts) -> None:
        rounded = ((first, part.to(parameter.dtype)) for first, part in parts)
        self.gradients.add_to_sum(parameter, rounded)

    @torch.no_grad()
    def finish(self, loss: torch.Tensor) -> torch.Tensor:
        norm = self.gradients.norm(loss)
        check_finite(loss, norm)
        factor = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        in_pieces = isinstance(self.optimizer, AdamW8bit)
        for parameter, first, gradient in self.gradients.returned(PIECE if in_pieces else sys.maxsize):
            if self.max_grad_norm:
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
        self.gradients.after_update()
        return norm

    def close(self) -> None:
        super().close()
        self.gradients.begin(0)


class UpdateInBackward(Updates):
    """Update every parameter in a hook on it, and free its gradient.

    optimizer: one with `update(parameter)` and `wait()`. `begin` raises ValueError for a step of several
    rows.
    """

    def __init__(self, optimizer):
        super().__init__(optimizer, self.use)
        self.squares: list[torch.Tensor] = []

    def begin(self, num_rows: int) -> None:
        if num_rows != 1:
            raise ValueError(
                f"this step has {num_rows} rows but update_in_backward uses each gradient up before the next "
                "row; pass --batch_traces 1, or --no_update_in_backward"
            )
        super().begin(num_rows)
        self.squares = []

    @torch.no_grad()
    def use(self, parameter: nn.Parameter) -> None:
        norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        self.squares.append(norm.square())
        self.optimizer.update(parameter)
        parameter.grad = None

    @torch.no_grad()
    def use_parts(self, parameter: nn.Parameter, parts: Parts) -> None:
        square = torch.zeros((), device=parameter.device)
        for first, gradient in parts:
            square += gradient.square().sum()
            self.optimizer.update(parameter, gradient, first=first)
        self.squares.append(square)

    def before_backward(self, loss: torch.Tensor) -> None:
        check_finite(loss)

    def finish(self, loss: torch.Tensor) -> torch.Tensor:
        self.optimizer.wait()
        norm = torch.stack(self.squares).sum().sqrt()
        check_finite(loss, norm)
        return norm
