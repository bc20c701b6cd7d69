"""What a decoder layer computes, in two halves: training, recompute and decoding all call this.

    h   = x + after_attention(o(attention(rope(norm_q(q(n))), rope(norm_k(k(n))), v(n)))),   n = norm_in(x)
    out = h + after_mlp(down(activation(gate(m)) * up(m))),                                  m = norm_mlp(h)

A row of kit/models/families.py says which norms a family has; the others are left out. The weights stay in
transformers' modules. Projections are called as modules, so adapters and NF4 weights are included.

Norms, rotation and gate are kernels of our own (FUSED), which read and write every element once. On a CPU
they compute in torch what a gradient needs; the sampler uses the fewest operators there (PLAIN, without a
graph). Both compute in fp32 and round once, so that the sampler's log-probs differ from the trainer's no more
than two orders of summation do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kit.kernels.glu import glu, glu_reference
from kit.kernels.rms_norm import rms_norm
from kit.kernels.rope import rope
from kit.models.attention import attend
from kit.models.families import FAMILIES, Family, layer_kinds
from kit.models.joined import Joined

LAYERS = {family.layer: family for family in FAMILIES.values()}
# a config's name of the activation -> ours
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def plain_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """Compute rms_norm in one operator of torch, or in four if a weight is added to an offset."""
    if not offset:
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = offset + weight.to(wide)  # in bf16, 1 + weight would lose what training changed
    return F.rms_norm(x.to(wide), weight.shape, scale, eps).to(x.dtype)


def plain_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Compute rope, of q and k together."""
    heads = torch.cat([q, k], dim=1).to(torch.promote_types(q.dtype, torch.float32))  # (B, Hq + Hkv, D)
    half = heads.shape[-1] // 2
    signed = torch.cat([-sin[:, :half], sin[:, half:]], dim=1)
    turned = torch.addcmul(heads * cos[:, None], heads.roll(half, -1), signed[:, None])
    return turned.to(q.dtype).split([q.shape[1], k.shape[1]], dim=1)


def plain_glu(gate: Tensor, up: Tensor, *, activation: str = "silu") -> Tensor:
    """Compute glu."""
    wide = gate.to(torch.promote_types(gate.dtype, torch.float32))
    return glu_reference(wide, up, activation=activation).to(gate.dtype)


class Operations(NamedTuple):
    """How norms, rotation and gate are computed."""

    norm: Callable = rms_norm
    rope: Callable = rope
    glu: Callable = glu


FUSED, PLAIN = Operations(), Operations(plain_norm, plain_rope, plain_glu)


def to_sample(device: torch.device) -> Operations:
    """Return how the sampler computes them, prompts and tokens alike."""
    return PLAIN if device.type == "cpu" else FUSED


class Norm(nn.Module):
    """Scale vectors (..., H) to a root mean square of 1, then by the weight of a norm of transformers."""

    def __init__(self, norm: nn.Module, family: Family, operations: Operations = FUSED):
        super().__init__()
        self.norm, self.normalise = norm, operations.norm
        self.eps, self.offset = getattr(norm, family.norm_eps), family.norm_offset

    def forward(self, x: Tensor) -> Tensor:
        return self.normalise(x, self.norm.weight, self.eps, offset=self.offset)


def _norm(parent: nn.Module, name: str | None, family: Family, operations: Operations) -> nn.Module:
    return Norm(getattr(parent, name), family, operations) if name else nn.Identity()


class Attention(nn.Module):
    """The attention of a layer, between the two norms of its half."""

    def __init__(self, attention: nn.Module, family: Family, operations: Operations = FUSED):
        super().__init__()
        self.attention, self.turn = attention, operations.rope
        # of q and k; in a tuple, since a module that is registered twice does not survive functional_call
        self.norms = tuple(_norm(attention, name, family, operations) for name in family.head_norms)

    def heads(
        self, x: Tensor, cos: Tensor, sin: Tensor, joined: Joined | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute q (T, Hq, D), k and v (T, Hkv, D) of normed inputs (T, H). cos, sin: (T, D).

        joined: the projections of q, k and v as one product; None = compute each.
        """
        module = self.attention
        projected = joined(x) if joined else (module.q_proj(x), module.k_proj(x), module.v_proj(x))
        q, k, v = (states.unflatten(-1, (-1, module.head_dim)) for states in projected)
        norm_q, norm_k = self.norms
        return *self.turn(norm_q(q), norm_k(k), cos, sin), v

    def forward(
        self,
        x: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache=None,
        **_,
    ) -> Tensor:
        """Attend within the documents of a pack: normed inputs (1, T, H) -> (1, T, H).

        position_embeddings: cos and sin, (1, T, D). cache: stores k and v, as the sampler's SlotCache does.
        Others that transformers' layers take have no use in a pack.
        """
        module = self.attention
        # squeezed, not x[0]: the gradient of an index is a tensor of zeros to copy into
        q, k, v = self.heads(x.squeeze(0), *(angles.squeeze(0) for angles in position_embeddings))
        if cache is not None:
            cache.store(module.layer_idx, k, v)
        dropout = module.attention_dropout if module.training else 0.0
        settings = {"window": getattr(module, "sliding_window", None), "scale": module.scaling}
        states = attend(module, q, k, v, cu_seqlens, max_seqlen, dropout=dropout, **settings)
        return module.o_proj(states.flatten(1))[None]


class FeedForward(nn.Module):
    """The second half of a layer: out from h, both (..., H)."""

    def __init__(self, layer: nn.Module, family: Family, operations: Operations = FUSED):
        super().__init__()
        self.mlp, self.gated = layer.mlp, operations.glu
        self.before = _norm(layer, family.before_mlp, family, operations)
        self.after = _norm(layer, family.after_mlp, family, operations)
        name = getattr(layer.mlp.config, family.activation)
        if name not in ACTIVATIONS:
            raise ValueError(f"{family.activation} is {name!r}; the kit knows {', '.join(ACTIVATIONS)}")
        self.activation = ACTIVATIONS[name]

    def forward(self, h: Tensor, joined: Joined | None = None) -> Tensor:
        """joined: the projections of gate and up as one product; None = compute each."""
        mlp, m = self.mlp, self.before(h)
        gate, up = joined(m) if joined else (mlp.gate_proj(m), mlp.up_proj(m))
        return h + self.after(mlp.down_proj(self.gated(gate, up, activation=self.activation)))


class DecoderLayer(nn.Module):
    """A decoder layer of transformers, of a class in LAYERS, computed by the kit."""

    def __init__(self, layer: nn.Module, operations: Operations = FUSED):
        super().__init__()
        family = LAYERS[type(layer)]
        self.parts = _parts_of(layer)
        self.before = _norm(layer, "input_layernorm", family, operations)
        self.attention = Attention(layer.self_attn, family, operations)
        self.has_norm_after = family.after_attention is not None
        self.after = _norm(layer, family.after_attention, family, operations)
        self.feed_forward = FeedForward(layer, family, operations)

    def forward(self, x: Tensor, **arguments) -> Tensor:
        """Compute a layer of a pack, (1, T, H) -> (1, T, H). arguments: of Attention."""
        h = x + self.after(self.attention(self.before(x), **arguments))
        return self.feed_forward(h)


def _parts_of(layer: nn.Module) -> tuple[nn.Module, ...]:
    """Return the modules of a layer that adapters may replace, in a tuple: they are not registered again."""
    return *layer.children(), *layer.self_attn.children()


def layer_of(layer: nn.Module, operations: Operations = FUSED) -> DecoderLayer:
    """Return a layer of transformers as the kit computes it."""
    kept = _kept(layer, operations, lambda: DecoderLayer(layer, operations))
    if kept.parts == _parts_of(layer):
        return kept
    del layer._kit
    return layer_of(layer, operations)


def norm_of(norm: nn.Module, family: Family, operations: Operations = FUSED) -> Norm:
    """Return a norm of transformers as the kit computes it."""
    return _kept(norm, operations, lambda: Norm(norm, family, operations))


def _kept(module: nn.Module, operations: Operations, make: Callable[[], nn.Module]) -> nn.Module:
    """Return the same object at every call, so that hooks on it stay. A dictionary does not register it."""
    if not hasattr(module, "_kit"):
        module._kit = {}
    if operations not in module._kit:
        module._kit[operations] = make()
    return module._kit[operations]


def rotations(model: nn.Module, x: Tensor, position_ids: Tensor) -> dict[str | None, tuple[Tensor, Tensor]]:
    """Return kind of layer -> cos and sin, (B, T, D), of position_ids (B, T). x: gives dtype and device."""
    kinds = set(layer_kinds(model.config))
    return {kind: model.model.rotary_emb(x, position_ids, *([kind] if kind else [])) for kind in kinds}
