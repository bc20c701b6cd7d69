"""A model in two parts: the backbone, which turns a packed row into hidden states, and the head after it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from kit.models.attention import BY_NAME
from kit.models.families import OTHER, family_of, layer_kinds
from kit.models.layers import FUSED, layer_of, norm_of, rotations, to_sample
from kit.packing import PackedBatch


def context_length(model: PreTrainedModel) -> int:
    """Return the number of tokens the model was trained for, prompt and response together."""
    return model.config.max_position_embeddings


def hidden_states(
    model: PreTrainedModel,
    batch: PackedBatch,
    *,
    inputs_embeds: torch.Tensor | None = None,
    cache=None,
) -> torch.Tensor:
    """Compute the backbone's last hidden states of a packed row, (T, H), without the head.

    kit/models/layers.py holds what a layer of the kit's families computes. Attention learns from cu_seqlens
    and max_seqlen where the documents begin and end, so there is no mask.

    inputs_embeds: the embeddings of batch.input_ids, (1, T, H); None = look them up. cache: a
    kit.generate.kv_cache.SlotCache, which stores the keys and values of every layer; None = none does.
    """
    backbone, family = model.model, family_of(model.config)
    x = backbone.embed_tokens(batch.input_ids[None]) if inputs_embeds is None else inputs_embeds
    arguments = {"cu_seqlens": batch.cu_seqlens, "max_seqlen": batch.max_seqlen, "cache": cache}
    if family is OTHER:
        return by_transformers(model, x, batch.position_ids[None], **arguments).squeeze(0)
    angles = rotations(model, x, batch.position_ids[None])
    operations = FUSED if cache is None else to_sample(x.device)
    for layer, kind in zip(backbone.layers, layer_kinds(model.config), strict=False):
        # kit.train.recompute goes in through the layer of transformers
        recomputes = layer.training and layer.gradient_checkpointing
        compute = layer if recomputes else layer_of(layer, operations)
        x = compute(x, position_embeddings=angles[kind], **arguments)
    return norm_of(backbone.norm, family, operations)(x).squeeze(0)


def by_transformers(model: PreTrainedModel, x: torch.Tensor, position_ids: torch.Tensor, **arguments):
    """Compute the last hidden states of embeddings x (B, T, H) with transformers' own layers.

    Where the family scales its logits (Granite, Cohere), the hidden states are scaled instead.
    arguments: of the kit's attention, which they pass on. Raises ValueError if the model has another one.
    """
    kind = model.config._attn_implementation
    if kind not in BY_NAME:
        raise ValueError(
            f"the model's attention is {kind}, which would let the documents of a pack see each other; load "
            "the model with kit.models.load"
        )
    how = {"use_cache": False, "return_dict": True}
    run = model.model(inputs_embeds=x, position_ids=position_ids, **how, **arguments)
    scale = getattr(model.config, "logit_scale", 1.0) / getattr(model.config, "logits_scaling", 1.0)
    return run.last_hidden_state if scale == 1 else run.last_hidden_state * scale


def head_weight(model: PreTrainedModel) -> torch.Tensor:
    """Return the head's weight, (V, H). If it is tied to the embedding, this is the embedding's parameter."""
    return model.get_output_embeddings().weight


def softcap(model: PreTrainedModel) -> float | None:
    """Return c if the model caps its logits as c * tanh(logits / c), None if it does not."""
    return getattr(model.config, "final_logit_softcapping", None)


def next_token_logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Compute the logits (..., V) of hidden states (..., H), in the head's dtype, or in fp32 if capped."""
    logits, cap = F.linear(hidden, head_weight(model)), softcap(model)
    return logits if cap is None else cap * torch.tanh(logits.float() / cap)
