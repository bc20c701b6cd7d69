"""Models: load one with its tokenizer, run its backbone over a pack, reach its head."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kit.models.attention import attention_name
from kit.models.families import family_of
from kit.models.folder import ADAPTER_CONFIG

transformers.logging.disable_progress_bar()  # weights load in seconds; the hub client keeps its own bar for downloads


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device | str) -> torch.dtype:
    """bf16 on a card; fp32 on a CPU, where bf16 matmuls are several times slower."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def path_of(name: str) -> Path:
    """Return where a shipped model, a folder or a file lies; a hub id as it is.

    Raises ValueError for what looks like a path and is not there.
    """
    path = SHIPPED.get(name, Path(name))
    if name.endswith(".gguf") or name.startswith((".", "/", "~")):
        path = path.expanduser()
        if not path.exists():
            raise ValueError(
                f"model is {name} but nothing is there; pass a hub id, a folder or a .gguf file that exists"
            )
    return path


def load_plain(
    name: str, *, device: torch.device, dtype: torch.dtype, attention: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model that is whole in itself: as kit.models.load, but for folders of adapters."""
    path = path_of(name)
    if path.suffix == ".gguf":
        model, tokenizer = _load_gguf(path, dtype, device, attention)
    else:
        where = str(path) if path.is_dir() else name
        config = _config(where)
        family_of(config, name)
        kind = attention_name(attention, config, device=device, dtype=dtype)
        model = AutoModelForCausalLM.from_pretrained(
            where, config=config, dtype=dtype, attn_implementation=kind
        )
        tokenizer = AutoTokenizer.from_pretrained(where)
    check_end_of_text(tokenizer, name)
    return model.to(device).eval(), tokenizer


def _config(where: str):
    try:
        return AutoConfig.from_pretrained(where)
    except OSError as error:
        raise ValueError(
            f"model is {where} but it is neither a local folder nor a model the hub gave us; check the name and the network; "
            "for gated models (Gemma, Llama) accept the licence on its page and log in with `hf auth login`; for adapters on the "
            f"hub pass their folder (hf download {where} --local-dir DIR)\n{error}"
        ) from error


def check_end_of_text(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {name} names no end-of-text token; set eos_token in its tokenizer_config.json"
        )


def _load_gguf(path: Path, dtype: torch.dtype, device: torch.device, attention: str):
    loader = logging.getLogger("transformers.quantizers.quantizer_gguf")
    level = loader.level
    loader.setLevel(logging.ERROR)  # it warns that the weights are dequantised, which is what we ask for
    try:
        packed = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    finally:
        loader.setLevel(level)
    config = packed.config
    family_of(config, path.name)
    if hasattr(config, "quantization_config"):
        del (
            config.quantization_config
        )  # the weights are plain by now, and a model marked quantised can be neither trained nor saved
    kind = attention_name(attention, config, device=device, dtype=dtype)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=kind)
    model.load_state_dict(
        {name: tensor.to(dtype) for name, tensor in packed.state_dict().items()}, assign=True
    )
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model, tokenizer


CONFIGS = Path(__file__).parent / "shipped" / "configs"


def load_config(model: str) -> PreTrainedConfig:
    """A model's config without its weights: shipped with the kit, from a folder or GGUF file, or from the hub; of a folder of
    adapters, their base's.

    Raises ValueError if there is none, with the way to give one.
    """
    shipped = CONFIGS / f"{model.replace('/', '--')}.json"
    if shipped.is_file():
        settings = json.loads(shipped.read_text(encoding="utf-8"))
        return AutoConfig.for_model(**settings)
    folder = SHIPPED.get(model, Path(model).expanduser())
    if (folder / ADAPTER_CONFIG).is_file():
        return load_config(
            json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
        )
    try:
        if folder.suffix == ".gguf":
            return AutoConfig.from_pretrained(folder.parent, gguf_file=folder.name)
        return AutoConfig.from_pretrained(folder if folder.is_dir() else model)
    except (OSError, ValueError) as error:
        known = ", ".join(sorted(path.stem.replace("--", "/") for path in CONFIGS.glob("*.json")))
        raise ValueError(
            f"model is {model} and no config of it is at hand; pass a folder that holds its config.json, go online for the "
            f"hub's, or take one of those that ship with the kit: {known}\n{error}"
        ) from error


TINY = (
    Path(__file__).parent / "shipped" / "tiny"
)  # what ships: a model in Hugging Face format and the two files below
SHIPPED = {"tiny": TINY, "tinier": TINY.with_name("tinier")}  # models by name; the second is the smaller one
