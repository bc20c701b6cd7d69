"""LoRA (Hu et al., 2021): frozen linear layers, with an adapter of low rank beside each.

    y = x W^T + (alpha / rank) x A^T B^T

A (rank, in) starts random and B (out, rank) at zero, so training starts at the base. In QLoRA (Dettmers et
al., 2023) W is in NF4; in LoRA it is as it was, in 16 bits on a card. What one of them loses and the other
does not is due to the four bits; what both lose, to the low rank.

A model is loaded as usual, for QLoRA quantised layer by layer, and gets its adapters in place. It keeps its
class, so trainer, sampler and head need no change. Quantising after loading works for a hub id, a folder and
a GGUF file alike. Meanwhile the whole model is in main memory (2 bytes per parameter in bf16) and one layer
of it on the card.

peft's prepare_model_for_kbit_training is not used. It would cast whatever is not quantised to fp32: 0.6 to
0.7 GiB more for the embedding and the head of a 1B to 3B model, and a gradient path that nothing needs. peft
freezes the base when it adds adapters. The kit's checkpointing is not reentrant, so it needs no preparation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kit.models import loading
from kit.models.attention import attention_name
from kit.models.folder import ADAPTER, ADAPTER_CONFIG
from kit.models.shipped import SHIPPED

RANK = 16
ALPHA = 32  # twice the rank (Biderman et al., LoRA Learns Less and Forgets Less, 2024)


def load(
    name: str,
    *,
    rank: int = RANK,
    alpha: int = ALPHA,
    seed: int = 0,
    nf4: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    attention: str = "auto",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model with fresh adapters, drawn from `seed`, and its tokenizer.

    nf4: False = the weights stay as they are. name, device, dtype and attention are as for kit.models.load.
    Raises ValueError as kit.models.load does, for a folder of adapters, and as add_adapters does.
    """
    path = loading.path_of(name)
    if (path / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{name} has adapters already; load it with kit.models.load, or merge it with recipes/export.py "
            "and start from that"
        )
    device = torch.device(device or loading.default_device())
    dtype = dtype or loading.default_dtype(device)
    if nf4:
        from kit.models.nf4 import quantise_decoder  # imports bitsandbytes, which LoRA does without

        model, tokenizer = loading.load_plain(path, device=torch.device("cpu"), dtype=dtype, attention="kit")
        quantise_decoder(model, device)
        model.set_attn_implementation(attention_name(attention, model.config, device=device, dtype=dtype))
    else:
        model, tokenizer = loading.load_plain(path, device=device, dtype=dtype, attention=attention)
    base = name if name in SHIPPED or not path.exists() else str(path.resolve())
    add_adapters(model, base=base, rank=rank, alpha=alpha, seed=seed, nf4=nf4)
    return model, tokenizer


def add_adapters(
    model: PreTrainedModel,
    *,
    base: str,
    rank: int = RANK,
    alpha: int = ALPHA,
    seed: int = 0,
    nf4: bool = True,
) -> None:
    """Add an adapter to every linear layer of the decoder, in place and in its dtype; freeze all else.

    nf4: the layers are in NF4; False = none is. base: the name under which kit.models.load finds the model;
    it is written beside the adapters. Raises ValueError for a rank below 1 and for a model without such
    layers.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank} but an adapter has at least one row; pass rank >= 1")
    if nf4:
        from kit.models.nf4 import NF4Linear  # as in load
    kind = NF4Linear if nf4 else nn.Linear
    layers = [name for name, module in model.model.named_modules() if type(module) is kind]
    names = sorted({name.rsplit(".", 1)[-1] for name in layers})
    if not names:
        raise ValueError(
            f"{base} has no {'NF4' if nf4 else 'plain'} layer to adapt; "
            f"{'call kit.models.nf4.quantise_decoder on the model first' if nf4 else 'pass nf4=True'}"
        )
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=names, task_type="CAUSAL_LM", base_model_name_or_path=base
    )
    # on "meta", since peft would draw from the global generator in fp32 and move modules, which fake tensors
    # refuse
    with torch.device("meta"):
        inject_adapter_in_model(config, model)

    generator = torch.Generator().manual_seed(seed)
    for layer in _adapted_layers(model):
        base, pair = layer.get_base_layer(), (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER])
        bound = base.in_features**-0.5  # peft's choice
        a = torch.empty(rank, base.in_features)  # on the CPU: the same values whatever the device
        a.uniform_(-bound, bound, generator=generator)
        for linear, values in zip(pair, (a, torch.zeros(base.out_features, rank)), strict=True):
            dtype = base.compute_dtype if nf4 else base.weight.dtype
            linear.weight = nn.Parameter(values.to(base.weight.device, dtype))


def _adapted_layers(model: PreTrainedModel) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


@contextmanager
def without_adapters(model: PreTrainedModel) -> Iterator[None]:
    """Switch the adapters off within a `with` block: the reference of a policy, without a second copy.

    Run a forward pass and its backward pass both inside or both outside: a checkpointed layer is recomputed
    with what is switched on at that moment.
    """
    # not those that an outer block has switched off, and will switch on again
    layers = [layer for layer in _adapted_layers(model) if not layer.disable_adapters]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
