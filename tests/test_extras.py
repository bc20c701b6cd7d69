"""The light install: what works without the extra [train], and how each missing package is named."""

import re
import sys
from pathlib import Path

import pytest
import transformers
from children import ROOT
from test_packaging import python

from kit import extras

# what the extra installs, and what only these bring along
ABSENT = {"triton", "peft", "bitsandbytes", "datasets", "gguf", "accelerate", "pyarrow"}
REFUSED = """
import json, pathlib, torch
from kit import memory, models
from kit.data.rows import BadRows, read_rows
from kit.machine import require_gpu
from kit.models.loading import load_config

pathlib.Path("m.gguf").touch()
pathlib.Path("t.parquet").touch()
pathlib.Path("adapters").mkdir()
adapters = {"r": 4, "base_model_name_or_path": "tiny"}
pathlib.Path("adapters/adapter_config.json").write_text(json.dumps(adapters))
torch.cuda.is_available = lambda: True
for call in (
    lambda: models.load("m.gguf", device="cpu"),
    lambda: load_config("m.gguf"),
    lambda: models.load("./adapters", device="cpu"),
    lambda: models.load_to_train("tiny", qlora_rank=4, device="cpu"),
    lambda: models.load_to_train("tiny", lora_rank=4, device="cpu"),
    lambda: memory.plan("tiny", row_tokens=64, qlora_rank=4),
    lambda: list(read_rows("owner/name", BadRows(0))),
    lambda: list(read_rows("t.parquet", BadRows(0))),
    lambda: require_gpu("cuda", "training", {"x": "y"}),
):
    try:
        call()
    except ValueError as error:
        print(str(error).split(", which ")[0])
"""


def without(names: set[str], site: Path) -> Path:
    """Make a copy of site-packages, by links, that lacks these packages."""
    site.mkdir()
    for entry in Path(transformers.__file__).parents[1].iterdir():
        if entry.name.split("-")[0].split(".")[0] not in names:
            (site / entry.name).symlink_to(entry)
    return site


@pytest.mark.slow
def test_without_the_extra_every_feature_names_what_it_lacks(tmp_path):
    site = without(ABSENT, tmp_path / "site")
    done = python(REFUSED, path=[ROOT, site], cwd=tmp_path, flags=["-S"])
    assert done.stdout.splitlines() == [
        "m.gguf, a GGUF file, needs gguf and accelerate",
        "m.gguf, a GGUF file, needs gguf and accelerate",
        "./adapters, a folder of adapters, needs peft",
        "qlora_rank needs bitsandbytes and peft",
        "lora_rank needs peft",
        "qlora_rank needs bitsandbytes and peft",
        "owner/name, a data set on the hub, needs datasets",
        "t.parquet, a .parquet file, needs pyarrow",
        "training needs triton",
    ], done.stderr


FEW = ["--num_questions", "4", "--num_samples", "1", "--max_new_tokens", "32"]
WORKS = {
    "evaluate": ["--smoke", *FEW],
    "finetune": ["--smoke", *FEW, "--max_steps", "2"],
    "grpo": ["--smoke", *FEW[:4], "--steps", "1", "--eval_tokens", "32"],
    "plan": ["--model", "tiny", "--row_tokens", "128"],
    "demo": ["--smoke", *FEW, "--arms", "long", "--sizes", "16", "--epochs", "1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", WORKS)
def test_without_the_extra_a_plain_model_is_planned_trained_and_evaluated(command, tmp_path):
    site = without(ABSENT, tmp_path / "site")
    code = (
        f"import sys; sys.argv[1:] = {[command, *WORKS[command]]!r}; import kit.command_line as c; c.main()"
    )
    done = python(code, path=[ROOT, site], cwd=tmp_path, flags=["-S"])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


LORA = """
import pathlib, sys, torch
from kit import memory, models
from kit.models.merge import merge
from kit.packing import Document, PackedBatch
from kit.train.savings import Savings
from kit.train.step import TrainingStep

batch = PackedBatch.build([Document(torch.arange(20), 3)])
model, tokenizer = models.load_to_train("tiny", lora_rank=2, device="cpu")
before = models.hidden_states(model, batch)
TrainingStep(model, Savings(), lr=0.1)([batch])
models.folder.save_model(pathlib.Path("adapters"), model, tokenizer)
again, _ = models.load("adapters", device="cpu")
trained = models.hidden_states(model, batch)
assert torch.equal(models.hidden_states(again, batch), trained) and not torch.equal(before, trained)
merge(again, torch.float32)
assert memory.plan("tiny", row_tokens=64, lora_rank=2).lora_rank == 2
assert not {"bitsandbytes", "triton"} & sys.modules.keys()
for call in (
    lambda: models.load_to_train("tiny", qlora_rank=2, device="cpu"),
    lambda: memory.plan("tiny", row_tokens=64, qlora_rank=2),
):
    try:
        call()
    except ValueError as error:
        print(error)
"""


@pytest.mark.slow
def test_lora_in_16_bits_needs_no_bitsandbytes_and_qlora_says_what_to_install(tmp_path):
    site = without({"triton", "bitsandbytes"}, tmp_path / "site")
    done = python(LORA, path=[ROOT, site], cwd=tmp_path, flags=["-S"])
    told = r'qlora_rank needs bitsandbytes, which is not installed; run .* install "bitsandbytes.*" or .*'
    assert re.fullmatch(rf"({told}\n){{2}}", done.stdout), done.stdout + done.stderr


# what Python reads first: two packages that are found and cannot be loaded, such as of another system
BROKEN = """
import sys
from importlib.machinery import ModuleSpec


class Broken:
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, origin="here") if name in ("triton", "bitsandbytes") else None

    def create_module(self, spec):
        print("tried to load", spec.name, file=sys.stderr)
        raise ImportError(f"{spec.name} is broken")

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, Broken())
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["", "demo", "evaluate"])
def test_a_triton_and_a_bitsandbytes_that_cannot_be_loaded_are_not_missed(command, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BROKEN)
    words = [command, *WORKS[command]] if command else []
    code = f"import sys; sys.argv[1:] = {words!r}; import kit.command_line as c; c.main()"
    done = python(code, path=[tmp_path, ROOT], cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "bitsandbytes" not in done.stderr
    assert ("tried to load triton" in done.stderr) == bool(command)  # by torch, and by kit.kernels.backend


def refused(what: str, *packages: str) -> str:
    with pytest.raises(ValueError) as error:
        extras.require(what, *packages)
    return str(error.value)


def test_the_command_installs_all_that_is_missing_in_the_versions_of_the_kit(monkeypatch):
    extras.require("a figure", "json", "matplotlib")
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    told = refused("QLoRA", "peft", "bitsandbytes")
    assert told.startswith("QLoRA needs peft and bitsandbytes, which are not installed; run ")
    assert re.search(r' -m pip install "peft[<>=.,\d]+" "bitsandbytes[<>=.,\d]+" or ', told)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(extras, "requires", lambda _: ["triton>=3", 'triton-windows>=3.6; extra == "train"'])
    assert ' -m pip install "triton-windows>=3.6" or ' in refused("a GPU", "triton")


def test_a_checkout_that_is_not_installed_names_the_package_alone(monkeypatch):
    def unknown(name):
        raise extras.PackageNotFoundError(name)

    monkeypatch.setattr(extras, "requires", unknown)
    assert ' -m pip install "no_such_package" or ' in refused("it", "no_such_package")


def test_a_folder_of_the_packages_name_is_not_the_package(monkeypatch, tmp_path):
    (tmp_path / "no_such_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert refused("it", "json", "no_such_package").startswith("it needs no_such_package, which is not")
