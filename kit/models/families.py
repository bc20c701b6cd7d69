"""What differs between model families: one row per family.

A row names what a decoder layer computes besides projections, attention and feed-forward. To add a family
whose layers differ only in these points, add its row to FAMILIES and its sizes to tests/conftest.py. The
tests compare every family with transformers. recipes/bench/README.md says which families are one row more.

The layers of every other family are computed by transformers, with the kit's attention in them
(kit/models/other_families.py): slower, and in more memory. OTHER stands for all of these.
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

    layer: type[nn.Module] | None  # the exact class, as a subclass may compute something else; None = any
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
OTHER = Family(None)

SIZES = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size")
SIZES += ("intermediate_size", "max_position_embeddings", "vocab_size")  # that plans and caches need
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # where configs count
MOVING = {"dynamic", "longrope"}  # rotations that depend on the longest text of a pack


def family_of(config: PreTrainedConfig, name: str = "the model") -> Family:
    """Return a config's family. Raises ValueError for one that the kit cannot run, with the reason."""
    if config.model_type in FAMILIES:
        return FAMILIES[config.model_type]
    if why := _obstacle(config):
        raise ValueError(
            f"{name} is a {config.model_type} model, and {why}; the kit runs dense decoders of text: pass "
            f"one of {', '.join(FAMILIES)} (of Gemma 3, google/gemma-3-270m-it or google/gemma-3-1b-it)"
        )
    return OTHER


def _obstacle(config: PreTrainedConfig) -> str:
    """Return why the kit cannot run a model of another family; "" if its config shows no reason."""
    kinds = {*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    rotation = getattr(config, "rope_parameters", None) or {}
    # with "alpha", as Hunyuan has it, a dynamic rotation is the same for every text
    parameters = [each for each in (rotation, *rotation.values()) if isinstance(each, dict)]
    rotations = {each.get("rope_type") for each in parameters if not each.get("alpha")}
    missing = [size for size in SIZES if not isinstance(getattr(config, size, None), int)]
    if config.sub_configs:
        return "it reads images or sound, too"
    if any(getattr(config, count, None) for count in EXPERTS):
        return "its feed-forwards are mixtures of experts"
    if kinds:
        return f"some of its layers are {' and '.join(sorted(kinds))}"
    if getattr(config, "attn_logit_softcapping", None):
        return "its attention caps scores by a tanh"
    if moving := rotations & MOVING:
        return f"its rotation, {moving.pop()}, depends on the longest text that is read with it"
    return f"its config has no single {missing[0]}" if missing else ""


def head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def layer_windows(config: PreTrainedConfig) -> list[int | None]:
    """Return the number of positions that each layer attends to, the query's own included; None = all."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def layer_kinds(config: PreTrainedConfig) -> list[str | None]:
    """Return the kind of each layer if kinds have rotations of their own; None for each if they do not."""
    has_kinds = family_of(config).has_windows
    return config.layer_types if has_kinds else [None] * config.num_hidden_layers
