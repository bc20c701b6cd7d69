"""Two ways to let go of a tensor that an autograd graph would hold until its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def catch_gradient(x: Tensor, gradients: list[Tensor]) -> Tensor:
    """x, to enter a graph with: its gradient goes to the list. A leaf would keep x alive as long as its gradient is wanted."""
    anchor = x.new_empty(0, requires_grad=True)  # what makes autograd pass by
    return _Caught.apply(anchor, x, gradients)


class _Caught(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, x, gradients: list[Tensor]):
        ctx.gradients = gradients
        return x

    @staticmethod
    def backward(ctx, dx):
        ctx.gradients.append(dx)
        return None, None, None


@contextmanager
def made_again(x: Tensor, make: Callable[[], Tensor]) -> Iterator[None]:
    """In the with-block, graphs do not keep x or views of it: make() makes it once more when the backward pass asks for it first.

    make: returns what x holds, with x's strides. Raises RuntimeError in the backward pass where another tensor that the graph did
    keep was changed on the way, as autograd itself would.
    """
    dropped = x.untyped_storage()._cdata
    made: list[Tensor] = []

    def pack(saved: Tensor) -> tuple:
        if saved.untyped_storage()._cdata == dropped:
            return saved.size(), saved.stride(), saved.storage_offset()
        return (
            saved.detach(),
            saved._version,
        )  # detached: an output held by its own graph would be held for good

    def unpack(packed: tuple) -> Tensor:
        if len(packed) == 3:
            if not made:
                with torch.no_grad():
                    made.append(make())
            return made[0].as_strided(*packed)
        saved, version = packed
        if saved._version != version:
            raise RuntimeError(
                f"a tensor of shape {tuple(saved.shape)} that the backward pass needs was changed in place"
            )
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
