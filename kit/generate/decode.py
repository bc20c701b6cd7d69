"""One token per row through a model's layers, with the keys and values of the tokens before in a cache.

At one token per row a product takes microseconds, and the casts, views and copies between two products take
as long again; on a card each is a kernel. What a layer computes stands in kit/models/layers.py: here it runs
in the fewest kernels, on a CPU in the fewest operators of torch.
"""

from __future__ import annotations

from torch import Tensor

from kit.generate.kv_cache import SlotCache
from kit.models.backbone import by_transformers
from kit.models.families import OTHER, family_of, layer_kinds
from kit.models.joined import joined, siblings
from kit.models.layers import Operations, layer_of, norm_of, rotations, to_sample


def make_decoder(model) -> Decoder | OtherDecoder:
    """Return a model as the sampler runs it after the prompts."""
    return OtherDecoder(model) if family_of(model.config) is OTHER else Decoder(model)


class Decoder:
    """A model of the kit's families."""

    def __init__(self, model, operations: Operations | None = None):
        """operations: None = the sampler's own on the model's device."""
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
            module = layer.attention.attention
            x = x + layer.after(module.o_proj(cache.attend(i, q, module.scaling).flatten(1)))
            x = layer.feed_forward(x, gate_up)
        return self.norm(x)


class OtherDecoder:
    """A model whose layers are transformers' own."""

    def __init__(self, model):
        self.model = model

    def __call__(self, tokens: Tensor, positions: Tensor, cache: SlotCache) -> Tensor:
        """Compute the hidden states (B, H) of tokens (B,) at positions (B,). Call cache.at_decode first."""
        x = self.model.model.embed_tokens(tokens)[:, None]  # (B, 1, H)
        return by_transformers(self.model, x, positions[:, None], cache=cache).squeeze(1)
