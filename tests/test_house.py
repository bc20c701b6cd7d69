"""Check the layout: imports only run down the floors, none form a ring, and front doors are light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from children import ROOT

# From the top: a package imports from the floors below its own, or from itself. The hall is kit's own files.
FLOORS = [
    {"report"},
    {"valley"},
    {"rl"},
    {"evaluate", "memory"},
    {"data", "generate", "train"},
    {"grade", "models"},
    {"hall"},
    {"kernels"},
]
PACKAGES = sorted(name for floor in FLOORS for name in floor if name not in ("hall", "kernels"))


def modules() -> dict[str, Path]:
    """Return dotted name -> file, of everything that is imported as kit.*"""
    found = {}
    for path in [*(ROOT / "kit").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts if parts[0] == "kit" else ("kit", *parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path) -> set[str]:
    """Return the files of kit that a file imports anywhere, also in functions and only for annotations."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inside & MODULES.keys()) or {node.module}
    return found & MODULES.keys()


def package_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in (*PACKAGES, "kernels") else "hall"


def floor_of(module: str) -> int:
    return next(i for i, floor in enumerate(FLOORS) if package_of(module) in floor)


ARROWS = {module: imports(path) for module, path in MODULES.items()}


def climbing(arrows: dict[str, set[str]]) -> list[str]:
    return [
        f"{module} imports {other}"
        for module, others in sorted(arrows.items())
        for other in sorted(others)
        if package_of(other) != package_of(module) and floor_of(other) <= floor_of(module)
    ]


def rings(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Return the rings of files that import one another: each ring once, from its first name on."""
    found, done = [], set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            ring = path[path.index(module) :]
            first = ring.index(min(ring))
            ring = ring[first:] + ring[:first]
            if ring not in found:
                found.append(ring)
        elif module not in done:
            for other in sorted(arrows[module] - {module}):
                visit(other, [*path, module])
            done.add(module)

    for module in sorted(arrows):
        visit(module, [])
    return found


def test_imports_run_down_the_floors_only():
    assert climbing(ARROWS) == []


def test_no_files_import_one_another_in_a_ring():
    assert rings(ARROWS) == []


def test_an_import_that_climbs_and_one_that_closes_a_ring_are_seen():
    found = climbing({"kit.train.loop": {"kit.memory.simulate", "kit.models.lora"}})
    assert found == ["kit.train.loop imports kit.memory.simulate"]
    assert climbing({"kit.data.traces": {"kit.train.loop"}})  # of the same floor
    assert climbing({"kit.kernels.packing": {"kit.packing"}})
    ring = {"kit.a": {"kit.b"}, "kit.b": {"kit.c"}, "kit.c": {"kit.a"}, "kit.d": {"kit.b"}}
    assert rings(ring) == [["kit.a", "kit.b", "kit.c"]]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_front_door_is_short_loads_nothing_heavy_and_every_name_behind_it_is_there(package):
    assert len((ROOT / "kit" / package / "__init__.py").read_text().splitlines()) < 40
    heavy = "torch", "transformers", "sympy", "matplotlib"
    code = f"import sys, kit.{package}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    door = __import__(f"kit.{package}", fromlist=["*"])
    assert door.__all__ and all(hasattr(door, name) for name in door.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nobody'; it hands on "):
        door.nobody  # noqa: B018


# calls that may run Python of whoever wrote the folder or hub id that they read
MAY_RUN_CODE = re.compile(r"Auto\w+\.from_(pretrained|config)|(datasets\.)?load_dataset")


def trusting(source: str) -> list[str]:
    """Return the calls in Python source that leave open whether they run what they read."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        f"line {call.lineno}: {ast.unparse(call.func)}"
        for call in calls
        if MAY_RUN_CODE.fullmatch(ast.unparse(call.func))
        and not any(k.arg == "trust_remote_code" and ast.unparse(k.value) == "False" for k in call.keywords)
    ]


def test_nothing_that_is_loaded_may_bring_python_of_its_own():
    paths = [*MODULES.values(), *(ROOT / "recipes").rglob("*.py")]
    assert {path.name: found for path in paths if (found := trusting(path.read_text(encoding="utf-8")))} == {}
    for call in ("AutoConfig.from_pretrained(x)", "load_dataset(x, trust_remote_code=True)"):
        assert trusting(f"def f():\n    return {call}") == [f"line 2: {call.partition('(')[0]}"]


def test_nothing_makes_the_folder_kernels_importable_on_its_own():
    """Hugging Face publishes a package of this name, and transformers imports it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_what_runs_in_tritons_interpreter_alone_is_in_a_file_that_runs_itself_there():
    marked = [path for path in (ROOT / "tests").glob("*/test_*.py") if "mark.interpreter" in path.read_text()]
    assert marked
    assert [path.name for path in marked if "pass_in_the_interpreter(__file__" not in path.read_text()] == []
