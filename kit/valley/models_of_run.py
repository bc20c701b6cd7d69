"""The models of a run's folder, to be asked: both sides of a fine-tuning, or every model of a study."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from kit.journal import CONFIG
from kit.run import kept_traces, read_json, read_json_if_any
from kit.valley.finished import CELLS, STUDY
from kit.valley.study import Cell, short_name


class Found(NamedTuple):
    """A model, what it is called beside others, and how it was asked when it was measured."""

    name: str  # as kit.models.load takes it
    title: str
    instruction: str | None = None  # None: not known
    chat_template: str = ""  # "" = the model's own


def models_of(name: str) -> list[Found]:
    """Return the models that a name stands for.

    A run's folder stands for the model that the run began with and the one that it made, a study's folder for
    the base models and all that have been trained from them, with the first seed. Any other name is a model's
    own. Raises ValueError for a run that has made no model yet.
    """
    folder = Path(name)
    if (folder / STUDY).is_file():
        return _of_study(folder)
    settings = settings_of(folder)
    if "model" not in settings:
        return [Found(name, name, settings_of_model(name).get("instruction"))]
    if not (folder / "model").is_dir():
        raise ValueError(
            f"{folder} has no model/ yet: the run has not ended, or it only measures; pass a model, "
            "a folder under its checkpoints/, or a run that has ended"
        )
    made = f"after {kept_traces(folder):,} traces" if kept_traces(folder) else "after training"
    base = settings["model"]
    before = Found(base, f"{base}, before", *how_asked(settings))
    return [before, Found(str(folder / "model"), f"{short_name(base)}, {made}", settings["instruction"])]


def side_by_side(names: Iterable[str]) -> list[Found]:
    """Return the models that several names stand for, each once. No two have the same title.

    A title that several models share is followed by the name that each was found by. Raises ValueError as
    models_of does.
    """
    found: dict[Found, str] = {}
    for name in names:
        for model in models_of(name):
            found.setdefault(model, name)
    count = Counter(model.title for model in found)
    return [
        model._replace(title=f"{model.title} ({name})") if count[model.title] > 1 else model
        for model, name in found.items()
    ]


def how_asked(settings: dict) -> tuple[str | None, str]:
    """Return a base model's instruction and chat template; a trained model has its template saved."""
    return settings.get("instruction"), settings.get("chat_template", "")


def settings_of(folder: Path) -> dict:
    """Return a run's settings; {} for a folder that is not a run's, such as that of a model."""
    settings = read_json_if_any(folder / CONFIG)
    return settings if "instruction" in settings else {}


def settings_of_model(name: str) -> dict:
    """Return the settings of the run that has written a model or checkpoint; {} if there is none."""
    folder = Path(name).absolute()
    runs = folder.parents[:2] if folder.is_dir() else ()
    return next(filter(None, map(settings_of, runs)), {})


def _of_study(folder: Path) -> list[Found]:
    cells = [Cell(**row) for row in read_json(folder / STUDY)["cells"]]
    first = min((cell.seed for cell in cells), default=0)
    cells = [cell for cell in cells if cell.seed == first]
    baselines = {cell.model: settings_of(folder / CELLS / cell.baseline) for cell in cells}
    found = [
        Found(name, f"{short_name(name)}, base model", *how_asked(settings))
        for name, settings in baselines.items()
    ]
    for cell in cells:
        if (model := folder / CELLS / cell.name / "model").is_dir():
            title = f"{short_name(cell.model)}, {cell.num_traces:,} {cell.curve}"
            found.append(Found(str(model), title, settings_of_model(str(model)).get("instruction")))
    return found
