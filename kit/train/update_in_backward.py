"""Update weights after the backward pass, or inside it: each parameter as soon as its gradient is complete.

Inside it, a gradient exists from its layer's backward pass to its update, and no two layers' gradients exist
together. This saves 2 bytes per parameter in bf16. The price: the other gradients are not known yet, so there
is no global norm to clip by (each parameter's own norm can be clipped instead), and no gradient can wait for
a second row of the same step. A tied embedding is one parameter with two gradients, the head's and the
lookup's: kit.train.head passes their sum on, once.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch


class Updates(Protocol):
    """Apply the gradients of a step. Call begin before its first backward pass and finish after the last."""

    def begin(self, num_rows: int) -> None: ...

    def use(self, parameter: torch.nn.Parameter) -> None:
        """Apply parameter.grad: complete, but not computed by autograd, which would have called the hooks."""

    def finish(self) -> torch.Tensor:
        """Finish updating all weights. Return the gradient's norm before clipping, an fp32 scalar."""

    def close(self) -> None:
        """Remove all hooks and gradients from the model."""


class UpdateAtEnd:
    """Keep all gradients, clip them by their global norm and apply them together.

    max_grad_norm: the norm to clip to; 0 = no clipping.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, max_grad_norm: float):
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def begin(self, num_rows: int) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def use(self, parameter: torch.nn.Parameter) -> None:
        """No-op: all gradients are applied together in finish()."""

    def finish(self) -> torch.Tensor:
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm or math.inf)
        self.optimizer.step()
        return norm

    def close(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


class UpdateInBackward:
    """Update every parameter in a hook on it, and free its gradient.

    optimizer: one with `update(parameter)` and `wait()`. max_tensor_norm: each parameter's gradient is
    clipped to this norm; 0 = no clipping. `begin` raises ValueError for a step of several rows. Call close()
    to remove the hooks.
    """

    def __init__(self, optimizer, *, max_tensor_norm: float = 0.0):
        self.optimizer = optimizer
        self.max_tensor_norm = max_tensor_norm
        self.squares: list[torch.Tensor] = []
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.hooks = [parameter.register_post_accumulate_grad_hook(self.use) for parameter in parameters]

    def begin(self, num_rows: int) -> None:
        if num_rows != 1:
            raise ValueError(
                f"this step has {num_rows} rows but update_in_backward uses each gradient up before the next "
                "row; pass --batch_traces 1 (a step is then one row of packed traces), or "
                "--no_update_in_backward to add gradients up"
            )
        self.squares = []

    @torch.no_grad()
    def use(self, parameter: torch.nn.Parameter) -> None:
        norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        self.squares.append(norm.square())
        if self.max_tensor_norm:
            parameter.grad.mul_((self.max_tensor_norm / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.update(parameter)
        parameter.grad = None

    def finish(self) -> torch.Tensor:
        self.optimizer.wait()
        return torch.stack(self.squares).sum().sqrt()

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()
