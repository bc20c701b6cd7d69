"""One token per row through a model's layers: what its forward computes, up to rounding, in fewer operations.

    h = x + o_proj(attention(rope(q_proj(norm(x))), rope(k_proj(norm(x))), v_proj(norm(x))))
    y = h + mlp(norm(h))

Gemma 3 also norms the heads of q and k, and what is added in both lines.

At one token per row a product takes microseconds, and the casts, views and copies that a model's modules do
between two products take as long again; on a card each is a kernel launch. Here a norm is two operations on a
card (three for Gemma 3, whose weights are added to 1 in fp32) and three on a CPU, and q and k are rotated
together. Norms round where the model's own do, so that the sampler's log-probs differ from the trainer's no
more than two orders of summation do. Embedding, projections and feed-forward are called as modules, so
adapters and quantised layers work as elsewhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kit.generate.kv_cache import SlotCache
from kit.models.families import Family, family_of, head_dim


class Decoder:
    """A model as the sampler runs it after the prompts. Its weights must not change: norms are read once."""

    def __init__(self, model):
        """Raises ValueError for an unknown family, whose layers may compute more than this does."""
        family = family_of(model.config)
        self.backbone = model.model
        self.num_heads, self.head_dim = model.config.num_attention_heads, head_dim(model.config)
        layers = self.backbone.layers[: model.config.num_hidden_layers]
        self.layers = [_Layer(layer, family) for layer in layers]
        # kinds of layers with their own rotation
        self.kinds = model.config.layer_types if family.has_windows else [None] * len(self.layers)
        self.norm = _norm(self.backbone.norm, family)
        self.signs = torch.ones(self.head_dim, dtype=model.dtype, device=model.device)
        self.signs[: self.head_dim // 2] = -1

    def __call__(self, tokens: Tensor, positions: Tensor, cache: SlotCache) -> Tensor:
        """Compute the hidden states (B, H) of tokens (B,) at positions (B,). Call cache.at_decode first."""
        x = self.backbone.embed_tokens(tokens)  # (B, H)
        rotations = {kind: self._rotation(x, positions, kind) for kind in set(self.kinds)}
        for i, layer in enumerate(self.layers):
            attended = self._attend(i, layer, layer.norm_in(x), *rotations[self.kinds[i]], cache)
            x = x + layer.norm_attended(layer.attention.o_proj(attended))
            x = x + layer.norm_out(layer.mlp(layer.norm_mlp(x)))
        return self.norm(x)

    def _rotation(self, x: Tensor, positions: Tensor, kind: str | None) -> tuple[Tensor, Tensor]:
        """Compute cos and sin, (B, 1, D). Half of sin is negated: rotate_half(q) * sin is then roll(q, D / 2)
        * sin.
        """
        cos, sin = self.backbone.rotary_emb(x, positions[:, None], *([kind] if kind else []))
        return cos, sin * self.signs

    def _attend(self, i: int, layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor, cache: SlotCache) -> Tensor:
        """Compute the attention of layer i, (B, Hq * D), from its input (B, H), and store its keys and
        values.
        """
        attention, Hq, D = layer.attention, self.num_heads, self.head_dim
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (project(x).unflatten(-1, (-1, D)) for project in projections)

        heads = torch.cat([layer.norm_q(q), layer.norm_k(k)], dim=1)  # (B, Hq + Hkv, D)
        heads = torch.addcmul(heads * cos, heads.roll(D // 2, -1), sin)
        cache.write(i, heads[:, Hq:], v)

        # the queries of a group are rows of one small matrix, so that K and V are read once
        q = heads[:, :Hq].unflatten(1, (k.shape[1], -1))
        parts = [
            F.scaled_dot_product_attention(q[rows], keys, values, attn_mask=mask, scale=attention.scaling)
            for rows, keys, values, mask in cache.groups(i)
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(len(x), Hq * D)


class _Layer:
    """The parts of a decoder layer, under the same names for every family."""

    def __init__(self, layer: nn.Module, family: Family):
        def norm(parent: nn.Module, name: str | None):
            return _norm(getattr(parent, name), family) if name else _same

        self.attention, self.mlp = layer.self_attn, layer.mlp
        self.norm_in = norm(layer, "input_layernorm")
        self.norm_q, self.norm_k = (norm(layer.self_attn, name) for name in family.head_norms or (None, None))
        self.norm_attended = norm(layer, family.after_attention)
        self.norm_mlp = norm(layer, family.before_mlp)
        self.norm_out = norm(layer, family.after_mlp)


def _same(x: Tensor) -> Tensor:
    return x


def _norm(module: nn.Module, family: Family):
    """Return a function that computes x / rms(x), scaled and rounded as the family's own norm does."""
    eps = getattr(module, family.norm_eps)
    if family.norm_offset is None:
        normalise = _normalise(module.weight, eps)
        return lambda x: normalise(x) * module.weight  # rounded to x's dtype before and after
    scale = family.norm_offset + module.weight.float()  # in bf16, 1 + weight would lose what training changed
    normalise = _normalise(scale, eps)
    return lambda x: (normalise(x.float()) * scale).to(x.dtype)


def _normalise(like: Tensor, eps: float):
    """Return a function that computes x / rms(x) for vectors of the size of `like`, on its device."""
    return (_in_few_operations if like.device.type == "cpu" else _in_one_kernel)(len(like), eps)


def _in_one_kernel(H: int, eps: float):
    return lambda x: F.rms_norm(x, (H,), eps=eps)


def _in_few_operations(H: int, eps: float):
    """Normalise with two operations on x, and a cast in bf16; on a CPU, torch's rms_norm takes nine."""
    # rms(x) = sqrt(|x|^2 + H eps) / sqrt(H)
    root, floor = H**0.5, torch.tensor((H * eps) ** 0.5, dtype=torch.float64)

    def normalise(x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        return (x / (torch.hypot(length, floor) / root)).to(x.dtype)

    return normalise
