"""Activations: every decoder layer is computed again in the backward pass from its input alone, its feed-forward in tiles.

A decoder layer of the three families is, per token except for the attention,

    h = x + after_attention(attention(norm(x)))          after_attention and after_mlp: a norm in Gemma 3, nothing elsewhere
    out = h + after_mlp(mlp(before_mlp(h)))

The forward pass runs it without a graph and keeps x. The backward pass computes norm(x), runs the attention with its graph (which
lets go of norm(x) and has it made once more), forms h, and then takes the feed-forward a tile of tokens at a time: forward,
backward, drop. dh is written over h tile by tile; then the attention's graph is spent, then the norm's tiles. A tile's forward is
the recompute: no product runs a third time.

At 16,384 tokens of Gemma 3 1B in bf16 (H = 1152, 26 layers) the inputs are 36 MiB per layer, 936 MiB in all;
with offload those of two layers are on the device. One layer's backward takes 1.8 GiB without tiles and 0.6
GiB with tiles of 2,048. What tiles cost is the fp32 sum of the MLP's gradients, 91 MiB here. Measured against
float64 on a tiny Llama of 2,048 tokens, fp32 sums err 1.02 times as much as no tiles, however many; bf16 sums
1.1 times at 8 tiles, 1.2 at 16, 7 at 2,048. Smaller tiles buy the bytes back.

A layer's parameters are inputs of its autograd.Function, so each gradient reaches its parameter once, whole, when the layer is
done: post-accumulate hooks may use it and let it go. kit.train.offload moves the inputs; its streams were not run on a GPU.

The norm after the last layer is computed again too: its graph, 180 MiB here, would wait through the loss, the fullest moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from kit.models.families import FAMILIES, Family
from kit.train.offload import HostInputs
from kit.train.saved_tensors import catch_gradient, made_again

LAYERS = {family.layer: family for family in FAMILIES.values()}
_norm_hooks: WeakKeyDictionary[nn.Module, RemovableHandle] = (
    WeakKeyDictionary()
)  # last norm -> what recompute_layers set there


def recompute_layers(model: nn.Module, *, offload: bool | HostInputs = False, tile_tokens: int = 0) -> None:
    """From now on, in training mode, keep only the inputs of each decoder layer and of the last norm for the backward pass.

    model: of a family in kit.models.families.FAMILIES, with or without adapters, full or NF4 weights; it may
    be on any device. Module and parameter names stay as they are. Calling it again replaces the settings;
    keep_activations ends it.
    offload: keep layer inputs in CPU memory (pinned on a GPU), the last layer's excepted. A backward pass is then possible once.
        A HostInputs does it in that object's way: a check can delay its copies.
    tile_tokens: most tokens of the feed-forward (and norms) whose activations are alive at a time; 0 = all.
    The keyword arguments that all layers share (cos and sin, cu_seqlens) get no gradient.
    Raises ValueError for an unknown layer class, for a model without decoder layers, for tile_tokens < 0; in the forward pass for
    autocast, which the recompute would not repeat, and for dropout, whose mask it would not draw again.
    """
    if tile_tokens < 0:
        raise ValueError(
            f"tile_tokens is {tile_tokens}; pass the most tokens of a tile, such as 2048, or 0 for no tiles"
        )
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        if type(layer) not in LAYERS:
            known = ", ".join(kind.__name__ for kind in LAYERS)
            raise ValueError(
                f"a layer is a {type(layer).__name__} but the kit knows {known}; add a row to FAMILIES in kit/models/families.py"
            )
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no decoder layer to recompute; pass the language model itself"
        )
    host = offload if isinstance(offload, HostInputs) else HostInputs() if offload else None
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = (
            True  # transformers' own protocol: the layer now calls the function in training mode
        )
        layer._gradient_checkpointing_func = _Recomputed(
            layer, tile_tokens, host, index, is_last=index == len(layers) - 1
        )
    for module in model.modules():
        if isinstance(getattr(module, "layers", None), nn.ModuleList) and isinstance(
            getattr(module, "norm", None), nn.Module
        ):
            _stop_recomputing(module.norm)
            _norm_hooks[module.norm] = module.norm.register_forward_hook(_RecomputedNorm(tile_tokens))


def keep_activations(model: nn.Module) -> None:
    """End recompute_layers: the backward pass uses what the forward pass computed."""
    for module in model.modules():
        if isinstance(getattr(module, "_gradient_checkpointing_func", None), _Recomputed):
            module.gradient_checkpointing = False
            del module._gradient_checkpointing_func
        _stop_recomputing(module)


def _stop_recomputing(norm: nn.Module) -> None:
    if norm in _norm_hooks:
        _norm_hooks.pop(norm).remove()


class _FeedForward(nn.Module):
    """h -> out. Refers to the layer's own modules, so that adapters and NF4 weights are what they are there."""

    def __init__(self, layer: nn.Module, family: Family):
        super().__init__()
        self.before = getattr(layer, family.before_mlp)
        self.mlp = layer.mlp
        self.after = getattr(layer, family.after_mlp) if family.after_mlp else nn.Identity()

    def forward(self, h):
        return h + self.after(self.mlp(self.before(h)))


class _Tiles:
    """Token-wise parts run over (B, T, H) a tile of tokens at a time."""

    def __init__(self, tile_tokens: int):
        self.tile_tokens = tile_tokens

    def _tiles(self, T: int) -> Iterator[slice]:
        step = self.tile_tokens or T
        return (slice(start, start + step) for start in range(0, T, step))

    def _run(self, part: nn.Module, source: torch.Tensor, out: torch.Tensor) -> None:
        """out <- part(source) tile by tile; the two may be one tensor."""
        for tile in self._tiles(source.shape[1]):
            out[:, tile] = part(source[:, tile])

    def _differentiate(self, part, source, dout, dsource, gradients) -> None:
        """Forward and backward of a token-wise part, tile by tile: dsource <- its gradient, parameters' gradients are collected.

        dsource may be source or dout (a tile is written when both were read), or None if it is not needed.
        """
        leaves = _leaves(part)
        if dsource is None and not leaves:
            return
        several = 0 < self.tile_tokens < source.shape[1]
        sums: dict[str, torch.Tensor] = {}

        def add(
            name: str, leaf: torch.Tensor
        ) -> None:  # at once, so that one weight's gradient of one tile is alive
            if name in sums:
                sums[name].add_(leaf.grad)
            else:
                sums[name] = leaf.grad.to(
                    torch.promote_types(leaf.dtype, torch.float32) if several else leaf.dtype
                )
            leaf.grad = None

        for name, leaf in leaves.items():
            leaf.register_post_accumulate_grad_hook(partial(add, name))
        for tile in self._tiles(source.shape[1]):
            dtile = _differentiate_once(
                part, leaves, source[:, tile].detach(), dout[:, tile], dsource is not None
            )
            if dsource is not None:
                dsource[:, tile] = dtile
        _collect(part, sums, gradients)


class _Recomputed(_Tiles):
    """What one layer calls instead of its own forward. x, h, a and their gradients are (B, T, H), B = 1 for a pack."""

    def __init__(
        self, layer: nn.Module, tile_tokens: int, host: HostInputs | None, index: int, *, is_last: bool
    ):
        super().__init__(tile_tokens)
        self.layer = layer
        self.family = LAYERS[type(layer)]
        self.host = host
        self.index = index
        self.is_last = is_last

    def __call__(self, forward: partial, x: torch.Tensor) -> torch.Tensor:
        """forward: the layer's own, bound to the keyword arguments of this call."""
        if torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                "the recompute does not repeat autocast; load the model in bfloat16 and leave autocast off"
            )
        for name, module in self.layer.named_modules():
            if isinstance(module, nn.Dropout) and module.p:
                raise ValueError(
                    f"{name} drops out {module.p} but the recompute would draw another mask; set the dropout to 0"
                )
        parameters = [parameter for parameter in self.layer.parameters() if parameter.requires_grad]
        if torch.is_grad_enabled() and (x.requires_grad or parameters):
            return _LayerFunction.apply(self, forward.keywords, x, *parameters)
        with torch.no_grad():
            return self.forward(x, forward.keywords)

    def _part(self, name: str | None) -> nn.Module | None:
        return getattr(self.layer, name) if name else None

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        """What the attention reads."""
        normed = torch.empty_like(x)
        self._run(self.layer.input_layernorm, x, normed)
        return normed

    def forward(self, x: torch.Tensor, arguments: dict) -> torch.Tensor:
        """The layer without a graph: besides x, one (T, H) of ours and what the attention makes."""
        after = self._part(self.family.after_attention)
        h = self.layer.self_attn(hidden_states=self._normed(x), **arguments)[0]
        if after is not None:
            self._run(after, h, h)
        h.add_(x)
        self._run(_FeedForward(self.layer, self.family), h, h)
        return h

    def backward(
        self,
        x: torch.Tensor,
        arguments: dict,
        dout: torch.Tensor,
        needs_dx: bool,
        when_lean: Callable[[], None],
    ):
        """dx, or None if it is not needed, and the gradient of every trainable parameter that the layer used.

        Alive while the tiles run, the fullest moment: x, dout, the attention's graph without its input, its output a, and h; a
        and h are one tensor where no norm stands between. Each is overwritten by its own gradient. That is safe: a is the result
        of a projection, which saves its input, not its output; and where some module does save it, the changed tensor is refused.
        when_lean: called when the tiles are done.
        """
        before, after = self.layer.input_layernorm, self._part(self.family.after_attention)
        gradients: dict[nn.Parameter, torch.Tensor] = {}
        normed, dnormeds = self._normed(x), []
        leaves = _leaves(self.layer.self_attn)
        with torch.enable_grad(), made_again(normed, partial(self._normed, x)):
            entering = catch_gradient(normed, dnormeds) if needs_dx or _trainable(before) else normed
            attended = functional_call(
                self.layer.self_attn, leaves, kwargs={"hidden_states": entering, **arguments}
            )[0]
        del normed, entering
        needs_da = attended.requires_grad
        a = h = attended.detach()
        if after is not None:
            h = torch.empty_like(a)
            self._run(after, a, h)
        h.add_(x)
        needs_dh = needs_dx or needs_da or (after is not None and bool(_trainable(after)))
        self._differentiate(
            _FeedForward(self.layer, self.family), h, dout, h if needs_dh else None, gradients
        )
        if after is not None:
            self._differentiate(after, a, h, a if needs_da else None, gradients)
        when_lean()
        if needs_da:
            torch.autograd.backward(attended, a)
            _collect(self.layer.self_attn, {name: leaf.grad for name, leaf in leaves.items()}, gradients)
        dnormed = dnormeds.pop() if dnormeds else None
        del attended, a, leaves
        if dnormed is not None:
            self._differentiate(before, x, dnormed, dnormed if needs_dx else None, gradients)
        return dnormed.add_(h) if needs_dx else None, gradients


class _WithoutHooks(nn.Module):
    """A module's own forward: a recompute from within its forward hook must not set that hook off again."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module.forward(x)


class _RecomputedNorm(_Tiles):
    """Forward hook of the norm after the last layer: what it made goes on, and how it made it is forgotten."""

    def __call__(self, norm: nn.Module, arguments: tuple, out: torch.Tensor) -> torch.Tensor:
        if not norm.training or not out.requires_grad:
            return out
        return _NormFunction.apply(self, norm, [out.detach()], arguments[0], *_trainable(norm).values())


def _differentiate_once(part, leaves, source, dout, needs_dsource: bool) -> torch.Tensor | None:
    source.requires_grad_(needs_dsource)
    with torch.enable_grad():
        out = functional_call(part, leaves, (source,))
    if out.requires_grad:
        torch.autograd.backward(out, dout)
    return source.grad


def _trainable(part: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in part.named_parameters() if parameter.requires_grad}


def _leaves(part: nn.Module) -> dict[str, torch.Tensor]:
    """Stand-ins that share the weights: where a backward inside the layer's backward ends, it sets off no parameter's hooks."""
    return {name: parameter.detach().requires_grad_() for name, parameter in _trainable(part).items()}


def _collect(
    part: nn.Module, found: dict[str, torch.Tensor | None], gradients: dict[nn.Parameter, torch.Tensor]
) -> None:
    """Move gradients from names to parameters, in the parameter's dtype; `found` is emptied so that each fp32 sum dies here."""
    for name, parameter in _trainable(part).items():
        gradient = found.pop(name, None)
        if gradient is not None:
            gradient = gradient.to(parameter.dtype)
            gradients[parameter] = gradients[parameter] + gradient if parameter in gradients else gradient


def _nothing() -> None:
    """No-op: nothing is prefetched."""


class _LayerFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layer: _Recomputed, arguments: dict, x: torch.Tensor, *parameters: nn.Parameter):
        ctx.layer, ctx.arguments, ctx.parameters = layer, arguments, parameters
        if layer.host is None:
            ctx.save_for_backward(x)
            return layer.forward(x, arguments)
        ctx.kept = layer.host.keep(x.detach(), layer.index, on_device=layer.is_last)
        out = layer.forward(x, arguments)
        if layer.is_last:
            layer.host.flush()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: torch.Tensor):
        host = ctx.layer.host
        x = ctx.saved_tensors[0] if host is None else host.fetch(ctx.kept)
        when_lean = _nothing if host is None else partial(host.prefetch, ctx.kept)
        dx, gradients = ctx.layer.backward(x, ctx.arguments, dout, ctx.needs_input_grad[2], when_lean)
        if host is not None:
            host.done(ctx.kept)
        return None, None, dx, *(gradients.pop(parameter, None) for parameter in ctx.parameters)


class _NormFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, tiles: _RecomputedNorm, norm: nn.Module, made: list[torch.Tensor], x: torch.Tensor, *parameters
    ):
        ctx.tiles, ctx.norm, ctx.parameters = tiles, norm, parameters
        ctx.save_for_backward(x)
        return made.pop()

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: torch.Tensor):
        (x,) = ctx.saved_tensors
        dx, gradients = torch.empty_like(x) if ctx.needs_input_grad[3] else None, {}
        ctx.tiles._differentiate(_WithoutHooks(ctx.norm), x, dout, dx, gradients)
        return None, None, None, dx, *(gradients.get(parameter) for parameter in ctx.parameters)
