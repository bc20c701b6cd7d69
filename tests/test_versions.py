"""The versions that the kit allows, those that the tests passed on, and the line about newer ones."""

import ast
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError

import pytest
from children import ROOT
from packaging.requirements import Requirement
from packaging.version import Version

from kit import versions
from kit.command import start
from kit.config import Checked

CONSTRAINTS = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8")
PINNED = dict(line.split("==") for line in CONSTRAINTS.splitlines() if not line.startswith("#"))
NO_UPPER_BOUND = {"ruff", "kernels"}  # tools of the developers


@dataclass(frozen=True)
class Nothing(Checked):
    smoke: bool = False  # no setting of interest


def requirements() -> list[Requirement]:
    """Return what setup.py installs, by default and with any extra."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    found = [text for text in texts if isinstance(text, str) and re.match(r"[a-z][\w.-]*(\[\w+\])?>=", text)]
    return [Requirement(text) for text in found]


def test_every_package_is_allowed_up_to_its_next_major_version():
    found = {requirement.name: requirement.specifier for requirement in requirements()}
    assert len(found) > 15
    for name in found.keys() - NO_UPPER_BOUND:
        bounds = {bound.operator: Version(bound.version) for bound in found[name]}
        assert bounds.keys() == {">=", "<"}, name
        newest = Version(PINNED.get(name, str(bounds[">="])))
        assert bounds["<"] == Version(str(newest.major + 1)), name


def test_the_constraints_name_a_version_within_its_bounds_for_every_package_and_no_other():
    found = {requirement.name: requirement.specifier for requirement in requirements()}
    assert PINNED.keys() == found.keys() - {"triton-windows"}  # which does not run in CI
    assert [name for name, version in PINNED.items() if version not in found[name]] == []


def test_the_versions_that_a_recipe_compares_with_are_those_of_the_constraints():
    assert {name: PINNED[name] for name in versions.TESTED} == versions.TESTED
    names = {requirement.name for requirement in requirements()}
    assert versions.TESTED.keys() == names - {"triton-windows"} - names_after("# for the tests alone")


def names_after(line: str) -> set[str]:
    return {name.split("==")[0] for name in CONSTRAINTS.split(line)[1].split()}


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ("2.13.0+cpu", ""),
        ("2.13.9", ""),  # a repair
        ("2.9.1", ""),
        (None, ""),
        (
            "2.14.0.dev20260101+cu128",
            "versions    newer than tested: torch 2.14.0.dev20260101+cu128 (2.13.0)",
        ),
        ("3.0", "versions    newer than tested: torch 3.0 (2.13.0)"),
    ],
)
def test_a_version_newer_than_tested_is_named_in_one_line_at_the_start(monkeypatch, capsys, installed, said):
    def version(package):
        if package != "torch" or installed is None:
            raise PackageNotFoundError(package)
        return installed

    monkeypatch.setattr(versions, "version", version)
    start(lambda config: print("done"), Nothing, [])
    assert capsys.readouterr().out == (f"{said}\n" if said else "") + "done\n"
