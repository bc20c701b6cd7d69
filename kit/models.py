"""Models: load one with its tokenizer, run its backbone over a pack, reach its head.

Attention goes in through transformers' own registry under the name "kit". It serves two callers: a pack, known by the
keyword arguments cu_seqlens and max_seqlen, and the sampler, known by a mask of its own. Anything else is refused: a
pack read as one sequence would let its documents see each other without a word.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kit.kernels.packed_attention import packed_attention
from kit.packing import PackedBatch
from kit.toy import TINY

FAMILIES = ("gemma3_text", "llama", "qwen2")  # config.model_type
ATTENTION = "kit"


def _attention(module, query, key, value, attention_mask, *, scaling=None, sliding_window=None, cu_seqlens=None,
               max_seqlen=None, dropout=0.0, **_):  # fmt: skip
    """transformers' attention interface: query (B, Hq, Tq, D), key and value (B, Hkv, Tk, D) -> (B, Tq, Hq, D), None."""
    if dropout:
        raise ValueError(
            f"attention dropout is {dropout} but a pack's attention has none; set attention_dropout to 0 in the config"
        )
    if cu_seqlens is not None:
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        window = sliding_window if getattr(module, "is_sliding", True) else None
        return packed_attention(q, k, v, cu_seqlens, max_seqlen, window=window, scale=scaling).unsqueeze(0), None
    if attention_mask is None:
        raise ValueError(
            "this model was loaded for packs; run it with kit.models.hidden_states or kit.generate, or call "
            'model.set_attn_implementation("sdpa") before using it on its own'
        )
    B, Hq, Tq, D = query.shape
    Hkv = key.shape[1]
    if Tq == 1 and Hq != Hkv:  # the queries of a group are the rows of one small matrix: K and V are read once, not repeated
        out = F.scaled_dot_product_attention(query.reshape(B, Hkv, Hq // Hkv, D), key, value, attn_mask=attention_mask,
                                             scale=scaling)  # fmt: skip
        return out.reshape(B, 1, Hq, D), None
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=Hq != Hkv)
    return out.transpose(1, 2), None


def _no_mask(*args, **kwargs) -> None:
    """A pack needs no mask: its boundaries travel as keyword arguments."""


transformers.logging.disable_progress_bar()  # weights load in seconds; the hub client keeps its own bar for downloads
AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device | str) -> torch.dtype:
    """bf16 on a card; fp32 on a CPU, where bf16 matmuls are several times slower."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def load(
    name: str, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer from "tiny", a hub id, a local folder, or a GGUF file (which is dequantised).

    Raises ValueError for a path that is not there and for a family whose attention we do not know.
    """
    device = torch.device(device or default_device())
    dtype = dtype or default_dtype(device)
    path = TINY if name == "tiny" else Path(name)
    if name.endswith(".gguf") or name.startswith((".", "/", "~")):
        path = path.expanduser()
        if not path.exists():
            raise ValueError(f"model is {name} but nothing is there; pass a hub id, a folder or a .gguf file that exists")
    if path.suffix == ".gguf":
        model, tokenizer = _load_gguf(path, dtype)
    else:
        where = str(path) if path.is_dir() else name
        config = _config(where)
        _check_family(config, name)
        model = AutoModelForCausalLM.from_pretrained(where, config=config, dtype=dtype, attn_implementation=ATTENTION)
        tokenizer = AutoTokenizer.from_pretrained(where)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {name} names no end-of-text token; set eos_token in its tokenizer_config.json")
    return model.to(device).eval(), tokenizer


def _config(where: str):
    try:
        return AutoConfig.from_pretrained(where)
    except OSError as error:
        raise ValueError(
            f"model is {where} but it is neither a local folder nor a model the hub gave us; check the name and the network; "
            f"for gated models (Gemma, Llama) accept the licence on its page and log in with `hf auth login`\n{error}"
        ) from error


def _check_family(config, name: str) -> None:
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"{name} is a {config.model_type} model; the kit knows {', '.join(FAMILIES)} (of Gemma 3, the text-only sizes)"
        )


def _load_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    loader = logging.getLogger("transformers.quantizers.quantizer_gguf")
    level = loader.level
    loader.setLevel(logging.ERROR)  # it warns that the weights are dequantised, which is what we ask for
    try:
        packed = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    finally:
        loader.setLevel(level)
    config = packed.config
    _check_family(config, path.name)
    if hasattr(config, "quantization_config"):
        del (
            config.quantization_config
        )  # the weights are plain by now, and a model marked quantised can be neither trained nor saved
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in packed.state_dict().items()}, assign=True)
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model, tokenizer


def checkpoint_layers(model: PreTrainedModel, on: bool) -> None:
    """Keep only each layer's input for the backward pass and compute the rest again, or stop doing so."""
    old, new = ("gradient_checkpointing_enable", "activation_checkpointing_enable") if on else (
        "gradient_checkpointing_disable", "activation_checkpointing_disable")  # fmt: skip
    switch = getattr(model, new, None) or getattr(model, old)  # renamed in transformers 5.2x
    switch({"use_reentrant": False}) if on else switch()


def context_length(model: PreTrainedModel) -> int:
    """Tokens the model was made for: prompt and response together."""
    return model.config.max_position_embeddings


def hidden_states(model: PreTrainedModel, batch: PackedBatch) -> torch.Tensor:
    """The backbone's last hidden states of a pack, (T, H). The head is not applied."""
    output = model.model(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        cu_seqlens=batch.cu_seqlens,
        max_seqlen=batch.max_seqlen,
    )
    return output.last_hidden_state[0]


def head_weight(model: PreTrainedModel) -> torch.Tensor:
    """The head's weight, (V, H); one parameter with the embedding where they are tied."""
    return model.get_output_embeddings().weight


def softcap(model: PreTrainedModel) -> float | None:
    """logits -> softcap * tanh(logits / softcap), where the family has it."""
    return getattr(model.config, "final_logit_softcapping", None)


def next_token_logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits (..., V) in fp32 of hidden states (..., H): the sampler's view of the head."""
    logits = F.linear(hidden, head_weight(model)).float()
    cap = softcap(model)
    return logits if cap is None else cap * torch.tanh(logits / cap)
