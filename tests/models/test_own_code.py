"""Python that lies in the folder of a model never runs, whatever standard input says."""

import io
import json
import shutil

import pytest
from transformers import dynamic_module_utils

from kit import models
from kit.models.loading import NeedsItsCode, load_config, load_tokenizer
from kit.models.shipped import TINY

CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "own"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
AUTO = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
TOKENIZER = {"AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the tiny model beside Python of its own, and somebody who says yes to everything."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "model" / "own.py").write_text(CODE.format(marker=str(tmp_path / "it ran")))
    yield tmp_path / "model"
    assert not (tmp_path / "it ran").exists()


def change(file, **settings):
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_a_model_that_is_nothing_without_its_own_python_is_refused(folder):
    change(folder / "config.json", model_type="own", auto_map=AUTO)
    for load in (models.load, models.load_to_train, load_config):
        with pytest.raises(
            NeedsItsCode, match=r"model needs Python of its own, which .* is never run; pass a"
        ):
            load(str(folder))


def test_a_tokenizer_that_is_nothing_without_its_own_python_is_refused(folder):
    change(folder / "config.json", model_type="own")
    change(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map=TOKENIZER)
    with pytest.raises(ValueError, match="Python of its own"):
        load_tokenizer(str(folder))


def test_a_known_model_that_brings_python_along_is_loaded_without_it(folder):
    change(folder / "config.json", auto_map=AUTO)
    change(folder / "tokenizer_config.json", auto_map=TOKENIZER)
    model, tokenizer = models.load(str(folder), device="cpu")
    assert type(model).__name__ == "LlamaForCausalLM" and tokenizer("1+1?").input_ids
    assert load_config(str(folder)).model_type == "llama"
