"""The grader's two inner packages, reading and deciding, are entered by their front doors only."""

import importlib
import subprocess
import sys

import pytest
from children import ROOT
from test_house import ARROWS, imports

PACKAGES = ("kit.grade.reading", "kit.grade.deciding")


def around_the_door(arrows: dict[str, set[str]]) -> list[str]:
    """Imports of a file inside one of the packages by a file outside it."""
    return [
        f"{module} imports {other}"
        for module, others in sorted(arrows.items())
        for other in sorted(others)
        for package in PACKAGES
        if other.startswith(f"{package}.") and not f"{module}.".startswith(f"{package}.")
    ]


def test_no_file_imports_around_the_doors():
    recipes = {str(path.relative_to(ROOT)): imports(path) for path in (ROOT / "recipes").rglob("*.py")}
    assert around_the_door(ARROWS | recipes) == []


def test_an_import_around_a_door_is_seen():
    inside = {"kit.grade.reading.parser": {"kit.grade.reading.tokens"}, "kit.grade.reading": set()}
    assert around_the_door(inside) == []
    assert around_the_door({"kit.grade.verdict": {"kit.grade.reading", "kit.grade.reading.parser"}}) == [
        "kit.grade.verdict imports kit.grade.reading.parser"
    ]
    across = {"kit.grade.deciding.judge": {"kit.grade.reading.tokens"}}
    assert around_the_door(across) == ["kit.grade.deciding.judge imports kit.grade.reading.tokens"]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_door_loads_nothing_until_a_name_is_asked_for_and_every_name_is_there(package):
    code = f"import sys, {package}; print([m for m in sys.modules if m.startswith('{package}.')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    door = importlib.import_module(package)
    assert door.__all__ and all(hasattr(door, name) for name in door.__all__)
