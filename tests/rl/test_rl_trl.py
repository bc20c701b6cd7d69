"""TRL's GRPOTrainer and ours on the same weights, rollouts and options: loss and gradients agree to 1e-5.

TRL comes with the extras `test` and `peers`; if it is missing, these tests are skipped and say so.
"""

import copy
import importlib.util
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from conftest import make_model
from test_grpo import BASE, formula, make_episodes, make_policy, plain_logprobs

from kit.data.toy import make_tokenizer
from kit.rl.episodes import by_group
from kit.rl.grpo import update
from kit.train.recompute import keep_activations

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None,
    reason="TRL is not installed (pip install -e '.[test]'): not compared with it",
)
TRL_NAMES = {"sequences": "grpo", "tokens": "dapo"}


def trainer_of(model, settings, folder, episodes):
    """Return TRL's trainer, with the episodes as its rollouts and rewards."""
    import datasets
    from trl import GRPOConfig, GRPOTrainer

    model.set_attn_implementation("sdpa")
    if settings.uses_reference:  # TRL loads its reference from the place that the model came from
        model.save_pretrained(folder / "start")
        model.config._name_or_path = str(folder / "start")
    tokenizer = make_tokenizer()
    groups = by_group(episodes)

    def rollout_func(prompts, trainer):
        assert len(prompts) == len(episodes)
        completions = [e.completion for e in episodes]
        return {
            "prompt_ids": [e.prompt for e in episodes],
            "completion_ids": [completion.ids for completion in completions],
            "logprobs": [completion.logprobs for completion in completions],
        }

    def reward(completions, **_):
        return [e.reward for e in episodes]

    arguments = GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        per_device_train_batch_size=len(episodes),
        num_generations=settings.group_size,
        gradient_checkpointing=False,
        max_completion_length=settings.max_new_tokens,
        temperature=settings.temperature,
        shuffle_dataset=False,
        max_steps=1,
        learning_rate=0.0,
        max_grad_norm=0.0,
        loss_type=TRL_NAMES[settings.normaliser],
        scale_rewards="group" if settings.advantage_scale == "group-std" else "none",
        epsilon=settings.clip_low,
        epsilon_high=settings.clip_high,
        delta=settings.dual_clip or None,
        importance_sampling_level=settings.ratio,
        mask_truncated_completions=settings.mask_truncated,
        beta=settings.kl_coef,
        use_bias_correction_kl=False,
    )
    dataset = datasets.Dataset.from_dict({"prompt": [f"{i}" for i in range(len(groups))]})
    return GRPOTrainer(
        model, reward, arguments, train_dataset=dataset, processing_class=tokenizer, rollout_func=rollout_func
    )


def ended(episodes):
    """End every finished completion in end-of-text, by which TRL recognises it, and no other one."""
    eos = make_tokenizer().eos_token_id
    changed = []
    for e in episodes:
        ids = [*e.completion.ids[:-1], eos if e.completion.finished else 5]
        changed.append(replace(e, completion=replace(e.completion, ids=ids)))
    return changed


OPTIONS = {
    "GRPO": {},
    "no std": {"advantage_scale": "none"},
    "DAPO": {"normaliser": "tokens", "clip_high": 0.28},
    "GSPO": {"ratio": "sequence", "clip_low": 0.03, "clip_high": 0.04},
    "GSPO, no std": {"ratio": "sequence", "advantage_scale": "none"},
    "KL": {"kl_coef": 0.3},
    "masked": {"mask_truncated": True, "normaliser": "tokens"},
    "masked, sequences": {"mask_truncated": True},
    "temperature": {"temperature": 0.7},
    "verl": {"normaliser": "tokens", "dual_clip": 1.5, "kl_coef": 0.01},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_one_step_on_policy_from_rewards_to_gradients(name, tmp_path, monkeypatch):
    """TRL's whole path: its rollout hook, its advantages, its loss, its backward pass."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    settings = replace(BASE, **OPTIONS[name])
    model = make_model("llama")
    episodes = ended(make_episodes(model, temperature=settings.temperature, noise=0.0))
    fresh = []
    for e in episodes:  # the last token was changed, so its log-prob is computed again
        with torch.no_grad():
            logprobs = plain_logprobs(model, e, settings.temperature).tolist()
        fresh.append(replace(e, completion=replace(e.completion, logprobs=logprobs)))
    theirs = copy.deepcopy(model)
    from transformers import TrainerCallback

    gradients = []

    class Catch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **_):
            gradients.extend(p.grad.clone() for p in theirs.parameters())

    trainer = trainer_of(theirs, settings, tmp_path, fresh)
    trainer.add_callback(Catch())
    trainer.train()
    [row] = [row for row in trainer.state.log_history if "loss" in row]
    policy = make_policy(model, settings)
    found = update(policy, fresh)
    compare(gradients, [p.grad for p in model.parameters()])
    assert found["reward_mean"] == pytest.approx(row["reward"], rel=1e-5)
    assert found["no_signal"] == pytest.approx(row["frac_reward_zero_std"], rel=1e-5)
    # on-policy the terms of the loss cancel, so its error is compared with their size
    terms = sum(g.norm() for g in gradients).item()
    assert abs(found["loss"] - row["loss"]) < 1e-5 * max(terms, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("name", ["GRPO", "no std", "DAPO", "GSPO", "masked", "temperature"])
def test_off_policy_with_the_same_old_and_reference_log_probs(name, kl_coef, tmp_path, monkeypatch):
    """TRL's compute_loss on given old log-probs: ratios on both sides of the clip range."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    settings = replace(BASE, **OPTIONS[name] | {"kl_coef": kl_coef})
    model = make_model("llama")
    policy = make_policy(model, settings)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    episodes = ended(make_episodes(model, temperature=settings.temperature))
    theirs = copy.deepcopy(model)
    keep_activations(theirs)  # the recompute knows packs alone, and TRL pads
    trainer = trainer_of(theirs, settings, tmp_path, episodes)
    inputs = padded(episodes, settings, model, policy.frozen)
    trainer.current_gradient_accumulation_steps = 1
    theirs.train()
    loss = trainer.compute_loss(theirs, inputs)
    loss.backward()
    found = update(policy, episodes)
    compare([p.grad for p in theirs.parameters()], [p.grad for p in model.parameters()])
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert found["loss"] == pytest.approx(
        formula(model, policy.frozen or model, episodes, settings).item(), rel=1e-5
    )


def padded(episodes, settings, model, reference):
    """Lay episodes out as TRL does: prompts padded on the left, completions on the right."""
    P, C = (
        max(len(x) for x in lengths)
        for lengths in zip(*((e.prompt, e.completion.ids) for e in episodes), strict=True)
    )
    rows = defaultdict(list)
    advantages = []
    for group in by_group(episodes):
        rewards = torch.tensor([e.reward for e in group])
        centred = rewards - rewards.mean()
        advantages.append(
            centred / (rewards.std() + 1e-4) if settings.advantage_scale == "group-std" else centred
        )
    for e in episodes:
        left, right, n = P - len(e.prompt), C - len(e.completion.ids), len(e.completion.ids)
        kept = int(e.completion.finished or not settings.mask_truncated)
        rows["prompt_ids"].append([0] * left + e.prompt)
        rows["prompt_mask"].append([0] * left + [1] * len(e.prompt))
        rows["completion_ids"].append(e.completion.ids + [0] * right)
        rows["completion_mask"].append([kept] * n + [0] * right)
        rows["old_per_token_logps"].append(e.completion.logprobs + [0.0] * right)
        with torch.no_grad():
            ref = plain_logprobs(reference or model, e, settings.temperature).tolist()
        rows["ref_per_token_logps"].append(ref + [0.0] * right)
    inputs = {name: torch.tensor(values) for name, values in rows.items()}
    return inputs | {
        "advantages": torch.cat(advantages),
        "num_items_in_batch": inputs["completion_mask"].sum(),
    }


def compare(theirs, ours):
    theirs, ours = (torch.cat([g.flatten().double() for g in gradients]) for gradients in (theirs, ours))
    assert theirs.norm() > 1e-3
    assert (theirs - ours).norm() < 1e-5 * theirs.norm()
