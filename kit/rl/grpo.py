"""Reinforcement learning with verifiable rewards: GRPO (Shao et al., 2024) in two verbs, rollout and update.

One training step:

1. `rollout` samples `group_size` completions of each prompt from the policy itself, keeps the log-prob of
   every token, and judges them (kit/rl/rewards.py): by default 1 for a right answer, 0 for a wrong one.
2. `update` compares the reward of each completion with those of its group, the completions of the same
   prompt: the result is its advantage. For each mini-batch of prompts it packs the completions into rows,
   runs the backbone, and lets the fused head compute log-probs, clipped objective (kit/rl/objective.py) and
   gradients, a chunk of tokens at a time. Then it takes one optimizer step.

What cannot be trusted is counted and left out. The sampler runs on the training weights: there is no second
copy to synchronise. Its cache is freed before the update, and no (tokens, vocabulary) tensor is allocated.

The old log-probs are the sampler's, so the ratio is against the distribution that each token was drawn from.
Sampler and trainer share the weights, the temperature and the whole vocabulary (no top-p, no top-k), and both
compute the softmax in fp32. Before the first optimizer step of an update, the ratio is therefore 1 up to
rounding: within 1e-4 in fp32 on a CPU, and further off in bf16, where the kernels of the two round in
different places (recipes/check_card.py measures how far). The metrics sampler_ratio_* record it.

Several ranks (kit/ranks.py) share the prompts of a rollout. Then each gets all episodes, so advantages and
rows are the same everywhere, and TrainingStep takes each rank's share of the rows.

What this GRPO leaves out is listed at the top of recipes/grpo_qwen2_5_0_5b.py.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import fmean, pstdev

import torch
from torch import Tensor

from kit.command import together
from kit.data.chat import ChatFormat
from kit.data.problems import Question
from kit.generate.sampler import generate
from kit.generate.sampling import SamplingParams
from kit.journal import REWARD
from kit.kernels.linear_cross_entropy import linear_cross_entropy, token_logprobs
from kit.kernels.linear_cross_entropy_chunks import kept_rows
from kit.models.backbone import head_weight, hidden_states, softcap
from kit.packing import IGNORE_INDEX, plan_packs
from kit.progress import Progress
from kit.ranks import here
from kit.rl.episodes import Episode, EpisodeBatch, WeightedEpisode, by_group, gathered, undecided_as_wrong
from kit.rl.objective import RunningStats, group_advantages, has_signal, token_losses, token_weight
from kit.rl.rewards import Reward, correctness, judge, total
from kit.rl.settings import Settings, check_savings
from kit.train.loss import LossOfRow
from kit.train.savings import Savings
from kit.train.step import TrainingStep


class Policy:
    """A model in training, its chat format, and how many prompts it has rolled out. Close it after training.

    max_grad_norm: as in TrainingStep. reward: one, or several by name, which add up. cuda_graphs: as for
    kit.generate.generate. Raises ValueError for savings that update inside the backward pass, and for a KL on
    adapters that have been trained before, since the model that they start from is not at hand.
    """

    def __init__(
        self,
        model,
        chat: ChatFormat,
        settings: Settings,
        *,
        lr: float,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        savings: Savings | None = None,
        reward: Reward | Mapping[str, Reward] = correctness,
        cuda_graphs: bool = True,
    ):
        self.model, self.chat, self.settings = model, chat, settings
        self.cuda_graphs = cuda_graphs
        name = getattr(reward, "__name__", "reward")
        self.rewards = reward if isinstance(reward, Mapping) else {name: reward}
        self.savings = savings or Savings()
        self.drawn = 0  # the position in the data, and a part of every sample's random stream
        check_savings(self.savings)

        trained = any(p.any() for name, p in model.named_parameters() if ".lora_B." in name)
        settings.check_reference(adapters_are_trained=trained)

        self.frozen = None  # a copy of the model as training starts; new adapters have their base instead
        if settings.uses_reference and not hasattr(model, "peft_config"):
            self.frozen = copy.deepcopy(model).requires_grad_(False).eval()

        optimization = {"lr": lr, "weight_decay": weight_decay, "max_grad_norm": max_grad_norm}
        self.training_step = TrainingStep(model, self.savings, **optimization, seed=settings.seed)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.training_step.optimizer

    @contextmanager
    def reference(self) -> Iterator[torch.nn.Module]:
        """Yield the model that training started from."""
        if self.frozen is not None:
            yield self.frozen
            return
        from kit.models.qlora import without_adapters  # peft takes seconds to import

        with without_adapters(self.model):
            yield self.model

    def close(self) -> None:
        self.training_step.close()


def rollout(policy: Policy, prompts: Sequence[Question]) -> list[Episode]:
    """Sample and judge group_size completions of each prompt, prompt by prompt. Advances policy.drawn.

    Raises ValueError for prompts without a gold answer, for one that with max_new_tokens exceeds row_tokens,
    and for a reward that fails.
    """
    settings, chat = policy.settings, policy.chat
    without_gold = [question.id for question in prompts if not question.answer.strip()]
    if without_gold:
        raise ValueError(
            f"{len(without_gold)} of {len(prompts)} prompts have no gold answer to grade by: "
            f"{without_gold[:5]}; give them one, or leave them out"
        )
    policy.optimizer.zero_grad(set_to_none=True)  # frees the last update's gradients while sampling
    groups = range(policy.drawn, policy.drawn + len(prompts))
    share, size = here().share(range(len(prompts))), settings.group_size

    def sample_and_judge() -> list[Episode]:
        encoded = chat.encode([chat.prompt(question.problem) for question in prompts])
        settings.check_prompts(encoded)
        wanted = [(i, sample) for i in share for sample in range(size)]
        completions = generate(
            policy.model,
            [encoded[i] for i, _ in wanted],
            SamplingParams(settings.temperature, top_p=1.0, top_k=0, max_new_tokens=settings.max_new_tokens),
            num_slots=settings.num_slots,
            cuda_graphs=policy.cuda_graphs,
            seed=settings.seed,
            eos_token_id=chat.eos_token_ids,
            keys=[[prompts[i].id, groups[i], sample] for i, sample in wanted],
            decode=chat.decode,
            description="rollout",
        )
        episodes = []
        for n, i in enumerate(share):
            group = completions[n * size : (n + 1) * size]
            judged = judge(policy.rewards, prompts[i], group)
            episodes += [
                Episode(groups[i], prompts[i].id, encoded[i], completion, total(rewards), rewards)
                for completion, rewards in zip(group, judged, strict=True)
            ]
        return episodes

    episodes = gathered(together(sample_and_judge))
    policy.drawn += len(prompts)
    return episodes


def update(policy: Policy, episodes: Sequence[Episode]) -> dict[str, float]:
    """Learn from the episodes of one rollout, one optimizer step per mini-batch. Return the metrics.

    A mini-batch without anything to learn takes no step and is counted (empty_minibatches).
    Raises ValueError if no episode can be trusted, with the reasons, and NotFinite as TrainingStep does.
    """
    settings, start = policy.settings, time.perf_counter()
    scored = undecided_as_wrong(episodes) if settings.undecided_is_wrong else episodes
    reasons = Counter(episode.rejection for episode in scored if episode.rejection)
    if sum(reasons.values()) == len(episodes):
        raise ValueError(
            f"nothing can be learned from {len(episodes)} episodes: {dict(reasons)}; if log-probs are not "
            "finite the policy has diverged: go back to the last checkpoint and lower --lr"
        )
    groups = [[episode for episode in group if not episode.rejection] for group in by_group(scored)]
    size = settings.minibatch_prompts
    minibatches = [groups[i : i + size] for i in range(0, len(groups), size)]

    stats, at_first, losses, norms, tokens = RunningStats(), {}, [], [], 0
    loss_of = grpo_loss(policy.model, settings, stats, policy.savings.logit_rows)
    for minibatch in Progress("update", "mini-batches", len(minibatches)).over(minibatches):
        policy.optimizer.zero_grad(set_to_none=True)  # frees the last step's gradients while scoring
        rows = rows_of(policy, minibatch)
        if not rows:
            continue
        loss, norm = policy.training_step(rows, loss_of)
        losses.append(loss.item())
        norms.append(norm.item())
        tokens += sum(map(len, rows))
        if len(losses) == 1:  # the log-probs are of the weights that sampled: what differs is rounding
            at_first = {f"sampler_{name}": x for name, x in stats.read().items() if name.startswith("ratio")}

    seconds = time.perf_counter() - start
    return {
        "loss": fmean(losses or [0.0]),
        "grad_norm": fmean(norms or [0.0]),
        "updates": len(losses),
        "empty_minibatches": len(minibatches) - len(losses),
        **summary(episodes, groups),
        **stats.read(),
        **at_first,
        **{f"rejected: {reason}": count for reason, count in reasons.items()},
        "tokens": tokens,
        "update_seconds": seconds,
        "update_tokens_per_second": tokens / seconds,
    }


def rows_of(policy: Policy, groups: Sequence[Sequence[Episode]]) -> list[EpisodeBatch]:
    """Pack what an optimizer step learns from these groups into rows; for a KL, score this rank's share."""
    settings = policy.settings
    weighted = weighted_episodes(groups, settings)
    packs = plan_packs([x.num_tokens for x in weighted], settings.row_tokens, seed=settings.seed)
    rows = [EpisodeBatch.of([weighted[i] for i in pack]) for pack in packs]
    if not settings.uses_reference:
        return rows
    with policy.reference() as model:
        for i in here().share(range(len(rows))):
            found = score(model, rows[i], settings.temperature, policy.savings.logit_rows)
            rows[i] = replace(rows[i], reference_logprobs=found)
    return rows


def weighted_episodes(groups: Sequence[Sequence[Episode]], settings: Settings) -> list[WeightedEpisode]:
    """Return the episodes that an optimizer step learns from, with their advantages and token weights."""
    found = []
    for group in groups:
        advantages = group_advantages([episode.reward for episode in group], settings.advantage_scale)
        found += zip(group, advantages, strict=True)
    all_sequences = len(found)
    if settings.mask_truncated:
        found = [(episode, advantage) for episode, advantage in found if episode.completion.finished]

    lengths = [len(episode.completion.ids) for episode, _ in found]
    totals = {"all_tokens": sum(lengths), "all_sequences": all_sequences}
    return [
        WeightedEpisode(episode, advantage, token_weight(length, settings.normaliser, **totals))
        for (episode, advantage), length in zip(found, lengths, strict=True)
        if advantage or settings.uses_reference  # otherwise its gradient is zero
    ]


@torch.no_grad()
def score(model, row: EpisodeBatch, temperature: float, logit_rows: int = 0) -> Tensor:
    """Compute the model's log-probs of a row's targets, (T,) fp32 on the CPU, 0 where there is no target.

    logit_rows: as in kit.train.savings.
    """
    training = model.training
    model.eval()
    weight = head_weight(model)
    batch = row.to(weight.device)
    hidden = hidden_states(model, batch)
    head = {"temperature": temperature, "softcap": softcap(model), "max_rows": logit_rows}
    logprobs, _ = token_logprobs(hidden, weight, batch.targets, **head)
    model.train(training)
    return logprobs.cpu()


def grpo_loss(model, settings: Settings, stats: RunningStats, logit_rows: int = 0) -> LossOfRow:
    """Return the loss of a row (kit/train/loss.py): the objective of every completion token, times its
    weight.

    The row's scale is not used, since the weights contain the normaliser. logit_rows: as in
    kit.train.savings.
    """
    head = {"temperature": settings.temperature, "softcap": softcap(model), "max_rows": logit_rows}
    by_sequence = settings.ratio == "sequence"

    def loss_of(hidden: Tensor, weight: Tensor, batch: EpisodeBatch, scale: float) -> Tensor:
        def objective(logprobs: Tensor, rows: Tensor) -> Tensor:
            old, advantages = batch.old_logprobs[rows], batch.advantages[rows]
            sequence = batch.sequence[rows] if by_sequence else None
            reference = batch.reference_logprobs[rows] if settings.uses_reference else None
            return token_losses(
                logprobs, old, advantages, settings, sequence=sequence, reference=reference, stats=stats
            )

        if by_sequence:  # needs whole completions, not chunks of tokens; backward recomputes the logits
            logprobs, _ = token_logprobs(hidden, weight, batch.targets, **head)
            rows = kept_rows(batch.targets, len(weight), IGNORE_INDEX)
            return (objective(logprobs[rows], rows) * batch.token_weight[rows]).sum()
        weighted = {"reduction": "sum", "token_weight": batch.token_weight, "objective": objective}
        return linear_cross_entropy(hidden, weight, batch.targets, **weighted, **head)

    return loss_of


def summary(episodes: Sequence[Episode], groups: Sequence[Sequence[Episode]]) -> dict[str, float]:
    """Summarise a rollout. groups: without the rejected episodes, which count in length and truncated."""
    trusted = [episode for group in groups for episode in group]
    rewards = [episode.reward for episode in trusted]
    return {
        "reward_mean": fmean(rewards),
        "reward_std": pstdev(rewards),
        **{f"{REWARD}{name}": fmean(e.rewards[name] or 0.0 for e in trusted) for name in trusted[0].rewards},
        "no_signal": fmean(not has_signal([episode.reward for episode in group]) for group in groups),
        # the mean of -log p over what was sampled: an unbiased estimate of the distributions' entropy
        "entropy": -fmean(logprob for episode in trusted for logprob in episode.completion.logprobs),
        "length": fmean(len(episode.completion.ids) for episode in episodes),
        "truncated": fmean(not episode.completion.finished for episode in episodes),
        "undecided": fmean(episode.reward is None for episode in episodes),
        "episodes": len(episodes),
        "groups": len(groups),
    }
