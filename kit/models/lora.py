"""LoRA adapters that were trained elsewhere: a folder as peft writes it, loaded onto its base.

    y = x W^T + (alpha / rank) x A^T B^T          W the base's weight, in the dtype the base is loaded in

adapter_config.json names the base, adapter_model.safetensors holds A and B. The base is loaded as it would be
without adapters and keeps its class, so sampler and evaluation need no change. The layers are peft's own, so
DoRA, rank-stabilised scaling and modules saved whole mean the same here as there. The adapters are not
merged: in bf16 that would round away the smaller part of B A.

Adapters that the kit trained record whether their base was NF4 or plain; kit.models.qlora loads them, to be
trained further. peft's files cannot record this, so adapters trained elsewhere on a quantised base look like
any others and are put on the plain base, as everywhere.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kit.extras import require
from kit.models import loading, qlora
from kit.models.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, NF4, base_kind, load_weights
from kit.models.weights import check_finite

# values of init_lora_weights that leave the base as it was published
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
MERGE = "merge them with peft's merge_and_unload where they were trained, and pass the folder of the result"


def load(folder: Path, **where) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base with a folder's adapters, frozen, and the tokenizer (the folder's, if it has one).

    where: device, dtype and attention, as for kit.models.load.
    Raises ValueError for pickled weights, for adapters that are not LoRA or that change more than LoRA does,
    for a base that is not at hand, and for weights that do not fit it.
    """
    _check_weights(folder)
    if kind := base_kind(folder):
        if kind == NF4:
            require(f"{folder}, adapters of a model in NF4,", "bitsandbytes")
        config = LoraConfig.from_pretrained(str(folder))
        how = {"rank": config.r, "alpha": config.lora_alpha, "nf4": kind == NF4}
        model, tokenizer = qlora.load(config.base_model_name_or_path, **how, **where)
        load_weights(folder, model, dtypes=False)
        return model, _own_tokenizer(folder) or tokenizer
    base = _base(folder)
    try:
        model, tokenizer = loading.load_plain(loading.path_of(base), **where)
    except ValueError as error:
        raise ValueError(
            f"{folder} holds adapters of {base}, which cannot be loaded; write where the base is as "
            f"base_model_name_or_path in {folder / ADAPTER_CONFIG}\n"
            f"{error}"
        ) from error
    model = _adapt(model, folder, base, where["device"])
    check_finite({name: x for name, x in model.named_parameters() if ".lora_" in name}, folder)
    return model.eval(), _own_tokenizer(folder) or tokenizer


def _own_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """Return the folder's tokenizer, which has the template and end that the adapters know, or None."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    tokenizer = loading.load_tokenizer(str(folder))
    loading.check_end_of_text(tokenizer, str(folder))
    return tokenizer


def _check_weights(folder: Path) -> None:
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        found = "adapter_model.bin, a pickle, which can run any code" if pickled else "no weights"
        raise ValueError(
            f"{folder} holds {found}, and the kit reads {ADAPTER_WEIGHTS} only; if you trust the adapters, "
            "load them with peft and write them again with its save_pretrained"
        )


def _base(folder: Path) -> str:
    """Return where the base is. Raises ValueError if the config asks for more than LoRA layers on it."""
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"{folder} holds {config.peft_type.value} adapters but the kit knows LoRA; {MERGE} if they can be"
        )

    none = (None,)
    allowed = {"layer_replication": none, "alora_invocation_tokens": none, "init_lora_weights": PLAIN_STARTS}
    for name, plain in allowed.items():
        value = getattr(config, name)
        if value not in plain:
            raise ValueError(
                f"{folder} holds adapters with {name} {value!r}, which is more than LoRA on the base; {MERGE}"
            )

    base = config.base_model_name_or_path
    if not base:
        raise ValueError(
            f"{folder} holds adapters that name no base; write the hub id or the folder of the model they "
            f"were trained on as base_model_name_or_path in {folder / ADAPTER_CONFIG}"
        )
    if config.revision not in (None, "main") and not Path(base).is_dir():
        raise ValueError(
            f"{folder} holds adapters of revision {config.revision} of {base} and the kit loads the newest; "
            f"download it (hf download {base} --revision {config.revision} --local-dir DIR) and write DIR as "
            "base_model_name_or_path"
        )
    if (Path(base) / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{folder} holds adapters of {base}, which is adapters itself; merge those first, with "
            "merge_and_unload"
        )
    return base


def _adapt(model: PreTrainedModel, folder: Path, base: str, device: torch.device) -> PreTrainedModel:
    # low_cpu_mem_usage: without it peft draws weights from the global generator, only to overwrite them
    try:
        with warnings.catch_warnings():
            # peft asks the model for it under a name that transformers has replaced
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)  # refused below
            adapted = PeftModel.from_pretrained(
                model, str(folder), torch_device=str(device), low_cpu_mem_usage=True
            )
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(
            f"the adapters in {folder} do not fit {base}; pass the base they were trained on\n{error}"
        ) from error

    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        stored = set(file.keys())
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    lacks, besides = sorted(expected - stored), sorted(stored - expected - adapted.state_dict().keys())
    if lacks or besides:
        raise ValueError(
            f"the adapters in {folder} do not fit {base}: the file lacks {lacks[:3]} and has {besides[:3]} "
            "besides"
        )

    model = adapted.get_base_model()
    if not isinstance(model.get_output_embeddings(), (nn.Linear, ModulesToSaveWrapper)):
        raise ValueError(
            f"{folder} holds adapters of the head, whose weight the kit's sampler reads without them; {MERGE}"
        )
    return model
