"""The folder of a run: config.json, metrics.jsonl, samples, checkpoints, model, report; how it is resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from kit.disk import remove_scratch, write_whole
from kit.journal import CONFIG, STEP, Journal, type_of
from kit.lock import LOCK, hold, is_shared, release
from kit.ranks import here
from kit.versions import running

UNSTORED = {"resume", "out", "plan", "json", "typed"}
# settings that change nothing that a run computes, or only what it does last, or only rounding
FREE_TO_CHANGE = UNSTORED | {
    "baseline", "workers", "gpus", "rl_steps", "rl_sizes", "num_slots", "desktop_gb", "card", "trace_tokens",
    "response_tokens", "recompute", "tile_tokens", "offload_inputs", "logit_rows", "offload_optimizer",
    "offload_gradients", "head_update", "eval_every", "log", "server", "cuda_graphs", "rl_flags",
}  # fmt: skip
ALIKE = {"rl_flags"}  # of these, what processes that share a folder must agree on

BEFORE, AFTER, SAMPLES = "before", "after", "samples"  # folders of samples in a run
DURING = "during"  # the folder of samples drawn while it was trained; DURING.jsonl: their figures by step
ROLLOUTS = "rollouts.jsonl"  # the first group of every step of reinforcement learning
BEGUN = ("metrics.jsonl", "checkpoints", "model", "cells")  # what a run writes once it has begun to train
MACHINE = "machine.json"  # what a run is trained on
INPUTS = "inputs.json"  # what a run reads -> where from, how much and its digest
# what it writes before
PREPARED = (
    CONFIG, INPUTS, "drop_counts.json", "prompts.jsonl", "data", "study.json", "memory.json", MACHINE,
    ROLLOUTS, BEFORE, AFTER, SAMPLES, DURING, f"{DURING}.jsonl",
)  # fmt: skip


class RunFolder:
    """A folder that belongs to one run with one set of settings."""

    newest: RunFolder | None = None  # the last one that this process opened
    discarding = threading.Lock()

    def __init__(
        self, path: Path, *, is_new: bool = False, is_created: bool = False, is_locked: bool = False
    ):
        self.path, self.is_new, self.is_created = path, is_new, is_created
        self.is_locked = is_locked  # by this object; False = the process held the lock before
        self.before = {child.name for child in path.glob("*")} - {CONFIG}
        self.metrics = Journal(path / "metrics.jsonl", STEP)
        self.at_end: list[Callable[[], object]] = []  # called when the recipe ends, however it does

    @classmethod
    def open(cls, config, *, may_grow: Sequence[str] = (), join: bool = False) -> RunFolder:
        """Return the run folder of a config, with its config.json written, locked until this process ends.

        config: a recipe's Config. If its `out` is "", the folder is the next free number under runs/RECIPE,
        or with `resume` the newest one there. may_grow: settings that may grow in a resumed run: a number
        gets larger, a list gets more numbers, or more names at its end. join: several processes may work in
        the folder once the first of them has called kit.lock.share, and a run with the same settings that is
        there already goes on, also without `resume`. Raises ValueError if the folder already holds a run, if
        there is nothing to resume, if a resumed run's settings differ, naming them, and if another process
        works in the folder.

        Of several ranks, the first opens it for all. Raises ValueError, too, if one has other settings or
        versions, or another disk.
        """
        here().check_same(_settings(config) | running() if here().count > 1 else {})

        def open_here() -> list[str]:
            path = cls._open(config, may_grow, join).path.absolute()
            return [str(path), (path / LOCK).read_text()]

        path, holder = here().from_first(open_here)
        if not here().is_first:
            lock = Path(path, LOCK)
            if not lock.is_file() or lock.read_text() != holder:
                raise ValueError(
                    f"{path} of rank 0 is not on a disk that {here().name} shares; pass an --out that is"
                )
            cls.newest = cls(Path(path))
        return cls.newest

    @classmethod
    def _open(cls, config, may_grow: Sequence[str], join: bool) -> RunFolder:
        parent = Path("runs") / recipe_name(type(config))
        path = Path(config.out or parent)
        try:
            if config.resume:
                path = stored_settings(parent.name, config.out)[0]
            is_created = not config.resume and (not config.out or not path.exists())
            path = path if config.resume or config.out else make_next_folder(parent)
            was_free = hold(path, join=join)
        except OSError as error:  # a file is in the way, or the disk is read-only, or not ours
            raise ValueError(
                f"{path} cannot be a run folder ({error.strerror}); pass an --out that is a new name, or a "
                "folder, where you can write"
            ) from error
        goes_on = config.resume or (join and (path / CONFIG).is_file())
        try:
            cls._write_settings(path, config, may_grow, goes_on=goes_on)
        except BaseException:
            if was_free:
                release(path)
            raise
        if not is_shared(path):
            remove_scratch(path)
        cls.newest = cls(path, is_new=not goes_on, is_created=is_created, is_locked=was_free)
        return cls.newest

    @staticmethod
    def _write_settings(path: Path, config, may_grow: Sequence[str], *, goes_on: bool) -> None:
        """Write config.json, if these settings may be those of the run in the folder and nobody shares it."""
        settings = _settings(config)
        if goes_on:
            before = read_json(path / CONFIG)
            defaults = {field.name: field.default for field in dataclasses.fields(config)}
            before = {name: before.get(name, defaults[name]) for name in settings} | before  # new settings
            grows = may_grow if config.resume and not is_shared(path) else ()
            grown = {k for k in grows if k in before and _has_grown(before[k], settings[k])}
            free = FREE_TO_CHANGE - ALIKE if is_shared(path) else FREE_TO_CHANGE
            fixed = sorted({*before, *settings} - free - grown)
            changed = [k for k in fixed if _meaning(k, before.get(k)) != _meaning(k, settings.get(k))]
            if changed:
                now = {
                    k: f"is {settings[k]!r}" if k in settings else "is no setting any more" for k in changed
                }
                each = "; ".join(f"{k} was {before.get(k)!r}, {now[k]}" for k in changed)
                wait = "wait until the others there end, " if is_shared(path) else ""
                only_more = set(changed) <= {*may_grow}
                grow = "--resume, which lets it grow, " if only_more and not config.resume else ""
                raise ValueError(
                    f"{path} was started with other settings: {each}; "
                    f"{wait}pass {grow}the same, or another --out"
                )
            if is_shared(path):
                return
        elif (path / CONFIG).exists():
            raise ValueError(f"{path} already holds a run; pass --resume to continue it, or another --out")
        elif has_begun(path):
            found = [name for name in (*BEGUN, BEFORE, AFTER, SAMPLES, DURING) if (path / name).exists()]
            raise ValueError(
                f"{path} holds {', '.join(found)} but no {CONFIG}, so nobody knows how they were made; "
                f"pass another --out, or put {CONFIG} back and pass --resume"
            )
        write_json(path / CONFIG, settings)

    def unlock(self) -> None:
        """Let other processes write in the folder, such as a second notebook's: the recipe has ended."""
        while self.at_end:
            self.at_end.pop()()
        if self.is_locked:
            release(self.path)

    def discard_if_new(self) -> None:
        """Remove a new run that has not begun, so that the corrected command may have its folder.

        In a folder that was there before, all that was in it stays.
        """
        with self.discarding:  # the thread that watches other ranks may come, too, and then ends the process
            if not self.is_new or has_begun(self.path):
                return
            self.is_new = False
            for made in (self.path / name for name in PREPARED if name not in self.before):
                shutil.rmtree(made) if made.is_dir() else made.unlink(missing_ok=True)
            if self.is_created:  # while it is locked: a process that waits for it would have files there
                shutil.rmtree(self.path, ignore_errors=True)
            release(self.path)


def _settings(config) -> dict:
    """Return the settings that make a run what it is."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in UNSTORED}


def _meaning(name: str, value: object) -> object:
    """Return what a setting is in a run that has begun: auto is then the kit's attention."""
    return "kit" if (name, value) == ("attention", "auto") else value


def has_begun(path: Path) -> bool:
    """Return whether the run in a folder has trained or measured anything."""
    samples = (file for stage in (BEFORE, AFTER, SAMPLES) for file in (path / stage).glob("*.jsonl"))
    return any((path / name).exists() for name in BEGUN) or any(map(_holds_samples, samples))


def _holds_samples(path: Path) -> bool:
    """Return whether a file of samples holds more than its first line, which is a header."""
    with path.open("rb") as lines:
        return len(list(islice(lines, 2))) > 1


def stored_settings(recipe: str, out: str) -> tuple[Path, dict]:
    """Return (the folder of the run to resume, the settings in its config.json).

    out: the folder; "" = the newest run under runs/RECIPE that has begun. Raises ValueError if there is none.
    """
    parent = Path("runs") / recipe
    if out:
        path, where = Path(out), f"{out} holds no run"
    else:
        begun = [child for child in numbered(parent) if has_begun(child)]
        path, where = (begun[-1] if begun else parent), f"no run under {parent} has begun"
    if not (path / CONFIG).is_file():
        raise ValueError(f"--resume was given but {where}; drop --resume, or pass the --out of the run")
    return path, read_json(path / CONFIG)


def _has_grown(before: int | str, now: int | str) -> bool:
    """Return whether a number is larger now, or a comma-separated list longer.

    Numbers of a list may be added anywhere, names only at its end.
    """
    if not isinstance(before, str):
        return before < now
    had, has = before.split(","), now.split(",")
    return set(had) < set(has) if had[0].isdigit() else has[: len(had)] == had


def recipe_name(config_class: type) -> str:
    """Return the file name, without .py, of the recipe that a Config belongs to."""
    return Path(getattr(sys.modules[config_class.__module__], "__file__", "notebook")).stem


def make_next_folder(parent: Path) -> Path:
    """Create the next free numbered folder under parent, 001 first. Return it: no other process gets it."""
    while True:
        number = max((int(child.name) for child in numbered(parent)), default=0) + 1
        path = parent / f"{number:03d}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:  # by another run that starts now
            continue
        return path


def numbered(parent: Path) -> list[Path]:
    """Return the numbered folders under parent, in their order."""
    found = (child for child in parent.glob("[0-9]*") if child.name.isdigit())
    return sorted(found, key=lambda child: int(child.name))


def kept_traces(run: Path) -> int:
    """Return on how many traces a run is trained; 0 if that is not known."""
    return read_json_if_any(run / "drop_counts.json").get("kept", 0)


def write_json(path: Path, value) -> None:
    """Write the file whole or not at all: a kill leaves the old file or the new one. Only rank 0 writes."""
    if here().is_first:
        write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict:
    """Return the object in a JSON file. Raises ValueError naming the file if it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
        raise ValueError(f"{path} is damaged ({error}); restore it, or begin a new run") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type_of(value)}, not an object; restore it, or begin a new run")
    return value


def read_json_if_any(path: Path) -> dict:
    """Return the object in a JSON file as read_json does; {} if there is no such file."""
    return read_json(path) if path.is_file() else {}


def digest(*parts: str) -> str:
    """Return a 128-bit hash of the parts, as hex."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(json.dumps(part).encode())  # quoted, so that ("ab", "c") and ("a", "bc") differ
    return state.hexdigest()
