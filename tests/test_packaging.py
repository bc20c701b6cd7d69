"""Check what an installation contains, and that it never hides Hugging Face's package `kernels`."""

import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow  # builds a wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from a copy of what git tracks or would track, so that building leaves nothing here."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command = [*pip, "--wheel-dir", str(out), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return next(out.glob("*.whl"))


def python(code, *, path=(), cwd, flags=()):
    """Run code in a fresh interpreter.

    It imports from the working directory first, then from `path`, then from site-packages (not with -S).
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, *flags, "-c", code]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def installed(wheel, tmp_path):
    """Install the wheel in a folder, beside a stand-in for Hugging Face's package `evaluate`."""
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(pip, check=True)
    (site / "evaluate.py").write_text("NAME = 'from the hub'\n")
    return site


@pytest.fixture
def hugging_face_kernels(tmp_path):
    """Make a stand-in for Hugging Face's package: a regular package called kernels, with its metadata."""
    package, info = tmp_path / "site" / "kernels", tmp_path / "site" / "kernels-0.99.0.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text("NAME = 'from the hub'\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.99.0\n")
    return tmp_path / "site"


def test_the_wheel_holds_kit_with_its_kernels_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"kit"}
    assert {
        "kit/kernels/linear_cross_entropy.py",
        "kit/models/shipped/tiny/model.safetensors",
        "kit/models/shipped/tiny/long_traces.jsonl",
        "kit/recipes/gemma3_1b_8k.py",
        "kit/recipes/card/truth.py",
    } <= set(names)
    assert not [name for name in names if name.startswith(("kit/kernels/__init__", "kit/recipes/bench"))]


def test_from_the_wheel_kit_kernels_is_ours_even_beside_hugging_faces(wheel, hugging_face_kernels, tmp_path):
    site = hugging_face_kernels
    zipfile.ZipFile(wheel).extractall(site)
    code = "import kit.kernels.packed_attention as p, kernels; print(p.__file__); print(kernels.NAME)"
    done = python(code, path=[site], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == [
        str(site / "kit" / "kernels" / "packed_attention.py"),
        "from the hub",
    ]


def test_the_wheels_recipes_hide_nobodys_package_and_need_nothing_that_is_not_in_it(installed, tmp_path):
    folder = installed / "kit" / "recipes"
    names = [".".join(path.relative_to(installed).with_suffix("").parts) for path in folder.rglob("*.py")]
    code = f"import importlib, importlib.util; found = [importlib.import_module(n) for n in {names}]; "
    code += "import evaluate, kit.recipes.valley_sweep as s; print(s.evaluate.__file__, evaluate.NAME); "
    code += "print([name for name in ('card', 'recipes', 'bench') if importlib.util.find_spec(name)])"
    done = python(code, path=[installed], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{folder / 'evaluate.py'} from the hub", "[]"]


@pytest.mark.slow
def test_the_wheels_command_runs_the_demo_in_an_empty_directory(installed, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    few = "--smoke --arms long --sizes 16 --epochs 1 --num_questions 4 --num_samples 1 --max_new_tokens 32"
    command = [sys.executable, str(installed / "bin" / "valley"), "demo", *few.split()]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    run = empty / "runs" / "valley_demo" / "001"  # the folder of `python recipes/valley_demo.py`, too
    assert [path.name for path in empty.iterdir()] == ["runs"] and (run / "report.html").is_file()
    log = (run / "cells" / "tiny-full-16-seed0" / "log.txt").read_text()
    assert log.startswith("python -m kit.recipes.gemma3_1b_8k --"), log[:500]


def test_the_wheels_description_holds_no_link_that_only_a_checkout_has(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata, description = archive.read(name).decode().split("\n\n", 1)
    assert "Project-URL: Paper, https://arxiv.org/abs/2506.07712" in metadata
    assert description.startswith("# Through the Valley") and "kit/packing.py" in description
    assert not re.search(r"\]\((?!https://)", description)


def test_from_the_repository_root_transformers_finds_hugging_faces_kernels_and_not_ours(hugging_face_kernels):
    code = "import kernels, kit.kernels.packed_attention as p; print(kernels.NAME); print(p.__file__)"
    done = python(code, path=[hugging_face_kernels], cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["from the hub", str(ROOT / "kernels" / "packed_attention.py")]


@pytest.mark.slow
def test_transformers_imports_from_the_repository_root_with_the_real_package_installed():
    assert version("kernels")  # the test extra installs Hugging Face's own
    code = "import transformers.models.llama.modeling_llama, kit.models.loading, kernels; "
    code += "print(hasattr(kernels, 'get_kernel'))"
    done = python(code, cwd=ROOT)
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.slow
def test_transformers_imports_from_the_repository_root_without_that_package(tmp_path):
    """`import kernels` then finds our folder as a namespace package; transformers must not use it."""
    for entry in Path(transformers.__file__).parents[1].iterdir():  # site-packages without that package
        if not entry.name.startswith("kernels"):
            (tmp_path / entry.name).symlink_to(entry)
    code = "import transformers.models.llama.modeling_llama, kit.models.loading, kernels; "
    code += "print(hasattr(kernels, 'get_kernel'))"
    done = python(code, path=[tmp_path], cwd=ROOT, flags=["-S"])
    assert done.stdout.strip() == "False", done.stderr


def test_the_installed_kit_works_from_anywhere_and_brings_no_other_top_level_name(tmp_path):
    """Try whatever installation is here; the README's is editable."""
    code = "import kit.kernels.packed_attention, kit.grade.deciding.sympy_workers; "
    code += "from importlib.util import find_spec as find; "
    code += "print([name for name in ('tests', 'recipes', 'setup') if find(name)], find('kernels').origin)"
    done = python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names, origin = done.stdout.split()
    assert names == "[]"
    assert Path(origin).is_relative_to(sys.prefix)  # Hugging Face's package, not our folder


def test_a_bare_checkout_finds_the_kernels_beside_kit(tmp_path):
    done = python("import kit.kernels.packed_attention as p; print(p.__file__)", path=[ROOT], cwd=tmp_path)
    assert done.stdout.strip() == str(ROOT / "kernels" / "packed_attention.py"), done.stderr


def test_the_top_level_is_as_designed():
    names = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")}
    generated = {"build", "dist", "runs"} | {name for name in names if name.endswith(".egg-info")}
    folders, files = (
        {"kit", "kernels", "recipes", "tests"},
        {"setup.py", "README.md", "LICENSE", "pyproject.toml"},
    )
    assert names - generated == folders | files
    assert not (ROOT / "kernels" / "__init__.py").exists()
