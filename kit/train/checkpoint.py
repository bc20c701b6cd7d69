"""Save and load checkpoints: the model in Hugging Face format, the optimizer's state and the step.

A checkpoint is a folder `step_0000500`: what `from_pretrained` reads, plus optimizer.safetensors, which with
exact_weights also holds the other 16 bits of each bf16 weight, and trainer.json: the step, the run that wrote
it, and a digest of every file of tensors. It is written under another name and renamed once complete, so a
kill leaves the older one. The last two are kept: if the newest is found damaged, the error says to delete it,
and the run goes on from the other. The finished model has a trainer.json, too.

Of a model with adapters (kit.models.qlora), only the adapters are written, as peft's own folder:
adapter_config.json, which names the base model, and adapter_model.safetensors. Loading them reads the base
model again and, for QLoRA, quantises it.

Under torchrun every rank calls these functions, rank 0 writes while the others wait, and all read the same
folder. The files do not depend on the number of ranks, so a run may go on with another one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from kit.command import LetFinish, Stopped
from kit.disk import publish
from kit.kernels.adamw8bit import exact_weight
from kit.models.folder import load_weights, write_model
from kit.models.weights import check_same, fingerprint, read_tensors
from kit.ranks import here
from kit.run import digest, read_json, write_json
from kit.train.optimizer import flat_states, owned, states_of

KEPT = 2  # checkpoints; the older one is a spare in case the newest cannot be read
OPTIMIZER, TRAINER = "optimizer.safetensors", "trainer.json"
CHUNK = 2**20  # bytes of a file that are hashed at once
Rests = dict[torch.nn.Parameter, torch.Tensor]


def name_of_run(model, **settings: object) -> str:
    """Name a training run by what it computes from: the weights before training, and settings as text.

    Raises ValueError for NaN in the weights, and, naming the difference, if another rank has others.
    """
    facts = {"weights": fingerprint(model)} | {name: str(value) for name, value in settings.items()}
    here().check_same({name: x if len(x) < 200 else f"digest {digest(x)[:12]}" for name, x in facts.items()})
    return digest(*facts.values())


def save(folder: Path, model, tokenizer, optimizer: torch.optim.Optimizer, step: int, run: str = "") -> Path:
    """Write the checkpoint after `step` steps, and delete all but the last two. Return its path.

    run: as name_of_run returns it. While it is written, rank 0 has the states of all ranks in CPU memory.
    """
    path = folder / f"step_{step:07d}"
    tensors = here().to_first({name: x.contiguous() for name, x in states_of(optimizer).items()})

    def write() -> None:
        scratch = write_model(folder / "writing", model, tokenizer)
        save_file(tensors, scratch / OPTIMIZER)
        _record(scratch, step, run)
        publish(scratch, path)
        older = sorted(other for other in folder.glob("step_*") if other != path)
        for useless in older[: len(older) - (KEPT - 1)]:
            shutil.rmtree(useless)

    here().from_first(write)
    return path


def _record(folder: Path, step: int, run: str) -> None:
    write_json(folder / TRAINER, {"step": step, "run": run, "files": _digests(folder)})


def _digests(folder: Path) -> dict[str, str]:
    """Return the digest of every file of tensors in a folder."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        state = hashlib.blake2b(digest_size=16)
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                state.update(chunk)
        found[file.name] = state.hexdigest()
    return found


def rests_of(optimizer: torch.optim.Optimizer) -> Rests:
    """Return the 16 bits that exact_weights keeps of each bf16 weight. Ranks other than 0 get none."""
    rests = here().to_first({name: x for name, x in states_of(optimizer).items() if name.endswith(".rest")})
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {trained[int(name.split(".")[0])]: x for name, x in rests.items()} if here().is_first else {}


@contextmanager
def _in_fp32(model, rests: Rests) -> Iterator[None]:
    """Let weights be what they are with their rests, in CPU memory: 4 bytes of each. Empties rests."""
    own, dtype = {parameter: parameter.data for parameter in rests}, model.config.dtype
    try:
        for parameter, weight in own.items():
            parameter.data = exact_weight(weight.cpu(), rests.pop(parameter).cpu())
        yield
    finally:
        for parameter, weight in own.items():
            parameter.data = weight
        model.config.dtype = dtype  # save_pretrained sets it


def finish(
    finished: Path, model, tokenizer, checkpoints: Path, step: int, run: str, rests: Rests | None = None
) -> None:
    """Write the finished model's folder, and delete the checkpoints, which are larger and now useless.

    step, run: as for save. rests: as rests_of returns them, to be written in fp32; None = as the model is.
    Raises Stopped after Ctrl-C, once the folder is written.
    """

    def write() -> None:
        with _in_fp32(model, rests or {}):
            scratch = write_model(finished.with_name(finished.name + ".tmp"), model, tokenizer)
        _record(scratch, step, run)
        publish(scratch, finished)
        shutil.rmtree(checkpoints, ignore_errors=True)

    with LetFinish("the model's folder") as interrupt:
        here().from_first(write)
        if interrupt.agreed():
            raise Stopped("after the last step, with the model saved")


def is_finished(finished: Path, run: str) -> bool:
    """Return whether the run has written its finished model.

    Raises ValueError if the folder is there but another run has written it.
    """
    return here().from_first(lambda: _is_finished(finished, run))


def _is_finished(finished: Path, run: str) -> bool:
    if not finished.is_dir():
        return False
    file = finished / TRAINER
    writer = read_json(file).get("run") if file.is_file() else None
    if writer != run:
        raise ValueError(
            f"{finished} is not the model that this run trains: its {TRAINER} "
            f"{'names the run ' + writer[:12] if writer else 'is missing'}, and this is {run[:12]} (a run is "
            "named by its base model, data and settings). Move that folder away, or pass another --out"
        )
    return True


def latest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, or None."""
    return max(folder.glob("step_*"), default=None)


def resume(folder: Path, model, optimizer: torch.optim.Optimizer, *, run: str, num_steps: int) -> int:
    """Load the newest checkpoint, as `load` does. Return the number of steps done; 0 if there is none.

    Raises ValueError as `load` does, for a checkpoint of another run or beyond the schedule's num_steps, and
    if another rank finds another one.
    """
    path = latest(folder)
    record = path and _read_record(path)
    here().check_same({"the newest checkpoint": path and path.name, "its digest": digest(str(record))})
    if path is None:
        return 0
    if record["run"] != run:
        raise ValueError(
            f"{path} was written by the run {record['run'][:12]}, and this is {run[:12]} (a run is named by "
            "its base model, data and settings). Restore what has changed, or pass another --out"
        )
    if not 0 < record["step"] <= num_steps:
        raise ValueError(
            f"{path} is a checkpoint after step {record['step']} but training has {num_steps} steps; pass "
            "the flags that the run was started with, or another --out"
        )
    _load_tensors(path, model, optimizer)
    return record["step"]


def _read_record(path: Path) -> dict:
    """Return trainer.json. Raises ValueError, with the way out, if a file is not what was written."""
    try:
        record = json.loads((path / TRAINER).read_text(encoding="utf-8"))
        faulty, fault = TRAINER, "lacks the step, the run or the digests of the files"
        if isinstance(record, dict) and {"step", "run", "files"} <= record.keys():
            then, now = record["files"], _digests(path)
            wrong = [name for name in {**then, **now} if then.get(name) != now.get(name)]
            if not wrong:
                return record
            faulty = wrong[0]
            fault = "does not hold what was written" if faulty in now else "is missing"
    except (OSError, ValueError) as error:
        faulty, fault = TRAINER, f"cannot be read ({error})"
    older = [other for other in path.parent.glob("step_*") if other.name < path.name]
    way_out = f"goes on from {max(older).name}" if older else "begins with the first step"
    raise ValueError(
        f"{path / faulty} {fault}: the checkpoint is damaged. Delete {path}; --resume then {way_out}"
    )


def load(path: Path, model, optimizer: torch.optim.Optimizer) -> int:
    """Load weights and optimizer state in place, bit for bit. Return the number of steps done.

    Raises ValueError if the checkpoint is damaged or of another model, or if exact_weights differs.
    """
    record = _read_record(path)
    _load_tensors(path, model, optimizer)
    return record["step"]


def _load_tensors(path: Path, model, optimizer: torch.optim.Optimizer) -> None:
    tensors = read_tensors(path / OPTIMIZER)
    was, now = "0.rest" in tensors, any("rest" in state for state in optimizer.state.values())
    if was != now:
        raise ValueError(
            f"{path} was written with exact_weights {was} but exact_weights is {now} here; pass "
            f"--{'' if was else 'no_'}exact_weights"
        )
    groups = optimizer.param_groups
    own = {parameter for group in groups for parameter in owned(group)}
    parameters = dict(enumerate(parameter for group in groups for parameter in group["params"]))
    parameters = {index: parameter for index, parameter in parameters.items() if parameter in own}
    tensors = {key: x for key, x in tensors.items() if int(key.split(".")[0]) in parameters}
    wanted = states_of(optimizer)
    if tensors and not wanted:  # torch's AdamW has no state before its first update
        wanted = flat_states({
            index: {"step": torch.tensor(0.0), "exp_avg": parameter, "exp_avg_sq": parameter}
            for index, parameter in parameters.items()
        })  # fmt: skip
    remedy = "pass the --model and the optimizer's flags that it was trained with"
    check_same(tensors, wanted, path / OPTIMIZER, remedy=remedy)
    load_weights(path, model)
    states: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        states.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def diverged(step: int, lr: float, error: Exception, folder: Path) -> ValueError:
    """Return the error of a step that was not finite. error: what is not."""
    kept = latest(folder) or "none: pass --checkpoint_every"
    return ValueError(
        f"step {step}: {error} at lr {lr:.2e}, so nothing of this step is kept. Begin anew with a lower "
        f"--lr; the last checkpoint is {kept}"
    )
