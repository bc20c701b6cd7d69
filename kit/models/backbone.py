"""A model in two parts: the backbone, which turns a packed row into hidden states, and the head after it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import Cache, PreTrainedModel

from kit.packing import PackedBatch


def context_length(model: PreTrainedModel) -> int:
    """Return the number of tokens the model was trained for, prompt and response together."""
    return model.config.max_position_embeddings


def hidden_states(
    model: PreTrainedModel,
    batch: PackedBatch,
    *,
    inputs_embeds: torch.Tensor | None = None,
    cache: Cache | None = None,
) -> torch.Tensor:
    """Compute the backbone's last hidden states of a packed row, (T, H), without the head.

    Attention learns from cu_seqlens and max_seqlen where the documents begin and end
    (kit/models/attention.py), so no mask is passed.

    inputs_embeds: the embeddings of batch.input_ids, (1, T, H); None = look them up. cache: stores the keys
    and values of every layer; None = they are not kept.
    """
    output = model.model(
        input_ids=batch.input_ids[None] if inputs_embeds is None else None,
        inputs_embeds=inputs_embeds,
        position_ids=batch.position_ids[None],
        past_key_values=cache,
        use_cache=cache is not None,
        cu_seqlens=batch.cu_seqlens,
        max_seqlen=batch.max_seqlen,
    )
    return output.last_hidden_state[0]


def head_weight(model: PreTrainedModel) -> torch.Tensor:
    """Return the head's weight, (V, H). If it is tied to the embedding, this is the embedding's parameter."""
    return model.get_output_embeddings().weight


def softcap(model: PreTrainedModel) -> float | None:
    """Return c if the model caps its logits as c * tanh(logits / c), None if it does not."""
    return getattr(model.config, "final_logit_softcapping", None)


def next_token_logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Compute the logits of hidden states (..., H), as (..., V) in fp32, for sampling."""
    logits = F.linear(hidden, head_weight(model)).float()
    cap = softcap(model)
    return logits if cap is None else cap * torch.tanh(logits / cap)
