"""Linear layers that read the same input, such as those of q, k and v, computed as one product.

At one token per row, a product of a few hundred outputs leaves most of a card idle, and takes a launch. The
layers stay transformers': joined, their parameters are views of one buffer, which costs no memory. Separate
them before the model is trained or saved: a file of views would first copy them all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Joined:
    """Linear layers of one input, with weights in one buffer: x (..., H) -> the output of each, in order."""

    def __init__(self, layers: Sequence[nn.Linear]):
        self.widths = [layer.out_features for layer in layers]
        self.weights = [layer.weight for layer in layers]
        self.biases = [layer.bias for layer in layers if layer.bias is not None]
        self.weight, self.bias = _in_one(self.weights), _in_one(self.biases)

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        return F.linear(x, self.weight, self.bias).split(self.widths, -1)

    def separate(self) -> None:
        """Give every parameter memory of its own. Do not call this object afterwards."""
        self.weight = self.bias = None
        with torch.inference_mode(False), torch.no_grad():  # the parameters will be trained
            for parameter in (*self.weights, *self.biases):
                parameter.data = parameter.data.clone()


def join(layers: Sequence[nn.Module]) -> Joined | None:
    """Join layers. None, and they stay apart, if one has an adapter, NF4 weights, hooks or alone a bias."""
    plain = all(type(layer) is nn.Linear and not _hooks(layer) for layer in layers)
    if plain and len({(x.bias is None, x.weight.dtype, x.weight.device) for x in layers}) == 1:
        return Joined(layers)
    return None


def _hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def _in_one(parameters: Sequence[nn.Parameter]) -> Tensor | None:
    """Move parameters (N_i, ...) into one tensor (sum of N_i, ...), of which they become views."""
    if not parameters:
        return None
    with torch.inference_mode(False), torch.no_grad():
        whole = torch.cat([parameter.data for parameter in parameters])
        for parameter, part in zip(parameters, whole.split([len(x) for x in parameters]), strict=True):
            parameter.data = part
    return whole
