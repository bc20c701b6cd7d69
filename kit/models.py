"""Models: load one with its tokenizer, run its backbone over a pack, reach its head."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedModel, PreTrainedTokenizerBase

from kit.attention import attention_name
from kit.packing import PackedBatch
from kit.toy import SHIPPED

FAMILIES = ("gemma3_text", "llama", "qwen2")  # config.model_type
transformers.logging.disable_progress_bar()  # weights load in seconds; the hub client keeps its own bar for downloads


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device | str) -> torch.dtype:
    """bf16 on a card; fp32 on a CPU, where bf16 matmuls are several times slower."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def load(
    name: str, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, attention: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer from "tiny" or "tinier", a hub id, a local folder, or a GGUF file (which is dequantised).

    A folder of adapters is loaded with its base: in NF4 those that the kit trained so (kit.qlora), plain all others
    (kit.adapters).

    attention: one of kit.attention.CHOICES. Raises ValueError for a path that is not there, for a family whose attention we do
    not know, and for an attention that cannot run here.
    """
    device = torch.device(device or default_device())
    dtype = dtype or default_dtype(device)
    path = SHIPPED.get(name, Path(name))
    if name.endswith(".gguf") or name.startswith((".", "/", "~")):
        path = path.expanduser()
        if not path.exists():
            raise ValueError(f"model is {name} but nothing is there; pass a hub id, a folder or a .gguf file that exists")
    if (path / "adapter_config.json").is_file():
        from kit import adapters  # which loads the base from here

        return adapters.load(path, device=device, dtype=dtype, attention=attention)
    if path.suffix == ".gguf":
        model, tokenizer = _load_gguf(path, dtype, device, attention)
    else:
        where = str(path) if path.is_dir() else name
        config = _config(where)
        _check_family(config, name)
        kind = attention_name(attention, config, device=device, dtype=dtype)
        model = AutoModelForCausalLM.from_pretrained(where, config=config, dtype=dtype, attn_implementation=kind)
        tokenizer = AutoTokenizer.from_pretrained(where)
    check_end_of_text(tokenizer, name)
    return model.to(device).eval(), tokenizer


def load_to_train(name: str, *, qlora_rank: int = 0, seed: int = 0, **where) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As load; with qlora_rank > 0 an NF4 copy with fresh adapters of that rank, drawn by `seed`. where: as load's.

    Raises ValueError for adapters that the kit did not train, too: a checkpoint has no place for another base than NF4.
    """
    if not qlora_rank:
        model, tokenizer = load(name, **where)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                f"{name} holds adapters that the kit did not train: they can be evaluated but not trained further; merge them "
                "with peft's merge_and_unload and train the result"
            )
        return model, tokenizer
    from kit import qlora  # bitsandbytes and peft take seconds to import

    return qlora.load(name, rank=qlora_rank, seed=seed, **where)


def _config(where: str):
    try:
        return AutoConfig.from_pretrained(where)
    except OSError as error:
        raise ValueError(
            f"model is {where} but it is neither a local folder nor a model the hub gave us; check the name and the network; "
            "for gated models (Gemma, Llama) accept the licence on its page and log in with `hf auth login`; for adapters on the "
            f"hub pass their folder (hf download {where} --local-dir DIR)\n{error}"
        ) from error


def check_end_of_text(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {name} names no end-of-text token; set eos_token in its tokenizer_config.json")


def _check_family(config, name: str) -> None:
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"{name} is a {config.model_type} model; the kit knows {', '.join(FAMILIES)} (of Gemma 3, the text-only sizes)"
        )


def _load_gguf(path: Path, dtype: torch.dtype, device: torch.device, attention: str):
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
    kind = attention_name(attention, config, device=device, dtype=dtype)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=kind)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in packed.state_dict().items()}, assign=True)
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model, tokenizer


def context_length(model: PreTrainedModel) -> int:
    """Tokens the model was made for: prompt and response together."""
    return model.config.max_position_embeddings


def hidden_states(
    model: PreTrainedModel, batch: PackedBatch, *, inputs_embeds: torch.Tensor | None = None, cache: Cache | None = None
) -> torch.Tensor:
    """The backbone's last hidden states of a pack, (T, H). The head is not applied.

    inputs_embeds (1, T, H): what the embedding makes of batch.input_ids; None = look it up. cache: takes every layer's keys and
    values; None = they are dropped.
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
