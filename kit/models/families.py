"""What differs between model families: one row per family."""

from __future__ import annotations

from dataclasses import dataclass

from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

FAMILIES = ("gemma3_text", "llama", "qwen2")  # config.model_type


def _check_family(config, name: str) -> None:
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"{name} is a {config.model_type} model; the kit knows {', '.join(FAMILIES)} (of Gemma 3, the text-only sizes)"
        )


def head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def layer_windows(config) -> list[int | None]:
    """Positions that each layer attends to, its own included; None = all."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]


@dataclass(frozen=True)
class Norms:
    """Which of a layer's norms stands where; None: there is none."""

    after_attention: str | None
    before_mlp: str
    after_mlp: str | None


LAYERS = {  # exact classes: a subclass may compute something else
    Gemma3DecoderLayer: Norms("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    LlamaDecoderLayer: Norms(None, "post_attention_layernorm", None),
    Qwen2DecoderLayer: Norms(None, "post_attention_layernorm", None),
}
