"""One token per row through a model's layers, with the keys and values of the tokens before in a cache.

At one token per row a product takes microseconds, and the casts, views and copies between two products take
as long again; on a card each is a kernel. What a layer computes stands in kit/models/layers.py: here it runs
in the fewest kernels, on a CPU in the fewest operators of torch.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kit.generate.kv_cache import SlotCache
from kit.kernels.decode_attention import decode_attention
from kit.models.families import family_of, layer_kinds
from kit.models.joined import joined, siblings
from kit.models.layers import Operations, layer_of, norm_of, rotations, to_sample


class Decoder:
    """A model as the sampler runs it after the prompts."""

    def __init__(self, model, operations: Operations | None = None):
        """operations: None = the sampler's own on the model's device.

        Raises ValueError for an unknown family, whose layers may compute more than the kit's.
        """
        operations = operations or to_sample(model.get_input_embeddings().weight.device)
        self.model, self.kinds = model, layer_kinds(model.config)
        self.layers = [layer_of(layer, operations) for layer in model.model.layers[: len(self.kinds)]]
        self.norm = norm_of(model.model.norm, family_of(model.config), operations)
        # of each layer: those of q, k and v, and those of gate and up, if they are side by side
        self.joined = [[joined(group) for group in siblings(layer)] for layer in model.model.layers]

    def __call__(self, tokens: Tensor, positions: Tensor, cache: SlotCache) -> Tensor:
        """Compute the hidden states (B, H) of tokens (B,) at positions (B,). Call cache.at_decode first."""
        x = self.model.model.embed_tokens(tokens)  # (B, H)
        angles = {
            kind: (cos.squeeze(1), sin.squeeze(1))  # (B, D)
            for kind, (cos, sin) in rotations(self.model, x, positions[:, None]).items()
        }
        for i, (layer, kind) in enumerate(zip(self.layers, self.kinds, strict=True)):
            qkv, gate_up = self.joined[i]
            q, k, v = layer.attention.heads(layer.before(x), *angles[kind], qkv)
            cache.write(i, k, v)
            x = x + layer.after(_attend(i, layer.attention.attention, q, cache))
            x = layer.feed_forward(x, gate_up)
        return self.norm(x)


def _attend(i: int, attention: nn.Module, q: Tensor, cache: SlotCache) -> Tensor:
    """Compute the output of a layer's attention, (B, H), from its queries (B, Hq, D)."""
    scale = attention.scaling
    if cache.uses_kernel:
        attended = decode_attention(q, *cache.rows(i), scale=scale)
    elif q.is_cuda:
        # not with cuDNN's attention, which compiles a plan per length and number of rows
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            attended = _attend_under_mask(q, *cache.rows(i), scale)
    else:
        attended = _attend_under_mask(q, *cache.rows(i), scale)
    return attention.o_proj(attended.flatten(1))


def _attend_under_mask(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Compute attention of q (B, Hq, D) to keys and values (B, Hkv, places, D) with torch."""
    # the query heads of a group are rows of one small matrix, so that K and V are read once
    q = q.unflatten(1, (keys.shape[1], -1))  # (B, Hkv, Hq / Hkv, D)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)
