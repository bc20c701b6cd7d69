"""Start a program from the command line: flags, one-line errors, Ctrl-C, and the lines at the end.

A recipe's last lines are

    if __name__ == "__main__":
        start(main, Config, smoke=SMOKE)
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import NoReturn, TypeVar

from kit import ranks
from kit.command_line import shell_word, started_as
from kit.config import parse, show
from kit.run import RunFolder, has_begun
from kit.versions import newer_than_tested

# What a user can mend: wrong settings or data, a file or a disk, a missing package. Everything else is a bug
# of the kit, and its traceback is printed.
MISTAKES = (ValueError, OSError, ImportError)
CRASHED, REFUSED, INTERRUPTED = 1, 2, 130  # exit statuses: Python's, argparse's, a shell's for Ctrl-C
ONE_PROCESS = "this runs in one process; start it without torchrun"
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)  # of a path that this user may not access
FOR_ONE = ("plan", "compare")  # settings with which a recipe only prints: under torchrun rank 0 does so
Value = TypeVar("Value")


class Stopped(KeyboardInterrupt):
    """Ctrl-C, after what was done has been saved. Its text says what was kept, such as "at step 4 of 9"."""


def clean_up_if_refused(main: Callable[[object], object]) -> Callable[[object], object]:
    """Decorate a recipe's main: if it ends before it has trained or measured anything, nothing is left of it.

    So the corrected settings may have the same run folder. When main ends, the folder's lock is released.
    """

    @wraps(main)
    def cleaning(config):
        RunFolder.newest, LetFinish.asked = None, False  # in a notebook, others may have run before
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
    if (count := ranks.here().count) > 1:
        print(f"ranks       {count}, which share the rows and the samples; hours are those of one card")
    return run


def start(
    main: Callable[[object], object],
    config_class: type,
    argv: Sequence[str] | None = None,
    *,
    alone: str = "",
    **choices,
) -> None:
    """Parse the flags and run main(config), under torchrun in each of its processes (kit/ranks.py).

    argv: None = sys.argv[1:]. alone: why torchrun is refused, and what to do instead; "" = it is not.
    choices: smoke, quick and presets, as for kit.config.parse. A mistake that the user can mend is one line
    on stderr and exit status 2; --traceback shows where it came from. Ctrl-C prints how to go on, and the
    status is 130.
    """

    def run(words: list[str]) -> None:
        config = parse(config_class, words, **choices)
        if any(getattr(config, name, False) for name in FOR_ONE):
            if not ranks.is_started_first():
                return
        else:
            ranks.join(getattr(config, "device", "cpu"))
            ranks.mute()
            ranks.here().how_to_go_on = _clean_up
        if line := newer_than_tested():
            print(line)
        clean_up_if_refused(main)(config)
        ranks.leave()

    guard(run, argv, alone=alone)


def guard(
    program: Callable[[list[str]], object], argv: Sequence[str] | None = None, *, alone: str = ONE_PROCESS
) -> None:
    """Run program(argv) as `start` does, for commands that read their own flags."""
    words = list(sys.argv[1:] if argv is None else argv)
    wants_traceback = "--traceback" in words
    RunFolder.newest = None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job ignores it
    ranks.mute(all_but_one_per_machine=True)
    warnings.formatwarning = _as_one_line
    if isinstance(sys.stdout, io.TextIOWrapper):  # it is None if it was closed
        # also the log of a run that is killed is whole, and no character of an answer ends it
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        if alone and ranks.num_started() > 1:
            raise ValueError(alone)
        program([word for word in words if word != "--traceback"])
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError as closed:  # the reader, such as `| head`, has all that it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        ranks.end(closed, "", CRASHED)
        raise SystemExit(CRASHED) from None
    except KeyboardInterrupt as stop:
        _end(stop, f"\n{_farewell(stop)}", INTERRUPTED)
    except SystemExit as ended:  # argparse has said why
        if ended.code:
            ranks.end(ended, "", ended.code)
        raise
    except BaseException as error:
        if isinstance(error, MISTAKES) and not wants_traceback:
            is_denied = getattr(error, "filename", None) and error.errno in DENIED
            hint = "; pass a path that you can read and write, or change its permissions" if is_denied else ""
            _end(error, f"error: {error}{hint}", REFUSED)
        ranks.end(error, traceback.format_exc(), CRASHED)
        raise


def _as_one_line(message, category, filename, lineno, line=None) -> str:
    """Format a warning without the source line that Python adds."""
    return f"warning     {message} ({Path(filename).name}:{lineno})\n"


def _end(error: BaseException, line: str, status: int) -> NoReturn:
    ranks.end(error, line, status)
    print(line, file=sys.stderr)
    raise SystemExit(status) from None


def _farewell(stop: KeyboardInterrupt) -> str:
    run = RunFolder.newest
    if run is None and isinstance(stop, Stopped):
        return f"stopped {stop}"
    if run is None or not has_begun(run.path):
        return "stopped before anything was trained or measured"
    where = f" {stop}" if isinstance(stop, Stopped) else "; what is finished is kept"
    program, count = started_as(), ranks.num_started()
    if count > 1:
        python, each = f"{shell_word(sys.orig_argv[0])} ", os.environ.get("LOCAL_WORLD_SIZE", str(count))
        started = program.removeprefix(python)
        if started == program:  # `valley WORD`, without an interpreter
            started = f"-m kit {program.split()[-1]}"
        how = f"--nproc_per_node {each}" if each == str(count) else "on each machine, as before, with"
        program = f"torchrun {how} {started}"
    return f"stopped{where}. Go on with: {program} --resume --out {shell_word(str(run.path))}"


def _clean_up() -> str:
    """Do what is left to do when a rank is about to end because of another one. Return how to go on."""
    if RunFolder.newest:
        RunFolder.newest.discard_if_new()
    return f"All {_farewell(KeyboardInterrupt())}"


def together(work: Callable[[], Value]) -> Value:
    """Return work(), once every rank has done its own. If Ctrl-C ends one, all raise KeyboardInterrupt.

    Inside work(), Ctrl-C raises KeyboardInterrupt at once, even within LetFinish. If Ctrl-C was pressed
    earlier, work() is not started.
    """
    value = None
    with LetFinish("the wait for other ranks") as interrupt:  # it must not be left half done
        try:
            value = interrupt.at_once(work)
        except KeyboardInterrupt:
            LetFinish.asked = True
        ranks.here().gather("done")  # waits for all ranks; `agreed` reports a Ctrl-C that comes meanwhile
        if interrupt.agreed():
            raise KeyboardInterrupt
    return value


class LetFinish:
    """Within this context the first Ctrl-C only sets `asked`, so that a step can end and be saved.

    A second Ctrl-C stops at once. It has no effect outside the main thread, where Python handles signals.
    Several ranks must stop after the same step: `agreed` tells. A Ctrl-C that comes during `agreed` counts at
    the next one, even in another context: all share `asked`, until KeyboardInterrupt leaves one of them.
    """

    asked = False

    def __init__(self, what: str):
        self.what = what  # is finished first, such as "step 4 and its checkpoint"

    def __enter__(self) -> LetFinish:
        self.in_main = threading.current_thread() is threading.main_thread()
        self.before = self._handle_with(signal.default_int_handler if self.asked else self._ask)
        return self

    def _handle_with(self, handler):
        """Return the handler that this one replaces."""
        return signal.signal(signal.SIGINT, handler) if self.in_main else None

    def _ask(self, *_) -> None:
        LetFinish.asked = True
        self._handle_with(signal.default_int_handler)
        print(f"\nfinishing {self.what}; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    def at_once(self, work: Callable[[], Value]) -> Value:
        """Return work(). Ctrl-C during it raises KeyboardInterrupt at once, and so does one that came before.

        Afterwards Ctrl-C sets `asked` again, since a terminal and torchrun may both send the first one.
        """
        try:
            self._handle_with(signal.default_int_handler)
            if self.asked:
                raise KeyboardInterrupt
            return work()
        finally:
            self._handle_with(self._ask)

    def agreed(self) -> bool:
        """Return whether Ctrl-C has reached any rank. All of them must call this, at the same place."""
        return any(ranks.here().gather(self.asked))

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            LetFinish.asked = False
        is_nested = isinstance(getattr(self.before, "__self__", None), LetFinish)
        self._handle_with(signal.default_int_handler if is_nested and self.asked else self.before)


def finish(report: Path, effect: str, command: str, *words: str) -> None:
    """Print a recipe's last lines: a link to the report, and what to type next. effect: of the command."""
    print(f"report {report.resolve().as_uri()}")
    suggest(effect, command, *words)


def suggest(effect: str, command: str, *words: str) -> None:
    """Print what to type next, as the last line of a recipe. effect: of the command, as a shell's comment."""
    print(f"next   {' '.join([command, *map(shell_word, words)])}    # {effect}")
