"""Merge adapters into their base: a folder of adapters becomes a plain model, which needs neither.

    W + (alpha / rank) B A

On an NF4 base this is kit.models.qlora.merge. On a plain base peft's layers merge themselves, so that DoRA,
rank-stabilised scaling and modules that are saved whole mean what they mean in training.
"""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from kit.models import qlora
from kit.models.folder import ADAPTER, is_in_nf4


@torch.no_grad()
def merge(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Merge the adapters that kit.models.load has put on a model, in place and on the CPU.

    The sum is computed in fp32 and rounded once, to dtype. If the head or the embedding alone has
    changed, the two are no longer tied.
    """
    if is_in_nf4(model):
        qlora.merge(model, dtype)
        return
    model.to("cpu", torch.float32)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, LoraLayer) and head.weight is embedding.get_base_layer().weight:
        head.weight = nn.Parameter(head.weight.clone())  # adapters of the embedding leave the head as it is
    for path, layer in [(name, module) for name, module in model.named_modules()]:
        if isinstance(layer, LoraLayer):
            layer.merge(safe_merge=True, adapter_names=[ADAPTER])  # refuses NaN
            model.set_submodule(path, layer.get_base_layer())
        elif isinstance(layer, ModulesToSaveWrapper):
            model.set_submodule(path, layer.modules_to_save[ADAPTER])
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False
    if hasattr(model, "peft_config"):
        del model.peft_config
    model.to(dtype).requires_grad_(True)
