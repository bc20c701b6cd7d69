"""Check every command of the README: its file exists, and the recipe reads its flags and their values."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
from children import RECIPES

from kit.config import parse

ROOT = Path(__file__).resolve().parents[1]
README, BENCH = (
    (ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "recipes/bench/README.md")
)
BLOCKS = re.findall(r"^```(?:sh|bash)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [
    shlex.split(command, comments=True)
    for block in BLOCKS
    for line in block.splitlines()
    for command in line.split("&&")
    if command.split("#")[0].strip()
]
STARTED = [words for words in COMMANDS if any(word.startswith("recipes/") for word in words)]
# within a sentence or a table; GB stands for a number
INLINE = [
    shlex.split(re.sub(r"\bGB\b", "12", command))
    for command in sorted({*re.findall(r"`((?:\S*python )?recipes/\S+\.py[^`\n]*)`", README + BENCH)})
]
# the commands at the head of a recipe; what each does stands behind two spaces or more
HEADS = [
    shlex.split(re.split(r" {2,}", line.strip())[0])
    for file in sorted((ROOT / "recipes").glob("*.py"))
    for line in (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").splitlines()
    if "python recipes/" in line
]


def test_the_readme_opens_with_one_sentence_and_two_commands():
    first, second = README.split("\n## ")[0].strip().split("\n\n")[:2]
    assert first.startswith("# ")
    assert second.count(". ") == 0
    assert second.endswith(".")
    assert len(BLOCKS[0].strip().splitlines()) == 2
    assert "--smoke" in BLOCKS[0].splitlines()[0]
    assert "pytest" in BLOCKS[0].splitlines()[1]


def test_there_are_recipe_commands_to_check():
    assert len(STARTED) >= 3 and len(INLINE) >= 20


def test_every_recipe_names_its_command_and_each_command_stands_on_a_line_of_its_own():
    assert {words[1] for words in HEADS} == {f"recipes/{file.name}" for file in RECIPES}
    assert not [words for words in HEADS if words[0] != "python" or "python" in words[1:]]


@pytest.mark.parametrize("words", [*STARTED, *INLINE, *HEADS], ids=" ".join)
def test_every_recipe_command_parses_against_the_recipes_own_flags(words, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))  # before recipes/bench, which pytest adds, too
    position = next(i for i, word in enumerate(words) if word.startswith("recipes/"))
    assert (ROOT / words[position]).is_file()
    module = importlib.import_module(Path(words[position]).stem)
    presets = {name: getattr(module, name.upper(), None) for name in ("smoke", "quick", "presets")}
    flags = words[position + 1 :]
    if "--resume" in flags:  # it reads the settings of a run
        flags = [word for word in flags if word != "--resume"]
        assert module.Config.resume is False
    assert parse(module.Config, flags, **presets)


@pytest.mark.parametrize("words", [words for words in COMMANDS if "-m" in words], ids=" ".join)
def test_every_module_command_names_a_module_that_exists(words):
    module = words[words.index("-m") + 1]
    assert importlib.util.find_spec(module), module


def test_every_file_the_readme_links_to_exists():
    for text, folder in ((README, ROOT), (BENCH, ROOT / "recipes" / "bench")):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            assert target.startswith("https://") or folder.joinpath(target).exists(), target


def test_the_readme_fits_two_screens_and_the_reading_path_an_afternoon():
    assert len(README.splitlines()) <= 130
    path = re.findall(r"^\| \[([\w/.]+)\]", README.split("## The reading path")[1], flags=re.MULTILINE)
    assert path[0] == "recipes/gemma3_1b_8k.py" and 10 <= len(path) <= 14
    assert sum(len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in path) <= 2_800
