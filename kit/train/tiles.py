"""Run and differentiate a token-wise part of a layer (a norm, the feed-forward) a tile of tokens at a time.

What tiles cost is the sum of the part's gradients in fp32, 91 MiB for the feed-forward of Gemma 3 1B.
Measured against float64 on a tiny Llama of 2,048 tokens, fp32 sums have 1.02 times the error of no tiles,
however many tiles there are; bf16 sums have 1.1 times at 8 tiles, 1.2 times at 16 and 7 times at 2,048.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn
from torch.func import functional_call

Gradients = dict[nn.Parameter, torch.Tensor]


class Tiles:
    """Tiles of at most tile_tokens tokens of (B, T, H) tensors; 0 = one tile of all."""

    def __init__(self, tile_tokens: int):
        self.tile_tokens = tile_tokens

    def slices(self, T: int) -> Iterator[slice]:
        step = self.tile_tokens or T
        return (slice(start, start + step) for start in range(0, T, step))

    def run(self, part: nn.Module, source: torch.Tensor, out: torch.Tensor) -> None:
        """Write part(source) to out, which may be source."""
        for tile in self.slices(source.shape[1]):
            out[:, tile] = part(source[:, tile])

    def differentiate(self, part: nn.Module, source, dout, dsource, gradients: Gradients) -> None:
        """Run a part forward and backward. Write source's gradient to dsource, add parameters' to gradients.

        dsource may be source or dout, since a tile is written after both were read; None if it is not needed.
        """
        leaves = leaves_of(part)
        if dsource is None and not leaves:
            return
        several = 0 < self.tile_tokens < source.shape[1]
        sums: dict[str, torch.Tensor] = {}

        # add and free each gradient at once, so that only one weight's gradient of a tile exists
        def add(name: str, leaf: torch.Tensor) -> None:
            if name in sums:
                sums[name].add_(leaf.grad)
            else:
                wide = torch.promote_types(leaf.dtype, torch.float32)
                sums[name] = leaf.grad.to(wide if several else leaf.dtype)
            leaf.grad = None

        for name, leaf in leaves.items():
            leaf.register_post_accumulate_grad_hook(partial(add, name))
        for tile in self.slices(source.shape[1]):
            needs_dsource = dsource is not None
            dtile = _differentiate_once(part, leaves, source[:, tile].detach(), dout[:, tile], needs_dsource)
            if needs_dsource:
                dsource[:, tile] = dtile
        collect(part, sums, gradients)


def _differentiate_once(part, leaves, source, dout, needs_dsource: bool) -> torch.Tensor | None:
    """Accumulate gradients in the leaves and return source's. On return, all activations are freed."""
    source.requires_grad_(needs_dsource)
    with torch.enable_grad():
        out = functional_call(part, leaves, (source,))
    if out.requires_grad:
        torch.autograd.backward(out, dout)
    return source.grad


def trainable(part: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in part.named_parameters() if parameter.requires_grad}


def leaves_of(part: nn.Module) -> dict[str, torch.Tensor]:
    """Return stand-ins that share the trainable weights.

    A backward pass inside a layer's backward pass ends in them, so it triggers no hook of a parameter.
    """
    return {name: parameter.detach().requires_grad_() for name, parameter in trainable(part).items()}


def collect(part: nn.Module, found: dict[str, torch.Tensor | None], gradients: Gradients) -> None:
    """Add gradients by name to gradients by parameter, in its dtype. Empties found, to free the fp32 sums."""
    for name, parameter in trainable(part).items():
        gradient = found.pop(name, None)
        if gradient is not None:
            gradient = gradient.to(parameter.dtype)
            gradients[parameter] = gradients[parameter] + gradient if parameter in gradients else gradient
