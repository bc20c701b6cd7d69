"""Load any model: a whole one, a base with its adapters, or one with fresh adapters to train."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kit.extras import require, require_for_adapters
from kit.models.folder import ADAPTER_CONFIG
from kit.models.loading import default_device, default_dtype, load_plain, path_of


def load(
    name: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    attention: str = "auto",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer.

    name: "tiny" or "tinier", a hub id, a folder, or a GGUF file (which is dequantised). A folder of adapters
    is loaded with its base: in NF4 if the kit trained them on NF4, plain otherwise (kit.models.lora).
    device: None = the card if there is one. dtype: None = bf16 on a card, fp32 on a CPU. attention: one of
    kit.models.attention.CHOICES.
    Raises ValueError for a path that does not exist, for a family that cannot be run, for weights that are
    missing or not finite, and for an attention that cannot run here.
    """
    device = torch.device(device or default_device())
    where = {"device": device, "dtype": dtype or default_dtype(device), "attention": attention}
    path = path_of(name)
    if not (path / ADAPTER_CONFIG).is_file():
        return load_plain(path, **where)
    require(f"{name}, a folder of adapters,", "peft")
    from kit.models import lora  # peft takes seconds to import

    return lora.load(path, **where)


def load_to_train(
    name: str, *, qlora_rank: int = 0, lora_rank: int = 0, seed: int = 0, **where
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model to train: as `load`, or with fresh adapters on a frozen copy.

    qlora_rank: > 0 = the rank of the adapters, which are drawn from `seed`, on weights in NF4. lora_rank: the
    same on the weights as they are. where: device, dtype and attention, as for `load`.
    Raises ValueError as `load` does, for adapters that the kit did not train, and for a config with dropout,
    which the kit does not support in training.
    """
    if qlora_rank and lora_rank:
        raise ValueError(f"qlora_rank is {qlora_rank} and lora_rank {lora_rank}; pass one of them")
    if not (qlora_rank or lora_rank):
        model, tokenizer = load(name, **where)
        check_dropout(model.config, name)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                f"{name} holds adapters that the kit did not train: they can be evaluated but not trained "
                "further; merge them with peft's merge_and_unload and train the result"
            )
        return model, tokenizer
    require_for_adapters(nf4=bool(qlora_rank))
    from kit.models import qlora  # peft takes seconds to import

    model, tokenizer = qlora.load(
        name, rank=qlora_rank or lora_rank, nf4=bool(qlora_rank), seed=seed, **where
    )
    check_dropout(model.config, name)
    return model, tokenizer


def check_dropout(config: PreTrainedConfig, name: str) -> None:
    """Raise ValueError for dropout, whose names differ between families. A classifier's has no effect."""
    drops = {
        key: value
        for key, value in vars(config).items()
        if ("dropout" in key or key.endswith("pdrop")) and "classifier" not in key and value
    }
    if drops:
        settings = ", ".join(f"{key} {value}" for key, value in drops.items())
        raise ValueError(
            f"the config of {name} says {settings}, but the kit trains without dropout; set it to 0 in the "
            "model's config.json (of a hub id: hf download ID --local-dir DIR, and pass DIR)"
        )
