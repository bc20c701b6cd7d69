"""GRPO on adapters beside a real NF4 base: the reference is the base, and nothing but adapters moves."""

import json
from dataclasses import replace

import pytest
import torch
from children import call, run_recipe, train_unbroken_and_killed
from conftest import make_model
from safetensors.torch import load_file
from test_grpo import BASE, formula, make_episodes, make_policy, questions
from test_qlora import dense_twin, make_qlora
from test_rl_loop import Config, untimed

from kit.config import as_flags
from kit.data.chat import ChatFormat
from kit.models import qlora
from kit.models.nf4 import NF4Linear
from kit.rl.grpo import Policy, rollout, rows_of, score, update
from kit.rl.loop import train
from kit.rl.settings import Settings
from kit.run import RunFolder
from kit.train.savings import Savings

WITH_KL = replace(BASE, kl_coef=0.3)
SIZES = {"group_size": 4, "max_new_tokens": 30, "row_tokens": 128, "minibatch_prompts": 2, "num_slots": 5}
SETTINGS = Settings(**SIZES, temperature=2.0, kl_coef=0.05)
STEPS = 4


def frozen_part(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}


def adapters_of(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_the_adapters_gradients_are_the_formulas_with_the_base_as_reference(recompute):
    """Truth: float64 on dense weights, W + (alpha / rank) B A for the policy and W for the reference."""
    model = make_qlora()
    policy = make_policy(model, WITH_KL, savings=Savings(recompute=recompute))
    references = {
        dtype: dense_twin(model, dtype)[0] for dtype in (torch.float64, torch.float32)
    }  # B is zero yet
    with torch.no_grad():
        generator = torch.Generator().manual_seed(7)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    episodes = make_episodes(model)
    expected = {}
    for dtype, reference in references.items():
        twin, tensors = dense_twin(model, dtype)
        loss = formula(twin, reference, episodes, WITH_KL)
        gradients = torch.autograd.grad(loss, tensors)
        expected[dtype] = loss.item(), torch.cat([g.flatten().double() for g in gradients])
    (truth, true_gradient), (plain, plain_gradient) = expected[torch.float64], expected[torch.float32]
    found = update(policy, episodes)
    ours = torch.cat([p.grad.flatten().double() for p in adapters_of(model)])
    assert found["kl"] != 0
    assert (ours - true_gradient).norm() <= 2 * (plain_gradient - true_gradient).norm()
    assert abs(found["loss"] - truth) <= 2 * max(
        abs(plain - truth), 2**-23 * max(1.0, true_gradient.norm().item())
    )


@pytest.mark.parametrize("family", ["llama", "gemma3"])  # untied and tied head
def test_the_kl_is_zero_before_a_step_and_above_after_it_and_only_adapters_change(family):
    model = make_qlora(family)
    assert any(isinstance(module, NF4Linear) for module in model.modules())
    policy = make_policy(model, WITH_KL, lr=1e-2)
    assert policy.frozen is None  # no second copy
    episodes = make_episodes(model, noise=0.0)
    base, before = frozen_part(model), [p.detach().clone() for p in adapters_of(model)]
    row, *_ = rows_of(policy, [episodes[:4]])
    with policy.reference() as reference:
        at_the_start = score(reference, row, 1.0)
    first, second = update(policy, episodes), update(policy, episodes)
    assert first["kl"] == 0  # B is zero: the same sums
    assert second["kl"] > 1e-6
    for name, tensor in frozen_part(model).items():
        assert torch.equal(tensor, base[name]), name
    assert all(not torch.equal(a, b) for a, b in zip(before, adapters_of(model), strict=True))
    with policy.reference() as reference:
        assert torch.equal(score(reference, row, 1.0), at_the_start)
    assert not torch.equal(score(model, row, 1.0), at_the_start)  # and the adapters are on again


def test_adapters_that_were_trained_before_are_refused_with_a_kl_and_accepted_without_one():
    model = make_qlora()
    update(make_policy(model, BASE, lr=1e-2), make_episodes(model))
    message = r"kl_coef is 0.3 but the adapters have been trained .*--kl_coef 0, .*recipes.export.py"
    with pytest.raises(ValueError, match=message):
        make_policy(model, WITH_KL)
    assert make_policy(model, BASE).frozen is None
    make_policy(make_model("llama"), WITH_KL)


def make_tiny_policy():
    model, tokenizer = qlora.load("tiny", rank=4, device="cpu")
    return Policy(
        model, ChatFormat(tokenizer, instruction=""), SETTINGS, lr=3e-3, savings=Savings(recompute=False)
    )


def test_what_the_adapted_model_writes_is_graded_and_scored_as_it_was_sampled():
    policy = make_tiny_policy()
    base = frozen_part(policy.model)
    for step in range(2):
        found = update(policy, rollout(policy, questions(4)))
        assert 0 < found["reward_mean"] < 1 and found["updates"]
        assert (found["sampler_ratio_min"], found["sampler_ratio_max"]) == pytest.approx((1, 1), abs=1e-3)
        assert (found["kl"] > 1e-9) == (step > 0 or found["updates"] > 1)
    assert all(torch.equal(tensor, base[name]) for name, tensor in frozen_part(policy.model).items())


def run_training(out, *, resume=False):
    run = RunFolder.open(Config(str(out), resume))
    return train(make_tiny_policy(), questions(7), run, steps=STEPS, batch_prompts=3, checkpoint_every=2)


def start(out, resume):
    return call(__file__, "run_training", out, resume=resume)


@pytest.mark.slow
def test_killed_by_sigkill_and_resumed_adapters_and_rollouts_are_bit_equal_to_an_unbroken_run(tmp_path):
    train_unbroken_and_killed(start, tmp_path, lines=3, newest_checkpoint="step_0000002")
    whole, broken = (
        load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in ("whole", "broken")
    )
    assert whole.keys() == broken.keys()
    assert all(torch.equal(tensor, broken[name]) for name, tensor in whole.items())
    assert any(tensor.any() for name, tensor in whole.items() if "lora_B" in name)
    texts = [(tmp_path / name / "rollouts.jsonl").read_text() for name in ("whole", "broken")]
    assert texts[0] == texts[1]
    rows = [
        [untimed(json.loads(line)) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "broken")
    ]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == list(range(1, STEPS + 1))


def recipe(*flags, cwd):
    return run_recipe("grpo_qwen2_5_0_5b", "--smoke", "--qlora_rank", "4", *flags, cwd=cwd)


@pytest.mark.slow
def test_the_recipe_trains_saves_and_measures_adapters(tmp_path):
    sizes = {"batch_prompts": 4, "group_size": 4, "minibatch_prompts": 2, "num_questions": 4}
    flags = as_flags({"weaken": 0, "steps": 2, **sizes}).split()
    done = recipe(*flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "grpo_qwen2_5_0_5b" / "001"
    assert [file.name for file in (run / "model").glob("*.safetensors")] == ["adapter_model.safetensors"]
    assert "before      toy:" in done.stdout and "after       toy:" in done.stdout
    headers = [
        json.loads((run / stage / "toy.jsonl").read_text().splitlines()[0])["header"]
        for stage in ("before", "after")
    ]
    assert headers[0]["model"] != headers[1]["model"]
    again = recipe(*flags, "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr


def test_noise_on_a_base_that_is_loaded_again_without_it_is_refused(tmp_path):
    done = recipe(cwd=tmp_path)
    assert done.returncode == 2
    assert (
        "weaken is 0.2 but adapters of rank 4 are trained" in done.stderr and not (tmp_path / "runs").exists()
    )
