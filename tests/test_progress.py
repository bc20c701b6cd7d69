"""Check the display of long loops: lines in a log, bars on a terminal, and that it ends with the loop."""

import io
import os
import re
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from children import ROOT

from kit import progress
from kit.progress import Progress, print_line, show

WAIT = 30  # seconds until a thread that does not do its work fails a test


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it. The thread keeps its own, and waits a minute."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    yield
    assert progress._running == []
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_a_log_gets_a_line_per_minute_none_in_between_and_one_at_the_end(clock, capsys):
    loop = Progress("training", "steps", 1_200)
    for step in loop.over(range(1_200)):
        loop.text = f"loss {2 - step / 1_000:.3f}, 512 tokens/s"
        clock.now += 0.1
        if step == 600:
            assert capsys.readouterr().err == ""
            show()  # what the thread does after a minute
            line = "training: 600 of 1,200 steps in 0:01:00, about 0:01:00 left; loss 1.400, 512 tokens/s\n"
            assert capsys.readouterr().err == line
    found = capsys.readouterr()
    assert found.err == "training: 1,200 of 1,200 steps in 0:02:00; loss 0.801, 512 tokens/s\n"
    assert found.out == ""


def test_lines_come_again_and_again_while_the_first_step_is_still_running(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.001)
    three, lines = threading.Event(), []

    def log(line):
        lines.append(line)
        if len(lines) == 3:
            three.set()

    monkeypatch.setattr(progress, "_log", log)
    with Progress("training", "steps", 449):
        assert three.wait(WAIT)
    assert all(line.startswith("training: 0 of 449 steps in 0:0") for line in lines)
    assert all(line.endswith(", the next is still running") for line in lines[:3])
    assert "running" not in lines[-1]


def test_a_line_says_that_a_step_is_still_running_only_if_none_has_ended_since_the_last_line(clock, capsys):
    with Progress("training", "steps", 4) as loop:
        for ended in (0, 1, 0, 2):
            for _ in range(ended):
                loop.update()
            show()
    lines = capsys.readouterr().err.splitlines()[:-1]
    assert ["the next is still running" in line for line in lines] == [True, False, True, False]


def test_time_left_counts_the_steps_of_this_run_alone_and_is_not_guessed_before_one_has_ended(clock, capsys):
    with Progress("training", "steps", 449, done=104) as loop:
        clock.now += 60
        show()
        loop.update()
        show()
        clock.now += 24 * 3600
    first, second, last = capsys.readouterr().err.splitlines()
    assert first == "training: 104 of 449 steps (resumed at 104) in 0:01:00, the next is still running"
    assert second == "training: 105 of 449 steps (resumed at 104) in 0:01:00, about 5:44:00 left"
    assert last == "training: 105 of 449 steps (resumed at 104) in 1 day, 0:01:00"


def test_without_a_total_there_is_no_time_left(clock, capsys):
    for row in Progress("reading traces", "rows").over(range(5_000)):
        clock.now += 0.01
        if row == 2_000:
            show()
            break
    lines = ["reading traces: 2,000 rows in 0:00:20"] * 2
    assert capsys.readouterr().err.splitlines() == lines


def test_a_loop_without_steps_prints_nothing(capsys):
    assert list(Progress("toy", "samples", 0).over([])) == []
    assert list(Progress("training", "steps", 0, done=0).over(range(0))) == []
    assert capsys.readouterr().err == ""


def test_a_loss_that_is_not_a_number_is_shown_as_such(clock, capsys):
    with Progress("training", "steps", 2) as loop:
        loop.text = f"loss {float('nan'):.3f}"
        show()
    assert ", the next is still running; loss nan" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_a_loop_that_raises_ends_its_display_while_the_traceback_is_kept(error, clock, capsys):
    def train():
        loop = Progress("training", "steps", 9)
        for step in loop.over(range(9)):
            loop.text = f"loss {step}"
            if step == 7:
                raise error("no")

    with pytest.raises(error) as caught:
        train()
    assert caught.traceback  # it keeps the frame of the loop alive, but not its iterator
    assert progress._running == []
    assert capsys.readouterr().err == "training: 7 of 9 steps in 0:00:00; loss 7\n"


def test_loops_inside_one_another_share_a_line_and_only_the_outermost_has_a_last_one(clock, capsys):
    outer = Progress("GRPO", "steps", 2)
    for step in outer.over(range(2)):
        outer.text = f"reward 0.{step}"
        with Progress("rollout", "samples", 64) as inner:
            inner.update()
            clock.now += 60
            show()
    assert capsys.readouterr().err.splitlines() == [
        "GRPO: 0 of 2 steps in 0:01:00, the next is still running; reward 0.0 | "
        "rollout: 1 of 64 samples in 0:01:00, about 1:03:00 left",
        "GRPO: 1 of 2 steps in 0:02:00, about 0:02:00 left; reward 0.1 | "
        "rollout: 1 of 64 samples in 0:01:00, about 1:03:00 left",
        "GRPO: 2 of 2 steps in 0:02:00; reward 0.1",
    ]


LOOP = """
import time
from kit import progress
progress.LINE_EVERY = progress.REFRESH_EVERY = 0.01
print("run folder X")
outer = progress.Progress("training", "steps", 3)
for step in outer.over(range(3)):
    inner = progress.Progress("rollout", "samples", 2)
    for sample in inner.over(range(2)):
        inner.text = "340 tokens/s"
        time.sleep(0.05)
    outer.text = f"loss {step / 4:.3f}"
    progress.print_line(f"step {step + 1}: reward 0.5")
print("report Y")
"""


def test_a_file_that_gets_both_streams_holds_whole_lines_in_their_order_and_no_carriage_return(tmp_path):
    with (tmp_path / "log.txt").open("wb") as log:
        command = [sys.executable, "-c", LOOP]  # stdout is buffered, as in any program whose output is a file
        subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=True)
    text = (tmp_path / "log.txt").read_text()
    lines = text.splitlines()
    assert "\r" not in text and "\x1b" not in text
    kinds = ("training: ", "run folder X", "step ", "report Y")
    assert all(line.startswith(kinds) for line in lines)
    assert lines[0] == "run folder X" and lines[-1] == "report Y"
    assert lines[-2].startswith("training: 3 of 3 steps in 0:00:") and lines[-2].endswith("; loss 0.500")
    steps = [line for line in lines if line.startswith("step ")]
    assert steps == [f"step {i}: reward 0.5" for i in (1, 2, 3)]
    ended = [line.split()[1] if line.startswith("training") else line.split(":")[0] for line in lines[1:-1]]
    assert ended.index("step 1") < ended.index("1") < ended.index("step 3") < len(ended) - 1


def test_a_terminal_gets_bars_that_are_refreshed_while_a_step_runs_and_lines_above_them():
    pty = pytest.importorskip("pty")  # not on Windows
    import fcntl
    import struct
    import termios

    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    child = subprocess.Popen([sys.executable, "-c", LOOP], cwd=ROOT, stdout=end, stderr=end)
    os.close(end)
    written = b""
    try:
        while chunk := os.read(terminal, 4096):
            written += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(terminal)
    assert child.wait() == 0
    text = written.decode()
    frames = text.split("\r")
    assert any(frame.startswith("training:  33%|") and "| 1/3 [" in frame for frame in frames)
    assert any(frame.startswith("rollout:  50%|") and "samples/s, 340 tokens/s]" in frame for frame in frames)
    seconds = [frame for frame in frames if frame.startswith("rollout:   0%") and "340 tokens/s" in frame]
    assert seconds  # refreshed before its first sample ended
    assert any(frame.startswith("step 2: reward 0.5") for frame in frames)
    assert "steps in 0:00" not in text  # these are lines of a log
    last = [line.split("\r")[-1] for line in text.replace("\r\n", "\n").splitlines()]
    assert last[-2].startswith("training: 100%|") and "loss 0.500]" in last[-2] and last[-1] == "report Y"
    assert not re.search(r"rollout: 100%[^\r\n\x1b]*\r?\n", text)  # an inner bar does not stay


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stderr", [io.StringIO, Terminal])
def test_what_is_printed_to_a_file_is_there_while_the_loop_runs(stderr, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stderr())
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    written = sys.stdout.buffer.getvalue
    print("run folder X")
    assert written() == b""  # buffered
    with Progress("training", "steps", 2):
        assert written() == b"run folder X\n"
        print_line("step 1: reward 0.5")
        assert written().endswith(b"step 1: reward 0.5\n")
        print("memory 3 GiB")
        show()
        assert written().endswith(b"memory 3 GiB\n") or stderr is Terminal


def test_without_a_loop_a_line_is_simply_printed(capsys):
    print_line("step 1: reward 0.5")
    assert capsys.readouterr() == ("step 1: reward 0.5\n", "")


def test_it_imports_nothing_that_takes_time():
    code = "import sys; before = set(sys.modules); import kit.progress; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert loaded.isdisjoint({"torch", "tqdm", "numpy", "transformers"}) and "kit" in loaded


def test_a_bar_that_has_ended_is_not_drawn_again_by_the_thread_that_refreshes_it():
    class Bar:
        def __init__(self):
            self.begun, self.is_closed, self.drawn_when_closed = threading.Event(), threading.Event(), []

        def set_postfix_str(self, text, refresh=True):
            if refresh:  # by the thread
                self.begun.set()
                self.drawn_when_closed.append(self.is_closed.wait(0.2))

        def close(self):
            self.is_closed.set()

    loop = progress.Progress("training", "steps", 3)
    with loop:
        loop.bar = bar = Bar()
        thread = threading.Thread(target=progress.show)
        thread.start()
        assert bar.begun.wait(10)
    thread.join()
    assert bar.is_closed.is_set() and bar.drawn_when_closed == [False]


def test_a_line_is_one_write_that_another_threads_line_cannot_cut(monkeypatch):
    class Writes(io.StringIO):
        def write(self, text):
            written.append(text)
            return super().write(text)

    written = []
    monkeypatch.setattr(sys, "stdout", Writes())
    monkeypatch.setattr(sys, "stderr", Writes())
    with progress.Progress("training", "steps", 1):
        progress.print_line("step 1: reward 0.5")
        progress.show()
    assert len([text for text in written if text]) == 3
    assert all(text.endswith("\n") for text in written if text)
