"""--save_fp32 of a recipe: the finished model has the bits that bf16 lacks, and is what is measured."""

from importlib import import_module

import pytest
import torch
from safetensors.torch import load_file

from kit import models
from kit.config import parse
from kit.kernels.adamw8bit import exact_weight
from kit.models import load_any
from kit.run import read_json
from kit.train import checkpoint

SMALL = {
    "gemma3_1b_8k": "--num_traces 24 --epochs 1 --max_new_tokens 16",
    "grpo_qwen2_5_0_5b": "--steps 1 --batch_prompts 4 --group_size 4 --minibatch_prompts 2 --eval_tokens 16",
}


@pytest.fixture
def handed_over(monkeypatch):
    """Collect the exact weights, by name, of the model that a run hands over to be saved."""
    found, finish = {}, checkpoint.finish

    def collecting(finished, model, *others):
        rests = others[-1]
        found.update({name: exact_weight(p.detach(), rests[p]) for name, p in model.named_parameters()})
        finish(finished, model, *others)

    monkeypatch.setattr(checkpoint, "finish", collecting)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_recipe_saves_its_bf16_weights_exactly_and_measures_what_it_saved(
    name, handed_over, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load_any, "default_dtype", lambda device: torch.bfloat16)  # as on a card
    recipe = import_module(f"kit.recipes.{name}")
    flags = ["--smoke", "--num_questions", "4", "--save_fp32", "--out", "run", *SMALL[name].split()]
    recipe.main(parse(recipe.Config, flags, smoke=recipe.SMOKE, presets=recipe.PRESETS))

    saved = load_file("run/model/model.safetensors")
    assert {x.dtype for x in saved.values()} == {torch.float32}
    assert any(not torch.equal(x, x.bfloat16().float()) for x in saved.values())
    assert read_json(tmp_path / "run/model/config.json")["dtype"] == "float32"
    loaded, _ = models.load("run/model", device="cpu", dtype=torch.float32)
    weights = dict(loaded.named_parameters())
    assert weights and not [name for name, x in weights.items() if not torch.equal(x, handed_over[name])]
    assert list((tmp_path / "run" / "after").glob("*.jsonl"))
