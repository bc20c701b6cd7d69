"""Save and load checkpoints: the model in Hugging Face format, the optimizer's state and the step.

A checkpoint is a folder `step_0000500`: what `from_pretrained` reads, plus optimizer.safetensors, which with
exact_weights also holds the other 16 bits of each bf16 weight, and trainer.json. It is written under another
name and renamed once complete, so a kill leaves the older one. Older checkpoints are deleted after the
rename.

Of a model with adapters (kit.models.qlora), only the adapters are written, as peft's own folder:
adapter_config.json, which names the base model, and adapter_model.safetensors. Loading them reads and
quantises the base model again.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kit.command import LetFinish, Stopped
from kit.models.folder import _publish, _write_model, load_weights, save_model
from kit.run import write_json


def save(folder: Path, model, tokenizer, optimizer: torch.optim.Optimizer, step: int) -> Path:
    """Write the checkpoint after `step` steps and delete the older ones. Return its path."""
    path = path_of(folder, step)
    scratch = _write_model(folder / "writing", model, tokenizer)
    tensors = {
        f"{index}.{name}": tensor.contiguous()
        for index, state in optimizer.state_dict()["state"].items()
        for name, tensor in state.items()
    }
    save_file(tensors, scratch / "optimizer.safetensors")
    write_json(scratch / "trainer.json", {"step": step})
    _publish(scratch, path)
    for older in folder.glob("step_*"):
        if older != path:
            shutil.rmtree(older)
    return path


def path_of(folder: Path, step: int) -> Path:
    """Return where the checkpoint after `step` steps is."""
    return folder / f"step_{step:07d}"


def finish(finished: Path, model, tokenizer, checkpoints: Path) -> None:
    """Write the finished model's folder, and delete the checkpoints, which are larger and now useless.

    Raises Stopped after Ctrl-C, once the folder is written.
    """
    with LetFinish("the model's folder") as interrupt:
        save_model(finished, model, tokenizer)
        shutil.rmtree(checkpoints, ignore_errors=True)
    if interrupt.asked:
        raise Stopped("after the last step, with the model saved")


def latest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, or None."""
    return max(folder.glob("step_*"), default=None)


def load(path: Path, model, optimizer: torch.optim.Optimizer) -> int:
    """Load weights and optimizer state in place, bit for bit. Return the number of steps done.

    Raises ValueError if the checkpoint is of another model, or if exact_weights differs.
    """
    tensors = load_file(path / "optimizer.safetensors")
    was, now = "0.rest" in tensors, any("rest" in state for state in optimizer.state.values())
    if was != now:
        raise ValueError(
            f"{path} was written with exact_weights {was} but exact_weights is {now} here; pass "
            f"--{'' if was else 'no_'}exact_weights"
        )
    load_weights(path, model)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        state = optimizer.state[parameter]
        # not by optimizer.load_state_dict, which casts fp32 states of a bf16 parameter to bf16
        if name != "step" and name in state:
            state[name].copy_(tensor)  # to the device where the optimizer keeps it
        else:
            on_card = name != "step" or optimizer.defaults.get("fused")
            state[name] = tensor.to(parameter.device) if on_card else tensor
    return json.loads((path / "trainer.json").read_text(encoding="utf-8"))["step"]
