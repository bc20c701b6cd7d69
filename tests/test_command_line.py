"""`valley` and `python -m kit`: the list, a mistyped command, and commands as the user would type them."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from kit.command_line import COMMANDS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def valley(tmp_path):
    """Write the script that pip writes for the command."""
    script = tmp_path / "bin" / "valley"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\nfrom kit.command_line import main\n\nmain()\n")
    script.chmod(0o755)
    return script


def run(*words, path=(), cwd=ROOT):
    search = os.pathsep.join([*map(str, path), os.environ["PATH"]])
    environment = os.environ | {"PATH": search, "PYTHONPATH": str(ROOT), "COLUMNS": "1000"}
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_without_a_word_every_command_is_listed_and_its_module_exists(valley):
    for words in ([sys.executable, "-m", "kit"], [valley], [valley, "--help"]):
        done = run(*map(str, words))
        assert done.returncode == 0, done.stderr
        assert re.findall(r"^  (\S+)  +\S", done.stdout, flags=re.MULTILINE) == list(COMMANDS)
    assert all(find_spec(module) for module, _ in COMMANDS.values())


@pytest.mark.parametrize(
    ("word", "hint"), [("evalute", "did you mean evaluate?"), ("zzz", "-m kit lists the commands")]
)
def test_a_command_that_does_not_exist_is_one_line_with_the_nearest(word, hint):
    done = run(sys.executable, "-m", "kit", word)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(rf"error: there is no command '{word}'; .*{re.escape(hint)}\n", done.stderr)


def test_flags_arrive_as_they_were_typed_and_the_status_is_the_commands_own(valley):
    done = run(str(valley), "grade", "--percent=value", "2x + 1", "so it is \\boxed{1 + 2 x}")
    assert done.returncode == 0 and re.search(r"^verdict +correct$", done.stdout, flags=re.MULTILINE)
    done = run(str(valley), "grade", "regrade", "no such file.jsonl")
    assert done.returncode == 2 and "no such file.jsonl" in done.stderr


def test_printed_commands_are_those_of_the_start(valley):
    python = sys.executable
    starts = [
        (python, "recipes/evaluate.py"),
        (python, "-m", "kit.recipes.evaluate"),
        (python, "-m", "kit", "evaluate"),
        (python, "-m", "kit", "report"),
        (python, "-m", "kit.report"),
        (str(valley), "check-card"),
        ("valley", "evaluate"),  # found on the path
    ]
    for words in starts:
        done = run(*words, "--help", path=[valley.parent] if words[0] == "valley" else [])
        command = " ".join(words)
        assert done.stdout.startswith(f"usage: {command} ["), done.stdout[:200] + done.stderr
        assert "report" in command or f"\n    {command} --" in done.stdout  # its docstring's commands


def test_from_any_folder_the_next_command_names_the_script_beside_the_one_that_was_started(tmp_path):
    recipes = tmp_path / "my kit" / "recipes"
    (recipes / "bench").mkdir(parents=True)
    (recipes / "valley_demo.py").touch()
    for script in (recipes / "ask.py", recipes / "bench" / "count.py"):
        script.write_text(
            "from kit.command_line import command_of as c; print(c('demo'), c('report'), sep='\\n')"
        )
    for cwd, typed, beside in (
        (tmp_path, "my kit/recipes/ask.py", "'my kit/recipes/valley_demo.py'"),
        (tmp_path, f"{recipes}/ask.py", f"'{recipes}/valley_demo.py'"),
        (recipes.parent, "recipes/ask.py", "recipes/valley_demo.py"),
        (recipes, "ask.py", "valley_demo.py"),
        (recipes, "bench/count.py", "recipes/valley_demo.py"),  # no neighbour: as from the checkout
        (recipes, "-mask", "recipes/valley_demo.py"),
    ):
        done = run(sys.executable, typed, cwd=cwd)
        assert done.stdout.splitlines() == [f"{sys.executable} {beside}", f"{sys.executable} -m kit.report"]


def test_what_the_plan_prints_starts_the_run_and_is_no_plan_again(valley):
    done = run(str(valley), "plan", "--help")
    assert done.stdout.startswith(f"usage: {valley} finetune [")
