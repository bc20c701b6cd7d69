"""One step of GRPO on Qwen2.5-0.5B, 64 answers of 128 tokens: does it fit, do trainer and sampler agree?

The sampler and the trainer compute the same log-probs by different kernels. Both round in bf16, so each is
compared with the same model in fp32: the sampler may be at most twice as far from it as the trainer is, and
their mean difference at most twice the trainer's own distance; the mean ratio of their probabilities, an
importance weight, must be 1 within its standard error. Weights are random, with the last norm scaled until
the entropy is about a trained model's; rewards are 0 and 1 in turn.
Left out: whether anything is learned, and other models.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from tempfile import TemporaryDirectory

import torch

from kit.data import ChatFormat, Question
from kit.data.toy import make_rows, make_tokenizer
from kit.machine import CONTEXT, GIB
from kit.memory import Plan
from kit.memory.phases import RunPlan
from kit.packing import IGNORE_INDEX, plan_packs
from kit.recipes.card.memory import beside_plan, measured, warm_up
from kit.recipes.card.models import NO_BF16, QWEN, build_to_sample, config_to_sample
from kit.recipes.card.results import Card, Results
from kit.rl import Policy, Settings, rollout, update
from kit.rl.episodes import Episode, EpisodeBatch, WeightedEpisode
from kit.rl.grpo import score
from kit.rl.memory_plan import RLRun
from kit.train import Savings

SPREAD = 7.0  # standard deviation of the logits: an entropy of about one nat
LEAST_LIMIT = 0.02  # of the mean difference of log-probs, however close to fp32 the trainer is


def run(results: Results, card: Card) -> None:
    card.need_rtx_30(NO_BF16)
    sizes = {"group_size": 8, "max_new_tokens": 128, "num_slots": 64, "row_tokens": 4_096}
    if card.small:
        sizes = {"group_size": 4, "max_new_tokens": 8, "num_slots": 16, "row_tokens": 64}
    settings, chat = Settings(**sizes, minibatch_prompts=8), ChatFormat(make_tokenizer(), instruction="")
    rows = make_rows("short", settings.num_slots // settings.group_size, seed=0)
    questions = [Question(f"q{i}", row["problem"], row["answer"]) for i, row in enumerate(rows)]
    longest = max(map(len, chat.encode([chat.prompt(question.problem) for question in questions])))

    with results.case("one step of Qwen2.5-0.5B"):
        results.need(seconds=40)
        plan = plan_step(card, settings, longest)
        results.need(gib=plan.larger.total / GIB)
        train(results, card, plan, settings, chat, questions)


def plan_step(card: Card, settings: Settings, prompt_tokens: int, *, cuda_graphs: bool = True) -> RunPlan:
    """Plan a step on Qwen2.5-0.5B, or on a rehearsal's small one. prompt_tokens: of the longest prompt."""
    with TemporaryDirectory() as folder:
        if card.small:
            config_to_sample(card).save_pretrained(folder)
        model = folder if card.small else QWEN
        what = {"settings": settings, "prompt_tokens": prompt_tokens, "cuda_graphs": cuda_graphs}
        return RLRun(model=model, **what).simulate(Savings())


def train(
    results: Results,
    card: Card,
    plan: RunPlan,
    settings: Settings,
    chat: ChatFormat,
    questions: list[Question],
) -> None:
    """Make one rollout and one update under the plan's cap, and compare log-probs between the two."""
    held, cap, graded = warm_up(card), (plan.larger.total - CONTEXT) / GIB, itertools.count()

    def reward(question: Question, completions) -> list[float]:
        return [float(next(graded) % 2) for _ in completions]

    model = build_to_sample(card, SPREAD).requires_grad_(True)
    policy = Policy(model, chat, settings, lr=1e-6, reward=reward)

    def under_cap(what: str, part: Plan, call: Callable[[], object]) -> tuple[object, float]:
        """Judge the memory of a call. Return its result and its seconds."""
        usage = measured(card, call, held=held, cap=cap)
        text = beside_plan(part.peak / GIB, usage, cap)
        results.check(f"{what} fits its plan", usage.reserved <= cap + 0.01, text)
        return usage.result, usage.seconds

    episodes, seconds = under_cap("rollout", plan.sampling, lambda: rollout(policy, questions))
    speed = sum(len(episode.completion.ids) for episode in episodes) / seconds
    results.figure("rollout", f"{len(episodes)} answers, {speed:,.0f} tokens/s", tokens_per_second=speed)

    compare(results, *log_probs(card, policy, episodes))

    found, seconds = under_cap("update", plan.update, lambda: update(policy, episodes))
    loss, norm, speed = found["loss"], found["grad_norm"], found["tokens"] / seconds
    text = f"loss {loss:.2e}, gradient norm {norm:.3g}, {speed:,.0f} tokens/s"
    results.check("the update is finite and moves", math.isfinite(loss) and 0 < norm < math.inf, text)
    policy.close()


def log_probs(card: Card, policy: Policy, episodes: list[Episode]) -> tuple[torch.Tensor, ...]:
    """Return log-probs of the sampled tokens, (N,) each: the sampler's, the trainer's, and those in fp32."""
    weighted = [WeightedEpisode(episode, 1.0, 1.0) for episode in episodes if episode.completion.ids]
    packs = plan_packs([episode.num_tokens for episode in weighted], policy.settings.row_tokens, seed=0)
    rows = [EpisodeBatch.of([weighted[i] for i in pack]) for pack in packs]
    kept = torch.cat([row.targets != IGNORE_INDEX for row in rows])
    sampler = torch.cat([row.old_logprobs for row in rows])

    precise = build_to_sample(card, SPREAD, torch.float32)  # the same weights: nothing was updated yet
    temperature = policy.settings.temperature
    models = policy.model, precise
    trainer, exact = (torch.cat([score(model, row, temperature) for row in rows]) for model in models)
    return sampler[kept], trainer[kept], exact[kept]


def compare(results: Results, sampler: torch.Tensor, trainer: torch.Tensor, exact: torch.Tensor) -> None:
    ours, theirs = ((logprobs - exact).abs().mean().item() for logprobs in (sampler, trainer))
    apart = trainer - sampler
    mean, limit = apart.abs().mean().item(), max(LEAST_LIMIT, 2 * theirs)
    ratio, noise = apart.exp().mean().item(), 3 * apart.exp().std().item() / len(apart) ** 0.5
    holds = mean <= limit and abs(ratio - 1) <= max(1e-3, noise)  # not if one is NaN
    text = f"mean {mean:.4f}, at most {limit:.4f}; largest {apart.abs().max():.3f}; "
    text += f"mean ratio {ratio:.4f} +- {noise:.4f}"
    results.check("log-probs: trainer beside sampler", holds, text, mean=mean, ratio=ratio, noise=noise)

    text = f"sampler {ours:.4f}, trainer {theirs:.4f}; the sampler's at most twice the trainer's"
    results.check("log-probs: distance from fp32", ours <= 2 * theirs, text, sampler=ours, trainer=theirs)
