"""Start a program from the command line: flags, one-line errors, Ctrl-C, and the lines at the end.

A recipe's last lines are

    if __name__ == "__main__":
        start(main, Config, smoke=SMOKE)
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path

from kit.command_line import shell_word, started_as
from kit.config import parse, show
from kit.run import RunFolder
from kit.versions import newer_than_tested

# What a user can mend: wrong settings or data, a file or a disk, a missing package. Everything else is a bug
# of the kit, and its traceback is printed.
MISTAKES = (ValueError, OSError, ImportError)
REFUSED, INTERRUPTED = 2, 130  # exit statuses: argparse's for a wrong flag, a shell's for Ctrl-C


class Stopped(KeyboardInterrupt):
    """Ctrl-C, after what was done has been saved. Its text says what was kept, such as "at step 4 of 9"."""


def clean_up_if_refused(main: Callable[[object], object]) -> Callable[[object], object]:
    """Decorate a recipe's main: if it ends before it has trained or measured anything, nothing is left of it.

    So the corrected settings may have the same run folder. When main ends, the folder's lock is released.
    """

    @wraps(main)
    def cleaning(config):
        RunFolder.newest = None
        try:
            return main(config)
        except BaseException:
            if RunFolder.newest:
                RunFolder.newest.discard_if_new()
            raise
        finally:
            if RunFolder.newest:
                RunFolder.newest.unlock()

    return cleaning


def open_run(config, *, may_grow: Sequence[str] = (), join: bool = False) -> RunFolder:
    """Open the folder of a run as RunFolder.open does, and print where it is and what is not by default."""
    run = RunFolder.open(config, may_grow=may_grow, join=join)
    print(f"{show(config)}\nrun folder {run.path} (its config.json lists all settings)")
    return run


def start(
    main: Callable[[object], object], config_class: type, argv: Sequence[str] | None = None, **choices
) -> None:
    """Parse the flags and run main(config).

    argv: None = sys.argv[1:]. choices: smoke, quick and presets, as for kit.config.parse. A mistake that the
    user can mend is one line on stderr and exit status 2; --traceback shows where it came from. Ctrl-C prints
    how to go on, and the status is 130.
    """

    def run(words: list[str]) -> None:
        config = parse(config_class, words, **choices)
        if line := newer_than_tested():
            print(line)
        clean_up_if_refused(main)(config)

    guard(run, argv)


def guard(program: Callable[[list[str]], object], argv: Sequence[str] | None = None) -> None:
    """Run program(argv) as `start` does, for commands that read their own flags."""
    words = list(sys.argv[1:] if argv is None else argv)
    wants_traceback = "--traceback" in words
    RunFolder.newest = None
    if isinstance(sys.stdout, io.TextIOWrapper):  # it is None if it was closed
        # also the log of a run that is killed is whole, and no character of an answer ends it
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        program([word for word in words if word != "--traceback"])
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `| head`, has all that it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        raise SystemExit(1) from None
    except MISTAKES as error:
        if wants_traceback:
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(REFUSED) from None
    except KeyboardInterrupt as stop:
        print(f"\n{_farewell(stop)}", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def _farewell(stop: KeyboardInterrupt) -> str:
    run = RunFolder.newest
    if run is None or not run.has_begun:
        return "stopped before anything was trained or measured"
    where = f" {stop}" if isinstance(stop, Stopped) else "; what is finished is kept"
    return f"stopped{where}. Go on with: {started_as()} --resume --out {shell_word(str(run.path))}"


class LetFinish:
    """Within this context the first Ctrl-C only sets `asked`, so that a step can end and be saved.

    A second Ctrl-C stops at once. It has no effect outside the main thread, where Python handles signals.
    """

    def __init__(self, what: str):
        self.what = what  # is finished first, such as "step 4 and its checkpoint"
        self.asked = False

    def __enter__(self) -> LetFinish:
        self.in_main = threading.current_thread() is threading.main_thread()
        if self.in_main:
            self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, *_) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print(f"\nfinishing {self.what}; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    def __exit__(self, *_) -> None:
        if self.in_main:
            signal.signal(signal.SIGINT, self.before)


def finish(report: Path, effect: str, command: str, *words: str) -> None:
    """Print a recipe's last lines: a link to the report, and what to type next. effect: of the command."""
    print(f"report {report.resolve().as_uri()}")
    suggest(effect, command, *words)


def suggest(effect: str, command: str, *words: str) -> None:
    """Print what to type next, as the last line of a recipe. effect: of the command."""
    print(f"next   {' '.join([command, *map(shell_word, words)])}    {effect}")
