"""Locks between real processes: who holds one is named, and its death, however it comes, sets it free."""

import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from children import ROOT

from kit import lock
from kit.lock import LOCK, held, hold, is_held, is_shared, release

HOLD = "import os, subprocess, sys, time; from pathlib import Path; from kit.lock import hold; "
HOLD += "hold(Path('run')); "
WAIT = "print('ready', flush=True); sys.stdin.read()"

pytestmark = pytest.mark.usefixtures("fresh_directory")


def start(code):
    """Start a process, and wait for the first word that it prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes)
    word = process.stdout.readline().split()
    assert word, "the process ended before it was ready"
    return process, word[0]


def kill(process):
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_a_second_process_is_refused_with_the_pid_and_the_start_of_the_first():
    before = datetime.now().astimezone() - timedelta(seconds=1)
    process, _ = start(HOLD + WAIT)
    message = (
        f"run is in use by process {process.pid} on .*; wait until it ends, end it, or pass another --out"
    )
    with pytest.raises(ValueError, match=message) as error:
        hold(Path("run"))
    since = datetime.fromisoformat(re.search("since (.*?);", str(error.value))[1])
    assert before <= since <= datetime.now().astimezone()
    kill(process)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_the_death_of_its_holder_sets_a_lock_free(end):
    process, _ = start(HOLD + WAIT)
    process.send_signal(end)
    process.communicate()
    assert Path("run", LOCK).exists()
    assert hold(Path("run"))


FORK = "if not os.fork(): print(os.getpid(), flush=True); time.sleep(60)\n"
SPAWN = "print(subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL).pid, flush=True)\n"


@pytest.mark.parametrize("child", [FORK, SPAWN], ids=["forked", "started"])
def test_a_child_that_outlives_the_holder_does_not_keep_its_lock(child):
    process, pid = start(HOLD + "\n" + child + "sys.stdin.read()")
    kill(process)
    os.kill(int(pid), 0)  # it is alive
    assert hold(Path("run"))
    os.kill(int(pid), signal.SIGKILL)


AGAIN = """
if not os.fork():
    try:
        hold(Path('run'))
    except ValueError as error:
        print(f'process {os.getppid()} ' in str(error), flush=True)
    os._exit(0)
sys.stdin.read()
"""


def test_a_forked_child_is_another_process():
    process, refused = start(HOLD + AGAIN)
    kill(process)
    assert refused == "True"


def test_one_process_may_lock_a_folder_again_and_again_by_whatever_name():
    assert hold(Path("run"))
    Path("link").symlink_to("run")
    assert not hold(Path("run")) and not hold(Path("link")) and not hold(Path("run").resolve())
    shutil.rmtree("run")  # as one does in a notebook, to begin again
    assert hold(Path("run")) and Path("run", LOCK).exists()


def test_a_lock_inside_a_locked_folder_is_one_of_its_own():
    process, _ = start(HOLD + WAIT)
    assert hold(Path("run/cells/a"))
    kill(process)


def test_a_lock_that_is_released_leaves_nothing_and_others_may_take_it():
    with held(Path("run")):
        assert Path("run", LOCK).exists()
    assert list(Path("run").iterdir()) == []
    process, _ = start(HOLD + WAIT)
    kill(process)
    hold(Path("run"))
    with held(Path("run")):
        pass
    assert Path("run", LOCK).exists()  # held before, and so afterwards
    release(Path("run"))
    release(Path("run"))


CONTEND = """
import sys, time
from pathlib import Path
from kit import lock
from kit.lock import hold, release
lock.NAMED_WITHIN = 0
run, inside, entered = Path('run'), Path('inside'), 0
print('ready', flush=True)
end = time.monotonic() + 60
while entered < 40 and time.monotonic() < end:
    try:
        hold(run)
    except ValueError:
        continue
    inside.mkdir()  # fails if another process is inside
    inside.rmdir()
    release(run)
    entered += 1
sys.exit(entered < 40)
"""


def test_of_many_that_lock_and_release_no_two_are_inside_at_once():
    processes = [start(CONTEND)[0] for _ in range(4)]
    for process in processes:
        process.communicate()
    assert [process.returncode for process in processes] == [0] * 4


def test_a_file_that_its_holder_removes_just_before_it_is_locked_is_not_the_lock(monkeypatch):
    take, processes = lock._lock, []

    def take_late(file, folder, join):
        if not processes:  # meanwhile one process has released the lock, and another has taken it
            Path("run", LOCK).unlink()
            processes.append(start(HOLD + WAIT)[0])
        return take(file, folder, join)

    monkeypatch.setattr(lock, "_lock", take_late)
    with pytest.raises(ValueError, match="is in use by process "):
        hold(Path("run"))
    kill(processes[0])


def test_a_link_in_the_place_of_the_lock_is_not_followed():
    Path("run").mkdir()
    Path("precious").write_text("mine")
    Path("run", LOCK).symlink_to(Path("precious").resolve())
    with pytest.raises(OSError, match=LOCK):
        hold(Path("run"))
    assert Path("precious").read_text() == "mine"


JOIN = HOLD.replace("hold(Path('run'))", "hold(Path('run'), join=True)")
SHARE = "from kit.lock import share; share(Path('run')); "


def test_a_folder_is_shared_once_its_first_holder_says_so_and_by_those_who_ask_for_it():
    first, _ = start(JOIN + "print('ready', flush=True); sys.stdin.readline(); " + SHARE + "sys.stdin.read()")
    waiting = subprocess.Popen(
        [sys.executable, "-c", JOIN + WAIT],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert f"waiting for process {first.pid} on " in waiting.stderr.readline()
    first.stdin.write("\n")
    first.stdin.flush()
    assert waiting.stdout.readline() == "ready\n"
    with pytest.raises(ValueError, match="is in use by"):
        hold(Path("run"))
    assert hold(Path("run"), join=True) and is_shared(Path("run"))
    kill(first)
    release(Path("run"))
    with pytest.raises(ValueError, match="is in use by"):  # the other still holds it
        hold(Path("run"))
    waiting.stderr.close()
    kill(waiting)
    assert hold(Path("run"), join=True) and not is_shared(Path("run"))


def test_whether_a_folder_is_held_is_found_out_without_taking_it():
    assert not is_held(Path("run"))
    process, _ = start(HOLD + WAIT)
    assert is_held(Path("run"))
    kill(process)
    assert not is_held(Path("run")) and hold(Path("run"))


def test_a_file_system_without_locks_is_warned_of_and_used(monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert hold(Path("run"))
    said = capsys.readouterr().err
    assert "run: its file system has no locks; let no other process write there" in said
