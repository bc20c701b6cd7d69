"""Write a model as one GGUF file, the format of llama.cpp and Ollama.

A file holds metadata (the sizes, the tokenizer with its chat template) and tensors. The `gguf` library knows
the format and the names; this file knows how a family's weights differ there from transformers':

    llama     the rows of q and k that are rotated together lie side by side, not half a head apart
    gemma3    a norm's weight includes the 1 that transformers adds
    all       a head that is tied to the embedding is not stored; one-dimensional tensors are fp32

A reader of GGUF takes some settings from the family alone, such as which layers have a window. A model whose
config says otherwise is refused: it would be read as another model. Llama 3.2's scaled rotation is a tensor
of factors, which llama.cpp reads and transformers (5.23) ignores; `restore_rotation` serves kit.models.load.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kit.models.families import head_dim
from kit.models.gguf_tokenizer import Vocabulary
from kit.progress import Progress

KINDS = ("q8_0", "f16", "bf16")  # of the matrices; more bits are left to other programs' finer formats
BLOCK, BLOCK_BYTES = 32, 34  # of q8_0: 32 weights share an fp16 scale
ROPE_FACTORS = "rope_freqs.weight"  # by which each frequency of the rotation is divided
LLAMA3 = {  # what Llama 3.1 and 3.2 have in common; their factor is the largest in the file
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Layout:
    """How a family is stored, and what a reader of GGUF takes for granted. To add one, add its row."""

    name: str  # of the architecture in GGUF
    norm_offset: float = 0.0  # the weight of a norm is stored with it added
    pairs_rows: bool = False  # rows of q and k that are rotated together lie side by side
    scales_rotation: bool = False  # by the factors of Llama 3; otherwise only the plain rotation is known
    full_every: int = 0  # each so many-th layer attends to everything, the others to a window; 0 = all do
    window_theta: float = 0.0  # base of the rotation in layers with a window


LAYOUTS = {  # config.model_type -> its row
    "gemma3_text": Layout("gemma3", norm_offset=1.0, full_every=6, window_theta=10_000.0),
    "llama": Layout("llama", pairs_rows=True, scales_rotation=True),
    "qwen2": Layout("qwen2"),
    "qwen3": Layout("qwen3"),
}


def check_exportable(config: PreTrainedConfig, name: str) -> Layout:
    """Return the layout of a model. Raises ValueError if a reader of GGUF would read another model."""
    if config.model_type not in LAYOUTS:
        raise ValueError(
            f"{name} is a {config.model_type} model but a GGUF file is written of {', '.join(LAYOUTS)}; "
            "leave out --gguf, or add a row to LAYOUTS in kit/models/gguf_file.py"
        )
    layout, rotation = LAYOUTS[config.model_type], _rotation(config)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    every = layout.full_every
    expected = [
        "sliding_attention" if every and (place + 1) % every else "full_attention"
        for place in range(config.num_hidden_layers)
    ]
    softcap = getattr(config, "final_logit_softcapping", None)
    fixed = {"layer_types": (kinds, expected), "softcap": (softcap, None)}
    fixed |= {bias: (getattr(config, bias, None) or False, False) for bias in ("attention_bias", "mlp_bias")}
    kind, types = rotation["rope_type"], ("default", "llama3") if layout.scales_rotation else ("default",)
    fixed["rope_type"] = (kind, kind if kind in types else types)
    if every:
        fixed["query_pre_attn_scalar"] = (config.query_pre_attn_scalar, head_dim(config))
        local = config.rope_parameters["sliding_attention"]
        fixed["rope_theta of layers with a window"] = (local["rope_theta"], layout.window_theta)
        fixed["rope_type of layers with a window"] = (local["rope_type"], "default")
    for setting, (found, known) in fixed.items():
        if found != known:
            raise ValueError(
                f"{setting} of {name} is {found} but GGUF's {layout.name} has {known}, so a reader of the "
                "file would compute something else; leave out --gguf"
            )
    return layout


def _rotation(config: PreTrainedConfig) -> dict:
    """Return the parameters of the rotation, of layers that attend to everything."""
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def file_bytes(num_weights: int, kind: str) -> int:
    """Return about how many bytes a file takes, without its vocabulary."""
    return num_weights * BLOCK_BYTES // BLOCK if kind == "q8_0" else 2 * num_weights


def write_gguf(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: str, *, name: str
) -> list[str]:
    """Write a plain model to a new file. Return the matrices whose rows q8_0 cannot split: they are f16.

    kind: of KINDS. name: of the model, for people. A matrix is converted when its turn has come, so that no
    second copy of the model is in memory.
    Raises ValueError as check_exportable and Vocabulary.of do, and for a weight that f16 cannot hold.
    """
    import gguf  # an extra, which the caller has asked for

    layout = check_exportable(model.config, name)
    vocabulary = Vocabulary.of(tokenizer, model.get_input_embeddings().weight.shape[0])
    writer = gguf.GGUFWriter(path, layout.name)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{kind.upper()}"))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_sizes(writer, model.config, layout)
    vocabulary.add_to(writer, tokenizer, model.generation_config.eos_token_id)

    kinds = {key: gguf.GGMLQuantizationType[key.upper()] for key in (*KINDS, "f32")}
    chosen, whole = {}, []
    for key, tensor in _tensors(model, layout):
        chosen[key] = "f32" if tensor.dim() == 1 else kind
        if chosen[key] == "q8_0" and tensor.shape[-1] % BLOCK:
            chosen[key] = "f16"
            whole.append(key)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kinds[chosen[key]]]
        num_bytes = tensor.numel() // block * block_bytes
        writer.add_tensor_info(key, tensor.shape, np.dtype(np.float32), num_bytes, kinds[chosen[key]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for key, tensor in Progress("GGUF", "tensors", len(chosen)).over(_tensors(model, layout)):
        values = np.ascontiguousarray(tensor.float().cpu().numpy())
        if chosen[key] == "f16" and np.abs(values).max() > np.finfo(np.float16).max:
            raise ValueError(f"{key} has a weight beyond the range of f16; pass --gguf bf16")
        writer.write_tensor_data(gguf.quants.quantize(values, kinds[chosen[key]]))
    writer.close()
    return whole


def _add_sizes(writer, config: PreTrainedConfig, layout: Layout) -> None:
    D = head_dim(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(D)
    writer.add_value_length(D)
    writer.add_rope_dimension_count(D)
    writer.add_rope_freq_base(_rotation(config)["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if layout.full_every:
        writer.add_sliding_window(config.sliding_window)


@torch.no_grad()
def _tensors(model: PreTrainedModel, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Yield GGUF's name and value of every weight."""
    import gguf

    config = model.config
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == layout.name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    if _rotation(config)["rope_type"] != "default":
        yield ROPE_FACTORS, rotation_factors(config)
    for name, tensor in model.state_dict().items():
        if tied and name.startswith("lm_head."):
            continue
        if (key := names.get_name(name, try_suffixes=(".weight", ".bias"))) is None:
            raise ValueError(f"GGUF's {layout.name} has no place for {name}; leave out --gguf")
        if name.endswith("norm.weight"):
            tensor = tensor.float() + layout.norm_offset  # in bf16 the sum would lose what training changed
        projection = name.split(".")[-2]
        if layout.pairs_rows and projection in heads:
            halves = tensor.unflatten(0, (heads[projection], 2, -1))  # (heads, 2, D / 2, ...)
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        yield key, tensor


def rotation_factors(config: PreTrainedConfig) -> Tensor:
    """Return by what each frequency of the rotation is divided, (D / 2,) fp32."""
    rotation = _rotation(config)
    scaled, _ = ROPE_INIT_FUNCTIONS[rotation["rope_type"]](config, torch.device("cpu"))
    powers = torch.arange(0, head_dim(config), 2, dtype=torch.float64) / head_dim(config)
    return (rotation["rope_theta"] ** -powers / scaled.double()).float()


def check_readable(path: Path, config: PreTrainedConfig) -> None:
    """Raise ValueError for a family without a layout: transformers may read its weights wrongly."""
    if config.model_type not in LAYOUTS:
        raise ValueError(
            f"{path} holds a {config.model_type} model but the kit reads GGUF files of {', '.join(LAYOUTS)} "
            "only; pass the model's Hugging Face folder or hub id"
        )


def restore_rotation(path: Path, config: PreTrainedConfig) -> None:
    """Give a config that transformers read from a GGUF file the scaled rotation that the file holds, if any.

    Raises ValueError if the factors are not Llama 3's, and for a family without a layout.
    """
    check_readable(path, config)
    if not LAYOUTS[config.model_type].scales_rotation:  # a vocabulary takes seconds to read
        return
    import gguf

    found = [tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == ROPE_FACTORS]
    if not found:
        return
    factors = torch.tensor(np.array(found[0].data, dtype=np.float32))
    plain = dict(config.rope_parameters)
    config.rope_parameters = plain | LLAMA3 | {"factor": round(factors.max().item(), 3)}
    ours = rotation_factors(config)
    if ours.shape != factors.shape or not torch.allclose(ours, factors, rtol=1e-4):
        raise ValueError(
            f"{path} scales its rotation by factors of up to {factors.max().item():g} that are not those of "
            "Llama 3, and transformers cannot be given them; pass the model's Hugging Face folder"
        )
