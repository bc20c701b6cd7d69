"""Recompute every decoder layer in the backward pass from its input alone, its feed-forward in tiles.

A decoder layer computes, per token except for the attention (kit/models/layers.py),

    h = x + after(attention(before(x)))
    out = feed_forward(h)

where `after` is a norm in Gemma 3 and absent elsewhere.

The forward pass runs the layer without a graph and keeps x. The backward pass computes before(x), runs the
attention with its graph (which frees before(x) and recomputes it later) and forms h. Then it processes the
feed-forward a tile of tokens at a time: forward, backward, free. dh is written over h tile by tile. The
backward passes of the attention and of the norm follow. A tile's forward pass is the recomputation, so no
product runs a third time.

At 16,384 tokens of Gemma 3 1B in bf16 (H = 1152, 26 layers) the inputs are 36 MiB per layer, 936 MiB in all;
with offloading, those of two layers are on the device. One layer's backward pass needs 1.8 GiB without tiles
and 0.6 GiB with tiles of 2,048. kit.train.tiles has what tiles cost; smaller tiles make up for it.

A layer's parameters are inputs of its autograd.Function, so each gradient reaches its parameter once,
complete, when the layer's backward pass ends: post-accumulate hooks may use and free it. kit.train.offload
moves the inputs; its streams were not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from transformers.modeling_layers import GradientCheckpointingLayer

from kit.models.layers import LAYERS, DecoderLayer, layer_of
from kit.train.offload import HostInputs
from kit.train.saved_tensors import catch_gradient, recomputed
from kit.train.tiles import Gradients, Tiles, collect, leaves_of, trainable


def recompute_layers(model: nn.Module, *, offload: bool | HostInputs = False, tile_tokens: int = 0) -> None:
    """Make the model keep only the input of each decoder layer, while in training mode.

    Names of modules and parameters stay. A second call replaces the settings; keep_activations ends it.

    model: with or without adapters, full or NF4 weights, on any device. The layers of a family that the kit
        has no layers for are recomputed as a whole, with transformers' forward.
    offload: keep the layers' inputs in CPU memory (pinned on a GPU), except for the last layer's. Only one
        backward pass is then possible. A HostInputs moves them in its own way: a check can delay its copies.
    tile_tokens: the most tokens of the feed-forward and the norms whose activations exist at one time;
        0 = all.

    The keyword arguments that all layers share (cos and sin, cu_seqlens) get no gradient. Raises ValueError
    for a model without decoder layers, for tile_tokens < 0 and for tiles of another family; in the forward
    pass for a batch that is not a pack, for autocast, which the recomputation would not repeat, and for
    dropout, whose mask would differ.
    """
    if tile_tokens < 0:
        raise ValueError(f"tile_tokens is {tile_tokens}; pass the most tokens of a tile, such as 2048, or 0")
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        name = type(model).__name__
        raise ValueError(f"{name} has no decoder layer to recompute; pass the language model itself")

    host = offload if isinstance(offload, HostInputs) else HostInputs() if offload else None
    last = len(layers) - 1
    functions = [
        _Recomputed(layer, tile_tokens, host, i, is_last=i == last) for i, layer in enumerate(layers)
    ]
    for layer, function in zip(layers, functions, strict=True):
        # transformers' own protocol: in training mode the layer calls this function
        layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, function


def keep_activations(model: nn.Module) -> None:
    """End recompute_layers: the backward pass uses what the forward pass computed."""
    for module in model.modules():
        if isinstance(getattr(module, "_gradient_checkpointing_func", None), _Recomputed):
            module.gradient_checkpointing = False
            del module._gradient_checkpointing_func


class _Recomputed:
    """What a layer calls instead of its own forward.

    x, h, a and their gradients are (B, T, H); a pack has B = 1.
    """

    def __init__(
        self, layer: nn.Module, tile_tokens: int, host: HostInputs | None, index: int, *, is_last: bool
    ):
        self.module = layer
        self.is_ours = type(layer) in LAYERS
        if tile_tokens and not self.is_ours:
            raise ValueError(
                f"tile_tokens is {tile_tokens} but transformers computes a {type(layer).__name__}, as a "
                "whole; pass --tile_tokens 0"
            )
        self.tiles = Tiles(tile_tokens)
        self.host = host
        self.index = index
        self.is_last = is_last

    @property
    def layer(self) -> DecoderLayer:
        return layer_of(self.module)

    def __call__(self, layer_forward: partial, x: torch.Tensor) -> torch.Tensor:
        """Compute the layer's output. layer_forward: its own, bound to this call's keyword arguments."""
        if torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                "the recompute does not repeat autocast; load the model in bfloat16 and leave autocast off"
            )
        if layer_forward.keywords.get("cu_seqlens") is None:
            raise ValueError(
                "the recompute knows packed rows only; run the model with kit.models.hidden_states, or call "
                "kit.train.recompute.keep_activations(model) first"
            )
        for name, module in self.module.named_modules():
            if isinstance(module, nn.Dropout) and module.p:
                raise ValueError(
                    f"{name} drops out {module.p} but the recompute would draw another mask; set dropout to 0"
                )
        parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        if torch.is_grad_enabled() and (x.requires_grad or parameters):
            return _LayerFunction.apply(self, layer_forward, x, *parameters)
        with torch.no_grad():
            return self.forward(x, layer_forward)

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the attention reads."""
        normed = torch.empty_like(x)
        self.tiles.run(self.layer.before, x, normed)
        return normed

    def forward(self, x: torch.Tensor, layer_forward: partial) -> torch.Tensor:
        """Compute the layer without a graph. Allocates one (T, H) besides x and what the attention needs.

        layer_forward: as in __call__.
        """
        if not self.is_ours:
            return layer_forward(x)
        h = self.layer.attention(self._normed(x), **layer_forward.keywords)
        if self.layer.has_norm_after:
            self.tiles.run(self.layer.after, h, h)
        h.add_(x)
        self.tiles.run(self.layer.feed_forward, h, h)
        return h

    def backward(
        self, x, layer_forward: partial, dout, needs_dx: bool, when_lean: Callable[[], None] | None
    ) -> tuple[torch.Tensor | None, Gradients]:
        """Return dx, or None if it is not needed, and the gradients of the trainable parameters in use.

        Memory peaks while the tiles run. It then holds x, dout, the attention's graph without its input, its
        output a, and h; a and h are one tensor if no norm is between them. Each is overwritten by its own
        gradient. This is safe: a is the result of a projection, which saves its input and not its output. If
        a module does save it, the backward pass refuses the changed tensor.

        when_lean: called when the tiles are done.
        """
        gradients: Gradients = {}
        if not self.is_ours:
            dx = torch.empty_like(x) if needs_dx else None
            self.tiles.differentiate(_Whole(self.module, layer_forward), x, dout, dx, gradients)
            if when_lean is not None:
                when_lean()
            return dx, gradients
        before, after, attention = self.layer.before, self.layer.after, self.layer.attention

        # the attention, with its graph
        normed, dnormeds = self._normed(x), []
        leaves = leaves_of(attention)
        with torch.enable_grad(), recomputed(normed, partial(self._normed, x)):
            entering = catch_gradient(normed, dnormeds) if needs_dx or trainable(before) else normed
            attended = functional_call(attention, leaves, (entering,), layer_forward.keywords)
        del normed, entering

        # h
        needs_da = attended.requires_grad
        a = h = attended.detach()
        if self.layer.has_norm_after:
            h = torch.empty_like(a)
            self.tiles.run(after, a, h)
        h.add_(x)

        # the feed-forward and the norm after the attention: h becomes dh, a becomes da
        needs_dh = needs_dx or needs_da or bool(trainable(after))
        self.tiles.differentiate(self.layer.feed_forward, h, dout, h if needs_dh else None, gradients)
        if self.layer.has_norm_after:
            self.tiles.differentiate(after, a, h, a if needs_da else None, gradients)
        if when_lean is not None:
            when_lean()

        # the attention and the norm before it
        if needs_da:
            torch.autograd.backward(attended, a)
            collect(attention, {name: leaf.grad for name, leaf in leaves.items()}, gradients)
        dnormed = dnormeds.pop() if dnormeds else None
        del attended, a, leaves
        if dnormed is not None:
            self.tiles.differentiate(before, x, dnormed, dnormed if needs_dx else None, gradients)
        return dnormed.add_(h) if needs_dx else None, gradients


class _Whole(nn.Module):
    """Another family's layer, as a function of its input alone."""

    def __init__(self, layer: nn.Module, layer_forward: partial):
        super().__init__()
        self.layer, self.layer_forward = layer, layer_forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer_forward(x)


class _LayerFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layer: _Recomputed, layer_forward: partial, x: torch.Tensor, *parameters: nn.Parameter):
        ctx.layer, ctx.layer_forward, ctx.parameters = layer, layer_forward, parameters
        if layer.host is None:
            ctx.save_for_backward(x)
            return layer.forward(x, layer_forward)

        ctx.kept = layer.host.keep(x.detach(), layer.index, on_device=layer.is_last)
        out = layer.forward(x, layer_forward)
        if layer.is_last:
            layer.host.flush()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: torch.Tensor):
        host = ctx.layer.host
        x = ctx.saved_tensors[0] if host is None else host.fetch(ctx.kept)
        when_lean = None if host is None else partial(host.prefetch, ctx.kept)
        dx, gradients = ctx.layer.backward(x, ctx.layer_forward, dout, ctx.needs_input_grad[2], when_lean)
        if host is not None:
            host.done(ctx.kept)
        return None, None, dx, *(gradients.pop(parameter, None) for parameter in ctx.parameters)
