"""Write the report of a run again, from the files in its folder.

    python -m kit.report runs/gemma3_1b_8k/001

Every kind of run has a report, finished or not: fine-tuning, evaluation, reinforcement learning, and a study
(recipes/valley_demo.py and valley_sweep.py). Which kind it is follows from what the folder holds.

--pool FOLDER takes several runs of one study with different seeds, such as those of a class, and writes one
report of them all in FOLDER.

--judge URL first asks a language model, on any server with OpenAI's chat interface, whether the answers with
a reflection keyword really reflect, as the paper does (kit/evaluate/judge.py). The run must have ended.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kit import report
from kit.command import guard
from kit.command_line import started_as
from kit.config import Parser
from kit.evaluate.judge import Judge, judge_logs
from kit.evaluate.sample_log import logs_in
from kit.journal import CONFIG
from kit.run import AFTER, BEFORE, SAMPLES, read_json_if_any
from kit.valley.finished import STUDY
from kit.valley.pool import pool

STAGES = (BEFORE, AFTER, SAMPLES)


def write_report(path: Path) -> Path:
    """Write the report of the run in `path`, and return it. Raises ValueError if there is no run."""
    if (path / STUDY).is_file():
        return report.valley.write_report(path)
    if "group_size" in read_json_if_any(path / CONFIG):
        return report.rl.write_report(path)
    return report.before_after.write_report(path)


def is_copy(folder: Path, run: Path) -> bool:
    """Return whether a folder of samples is a cell's copy of a baseline that the study `run` has, too."""
    cell = folder.parent
    return folder.name == BEFORE and cell != run and bool(read_json_if_any(cell / CONFIG).get("baseline"))


def main(arguments: list[str]) -> None:
    parser = Parser(
        prog=started_as(),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="run", help="a run folder; several with --pool")
    parser.add_argument("--pool", type=Path, metavar="FOLDER", help="a new folder for the runs together")
    parser.add_argument("--judge", metavar="URL", default="", help="such as http://localhost:8000/v1")
    parser.add_argument("--judge_model", metavar="NAME", default="", help="default: the server's first")
    config = parser.parse_args(arguments)
    if config.judge_model and not config.judge:
        raise ValueError(f"judge_model is {config.judge_model!r} but --judge_model needs --judge URL")
    if config.pool:
        pool(config.runs, config.pool)
    elif len(config.runs) > 1:
        raise ValueError(f"{len(config.runs)} run folders were given; --pool FOLDER makes one report of them")
    run = config.pool or config.runs[0]
    page = write_report(run)  # a folder without a run is refused before anything is judged
    if config.judge:
        judge = Judge(config.judge, config.judge_model)
        folders = sorted(folder for stage in STAGES for folder in run.glob(f"**/{stage}"))
        logs = [file for folder in folders if not is_copy(folder, run) for file in logs_in(folder)]
        for outcome, count in judge_logs(logs, judge).items():
            print(f"judge       {count:,} answers: {outcome}")
        page = write_report(run)
    print(page)


if __name__ == "__main__":
    guard(main)
