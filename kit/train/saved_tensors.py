"""Two ways to free a tensor that an autograd graph would keep until its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def catch_gradient(x: Tensor, gradients: list[Tensor]) -> Tensor:
    """Return x as an input of a graph that appends x's gradient to the list.

    A leaf would keep x in memory until its gradient is computed; this does not.
    """
    anchor = x.new_empty(0, requires_grad=True)  # without an input that requires it, autograd computes none
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
def recomputed(x: Tensor, compute: Callable[[], Tensor]) -> Iterator[None]:
    """Make graphs built in the with-block save neither x nor its views, but recompute them for backward.

    compute: called once, by the backward pass; returns what x holds, with x's strides. Like autograd itself,
    the backward pass raises RuntimeError if another tensor that the graph saved was changed in place.
    """
    dropped = x.untyped_storage()._cdata
    found: list[Tensor] = []

    def pack(saved: Tensor) -> tuple:
        if saved.untyped_storage()._cdata == dropped:
            return saved.size(), saved.stride(), saved.storage_offset()
        return saved.detach(), saved._version  # detached: a graph that holds its own output is never freed

    def unpack(packed: tuple) -> Tensor:
        if len(packed) == 3:
            if not found:
                with torch.no_grad():
                    found.append(compute())
            return found[0].as_strided(*packed)

        saved, version = packed
        if saved._version != version:
            shape = tuple(saved.shape)
            raise RuntimeError(f"a tensor of shape {shape} that the backward pass needs was changed in place")
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
