"""Linear layers that read the same input, q, k and v or gate and up, computed as one product.

At one token per row, a product of a few hundred outputs leaves most of a card idle, and takes a launch. The
layers stay transformers': their parameters are views of one buffer, which costs no memory if they get there
as the model is loaded. Joining them later would leave gaps that no other tensor fits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kit.models.families import OTHER, family_of


class Joined:
    """Linear layers of one input, with weights in one buffer: x (..., H) -> the output of each, in order."""

    def __init__(self, layers: Sequence[nn.Linear], weight: Tensor, bias: Tensor | None):
        self.widths, self.weight, self.bias = [layer.out_features for layer in layers], weight, bias

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        return F.linear(x, self.weight, self.bias).split(self.widths, -1)


def siblings(layer: nn.Module) -> list[list[nn.Module]]:
    """Return the projections of a decoder layer of transformers that read the same input."""
    attention, mlp = layer.self_attn, layer.mlp
    return [[attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]]


def joined(layers: Sequence[nn.Module]) -> Joined | None:
    """Return layers as one product; None if they are not side by side, or have adapters, NF4 or hooks."""
    if not _are_plain(layers):
        return None
    weight = _whole([layer.weight for layer in layers])
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias = _whole(biases) if len(biases) == len(layers) else None
    is_whole = weight is not None and (bias is not None or not biases)
    return Joined(layers, weight, bias) if is_whole else None


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to a device. On a card, the projections of one input come to lie side by side there."""
    if device.type == "cuda":
        join(model, device)
    return model.to(device)


@torch.no_grad()
def join(model: nn.Module, device: torch.device) -> None:
    """Move the plain projections of each layer to a device, those of one input side by side."""
    if family_of(model.config) is OTHER:  # the token step of others calls each projection
        return
    for layers in (group for layer in model.model.layers for group in siblings(layer)):
        if not _are_plain(layers):
            continue
        for parameters in ([layer.weight for layer in layers], [layer.bias for layer in layers]):
            kinds = {None if parameter is None else parameter.dtype for parameter in parameters}
            if len(kinds) > 1 or None in kinds:  # torch.cat would cast other dtypes
                continue
            whole = torch.cat([parameter.data for parameter in parameters]).to(device)
            for parameter, part in zip(parameters, whole.split([*map(len, parameters)]), strict=True):
                parameter.data = part


def _are_plain(layers: Sequence[nn.Module]) -> bool:
    return all(type(x) is nn.Linear and not x._forward_hooks and not x._forward_pre_hooks for x in layers)


def _whole(parts: Sequence[Tensor]) -> Tensor | None:
    """Return the tensor (sum of N_i, ...) of parts (N_i, ...); None if they are not one behind the other."""
    first, end = parts[0].detach(), parts[0].data_ptr()
    kind = first.untyped_storage().data_ptr(), first.dtype, first.shape[1:], True
    for part in parts:
        same = part.untyped_storage().data_ptr(), part.dtype, part.shape[1:], part.is_contiguous()
        if same != kind or part.data_ptr() != end:
            return None
        end += part.nbytes
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
