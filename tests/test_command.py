"""What a person meets at the command line: one-line errors, Ctrl-C, closed pipes, a fast start."""

import errno
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from children import RECIPES, Child, call, run_recipe, start_recipe

from kit import command
from kit.command import LetFinish, Stopped, start
from kit.progress import Progress
from kit.run import RunFolder

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "transformers", "numpy", "sympy", "matplotlib", "datasets", "triton"}


@dataclass(frozen=True)
class Config:
    lr: float = 1.0
    resume: bool = False
    out: str = ""


pytestmark = pytest.mark.usefixtures("fresh_directory")


def status_of(main, *flags: str) -> int:
    with pytest.raises(SystemExit) as ended:
        start(main, Config, flags)
    return ended.value.code


@pytest.mark.parametrize(
    "error", [ValueError("lr is 2; pass 1"), OSError(28, "disk full"), ImportError("no x")]
)
def test_a_mistake_is_one_line_with_status_2_and_leaves_no_numbered_folder(error, capsys):
    def main(config):
        RunFolder.open(config)
        raise error

    assert status_of(main) == 2
    said = capsys.readouterr().err
    assert said == f"error: {error}\n"
    assert list(Path("runs/test_command").iterdir()) == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_file_that_the_system_denies_says_what_to_do(number, capsys):
    def main(config):
        raise OSError(number, "denied", "exports")

    assert status_of(main) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: .*'exports'; pass a path that you can read and write.*\n", said)


def test_traceback_shows_where_the_mistake_was_found():
    def main(config):
        raise ValueError("lr is 2")

    with pytest.raises(ValueError, match="lr is 2"):
        start(main, Config, ["--traceback"])


def test_a_warning_is_one_line():
    program = "import warnings; from kit.command import guard; guard(lambda _: warnings.warn('slow'), [])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "warning     slow (<string>:1)\n"


def test_what_is_not_the_users_mistake_keeps_its_traceback():
    def main(config):
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        start(main, Config, [])


def test_ctrl_c_names_the_command_that_goes_on(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipes/x.py"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # pytest may have been started with -m

    def main(config):
        RunFolder.open(config).metrics.append({"step": 1})
        raise Stopped("at step 1 of 4, checkpoint 1 kept")

    assert status_of(main) == 130
    assert capsys.readouterr().err.strip() == (
        "stopped at step 1 of 4, checkpoint 1 kept. "
        f"Go on with: {sys.orig_argv[0]} recipes/x.py --resume --out runs/test_command/001"
    )


def test_ctrl_c_before_anything_was_measured_leaves_nothing(capsys):
    def main(config):
        RunFolder.open(config)
        raise KeyboardInterrupt

    assert status_of(main) == 130
    assert capsys.readouterr().err.strip() == "stopped before anything was trained or measured"
    assert list(Path("runs/test_command").iterdir()) == []


def test_the_first_ctrl_c_lets_a_step_finish_and_the_second_does_not():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), LetFinish("this step") as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert interrupt.asked
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_ctrl_c_also_ends_what_began_after_the_first():
    with pytest.raises(KeyboardInterrupt), LetFinish("this step"):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        with LetFinish("the model's folder"):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)


def test_the_second_ctrl_c_stops_at_once_also_if_the_first_came_in_an_inner_context():
    with pytest.raises(KeyboardInterrupt), LetFinish("this step"):
        with LetFinish("the wait"):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)


def test_ctrl_c_that_nothing_acted_on_is_known_to_the_next_context_and_to_no_other_run(capsys):
    with LetFinish("this step"):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
    with LetFinish("the model's folder") as interrupt:
        assert interrupt.agreed()
    start(lambda config: print(LetFinish.asked), Config, [])
    assert capsys.readouterr().out.endswith("False\n")


def wait_for_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    command.guard(lambda words: os.kill(os.getpid(), signal.SIGINT) or time.sleep(5), [])


def test_ctrl_c_ends_a_program_that_a_script_has_started_in_the_background():
    assert call(__file__, "wait_for_ctrl_c").wait() == 130


def show_progress():
    command.guard(lambda words: list(Progress("counting", "numbers").over(range(3))), [])


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_stream_is_no_error(closed):
    program = f'"{sys.executable}" -c "import test_command; test_command.show_progress()" {closed}'
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    assert subprocess.run(program, shell=True, env=environment, check=False).returncode == 0


def print_much():
    command.guard(lambda words: [print("x" * 100) for _ in range(10_000)], [])


def test_a_reader_that_has_enough_is_no_error():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import test_command as t; t.print_much()"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1


@pytest.mark.parametrize("recipe", [path.stem for path in RECIPES])
@pytest.mark.parametrize("flag", ["--help", "--no_such_flag"])
def test_flags_are_read_before_anything_heavy_is_imported(recipe, flag):
    script = str(ROOT / "recipes" / f"{recipe}.py")
    timed = [sys.executable, "-X", "importtime", script, flag]
    done = subprocess.run(
        timed, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert done.returncode == (0 if flag == "--help" else 2)
    assert "argparse" in imported and imported & HEAVY == set()


def interrupt(child: Child, journal: Path, lines: int) -> None:
    """Send Ctrl-C once the journal has so many lines, and wait for the end."""
    while child.poll() is None and not (journal.exists() and journal.read_text().count("\n") >= lines):
        time.sleep(0.001)
    os.kill(child._process.pid, signal.SIGINT)
    child.wait()


TRAINING = ["--smoke", "--num_traces", "64", "--epochs", "2", "--num_questions", "2", "--num_samples", "1"]


@pytest.mark.slow
def test_ctrl_c_during_training_writes_a_checkpoint_and_resume_alone_goes_on(tmp_path):
    run = tmp_path / "runs" / "gemma3_1b_8k" / "001"
    child = start_recipe("gemma3_1b_8k", *TRAINING, "--max_new_tokens", "16", cwd=tmp_path)
    interrupt(child, run / "metrics.jsonl", lines=2)
    assert child.returncode == 130, child.stderr
    said = child.stderr
    step = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert "finishing this step, then a checkpoint; Ctrl-C again stops at once" in said
    stopped = re.search(rf"stopped at step {step} of (\d+), checkpoint {step} kept. Go on with: ", said)
    assert "--resume --out runs/gemma3_1b_8k/001" in said and "Traceback" not in said
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{step:07d}"]

    again = run_recipe("gemma3_1b_8k", "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"training    goes on after step {step} of {stopped[1]}" in again.stdout
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, int(stopped[1]) + 1))


@pytest.mark.slow
def test_ctrl_c_during_sampling_keeps_every_finished_answer_and_resume_alone_goes_on(tmp_path):
    samples = tmp_path / "runs" / "evaluate" / "001" / "samples" / "toy.jsonl"
    flags = ["--smoke", "--num_questions", "40", "--num_samples", "8", "--num_slots", "4"]
    child = start_recipe("evaluate", *flags, cwd=tmp_path)
    interrupt(child, samples, lines=4)
    kept = samples.read_text().splitlines()
    assert child.returncode == 130, child.stderr
    assert f"stopped in toy, {len(kept) - 1} of 320 answers kept. Go on with: " in child.stderr
    assert "Traceback" not in child.stderr

    again = run_recipe("evaluate", "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"toy: {len(kept) - 1} answers are kept, {321 - len(kept)} are to come" in again.stdout
    lines = samples.read_text().splitlines()
    assert lines[: len(kept)] == kept and len(lines) == 321


def type_in_a_terminal(program: list[str], cwd: Path, ready, keys: bytes) -> tuple[int, str]:
    """Run a program on a terminal of its own, type keys once ready() is true; return status, screen."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(cwd)
        os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job would ignore it
        os.execv(program[0], program)
    screen, typed = b"", False
    while True:
        if not typed and ready():
            os.write(terminal, keys)
            typed = True
        if select.select([terminal], [], [], 0.01)[0]:
            try:
                screen += os.read(terminal, 65_536)
            except OSError:  # the program has ended, and Linux says so
                break
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), screen.decode()


def processes_in(folder: Path) -> list[str]:
    """Return the numbers of other processes whose current folder is this one."""
    found = (
        link.parent for link in Path("/proc").glob("[0-9]*/cwd") if os.path.realpath(link) == str(folder)
    )
    return [path.name for path in found if path.name != str(os.getpid())]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs a pseudo-terminal and /proc")
def test_ctrl_c_on_a_terminal_ends_a_study_with_all_its_runs_and_resume_alone_goes_on(tmp_path):
    script = str(ROOT / "recipes" / "valley_demo.py")
    study = tmp_path / "runs" / "valley_demo" / "001"
    trains = study / "cells" / "tiny-full-256-seed0"
    flags = ["--smoke", "--num_questions", "4", "--sizes", "16,64,256", "--arms", "long"]
    status, screen = type_in_a_terminal(
        [sys.executable, script, *flags], tmp_path, (trains / "metrics.jsonl").exists, b"\x03"
    )
    assert status == 130, screen
    assert "what is done; Ctrl-C again stops at once" in screen
    assert re.search(r"stopped after \d runs; .*Go on with: \S+ \S+valley_demo.py --resume --out", screen)
    assert "Traceback" not in screen
    assert list((trains / "checkpoints").glob("step_*")) and not (trains / "model").exists()
    for _ in range(1_000):  # the process that runs are forked from ends when it notices
        time.sleep(0.01 if processes_in(tmp_path) else 0)
    assert processes_in(tmp_path) == []

    again = run_recipe("valley_demo", "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (study / "report.html").is_file() and (trains / "model").is_dir()
