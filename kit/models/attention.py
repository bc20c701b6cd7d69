"""The attention that a model runs, registered with transformers under names of its own.

It serves packed rows, which it knows by the keyword arguments cu_seqlens and max_seqlen. Without them it
raises: read as one sequence, a pack would silently let its documents attend to each other.

    kit         kit.kernels.packed_attention: our kernels on a card, torch on a CPU; the same bits every run
    flash-attn  flash_attn_varlen_func: 16-bit, on a card; the last bits of gradients differ from run to run
    torch       one scaled_dot_product_attention per document, on any device
    auto        flash-attn if it is installed and can run the model, else kit
"""

from __future__ import annotations

import importlib.util

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from kit.kernels.packed_attention import documents_attention, packed_attention
from kit.models.families import head_dim

CHOICES = ("auto", "kit", "flash-attn", "torch")
# Take such a name from here and not as a string, so that the import that registers it cannot be forgotten.
# transformers treats names with "flash" in them specially.
REGISTERED = {"kit": "kit", "flash-attn": "kit_varlen", "torch": "kit_torch"}
MAX_FLASH_HEAD_DIM = 256  # of flash-attn 2


def _flash_attention(q, k, v, cu_seqlens, max_seqlen, *, window=None, scale=None) -> torch.Tensor:
    """Compute packed_attention with flash-attn, whose window counts the keys left of the query's own."""
    from flash_attn import flash_attn_varlen_func

    edges = (-1, -1) if window is None else (window - 1, 0)
    bounds = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return flash_attn_varlen_func(q, k, v, *bounds, softmax_scale=scale, causal=True, window_size=edges)


PACK_ATTENTION = {"kit": packed_attention, "flash-attn": _flash_attention, "torch": documents_attention}
BY_NAME = {REGISTERED[choice]: function for choice, function in PACK_ATTENTION.items()}


def attend(
    module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
) -> torch.Tensor:
    """Attend within the documents of a pack, as the settings of a model's attention module say.

    q (T, Hq, D), k and v (T, Hkv, D) -> (T, Hq, D). A model that was loaded with an attention of
    transformers' gets the kit's. Raises ValueError without boundaries, and for dropout.
    """
    if module.training and module.attention_dropout:
        raise ValueError(
            f"attention dropout is {module.attention_dropout} but packed attention has none; set "
            "attention_dropout to 0 in the config"
        )
    if cu_seqlens is None:
        raise ValueError(
            "this model was loaded for packed rows; run it with kit.models.hidden_states or "
            "kit.generate.sampler, "
            'or call model.set_attn_implementation("sdpa") before using it on its own'
        )
    window = getattr(module, "sliding_window", None)
    function = BY_NAME.get(module.config._attn_implementation, packed_attention)
    return function(q, k, v, cu_seqlens, max_seqlen, window=window, scale=module.scaling)


def _interface(module, query, key, value, attention_mask, *, cu_seqlens=None, max_seqlen=None, **_):
    """Implement transformers' interface.

    query (1, Hq, T, D), key and value (1, Hkv, T, D) -> output (1, T, Hq, D), None.
    """
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return attend(module, q, k, v, cu_seqlens, max_seqlen).unsqueeze(0), None


def _no_mask(*args, **kwargs) -> None:
    """Build no mask: the boundaries of a pack arrive as keyword arguments."""


for _name in BY_NAME:
    AttentionInterface.register(_name, _interface)
    AttentionMaskInterface.register(_name, _no_mask)


def attention_name(
    choice: str, config: PreTrainedConfig | None = None, *, device: torch.device | str, dtype: torch.dtype
) -> str:
    """Return the registered name of a choice for a model on this device.

    Raises ValueError for an unknown choice, and for flash-attn, with the reason, if it is not installed or
    cannot run.
    """
    if choice not in CHOICES:
        raise ValueError(f"attention is {choice!r}; pass one of {', '.join(CHOICES)}")
    obstacle = _flash_obstacle(config, torch.device(device), dtype)
    if choice == "flash-attn" and obstacle:
        raise ValueError(f"attention is flash-attn but {obstacle}; pass --attention kit")
    if choice == "auto":
        choice = "kit" if obstacle else "flash-attn"
    return REGISTERED[choice]


def _flash_obstacle(config, device: torch.device, dtype: torch.dtype) -> str:
    """Return why flash-attn cannot run this model here; "" if it can."""
    width = head_dim(config) if config else 0
    if importlib.util.find_spec("flash_attn") is None:
        return "it is not installed (pip install flash-attn)"
    if device.type != "cuda":
        return f"it runs on a CUDA card and the model is on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 or bfloat16 and the model is in {dtype}"
    if width > MAX_FLASH_HEAD_DIM:
        return f"its heads are at most {MAX_FLASH_HEAD_DIM} wide and the model's are {width}"
    if torch.cuda.get_device_capability(device)[0] < 8:
        return "it needs compute capability 8.0 (RTX 30 and later)"
    return ""
