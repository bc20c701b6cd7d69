"""Write the report of a run again, from the files in its folder.

    python -m kit.report runs/gemma3_1b_8k/001

Every kind of run has a report, finished or not: fine-tuning, evaluation, reinforcement learning, and a study
(recipes/valley_demo.py and valley_sweep.py). Which kind it is follows from what the folder holds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from kit import report
from kit.command import guard
from kit.command_line import started_as
from kit.valley.finished import STUDY


def write_report(path: Path) -> Path:
    """Write the report of the run in `path`, and return it. Raises ValueError if there is no run."""
    if (path / STUDY).is_file():
        return report.valley.write_report(path)
    config = path / "config.json"
    if config.is_file() and "group_size" in json.loads(config.read_text(encoding="utf-8")):
        return report.rl.write_report(path)
    return report.before_after.write_report(path)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog=started_as(),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="a run folder")
    print(write_report(parser.parse_args(arguments).run))


if __name__ == "__main__":
    guard(main)
