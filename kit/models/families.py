"""What differs between model families: one row per family.

A row names what a decoder layer computes besides projections, attention and feed-forward. To add a family
whose layers differ only in these points, add its row to FAMILIES and its sizes to tests/conftest.py. The
tests compare every family with transformers. recipes/bench/README.md says which families are one row more.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer


@dataclass(frozen=True)
class Family:
    """What differs. Strings name attributes of transformers' modules; None = the family has no such one."""

    layer: type[nn.Module]  # the exact class: a subclass may compute something else
    norm_eps: str = "variance_epsilon"  # of a norm
    norm_offset: float = 0.0  # a norm scales by offset + weight
    after_attention: str | None = None  # norm of what attention adds
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str | None = None  # norm of what the feed-forward adds
    head_norms: tuple[str | None, str | None] = (None, None)  # of q and k, before the rotation
    has_windows: bool = False  # some layers attend to config.sliding_window positions, with another rotation
    activation: str = "hidden_act"  # of the feed-forward, in the config
    embedding_scale: str | None = None  # factor of the embedding's output


FAMILIES = {  # config.model_type -> its row
    "gemma3_text": Family(
        Gemma3DecoderLayer,
        norm_eps="eps",
        norm_offset=1.0,
        activation="hidden_activation",
        after_attention="post_attention_layernorm",
        before_mlp="pre_feedforward_layernorm",
        after_mlp="post_feedforward_layernorm",
        head_norms=("q_norm", "k_norm"),
        has_windows=True,
        embedding_scale="embed_scale",
    ),
    "llama": Family(LlamaDecoderLayer),
    "qwen2": Family(Qwen2DecoderLayer),
    "qwen3": Family(Qwen3DecoderLayer, head_norms=("q_norm", "k_norm")),
}
_EXPERTS = "its feed-forwards are mixtures of experts"
_IMAGES = "it reads images, too"
_LINEAR = "most of its layers have linear attention"
REFUSED = {  # config.model_type -> why a row is not enough
    "gemma2": "its attention caps scores by a tanh",
    "gemma3": f"{_IMAGES}; pass one of the text-only sizes, google/gemma-3-270m-it or google/gemma-3-1b-it",
    "gemma3n": f"{_IMAGES}, and its layers have four residual streams and embeddings of their own",
    "gemma3n_text": "its layers have four residual streams and embeddings of their own",
    "gpt_oss": f"{_EXPERTS}, and its attention has sinks",
    "llama4": f"{_IMAGES}, and {_EXPERTS}",
    "llama4_text": f"{_EXPERTS}, and its attention is in chunks, in some layers without a rotation",
    "mixtral": _EXPERTS,
    "phi3": "it keeps q, k and v in one matrix, and gate and up in another",
    "qwen2_moe": _EXPERTS,
    "qwen3_5": f"{_IMAGES}, and {_LINEAR}",
    "qwen3_5_text": _LINEAR,
    "qwen3_moe": _EXPERTS,
    "qwen3_next": f"{_EXPERTS}, and {_LINEAR}",
    "qwen3_vl": _IMAGES,
    "smollm3": "some of its layers have no rotation",
}


def family_of(config: PreTrainedConfig, name: str = "the model") -> Family:
    """Return a config's family. Raises ValueError for an unknown one."""
    if config.model_type not in FAMILIES:
        why, known = REFUSED.get(config.model_type), f"the kit knows {', '.join(FAMILIES)}"
        if why:
            raise ValueError(f"{name} is a {config.model_type} model, and {why}; {known}: pass one of these")
        raise ValueError(
            f"{name} is a {config.model_type} model; {known} (of Gemma 3, the text-only sizes). Pass one of "
            "these, or add a row to FAMILIES in kit/models/families.py"
        )
    return FAMILIES[config.model_type]


def head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def layer_windows(config: PreTrainedConfig) -> list[int | None]:
    """Return the number of positions that each layer attends to, the query's own included; None = all."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]


def layer_kinds(config: PreTrainedConfig) -> list[str | None]:
    """Return the kind of each layer if kinds have rotations of their own; None for each if they do not."""
    has_kinds = family_of(config).has_windows
    return config.layer_types if has_kinds else [None] * config.num_hidden_layers
