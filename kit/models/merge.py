"""Merge adapters into their base: a folder of adapters becomes a plain model, which needs neither.

    W + (alpha / rank) B A

On an NF4 base, W is the dequantised weight, on which the adapters were trained. They have also learnt to make
up for its rounding, so on the original weights they would correct errors that are not there. On a plain base
peft's layers merge themselves, so that DoRA, rank-stabilised scaling and modules that are saved whole mean
what they mean in training.
"""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from kit.models.folder import ADAPTER, is_in_nf4


@torch.no_grad()
def merge(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Merge the adapters that kit.models.load has put on a model, in place and on the CPU.

    The sum is computed in fp32 and rounded once, to dtype. In bf16 the part of B A below 1/256 of its weight
    is rounded away; float32 keeps it. If the head or the embedding alone has changed, the two are no longer
    tied.
    """
    in_nf4 = is_in_nf4(model)
    if not in_nf4:
        model.to("cpu", torch.float32)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, LoraLayer) and head.weight is embedding.get_base_layer().weight:
        head.weight = nn.Parameter(head.weight.clone())  # adapters of the embedding leave the head as it is
    for path, layer in [(name, module) for name, module in model.named_modules()]:
        if isinstance(layer, LoraLayer) and in_nf4:
            model.set_submodule(path, _merged(layer, dtype))
        elif isinstance(layer, LoraLayer):
            layer.merge(safe_merge=True, adapter_names=[ADAPTER])  # refuses NaN
            model.set_submodule(path, layer.get_base_layer())
        elif isinstance(layer, ModulesToSaveWrapper):
            model.set_submodule(path, layer.modules_to_save[ADAPTER])
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False
    if hasattr(model, "peft_config"):
        del model.peft_config
    model.to("cpu", dtype).requires_grad_(True)


def _merged(layer: LoraLayer, dtype: torch.dtype) -> nn.Linear:
    """Return the plain layer, on the CPU, of an adapter on a layer in NF4."""
    base = layer.get_base_layer()
    a, b = layer.lora_A[ADAPTER].weight.float(), layer.lora_B[ADAPTER].weight.float()
    weight = base.dequantise().float() + layer.scaling[ADAPTER] * (b @ a)
    plain = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight.to("cpu", dtype))
    if base.bias is not None:
        plain.bias = nn.Parameter(base.bias.to("cpu", dtype))
    return plain
