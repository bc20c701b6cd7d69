"""Loading: a whole model with its tokenizer from a hub id, a folder or a GGUF file, or its config alone."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kit.command_line import shell_word
from kit.extras import require
from kit.models.attention import attention_name
from kit.models.families import family_of
from kit.models.folder import ADAPTER_CONFIG
from kit.models.gguf_file import restore_rotation
from kit.models.joined import place
from kit.models.other_families import check
from kit.models.shipped import CONFIGS, SHIPPED
from kit.models.weights import check_finite, check_loaded
from kit.run import CONFIG, read_json

transformers.logging.disable_progress_bar()  # weights load in seconds; the hub client has its own bar
# it warns that the weights of a GGUF file are dequantised, which we ask for
logging.getLogger("transformers.quantizers.quantizer_gguf").setLevel(logging.ERROR)
TOKENIZERS = ("tokenizer.*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")  # files of a vocabulary


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device | str) -> torch.dtype:
    """bf16 on a card; fp32 on a CPU, where bf16 matmuls are several times slower."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def path_of(name: str) -> Path:
    """Return the path of a shipped model, a folder or a file; a hub id unchanged.

    Raises ValueError for a name that looks like a path but does not exist, and for a run's folder that holds
    the model it made. A hub id has one slash at most.
    """
    path = SHIPPED.get(name, Path(name))
    if name.endswith(".gguf") or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        path = path.expanduser()
        if not path.exists():
            raise ValueError(
                f"model is {name} but nothing is there; pass a hub id, a folder or a .gguf file that exists"
            )
    made = path / "model"
    if made.is_dir() and (path / CONFIG).is_file() and "model_type" not in read_json(path / CONFIG):
        raise ValueError(f"{name} is a run; pass the model that it made: --model {shell_word(str(made))}")
    return path


def load_plain(
    path: Path, *, device: torch.device, dtype: torch.dtype, attention: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model without adapters. path: as path_of returns it. The rest is as for kit.models.load.

    Raises ValueError, naming a few, for weights that the files lack or that are NaN or infinite.
    """
    name = str(path) if path.is_dir() else path.as_posix()  # of a hub id, on Windows too
    if path.suffix == ".gguf":
        model, tokenizer = _load_gguf(path, dtype, device, attention)
    else:
        config = _config(name)
        family_of(config, name)
        kind = attention_name(attention, config, device=device, dtype=dtype)
        model = _read_model(name, name, config=config, dtype=dtype, attn_implementation=kind)
        tokenizer = load_tokenizer(name)
    check_end_of_text(tokenizer, name)
    model = place(model, device).eval()
    check_finite(model.state_dict(), name)
    check(model, name)
    return model, tokenizer


def _read_model(name: str, where: str, **options) -> PreTrainedModel:
    """Read a model. where: its folder or hub id, as transformers takes it.

    Raises ValueError unless its files hold all of its weights.
    """
    loader = logging.getLogger("transformers.modeling_utils")
    loader.addFilter(_is_no_report)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            where,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **options,
        )
    except SafetensorError as error:
        raise ValueError(
            f"a weights file of {name} is damaged ({error}); download the model again, or write it again"
        ) from error
    finally:
        loader.removeFilter(_is_no_report)
    check_loaded(found, name)
    return model


def _is_no_report(record: logging.LogRecord) -> bool:
    """Hold back transformers' table of missing weights, which advises to train them: they are refused."""
    return "LOAD REPORT" not in record.getMessage()


class NeedsItsCode(ValueError):
    """A model or tokenizer cannot be loaded without running Python that lies beside it."""


def _read(kind: type, where: str | Path, **how):
    """Return kind.from_pretrained(where). Raises NeedsItsCode if it would ask for trust_remote_code."""
    try:
        return kind.from_pretrained(where, trust_remote_code=False, **how)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise NeedsItsCode(
            f"{where} needs Python of its own, which could do anything here and is never run; pass a Qwen2, "
            "Qwen3, Llama or Gemma 3 (text) model that works without"
        ) from error


def load_tokenizer(where: str, **how) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or a hub id. how: as for from_pretrained.

    Raises NeedsItsCode, and ValueError for a folder that holds no tokenizer.
    """
    folder = Path(where)
    found = (path for pattern in TOKENIZERS for path in folder.glob(pattern))
    if folder.is_dir() and "gguf_file" not in how and not any(found):
        # for some families, transformers would make a tokenizer without any words
        raise ValueError(f"{where} holds no tokenizer (tokenizer.json); copy it there from the base model")
    tokenizer = _read(AutoTokenizer, where, **how)
    if "gguf_file" in how:  # transformers names it after the folder; errors should name the file
        tokenizer.name_or_path = str(Path(where) / how["gguf_file"])
    return tokenizer


def _config(where: str) -> PreTrainedConfig:
    try:
        return _read(AutoConfig, where)
    except OSError as error:
        why = str(error).partition("\n")[0]  # what transformers advises below it is said here
        raise ValueError(
            f"model is {where} but it is neither a local folder nor a model the hub gave us ({why}); check "
            f"the name (the kit ships {' and '.join(SHIPPED)}) and the network; for a gated model (Gemma, "
            "Llama) accept the licence on its page and log in with `hf auth login`; for adapters on the hub "
            f"pass their folder (hf download {where} --local-dir DIR)"
        ) from error


def check_end_of_text(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {name} names no end-of-text token; set eos_token in its tokenizer_config.json"
        )


def _load_gguf(path: Path, dtype: torch.dtype, device: torch.device, attention: str):
    require(f"{path}, a GGUF file,", "gguf", "accelerate")
    packed = _read_model(str(path), str(path.parent), gguf_file=path.name, dtype=dtype)
    tokenizer = load_tokenizer(str(path.parent), gguf_file=path.name)
    config = packed.config
    restore_rotation(path, config)
    if hasattr(config, "quantization_config"):
        # the weights are plain by now, and a model marked as quantised can be neither trained nor saved
        del config.quantization_config
    kind = attention_name(attention, config, device=device, dtype=dtype)
    model = AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=kind, trust_remote_code=False
    )
    weights = {name: tensor.to(dtype) for name, tensor in packed.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model, tokenizer


def load_config(model: str) -> PreTrainedConfig:
    """Load a model's config without its weights; for a folder of adapters, the config of their base.

    It comes from those that ship with the kit, a folder, a GGUF file, or the hub.
    Raises ValueError if there is none, and says how to provide one.
    """
    shipped = CONFIGS / f"{model.replace('/', '--')}.json"
    if shipped.is_file():
        return AutoConfig.for_model(**json.loads(shipped.read_text(encoding="utf-8")))
    folder = path_of(model)
    if base := _base_of(folder):
        return load_config(base)
    if folder.suffix == ".gguf":
        require(f"{folder}, a GGUF file,", "gguf", "accelerate")
    try:
        if folder.suffix == ".gguf":
            return _read(AutoConfig, folder.parent, gguf_file=folder.name)
        return _read(AutoConfig, folder if folder.is_dir() else model)
    except NeedsItsCode:
        raise
    except (OSError, ValueError) as error:
        known = ", ".join(sorted(path.stem.replace("--", "/") for path in CONFIGS.glob("*.json")))
        raise ValueError(
            f"model is {model} and no config of it is at hand; pass a folder that holds its config.json, go "
            f"online for the hub's, or pass one of those that ship with the kit: {known}\n"
            f"{error}"
        ) from error


def _base_of(folder: Path) -> str:
    """Return the model that a folder's adapters are for; "" if it holds none."""
    file = folder / ADAPTER_CONFIG
    return json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"] if file.is_file() else ""


def load_without_weights(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load what a prompt depends on: a tokenizer, and a model on the meta device, which has no numbers.

    name: as for kit.models.load, of any architecture that transformers has. The model has shapes, and the
    ends that its generation_config.json names. Raises ValueError as load_config does.
    """
    path = path_of(name)
    where, file = path.as_posix(), {}
    if base := _base_of(path):
        model, tokenizer = load_without_weights(base)
        has_own = (path / "tokenizer_config.json").is_file()
        return model, load_tokenizer(where) if has_own else tokenizer
    if path.suffix == ".gguf":
        where, file = str(path.parent), {"gguf_file": path.name}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(name), trust_remote_code=False)
    tokenizer = load_tokenizer(where, **file)
    check_end_of_text(tokenizer, name)
    try:
        model.generation_config = GenerationConfig.from_pretrained(where)
    except OSError:  # it has no such file: its config names the ends
        model.generation_config = GenerationConfig.from_model_config(model.config)
    return model, tokenizer
