"""Pool runs of one study with different seeds, such as those of a class, into one study."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from kit.journal import CONFIG, Journal
from kit.lock import LOCK
from kit.run import FREE_TO_CHANGE, read_json, write_json
from kit.valley.claims import CLAIM, JOURNAL
from kit.valley.finished import CELLS, StudyResults, write_study
from kit.valley.jobs import OUTCOME

MAY_DIFFER = FREE_TO_CHANGE | {"seed", "seeds"}
LEFT_BEHIND = shutil.ignore_patterns("model", "checkpoints", LOCK, f"{CLAIM}*")  # large, and not for a report


def pool(runs: Sequence[Path], folder: Path) -> None:
    """Copy what the runs have measured into a new folder, as one study with all their seeds.

    Models and reinforcement learning are left out. Raises ValueError for a folder that holds anything, for
    runs that differ in more than their seeds, and for two runs of one seed.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty; pass another folder to --pool")
    studies = [StudyResults.read(run) for run in runs]
    settings = [read_json(run / CONFIG) for run in runs]
    owners: dict[int, Path] = {}  # seed -> its run
    for run, study, own in zip(runs, studies, settings, strict=True):
        names = {*settings[0], *own} - MAY_DIFFER
        if different := sorted(name for name in names if settings[0].get(name) != own.get(name)):
            pairs = (f"{name} {settings[0].get(name)!r} and {own.get(name)!r}" for name in different)
            raise ValueError(
                f"{runs[0]} and {run} differ: {'; '.join(pairs)}; pool runs that differ in --seed"
            )
        for seed in sorted({cell.seed for cell in study.cells}):
            if seed in owners:
                raise ValueError(
                    f"{owners[seed]} and {run} both have seed {seed}, and would count as one; "
                    "leave one out, or run one of them again with another --seed"
                )
            owners[seed] = run

    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder / JOURNAL, OUTCOME)
    for run, study in zip(runs, studies, strict=True):
        measured = {path.name for path in (run / CELLS).glob("*")} & study.outcomes.keys()
        for name in sorted(measured):
            shutil.copytree(run / CELLS / name, folder / CELLS / name, ignore=LEFT_BEHIND)
            journal.append(asdict(study.outcomes[name]))
    write_study(folder, [cell for study in studies for cell in study.cells], studies[0].deviations)
    write_json(folder / CONFIG, settings[0] | {"seed": min(owners), "seeds": len(owners)})
