"""The attention that a model runs, registered with transformers under names of its own.

It serves packed rows, which it knows by the keyword arguments cu_seqlens and max_seqlen. Without them it
raises: read as one sequence, a pack would silently let its documents attend to each other.

    kit     kit.kernels.packed_attention: our kernels on a card, torch on a CPU; the same bits every run
    varlen  the FlashAttention-2 that torch brings, torch.nn.attention.varlen: 16-bit, on a card, from torch
            2.12 on; the last bits of gradients differ from run to run. Not run on a GPU so far
    torch   one scaled_dot_product_attention per document, on any device
    auto    kit. A recipe that begins a run makes it varlen where recipes/check_card.py found varlen right and
            faster on this card (kit/models/pick_attention.py). A run keeps what it began with

The memory plan simulates kit. For varlen it adds what the backward pass holds more for a moment: dq in fp32,
and dk and dv of every query head if heads share keys; 64, 32 and 32 MiB in a layer of Gemma-3-1B with 16,384
tokens.
"""

from __future__ import annotations

import inspect

import torch
from transformers import AttentionInterface, PreTrainedConfig

from kit.kernels.packed_attention import documents_attention, packed_attention
from kit.models.families import head_dim, layer_windows

CHOICES = ("auto", "kit", "varlen", "torch")
# Take such a name from here and not as a string, so that the import that registers it cannot be forgotten.
# transformers treats names with "flash" in them specially.
REGISTERED = {"kit": "kit", "varlen": "kit_varlen", "torch": "kit_torch"}
MAX_FLASH_HEAD_DIM = 256  # of FlashAttention-2
OURS, VARLEN = "ours", "torch varlen"  # what check_card's results call kit and varlen
# what layers pass to an attention that does not change what it computes in a pack
WITHOUT_EFFECT = {"position_ids", "use_cache", "is_causal", "output_attentions", "return_dict"}
OPTIONS = ("scale", "window_size", "enable_gqa")  # of varlen_attn; torch 2.12 has all of them, 2.10 none


def varlen_attention(q, k, v, cu_seqlens, max_seqlen, *, window=None, scale=None) -> torch.Tensor:
    """Compute packed_attention with torch's, whose window counts the keys left of the query's own, -1 = all.

    cu_seqlens is int32 here.
    """
    from torch.nn.attention.varlen import varlen_attn  # takes seconds to import

    bounds, left = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen), -1 if window is None else window - 1
    return varlen_attn(q, k, v, *bounds, scale=scale, window_size=(left, 0), enable_gqa=True)


PACK_ATTENTION = {"kit": packed_attention, "varlen": varlen_attention, "torch": documents_attention}
BY_NAME = {REGISTERED[choice]: function for choice, function in PACK_ATTENTION.items()}


def attend(
    module,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *,
    window: int | None,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """Attend within the documents of a pack, for a model's attention module.

    q (T, Hq, D), k and v (T, Hkv, D) -> (T, Hq, D). A model that was loaded with an attention of
    transformers' gets the kit's. Raises ValueError without boundaries, and for dropout.
    """
    if dropout:
        raise ValueError(
            f"attention dropout is {dropout} but packed attention has none; set attention_dropout to 0 in "
            "the config"
        )
    if cu_seqlens is None:
        raise ValueError(
            "no boundaries of documents reach the model's attention, which is for packed rows; run the model "
            "with kit.models.hidden_states or kit.generate.sampler, or call "
            'model.set_attn_implementation("sdpa") before using it on its own'
        )
    function = BY_NAME.get(module.config._attn_implementation, packed_attention)
    return function(q, k, v, cu_seqlens, max_seqlen, window=window, scale=scale)


def _interface(
    module,
    query,
    key,
    value,
    attention_mask,
    *,
    dropout=0.0,
    scaling=None,
    sliding_window=None,
    cu_seqlens=None,
    max_seqlen=None,
    cache=None,
    **others,
):
    """Implement transformers' interface, for layers that are not the kit's (kit/models/other_families.py).

    query (1, Hq, T, D), key and value (1, Hkv, T, D) of a pack -> output (1, T, Hq, D), None. With a cache
    and no boundaries, each row adds one token to it: (B, Hq, 1, D) -> (B, 1, Hq, D).
    Raises ValueError for what the kit's attention does not compute, such as scores that are capped.
    """
    others |= {"attention_mask": attention_mask}  # the kit builds none, so it would be the family's own
    unknown = [name for name, value in others.items() if value is not None and name not in WITHOUT_EFFECT]
    if unknown:
        raise ValueError(
            f"{type(module).__name__} asks its attention for {', '.join(unknown)}, which the kit's does not "
            "compute"
        )
    if cache is not None and cu_seqlens is None:
        q, k, v = (x.squeeze(2) for x in (query, key, value))
        cache.write(module.layer_idx, k, v)
        return cache.attend(module.layer_idx, q, scaling).unsqueeze(1), None
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    if cache is not None:
        if sliding_window != (seen := layer_windows(module.config)[module.layer_idx]):
            raise ValueError(
                f"layer {module.layer_idx} attends to {sliding_window} positions and its config says {seen}, "
                "which is what the cache holds"
            )
        cache.store(module.layer_idx, k, v)
    settings = {"window": sliding_window, "scale": scaling, "dropout": dropout}
    return attend(module, q, k, v, cu_seqlens, max_seqlen, **settings).unsqueeze(0), None


# No mask function gets these names, so transformers builds no mask, and need not ask the device for one.
for _name in BY_NAME:
    AttentionInterface.register(_name, _interface)


def attention_name(
    choice: str, config: PreTrainedConfig | None = None, *, device: torch.device | str, dtype: torch.dtype
) -> str:
    """Return the registered name of a choice for a model on this device.

    Raises ValueError for an unknown choice, and for varlen, with the reason, if it cannot run the model here.
    """
    if choice not in CHOICES:
        raise ValueError(f"attention is {choice!r}; pass one of {', '.join(CHOICES)}")
    if choice == "varlen":
        width = head_dim(config) if config else 0
        if obstacle := varlen_obstacle(width, torch.device(device), dtype):
            raise ValueError(f"attention is varlen but {obstacle}; pass --attention kit")
    return REGISTERED["kit" if choice == "auto" else choice]


def varlen_obstacle(width: int, device: torch.device, dtype: torch.dtype) -> str:
    """Return why varlen cannot run a model with heads of this width here; "" if it can."""
    if device.type != "cuda":
        return f"it runs on a CUDA card and the model is on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 or bfloat16 and the model is in {dtype}"
    if width > MAX_FLASH_HEAD_DIM or width % 8:
        return f"its heads are multiples of 8 up to {MAX_FLASH_HEAD_DIM} wide and the model's are {width}"
    if torch.cuda.get_device_capability(device)[0] < 8:
        return "it needs compute capability 8.0 (RTX 30 and later)"
    if not torch.backends.cuda.is_flash_attention_available():
        return f"torch {torch.__version__} was built without FlashAttention"

    from torch.nn.attention.varlen import varlen_attn

    missing = [name for name in OPTIONS if name not in inspect.signature(varlen_attn).parameters]
    if missing:
        return f"that of torch {torch.__version__} lacks {', '.join(missing)} (pip install 'torch>=2.12')"
    return ""


def varlen_extra_bytes(config: PreTrainedConfig, num_tokens: int) -> int:
    """Return what a layer's backward pass holds for a moment with varlen and not with kit."""
    shares_keys = config.num_attention_heads != config.num_key_value_heads
    bytes_per_number = 4 + (2 * 2 if shares_keys else 0)  # dq in fp32; dk and dv in 16 bits
    return bytes_per_number * num_tokens * config.num_attention_heads * head_dim(config)
