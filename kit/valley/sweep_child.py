"""A run of a recipe that ends when the process that started it does, however that ends.

    python -m kit.valley.sweep_child recipes/evaluate.py --smoke < a pipe that the starting process holds open

A sweep that is killed closes the pipe; the run sees its end and goes. Else it would go on unseen, and a resumed sweep would start
a second one in the same folder.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from pathlib import Path

from kit.config import parse

STDIN = 0  # file descriptor
ORPHANED = 75  # exit status of a run whose sweep is gone; nobody is left to read it


def end_with_parent() -> None:
    """Wait for the end of standard input in the background, then leave at once, as a kill would."""

    def wait():
        while os.read(STDIN, 1):  # not through sys.stdin, whose lock the interpreter wants when it ends
            pass
        os._exit(ORPHANED)

    threading.Thread(target=wait, daemon=True, name="end-with-parent").start()


def main(recipe: Path, flags: list[str]) -> None:
    """recipe: a file with Config, main, and, where it has them, SMOKE and PRESETS. flags: as on its command line."""
    sys.path.insert(0, str(recipe.parent))
    module = importlib.import_module(recipe.stem)
    module.main(parse(module.Config, flags, smoke=module.SMOKE, presets=getattr(module, "PRESETS", None)))


if __name__ == "__main__":
    end_with_parent()
    main(Path(sys.argv[1]), sys.argv[2:])
