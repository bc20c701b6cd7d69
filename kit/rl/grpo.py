"""Reinforcement learning with verifiable rewards: GRPO (Shao et al., 2024) in two verbs, `rollout` and `update`.

One step of training:
1. Take the next prompts. Sample `group_size` completions of each from the policy itself, keeping every token's log-prob.
2. Grade each completion: 1 if its answer is right, 0 if not. What cannot be graded or trusted is counted and left out.
3. Advantage of a completion = its reward against the others of its prompt (kit.rl.objective).
4. For each mini-batch of prompts: pack its episodes, run the backbone, and let the fused head make the log-probs, the clipped
   objective (kit.rl.objective) and its gradients a chunk of rows at a time; then one optimizer step.

The sampler runs on the training weights, so there is no second copy to hold or to keep in step; its cache is gone before the
update begins. No tensor of (tokens, vocabulary) ever exists.

Left out on purpose: a value network, a reward model, entropy bonuses, several GPUs, sampling while training, tools and turns.
What the paper does not state (clip range, KL estimator, normaliser) has the defaults of GRPO's own paper and PPO's clip of 0.2.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import fmean, pstdev

import torch

from kit.data.chat import ChatFormat
from kit.data.problems import Question
from kit.generate.sampler import Completion, generate
from kit.generate.sampling import SamplingParams
from kit.grade.verdict import grade
from kit.kernels.linear_cross_entropy import linear_cross_entropy, token_logprobs
from kit.models.backbone import head_weight, hidden_states, softcap
from kit.packing import plan_packs
from kit.rl.episodes import Episode, EpisodeBatch, WeightedEpisode, by_group
from kit.rl.objective import (
    RunningStats,
    group_advantages,
    has_signal,
    token_losses,
    token_weights,
)
from kit.rl.settings import Settings
from kit.train.savings import Savings
from kit.train.step import TrainingStep

Reward = Callable[[Question, Completion], "float | None"]  # None: undecided


def correctness(question: Question, completion: Completion) -> float | None:
    """Return 1 for a right answer, 0 for a wrong one or none, None if the grader could not decide."""
    return {"correct": 1.0, "wrong": 0.0, "unknown": None}[grade(question.answer, completion.text).verdict]


class Policy:
    """A model in training, its prompts' format, and how far it has come. Close it when training is over.

    reward: of a completion. max_grad_norm: as TrainingStep's.
    Raises ValueError for savings that update inside the backward pass: a mini-batch has several rows; and for a KL where adapters
    were trained before: the model that training starts from is then nowhere.
    """

    def __init__(
        self, model, chat: ChatFormat, settings: Settings, *, lr: float, weight_decay: float = 0.0, max_grad_norm: float = 1.0,
        savings: Savings | None = None, reward: Reward = correctness,
    ):  # fmt: skip
        savings = savings or Savings()
        if savings.update_in_backward:
            raise ValueError(
                "update_in_backward is on but a mini-batch has several rows, whose gradients must wait for one another; "
                "pass --no_update_in_backward (and --qlora_rank 16 where memory is short)"
            )
        self.model, self.chat, self.settings, self.reward, self.savings = (
            model,
            chat,
            settings,
            reward,
            savings,
        )
        self.drawn = (
            0  # prompts rolled out so far: the data's cursor, and a part of every sample's random stream
        )
        has_adapters = hasattr(model, "peft_config")
        if (
            has_adapters
            and settings.uses_reference
            and any(p.any() for name, p in model.named_parameters() if ".lora_B." in name)
        ):
            raise ValueError(
                f"kl_coef is {settings.kl_coef:g} but the adapters have been trained already: the reference would be their base, not the "
                "model that this training starts from; pass --kl_coef 0, or start from what kit.models.qlora.export writes"
            )
        # a copy of the model as training starts; with adapters the base is still there, and they start as nothing
        self.frozen = (
            copy.deepcopy(model).requires_grad_(False).eval()
            if settings.uses_reference and not has_adapters
            else None
        )
        self.training_step = TrainingStep(
            model, savings, lr=lr, weight_decay=weight_decay, max_grad_norm=max_grad_norm, seed=settings.seed
        )

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.training_step.optimizer

    @contextmanager
    def reference(self) -> Iterator[torch.nn.Module]:
        """The model that training started from."""
        if self.frozen is not None:
            yield self.frozen
            return
        from kit.models.qlora import without_adapters  # peft takes seconds to import

        with without_adapters(self.model):
            yield self.model

    def close(self) -> None:
        self.training_step.close()


def rollout(policy: Policy, prompts: Sequence[Question]) -> list[Episode]:
    """Sample and grade settings.group_size completions of each prompt, prompt by prompt. Advances policy.drawn.

    Raises ValueError for prompts without a gold answer and for a prompt that with max_new_tokens exceeds row_tokens.
    """
    settings, chat = policy.settings, policy.chat
    without_gold = [question.id for question in prompts if not question.answer.strip()]
    if without_gold:
        raise ValueError(
            f"{len(without_gold)} of {len(prompts)} prompts have no gold answer to grade by: {without_gold[:5]}"
        )
    encoded = chat.encode([chat.prompt(question.problem) for question in prompts])
    longest = max(map(len, encoded), default=0) + settings.max_new_tokens
    if longest > settings.row_tokens:
        raise ValueError(f"row_tokens is {settings.row_tokens} but the longest prompt and max_new_tokens are {longest} tokens; "
                         f"pass --row_tokens {longest}")  # fmt: skip
    policy.optimizer.zero_grad(
        set_to_none=True
    )  # the last update's gradients need not be held while sampling
    groups = range(policy.drawn, policy.drawn + len(prompts))
    wanted = [(i, sample) for i in range(len(prompts)) for sample in range(settings.group_size)]
    completions = generate(
        policy.model, [encoded[i] for i, _ in wanted], SamplingParams(settings.temperature, 1.0, 0, settings.max_new_tokens),
        num_slots=settings.num_slots, seed=settings.seed, eos_token_id=chat.eos_token_ids,
        keys=[[prompts[i].id, groups[i], sample] for i, sample in wanted], decode=chat.decode, description="rollout",
    )  # fmt: skip
    policy.drawn += len(prompts)
    return [
        Episode(groups[i], prompts[i].id, encoded[i], completion, policy.reward(prompts[i], completion))
        for (i, _), completion in zip(wanted, completions, strict=True)
    ]


def update(policy: Policy, episodes: Sequence[Episode]) -> dict[str, float]:
    """Learn from the episodes of one rollout, one optimizer step per mini-batch. Returns what was measured.

    A mini-batch without anything to learn takes no step and is counted (empty_minibatches).
    Raises ValueError if no episode can be trusted, with the reasons.
    """
    settings, start = policy.settings, time.perf_counter()
    reasons = Counter(episode.rejection for episode in episodes if episode.rejection)
    if not episodes or sum(reasons.values()) == len(episodes):
        raise ValueError(
            f"nothing can be learned from {len(episodes)} episodes: {dict(reasons)}; where log-probs are not finite the policy "
            "has diverged: go back to the last checkpoint and lower --lr"
        )
    groups = by_group(episodes)
    minibatches = [
        groups[i : i + settings.minibatch_prompts] for i in range(0, len(groups), settings.minibatch_prompts)
    ]
    steps = [_rows(policy, weighted_episodes(minibatch, settings)) for minibatch in minibatches]
    score_row = partial(score, temperature=settings.temperature, logit_rows=policy.savings.logit_rows)

    if settings.uses_reference:
        with policy.reference() as reference:
            steps = [
                [replace(row, reference_logprobs=score_row(reference, row)) for row in rows] for rows in steps
            ]
    stats, sampler, results = RunningStats(), RunningStats(), []
    for rows in filter(None, steps):
        # before the first step the trainer's weights are still the sampler's: what then differs is the arithmetic
        loss_of = partial(
            row_loss,
            settings=settings,
            cap=softcap(policy.model),
            stats=stats,
            sampler=None if results else sampler,
            logit_rows=policy.savings.logit_rows,
        )
        results.append([x.item() for x in policy.training_step(rows, loss_of)])
    seconds = time.perf_counter() - start
    tokens = sum(len(row) for rows in steps for row in rows)
    return {
        "loss": fmean(loss for loss, _ in results) if results else 0.0,
        "grad_norm": fmean(norm for _, norm in results) if results else 0.0,
        "updates": len(results),
        "empty_minibatches": len(steps) - len(results),
        **summary(groups, settings),
        **stats.read(),
        **sampler.read(),
        **{f"rejected: {reason}": count for reason, count in reasons.items()},
        "tokens": tokens,
        "update_seconds": seconds,
        "update_tokens_per_second": tokens / seconds,
    }


def weighted_episodes(groups: Sequence[Sequence[Episode]], settings: Settings) -> list[WeightedEpisode]:
    """Return the episodes to learn from in one optimizer step, with the weight of their tokens."""
    found: list[tuple[Episode, float]] = []
    num_sequences = 0
    for group in groups:
        rewards = [reward_of(episode, settings) for episode in group]
        num_sequences += sum(reward is not None for reward in rewards)
        for episode, reward, advantage in zip(
            group, rewards, group_advantages(rewards, settings.advantage_scale), strict=True
        ):
            masked = settings.mask_truncated and not episode.completion.finished
            if reward is not None and not masked:
                found.append((episode, advantage))
    lengths = [len(episode.completion.ids) for episode, _ in found]
    weights = token_weights(lengths, settings.normaliser, num_sequences=num_sequences)
    taught = [
        WeightedEpisode(episode, advantage, weight)
        for (episode, advantage), weight in zip(found, weights, strict=True)
    ]
    return [
        weighted for weighted in taught if weighted.advantage or settings.uses_reference
    ]  # the others' gradient is zero


def reward_of(episode: Episode, settings: Settings) -> float | None:
    """Return the reward; None for a rejected episode."""
    return None if episode.rejection else episode.reward


def group_has_signal(group: Sequence[Episode], settings: Settings) -> bool:
    return has_signal([reward_of(episode, settings) for episode in group])


def _rows(policy: Policy, taught: list[WeightedEpisode]) -> list[EpisodeBatch]:
    lengths = [weighted.num_tokens for weighted in taught]
    packs = plan_packs(lengths, policy.settings.row_tokens, seed=policy.settings.seed)
    return [EpisodeBatch.of([taught[i] for i in pack]) for pack in packs]


@torch.no_grad()
def score(model, row: EpisodeBatch, temperature: float, logit_rows: int = 0) -> torch.Tensor:
    """Compute the model's log-probs of a row's targets, (T,) fp32 on the CPU, 0 if a token has no target. logit_rows: as
    in kit.train.savings."""
    training = model.training
    model.eval()
    weight = head_weight(model)
    batch = row.to(weight.device)
    logprobs, _ = token_logprobs(
        hidden_states(model, batch),
        weight,
        batch.targets,
        temperature=temperature,
        softcap=softcap(model),
        max_rows=logit_rows,
    )
    model.train(training)
    return logprobs.cpu()


def row_loss(
    hidden: torch.Tensor, weight: torch.Tensor, batch: EpisodeBatch, scale: float, *, settings: Settings,
    cap: float | None = None, stats: RunningStats | None = None, sampler: RunningStats | None = None, logit_rows: int = 0,
) -> torch.Tensor:  # fmt: skip
    """Compute a row's share of the step's loss: the clipped objective of every completion token, times its weight.

    hidden (T, H), weight (V, H). scale: not used, since a token's weight holds its normaliser. cap: the softcap. logit_rows: as
    in kit.train.savings. sampler: takes the ratio of the trainer's probabilities to the sampler's.
    """

    def objective(logprobs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        old = batch.old_logprobs[rows]
        if sampler is not None:
            sampler.count(len(rows))
            sampler.range("sampler_ratio", (logprobs.detach() - old).exp())
        return token_losses(
            logprobs, old, batch.advantages[rows], clip_low=settings.clip_low, clip_high=settings.clip_high,
            kl_coef=settings.kl_coef, reference=batch.reference_logprobs[rows] if settings.uses_reference else None,
            stats=stats,
        )  # fmt: skip

    return linear_cross_entropy(
        hidden, weight, batch.targets, reduction="sum", token_weight=batch.token_weight, objective=objective, softcap=cap,
        temperature=settings.temperature, max_rows=logit_rows,
    )  # fmt: skip


def summary(groups: Sequence[Sequence[Episode]], settings: Settings) -> dict[str, float]:
    """Summarise a rollout's episodes. Rejected ones are left out of the mean rewards."""
    episodes = [episode for group in groups for episode in group]
    trusted = [episode for episode in episodes if not episode.rejection]
    rewards = [episode.reward for episode in trusted]
    lengths = [len(episode.completion.ids) for episode in episodes]
    silent = sum(not group_has_signal(group, settings) for group in groups)
    return {
        "reward_mean": fmean(rewards),
        "reward_std": pstdev(rewards),
        "no_signal": silent / len(groups),
        # the mean of -log p of what was sampled: an unbiased estimate of the sampled distributions' entropy, at no cost
        "entropy": -fmean(logprob for episode in trusted for logprob in episode.completion.logprobs),
        "length": fmean(lengths),
        "truncated": fmean(not episode.completion.finished for episode in episodes),
        "episodes": len(episodes),
        "groups": len(groups),
    }
