"""A model on disk, in Hugging Face format, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kit.disk import publish, scratch_beside
from kit.models.weights import check_finite, check_same, read_tensors

ADAPTER = "default"  # peft's name for a model's only adapter
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names, too
NF4, PLAIN = "nf4", "plain"  # bases that the kit trains adapters on
REMEDY = "pass the --model that it was trained from"


def adapter_ranks(model: str) -> dict[str, int]:
    """Return the rank of a folder of adapters, as qlora_rank or lora_rank; both are 0 for any other model."""
    folder = Path(model).expanduser()
    file = folder / ADAPTER_CONFIG
    rank = json.loads(file.read_text(encoding="utf-8"))["r"] if file.is_file() else 0
    in_nf4 = (folder / ADAPTER_WEIGHTS).is_file() and base_kind(folder) == NF4
    return {"qlora_rank": rank if in_nf4 else 0, "lora_rank": 0 if in_nf4 else rank}


def base_kind(folder: Path) -> str:
    """Return what the kit trained the adapters in a folder on, NF4 or PLAIN; "" = others trained them.

    peft's config cannot store it, so the weights' metadata does. Raises ValueError if their file is damaged.
    """
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
            return (file.metadata() or {}).get("base", "")
    except SafetensorError as error:
        raise ValueError(
            f"{folder / ADAPTER_WEIGHTS} is damaged: {error}; copy the adapters again"
        ) from error


def is_in_nf4(model) -> bool:
    return any(tensor.dtype == torch.uint8 for tensor in model.parameters())  # two weights per byte


def save_model(path: Path, model, tokenizer) -> None:
    """Write a model, or its adapters alone if it has any, as a Hugging Face folder: whole or not at all.

    It replaces what is there, and is flushed to the disk.
    """
    publish(write_model(path, model, tokenizer), path)


def write_model(path: Path, model, tokenizer) -> Path:
    """Write a model into a new folder beside `path`, which gets its name later, and return it."""
    scratch = scratch_beside(path)
    scratch.mkdir(parents=True)
    if config := _adapter_config(model):
        config.save_pretrained(str(scratch))
        weights = {name: tensor.detach().contiguous() for name, tensor in _adapter_weights(model).items()}
        metadata = {"format": "pt", "base": NF4 if is_in_nf4(model) else PLAIN}
        save_file(weights, scratch / ADAPTER_WEIGHTS, metadata=metadata)
    else:
        model.save_pretrained(scratch, state_dict=_in_cpu_memory(model))
    tokenizer.save_pretrained(scratch)
    return scratch


def _in_cpu_memory(model) -> dict[str, torch.Tensor]:
    """Return a model's weights in CPU memory, where they are written from; tied ones are one tensor.

    transformers would first copy on the card those that share a buffer (kit/models/joined.py).
    """
    copies, state = {}, {}
    for name, tensor in model.state_dict().items():
        key = tensor.data_ptr(), tensor.shape
        if key not in copies:
            copies[key] = tensor.cpu()
        state[name] = copies[key]
    return state


def _adapter_config(model):
    """Return peft's config of the model's adapters, None if it has none."""
    return getattr(model, "peft_config", {}).get(ADAPTER)


def _adapter_weights(model) -> dict[str, torch.Tensor]:
    """Return the adapters under the names that peft uses in files, which leave out the adapter's own name."""
    named = {name: tensor for name, tensor in model.named_parameters() if ".lora_" in name}
    return {f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": tensor for name, tensor in named.items()}


def load_weights(path: Path, model, *, dtypes: bool = True) -> None:
    """Load a folder's weights into a model; into its adapters alone if it has any.

    dtypes: they must be the model's, so that it gets the same bits; False = adapters are converted.

    Raises ValueError if they are of another model, damaged or not finite.
    """
    if _adapter_config(model):
        _load_adapters(path, model, dtypes)
        return
    weights = {}
    for file in sorted(path.glob("model*.safetensors")):
        weights |= read_tensors(file)
    tensors = model.state_dict()
    # a tied weight is stored once: one that shares its memory with a stored one is not missing
    stored = {tensors[name].data_ptr() for name in weights if name in tensors}
    wanted = {n: x for n, x in tensors.items() if n in weights or x.data_ptr() not in stored}
    check_same(weights, wanted, path, remedy=REMEDY)
    check_finite(weights, path)
    model.load_state_dict(weights, strict=False)


@torch.no_grad()
def _load_adapters(path: Path, model, dtypes: bool) -> None:
    file, ours = path / ADAPTER_CONFIG, _adapter_config(model)
    theirs = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for key in ("base_model_name_or_path", "r", "lora_alpha"):
        if theirs.get(key) != getattr(ours, key):
            raise ValueError(
                f"{path} is a checkpoint of another model: {key} is {theirs.get(key)!r} there and "
                f"{getattr(ours, key)!r} here; pass the model, rank and alpha that it was trained with"
            )
    tensors, stored = _adapter_weights(model), read_tensors(path / ADAPTER_WEIGHTS)
    check_same(stored, tensors, path, remedy=REMEDY, dtypes=dtypes)
    check_finite(stored, path)
    for name, tensor in tensors.items():
        tensor.copy_(stored[name])
