"""Rewards: the numbers that GRPO raises. The built-in one, and functions of your own that a setting names.

A reward is a function of a question and of all the answers that it got in one step. It returns one number
per answer, in their order, or None for an answer that it cannot judge:

    def short(question, completions):
        return [-len(completion.ids) / 1000 for completion in completions]

    question       problem, and answer, the gold one: both are text
    a completion   text; ids, its tokens; finished, False if it was cut off

Only differences within a group matter: an advantage compares an answer with the others to the same question.
recipes/rewards.py has three examples.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from types import ModuleType

import torch

from kit.data.problems import Question
from kit.generate.sampler import Completion
from kit.grade.verdict import grade

Reward = Callable[[Question, Sequence[Completion]], "Sequence[float | None]"]  # None: undecided

OWN = "for a function of your own, pass FILE.py:FUNCTION"
SCORES = {"correct": 1.0, "wrong": 0.0, "unknown": None}  # verdict of the grader -> reward


def correctness(question: Question, completions: Sequence[Completion]) -> list[float | None]:
    """Return 1 for a right answer, 0 for a wrong one or none at all, None if the grader could not decide."""
    return [SCORES[grade(question.answer, completion.text).verdict] for completion in completions]


def judge(
    rewards: Mapping[str, Reward], question: Question, completions: Sequence[Completion]
) -> list[dict[str, float | None]]:
    """Return the rewards of each completion by name. Raises ValueError for a function that fails, or returns
    anything but one finite number or None per completion.
    """
    columns = [_judge(name, reward, question, completions) for name, reward in rewards.items()]
    return [dict(zip(rewards, values, strict=True)) for values in zip(*columns, strict=True)]


def try_out(rewards: Mapping[str, Reward], question: Question) -> str:
    """Return what a right answer and an empty one would earn, as text. Raises ValueError as `judge` does.

    So most mistakes in a function come up before a model is loaded.
    """
    right = Completion([0] * 8, [0.0] * 8, finished=True, text=f"\\boxed{{{question.answer}}}")
    empty = Completion([0], [0.0], finished=True, text="")
    found = judge(rewards, question, [right, empty])
    right, empty = (", ".join("none" if x is None else f"{x:g}" for x in one.values()) for one in found)
    return f"{right} for a right answer, {empty} for an empty one"


def total(judged: Mapping[str, float | None]) -> float | None:
    """Return the sum of an answer's rewards; None if one of them is."""
    return None if None in judged.values() else sum(judged.values())


def _judge(
    name: str, reward: Reward, question: Question, completions: Sequence[Completion]
) -> list[float | None]:
    mend = "correct the function, and begin a new run"
    try:
        found = reward(question, completions)
    except torch.OutOfMemoryError:  # the training loop says what to do
        raise
    except Exception as error:
        asked = " ".join(question.problem.split())
        raise ValueError(f"reward {name} failed on {asked!r}: {_describe(error)}; {mend}") from error

    wanted = f"a list of {len(completions)} numbers, one per answer"
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise ValueError(f"reward {name} returned {found!r}, but it must return {wanted}; {mend}")
    if len(found) != len(completions):
        raise ValueError(
            f"reward {name} returned a list of {len(found)}, but it must return {wanted}; {mend}"
        )
    for value in found:
        if value is not None and not (isinstance(value, Real) and math.isfinite(value)):
            raise ValueError(
                f"reward {name} returned {value!r} for an answer, but it must be a finite number, or None "
                f"for an answer that it cannot judge; {mend}"
            )
    return [None if value is None else float(value) for value in found]


def load_rewards(names: str, shipped: Path) -> tuple[dict[str, Reward], list[Path]]:
    """Return (name -> reward, the files that they are from) of a setting such as "exact_answer,my.py:short".

    Each word is FILE.py:FUNCTION, or a function of `shipped`. The files are run as Python. Raises ValueError
    for a file that does not exist or cannot be run, and for a function that it lacks.
    """
    rewards: dict[str, Reward] = {}
    modules: dict[Path, ModuleType] = {}
    for word in names.split(","):
        file, _, name = word.strip().rpartition(":")
        path = Path(file).expanduser() if file else shipped
        if not path.is_file():
            raise ValueError(f"reward is {names!r} but there is no file {path}; pass FILE.py:FUNCTION")
        if path not in modules:
            modules[path] = _run_file(path)
        module = modules[path]
        functions = {key: value for key, value in vars(module).items() if inspect.isfunction(value)}
        own = [key for key, f in functions.items() if f.__module__ == module.__name__ and key[0] != "_"]
        reward = getattr(module, name, None)
        if not callable(reward) or isinstance(reward, type):
            near = difflib.get_close_matches(name, own, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(own) or 'none'}"
            hint += "" if file else f" ({OWN})"
            raise ValueError(f"reward is {names!r} but {path} has no function {name!r}; {hint}")
        if name in rewards:
            raise ValueError(f"reward is {names!r}, which names {name} twice; give each a name of its own")
        rewards[name] = reward
    return rewards, list(modules)


def _run_file(path: Path) -> ModuleType:
    """Import a file by its path."""
    name = f"rewards of {path}"  # no name that an import statement could find
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise ValueError(f"{path} is not a Python file; {OWN}")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path} cannot be run: {_describe(error)}; correct it") from error
    return module


def _describe(error: Exception) -> str:
    """Return an error as one line, with the line of the user's file that it comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    outside = [f for f in frames if f.filename != __file__ and not f.filename.startswith("<frozen")]
    where = f" ({Path(outside[0].filename).name}, line {outside[0].lineno})" if outside else ""
    return " ".join(f"{type(error).__name__}: {error}{where}".split())
