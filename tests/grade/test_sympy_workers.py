"""Sympy workers decide or give up in time; none outlives its parent or runs the caller's code."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kit.grade.deciding import sympy_worker, sympy_workers
from kit.grade.limits import Undecided
from kit.grade.reading.parser import parse

POSIX = pytest.mark.skipif(os.name != "posix", reason="signals and process limits as on Linux and macOS")
START = 60.0  # seconds for a worker to start on a busy machine
HARD = r"\int_0^{\infty} \sin(x^x) \cos(e^{x^2}) dx"


def prove(a, b, seconds=START):
    return sympy_workers.prove(parse(a), parse(b), time.monotonic() + seconds)


def run(script, *arguments, cwd=None, **options):
    return subprocess.run(
        [sys.executable, *arguments],
        input=script,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        **options,
    )


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until_gone(pids, seconds=15):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(map(is_running, pids)):
        time.sleep(0.1)
    return [pid for pid in pids if is_running(pid)]


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (r"\int_0^1 x^2 dx", r"\frac13", True),
        (r"\int_0^1 x^2 dx", r"\frac14", False),
        (r"\int_0^{\pi} \sin x dx", "2", True),
        (r"\sum_{k=1}^{n} k", r"\frac{n(n+1)}{2}", True),
        (r"\sum_{k=1}^{n} k", r"\frac{n(n+2)}{2}", False),
        (r"\sum_{k=1}^{\infty} \frac{1}{k^2}", r"\frac{\pi^2}{6}", True),
        (r"\sum_{k=0}^{n} \binom{n}{k}", "2^n", True),
        (r"\sin^2 x+\cos^2 x", "1", True),
        (r"\sqrt[3]{-8}", "-2", True),
        (r"\lg 1000+10\%", "3.1", True),
        ("f(x)+1", "1+f(x)", True),
        ("x", "x+1", False),
    ],
)
def test_decisions(a, b, same):
    assert prove(a, b) is same


def test_a_started_worker_answers_at_once():
    script = f"""
import time
from kit.grade.deciding import sympy_workers as workers
from kit.grade.verdict import grade
print(workers.start_worker(), len(workers.pool().all))
print(grade(r"\\int_0^1 x dx", "1/2", deadline={START}).verdict, len(workers.pool().all))
"""
    assert run(None, "-c", script).stdout.split() == ["True", "1", "correct", "1"]


def test_deadline_kills_and_the_next_question_is_answered():
    assert prove("x", "x")  # warm
    start = time.monotonic()
    with pytest.raises(Undecided, match="deadline"):
        prove(HARD, "5", 0.5)
    assert time.monotonic() - start < 30  # a busy machine may stall
    assert prove("x", "x")


def test_a_deadline_in_the_past_starts_nothing():
    with pytest.raises(Undecided, match="deadline"):
        prove("x", "x", -1)


def test_threads_share_the_workers_and_get_their_own_answers():
    results = {}

    def ask(index):
        results[index] = prove(
            r"\int_0^1 x^{" + str(index) + "} dx", rf"\frac{{1}}{{{index + 1 + index % 2}}}"
        )

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {index: index % 2 == 0 for index in range(8)}
    assert len(sympy_workers.pool().all) <= sympy_workers.MAX_WORKERS


def test_a_worker_that_died_is_replaced():
    assert prove("x", "x")
    workers = list(sympy_workers.pool().all)
    for worker in workers:
        worker.process.kill()
        worker.process.wait()
    assert prove("x", "x")
    assert any(worker.process.stdin.closed for worker in workers)


@POSIX
def test_memory_is_limited():
    if sys.platform != "linux":
        pytest.skip("macOS accepts RLIMIT_AS without keeping it")
    assert prove("x", "x")
    for worker in sympy_workers.pool().all:
        limits = Path(f"/proc/{worker.process.pid}/limits").read_text(encoding="ascii")
        assert f"Max address space         {sympy_worker.MEMORY} " in limits


@POSIX
def test_a_question_has_a_limit_of_cpu_time_too():
    """The parent is stopped during a question, so that only the worker's own limit can end it."""
    script = f"""
import os, signal, sys, threading, time
from kit.grade.verdict import grade
from kit.grade.deciding import sympy_workers as workers
grade(r"\\int_0^1 x dx", r"\\frac12", deadline={START})
print(next(iter(workers.pool().all)).process.pid, flush=True)
threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGSTOP)).start()
grade("5", r"{HARD}", deadline=4)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        pid = int(process.stdout.readline())
        deadline = time.monotonic() + START
        while time.monotonic() < deadline and not is_zombie(pid):
            time.sleep(0.1)
        assert is_zombie(pid)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def is_zombie(pid):
    """Whether the process has ended and waits for its (stopped) parent to notice."""
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True
    ).stdout.strip()
    return not state or state.startswith("Z")


@pytest.mark.parametrize("arguments", [["-"], ["-c"], ["file"]])
def test_no_main_guard_is_needed(arguments, tmp_path):
    """The caller's script runs once, however it was started, although it has no `if __name__` guard."""
    script = f"""
from kit.grade.verdict import grade
print("once", grade(r"\\int_0^1 x^2 dx", "1/3", deadline={START}).verdict)
"""
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    given = {"-": ["-"], "-c": ["-c", script], "file": [str(tmp_path / "script.py")]}[arguments[0]]
    done = run(script if given == ["-"] else None, *given, cwd=tmp_path)
    assert (done.stdout.split(), done.stderr) == (["once", "correct"], "")


def test_the_callers_folder_is_not_searched_for_modules(tmp_path):
    for name in ("sympy", "random", "json", "queue"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')", encoding="utf-8")
    script = f"""
import sys
sys.path.remove("")
from kit.grade.verdict import grade
print(grade(r"\\int_0^1 x^2 dx", "1/3", deadline={START}).verdict)
"""
    assert run(None, "-c", script, cwd=tmp_path).stdout.strip() == "correct"


def test_the_interpreter_ends_at_once_with_a_worker_at_work():
    script = f"""
import threading, time
from kit.grade.verdict import grade
grade(r"\\int_0^1 x^2 dx", "1/3", deadline={START})
threading.Thread(target=grade, args=("5", r"{HARD}"), kwargs=dict(deadline=100), daemon=True).start()
time.sleep(0.3)
print(time.time(), flush=True)
"""
    done = run(None, "-c", script)
    assert done.returncode == 0
    assert time.time() - float(done.stdout) < START
    assert done.stderr == ""


@POSIX
@pytest.mark.parametrize("end", ["exit", "kill"])
def test_no_worker_outlives_its_parent(end):
    script = f"""
import os, signal, threading, time
from kit.grade.deciding import sympy_workers as workers
from kit.grade.verdict import grade
grade(r"\\int_0^1 x^2 dx", "1/3", deadline={START})
thread = threading.Thread(target=grade, args=("5", r"{HARD}"), kwargs=dict(deadline=100), daemon=True)
thread.start()
time.sleep(0.3)
print(*[worker.process.pid for worker in workers.pool().all], flush=True)
if {end!r} == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
"""
    pids = [int(pid) for pid in run(None, "-c", script).stdout.split()]
    assert pids
    assert wait_until_gone(pids) == []


@POSIX
def test_a_forked_child_has_its_own_workers():
    """The child is forked while another thread has the pool's lock, which nothing in the child releases."""
    script = f"""
import os, signal, threading, time
from kit.grade.deciding import sympy_workers as workers
from kit.grade.verdict import grade
def ask(): return grade(r"\\int_0^1 x^2 dx", "1/3", deadline={START}).verdict
assert ask() == "correct"
def hold():
    with workers.pool().condition:
        time.sleep(1)
threading.Thread(target=hold).start()
time.sleep(0.3)
child = os.fork()
if not child:
    signal.alarm(100)
    os._exit(0 if ask() == "correct" else 1)
answers = [ask() for _ in range(3)]
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), *answers)
"""
    done = run(None, "-W", "ignore", "-c", script)
    assert done.stdout.split() == ["0", "correct", "correct", "correct"], done.stderr


def test_workers_do_not_import_torch():
    """A worker that imported it would start slowly and exceed its memory limit."""
    script = "import sys, kit.grade.deciding.sympy_worker; loaded = sys.modules; "
    script += "print('torch' in loaded, 'sympy' in loaded)"
    assert run(None, "-c", script).stdout.split() == ["False", "False"]
