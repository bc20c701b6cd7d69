"""Families that the kit has no layers for: transformers computes them, with the kit's attention and loss.

    layers  transformers' modules, norms, rotations and gates included, in as many operators as they have
    attention, cache, loss, head, optimizer, adapters  the kit's, as for its own families

Nothing tells in advance whether a family's layers pass on what a pack needs, and whether its logits are the
product of hidden states and head. So a model is checked on a few tokens when it is loaded, for QLoRA before
its weights are quantised.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from kit.models.backbone import by_transformers, hidden_states, next_token_logits
from kit.models.families import FAMILIES, OTHER, family_of, head_dim, layer_windows
from kit.packing import Document, PackedBatch

LENGTHS = (11, 5)  # tokens of the two documents that a model is checked on
FP32_ERROR = 2**-12  # relative error of a part in fp32: 33 times the largest that was measured, 7.3e-6


def check_parts(model: PreTrainedModel, name: str = "the model") -> None:
    """Say who computes the layers, and check that the model has the parts that the kit uses.

    It works without weights, so plans run it too. Returns at once for FAMILIES. Raises ValueError for a part
    that is missing, and for one that computes more than the kit does in its place.
    """
    if family_of(model.config, name) is not OTHER:
        return
    _announce(model.config.model_type)
    if why := _odd_part(model):
        raise ValueError(
            f"{name} is a {model.config.model_type} model, and {why}; pass one of {', '.join(FAMILIES)}"
        )


def _odd_part(model: PreTrainedModel) -> str:
    """Return what is missing or computes more; "" if nothing does."""
    head = model.get_output_embeddings()
    if head is None or head.bias is not None:
        return "its head has a bias" if head else "it has no head"
    backbone = getattr(model, "model", None)
    for part in ("embed_tokens", "layers", "norm", "rotary_emb"):
        if not hasattr(backbone, part):
            return f"it has no model.{part}"
    if not all(hasattr(layer, "self_attn") for layer in backbone.layers):
        return "some of its layers have no self_attn"
    if type(backbone.embed_tokens) is not nn.Embedding:  # the head adds a lookup's gradient by itself
        return f"its embedding is a {type(backbone.embed_tokens).__name__}"
    return ""


@cache
def _announce(kind: str) -> None:
    """Warn once per family, however often its models are loaded."""
    warnings.warn(
        f"transformers computes the layers of a {kind} model: the kit has its own for "
        f"{', '.join(FAMILIES)}. Attention and loss are the kit's; norms, rotations and feed-forwards are "
        "slower, take more memory, and cannot use --tile_tokens",
        stacklevel=3,
    )


def check(model: PreTrainedModel, name: str) -> None:
    """Compare the model as the kit runs it with transformers' own forward. Return at once for FAMILIES.

    The kit reads two documents as one pack, and the last token of one through a cache. Raises ValueError as
    check_parts does, if an attention, a layer or the logits differ by more than rounding, or if the model
    cannot be run so.
    """
    if family_of(model.config, name) is not OTHER:
        return
    check_parts(model, name)
    kind, known = f"{name} is a {model.config.model_type} model", ", ".join(FAMILIES)
    try:
        errors = _errors(model)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{kind}, which cannot be run in packs: {error}\nPass one of {known}") from error
    # Measured in bf16 on a CPU, a part of Gemma-3-270M and of SmolLM2-135M rounds by up to 2 eps. Parts that
    # compute in fp32 round by that even if the model is in float64.
    allowed = max(6 * torch.finfo(model.get_output_embeddings().weight.dtype).eps, FP32_ERROR)
    if wrong := [error for error in errors if not error <= allowed]:
        raise ValueError(
            f"{kind}, whose attention or logits are {100 * max(wrong):.3g}% away from transformers' if the "
            f"kit computes them: the family does something else there; pass one of {known}"
        )


def _documents(model: PreTrainedModel) -> list[Tensor]:
    V = model.config.vocab_size
    ids = torch.arange(sum(LENGTHS)) * 7_919 % (V - 1) + 1  # spread over the vocabulary, without a start
    return list(ids.split(LENGTHS))


@torch.no_grad()
def _errors(model: PreTrainedModel) -> list[float]:
    """Return the kit's relative errors: of every attention, every layer, and the logits.

    Each part gets what transformers computed before it. Otherwise rounding would grow from layer to layer: in
    bf16 the last logits of a token step of Gemma-3-270M, by transformers alone, are 7.9% away from those of
    the whole text (16 tokens on a CPU).
    """
    device = model.get_input_embeddings().weight.device
    first, second = (ids.to(device) for ids in _documents(model))
    parts = _Parts(model)
    ours = model.config._attn_implementation
    model.set_attn_implementation("eager")  # each family's own attention
    try:
        with parts.hooked(parts.keep):
            logits = torch.cat([model(ids[None], use_cache=False).logits[0] for ids in (first, second)])
    finally:
        model.set_attn_implementation(ours)

    def pack(*documents: Tensor) -> PackedBatch:
        return PackedBatch.build([Document(ids.cpu(), 1) for ids in documents]).to(device)

    cache, last = _OneText(model.config), len(first) - 1
    with parts.hooked(parts.compare):
        packed = hidden_states(model, pack(first, second))
    with parts.hooked(partial(parts.compare, places=slice(last))):
        hidden_states(model, pack(first[:-1]), cache=cache)
    with parts.hooked(partial(parts.compare, places=slice(last, last + 1))):
        x = model.get_input_embeddings()(first[None, -1:])
        step = by_transformers(model, x, torch.full((1, 1), last, device=device), cache=cache)[0, 0]
    results = ((packed, logits), (step, logits[last]))
    return parts.errors + [_error(next_token_logits(model, hidden), truth) for hidden, truth in results]


def _error(found: Tensor, truth: Tensor) -> float:
    error = (found - truth).norm()
    return (error / truth.norm()).item() if error else 0.0  # also if both are zero


class _Parts:
    """The attentions and layers of a model: what transformers computes there, and the kit's errors."""

    def __init__(self, model: PreTrainedModel):
        parts = (part for layer in model.model.layers for part in (layer.self_attn, layer))
        # (1, T, H) of each document
        self.outputs: dict[nn.Module, list[Tensor]] = {part: [] for part in parts}
        self.errors: list[float] = []

    @contextmanager
    def hooked(self, hook: Callable) -> Iterator[None]:
        handles = [part.register_forward_hook(hook) for part in self.outputs]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def keep(self, part: nn.Module, args: tuple, out: Tensor | tuple) -> None:
        self.outputs[part].append(out[0] if isinstance(out, tuple) else out)

    def compare(self, part: nn.Module, args: tuple, out: Tensor | tuple, places: slice = slice(None)):
        """Compare an output with transformers' at these places, and go on with transformers'."""
        truth = torch.cat(self.outputs[part], dim=1)[:, places]
        self.errors.append(_error(out[0] if isinstance(out, tuple) else out, truth))
        return (truth, *out[1:]) if isinstance(out, tuple) else truth


class _OneText:
    """The keys and values of one text: of kit.generate.kv_cache.SlotCache, what a check needs."""

    def __init__(self, config: PreTrainedConfig):
        self.windows = layer_windows(config)
        self.shape = config.num_key_value_heads, head_dim(config)
        self.held: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys and values, (T, Hkv, D)

    def store(self, layer: int, keys: Tensor, values: Tensor) -> None:
        if not keys.shape[1:] == values.shape[1:] == self.shape:
            raise ValueError(
                f"keys and values of a token are {tuple(keys.shape[1:])} and {tuple(values.shape[1:])}, and "
                f"its config says {self.shape}"
            )
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
