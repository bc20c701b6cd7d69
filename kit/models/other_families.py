"""Families that the kit has no layers for: transformers computes them, with the kit's attention and loss.

    layers  transformers' modules, norms, rotations and gates included, in as many operators as they have
    attention, cache, loss, head, optimizer, adapters  the kit's, as for its own families

Nothing tells in advance whether a family's layers pass on what a pack needs, and whether its logits are the
product of hidden states and head. So a model is checked on a few tokens when it is loaded.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from kit.models.backbone import by_transformers, hidden_states, next_token_logits
from kit.models.families import FAMILIES, OTHER, family_of, layer_windows
from kit.packing import Document, PackedBatch

LENGTHS = (11, 5)  # tokens of the two documents that a model is checked on


def announce(config: PreTrainedConfig) -> None:
    """Warn, once per family, if a model's layers are transformers'."""
    if family_of(config) is OTHER:
        _warn_of(config.model_type)


@cache
def _warn_of(model_type: str) -> None:
    warnings.warn(
        f"transformers computes the layers of a {model_type} model: the kit has its own for "
        f"{', '.join(FAMILIES)}. Attention and loss are the kit's; norms, rotations and feed-forwards are "
        "slower, take more memory, and have no tiles",
        stacklevel=3,
    )


def check(model: PreTrainedModel, name: str) -> None:
    """Compare the model as the kit runs it with transformers' own forward. Return at once for FAMILIES.

    The kit reads two documents as one pack, and the last token of one through a cache. Raises ValueError if
    the logits differ by more than rounding, or if the model cannot be run so.
    """
    if family_of(model.config, name) is not OTHER:
        return
    announce(model.config)
    try:
        embedding = model.model.embed_tokens
        if type(embedding) is not nn.Embedding:  # the head adds a lookup's gradient by itself
            raise TypeError(f"its embedding is a {type(embedding).__name__}")
        pack, step = _logits(model)
        expected = _expected(model)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name} is a {model.config.model_type} model, which cannot be run in packs: {error}\n"
            f"Pass one of {', '.join(FAMILIES)}"
        ) from error
    allowed = torch.finfo(expected.dtype).eps ** 0.5  # far above rounding, far below another computation
    for found, truth in ((pack, expected), (step, expected[LENGTHS[0] - 1])):
        error = ((found - truth).norm() / truth.norm()).item()
        if not error <= allowed:
            raise ValueError(
                f"{name} is a {model.config.model_type} model, whose logits are {error:.1%} away from "
                "transformers' if the kit computes attention and head: the family does something else there; "
                f"pass one of {', '.join(FAMILIES)}"
            )


def _documents(model: PreTrainedModel) -> list[Tensor]:
    V = model.config.vocab_size
    ids = torch.arange(sum(LENGTHS)) * 7_919 % (V - 1) + 1  # spread over the vocabulary, without a start
    return list(ids.split(LENGTHS))


@torch.no_grad()
def _logits(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Return the kit's logits: (T, V) of a pack of the documents, (V,) of the first one's last token."""
    first, second = _documents(model)
    device = model.get_input_embeddings().weight.device

    def pack(*documents: Tensor) -> PackedBatch:
        return PackedBatch.build([Document(ids, 1) for ids in documents]).to(device)

    cache, last = _OneText(model.config), len(first) - 1
    hidden_states(model, pack(first[:-1]), cache=cache)
    x = model.get_input_embeddings()(first[None, -1:].to(device))
    step = by_transformers(model, x, torch.full((1, 1), last, device=device), cache=cache)[0, 0]
    return next_token_logits(model, hidden_states(model, pack(first, second))), next_token_logits(model, step)


@torch.no_grad()
def _expected(model: PreTrainedModel) -> Tensor:
    """Return transformers' logits of each document alone, (T, V)."""
    ours = model.config._attn_implementation
    model.set_attn_implementation("eager")  # each family's own attention
    try:
        device = model.get_input_embeddings().weight.device
        return torch.cat([model(ids[None].to(device)).logits[0] for ids in _documents(model)])
    finally:
        model.set_attn_implementation(ours)


class _OneText:
    """The keys and values of one text: of kit.generate.kv_cache.SlotCache, what a check needs."""

    def __init__(self, config: PreTrainedConfig):
        self.windows = layer_windows(config)
        self.held: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys and values, (T, Hkv, D)

    def store(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self.held[layer] = keys, values

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        held_keys, held_values = self.held[layer]
        self.held[layer] = torch.cat([held_keys, keys]), torch.cat([held_values, values])

    def attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """Attend from the last token's queries (1, Hq, D) to the text, as far as the layer's window."""
        seen = slice(-(self.windows[layer] or sum(LENGTHS)), None)
        keys, values = (x[seen].transpose(0, 1) for x in self.held[layer])  # (Hkv, T, D)
        grouped = q.reshape(len(keys), -1, q.shape[2])  # (Hkv, Hq / Hkv, D)
        weights = (grouped @ keys.mT * scale).float().softmax(-1).to(q.dtype)
        return (weights @ values).flatten(0, 1)[None]
