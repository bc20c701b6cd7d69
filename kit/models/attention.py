"""Which attention a model runs, entered through transformers' own registry.

It serves packs, known by the keyword arguments cu_seqlens and max_seqlen. Anything else is refused: a pack read as one sequence
would let its documents see each other without a word.

    kit         kit.kernels.packed_attention: our Triton kernels on a card, torch on a CPU; the same bits every run
    flash-attn  flash_attn_varlen_func where that package is installed: 16-bit on a card; its gradients differ in the last
                bits from run to run
    torch       one scaled_dot_product_attention a document, on any device
    auto        flash-attn where it is installed and able, kit everywhere else
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from kit.kernels.packed_attention import documents_attention, packed_attention
from kit.models.families import head_dim

CHOICES = ("auto", "kit", "flash-attn", "torch")
# Code that gives transformers such a name takes it from here, and so cannot forget the import that registers it. transformers
# reads a meaning of its own into names with "flash" in them.
REGISTERED = {"kit": "kit", "flash-attn": "kit_varlen", "torch": "kit_torch"}
MAX_FLASH_HEAD_DIM = 256  # of flash-attn 2


def _flash_attention(q, k, v, cu_seqlens, max_seqlen, *, window=None, scale=None) -> torch.Tensor:
    """packed_attention by flash-attn, whose window counts the keys to the left of the query's own."""
    from flash_attn import flash_attn_varlen_func

    edges = (-1, -1) if window is None else (window - 1, 0)
    bounds = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return flash_attn_varlen_func(q, k, v, *bounds, softmax_scale=scale, causal=True, window_size=edges)


PACK_ATTENTION = {"kit": packed_attention, "flash-attn": _flash_attention, "torch": documents_attention}


def _interface(pack_attention: Callable) -> Callable:
    def attention(module, query, key, value, attention_mask, *, scaling=None, sliding_window=None, cu_seqlens=None,
                  max_seqlen=None, dropout=0.0, **_):  # fmt: skip
        """transformers' attention interface: query (B, Hq, Tq, D), key and value (B, Hkv, Tk, D) -> (B, Tq, Hq, D), None."""
        if dropout:
            raise ValueError(
                f"attention dropout is {dropout} but a pack's attention has none; set attention_dropout to 0 in the config"
            )
        if cu_seqlens is None:
            raise ValueError(
                "this model was loaded for packs; run it with kit.models.hidden_states or kit.generate.sampler, or call "
                'model.set_attn_implementation("sdpa") before using it on its own'
            )
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        window = sliding_window if getattr(module, "is_sliding", True) else None
        return pack_attention(q, k, v, cu_seqlens, max_seqlen, window=window, scale=scaling).unsqueeze(
            0
        ), None

    return attention


def _no_mask(*args, **kwargs) -> None:
    """A pack needs no mask: its boundaries travel as keyword arguments."""


for _choice, _name in REGISTERED.items():
    AttentionInterface.register(_name, _interface(PACK_ATTENTION[_choice]))
    AttentionMaskInterface.register(_name, _no_mask)


def attention_name(
    choice: str, config: PreTrainedConfig | None = None, *, device: torch.device | str, dtype: torch.dtype
) -> str:
    """The registered name of a choice for a model on this device.

    Raises ValueError for an unknown choice, and for flash-attn where it is not installed or cannot do it, with the reason.
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
    """Why flash-attn cannot run this model here; "" = it can."""
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
