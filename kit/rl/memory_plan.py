"""Plan the memory of reinforcement learning, whose sampling and updates alternate: a card needs the larger.

    sampling    weights + optimizer states + reference + the sampler's cache and step
    update      weights + optimizer states + reference + gradients + a row's training step
                or, before it, without gradients: the pass that scores a row for the KL

Both are simulated on fake tensors: the update is the real training step with the real objective, on two rows,
the second of which finds the gradients of the first; sampling is as in kit.memory.sampling. Evaluation has
the same cache without an optimizer (see eval_slots), so it needs less.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from kit.generate.sampling import SamplingParams
from kit.machine import GIB
from kit.memory import live_bytes
from kit.memory.choose import QLORA_RANK, given_up, ladder_steps, nearest, show_tried, size_of
from kit.memory.flops import Sizes
from kit.memory.run_plan import RunPlan
from kit.memory.sampling import MOST_SLOTS, PROMPT_TOKENS, Sampling, most_slots, simulate_sampling, transient
from kit.memory.simulate import Plan, card_bytes, fake_batch, fake_model, measure
from kit.models.loading import load_config
from kit.rl.episodes import EpisodeBatch
from kit.rl.grpo import grpo_loss, score
from kit.rl.objective import RunningStats
from kit.rl.settings import Settings
from kit.train.savings import Savings

REFERENCE, SCORING = "reference", "reference's pass"
SHORTEST_ANSWER = 512  # tokens; no plan suggests shorter answers


@dataclass(frozen=True)
class RLStep:
    """What a plan is made for."""

    model: str  # as load_config takes it
    settings: Settings
    qlora_rank: int = 0
    prompt_tokens: int = PROMPT_TOKENS
    desktop_gb: float = 0.0  # GiB of the card that a desktop uses

    @property
    def ladder(self) -> list[Savings]:
        return ladder_steps_rl(self.model, self.qlora_rank)

    def may_fit(self, savings: Savings, gpu_gb: float) -> bool:
        """Return False if what is always on the card is too large by itself: a simulation takes seconds."""
        if self.qlora_rank:
            return True
        # in bf16: weights, gradients and the reference
        copies = 1 + (not savings.offload_gradients) + self.settings.uses_reference
        # bytes per weight, of 8-bit states and rests
        states = 0 if savings.offload_optimizer else 2 + 2 * savings.exact_weights
        weights = Sizes.of(load_config(self.model)).weights
        return card_bytes((2 * copies + states) * weights) <= (gpu_gb - self.desktop_gb) * GIB

    def simulate(self, savings: Savings) -> tuple[Plan, Sampling]:
        """Return (the update's plan, sampling's as a function of the answers at once)."""
        settings = self.settings
        fake, mode = fake_model(load_config(self.model), self.qlora_rank)
        has_copy = settings.uses_reference and not self.qlora_rank  # adapters' base is the reference itself
        row_tokens = settings.row_tokens
        with mode:
            reference = [torch.empty_like(p) for p in fake.parameters()] if has_copy else []
            loss_of = grpo_loss(fake, settings, RunningStats(), savings.logit_rows)
            row, resident = _fake_episodes(row_tokens), {REFERENCE: reference}
            ledger = measure(fake, savings, row, rows=2, loss_of=loss_of, resident=resident)

        owners = {owner: n for owner, n in ledger.owners.items() if n}
        sizes = {"row_tokens": row_tokens, "qlora_rank": self.qlora_rank, "savings": savings, "rows": 2}
        sizes |= {"host": ledger.host_peak, "desktop_gb": self.desktop_gb}
        update = Plan(self.model, peak=ledger.peak, when=ledger.when, owners=owners, **sizes)

        kept = (live_bytes.WEIGHTS, live_bytes.OPTIMIZER, REFERENCE)
        lasting = replace(update, owners={owner: owners[owner] for owner in kept if owner in owners})
        if settings.uses_reference:
            with mode:
                how = _fake_episodes(row_tokens), settings.temperature, savings.logit_rows
                owners = lasting.owners | {SCORING: transient(fake, lambda: score(fake, *how))}
            scoring = replace(update, when="scoring", owners=owners, peak=sum(owners.values()))
            update = max(update, scoring, key=lambda plan: plan.peak)

        params = SamplingParams(settings.temperature, 1.0, 0, settings.max_new_tokens)
        longest_prompt = capacity(settings, self.prompt_tokens) - settings.max_new_tokens
        return update, simulate_sampling(fake, mode, params, longest_prompt, lasting)


def plan_rl(model: str, *, savings: Savings | None = None, **what) -> RunPlan:
    """Simulate a step of reinforcement learning with bf16 weights; takes seconds. what: as for RLStep.

    Raises ValueError for a model without a config at hand and for savings that exclude one another.
    """
    step = RLStep(model, **what)
    update, sampling = step.simulate(savings or Savings())
    slots = step.settings.num_slots
    return RunPlan(sampling(slots), update, slots, sampling, is_plain=False)


def choose_rl(model: str, *, gpu_gb: float, bound: int = MOST_SLOTS, **what) -> RunPlan:
    """Return the plan of the first savings of the ladder that fit a card of gpu_gb GiB; takes up to a minute.

    The plan's num_slots is the most answers at once that fit, up to `bound`; settings.num_slots is ignored. A
    line is printed for each setting that is tried. what: as for RLStep.
    Raises ValueError if not even one answer at a time fits, naming the three largest owners and the nearest
    setting that does.
    """
    step = RLStep(model, **what)
    settings, desktop_gb = step.settings, step.desktop_gb
    for savings in step.ladder:
        if step.may_fit(savings, gpu_gb):
            update, sampling = step.simulate(savings)
            slots = most_slots(sampling, gpu_gb, bound) if show_tried(update).fits(gpu_gb) else 0
            if slots:
                if given_up(savings):
                    print(f"  to keep the update takes a larger card; the price: {given_up(savings)}")
                return RunPlan(sampling(slots), update, slots, sampling, is_plain=False)

    update, sampling = step.simulate(step.ladder[-1])
    least = max(update, sampling(1), key=lambda plan: plan.peak)
    nearest = _nearest(step, gpu_gb)
    raise ValueError(
        f"{size_of(gpu_gb, desktop_gb)} but {model} with answers of {settings.max_new_tokens:,} tokens in "
        f"rows of {settings.row_tokens:,} needs {least.total / GIB:.2f} GiB with every saving on and one "
        f"answer at a time; its largest owners are {least.largest_owners()}; "
        f"pass {nearest + ', or ' if nearest else ''}a larger card"
    )


def ladder_steps_rl(model: str, qlora_rank: int) -> list[Savings]:
    """Return the ladder without what several rows per step, or another loss than cross-entropy, exclude."""
    without = ("update_in_backward", "head_update")
    return ladder_steps(load_config(model), qlora_rank, without)


def eval_slots(settings: Settings, eval_tokens: int, prompt_tokens: int = PROMPT_TOKENS) -> int:
    """Return how many answers of eval_tokens the rollout's cache holds for an evaluation; at least one."""
    positions = settings.num_slots * capacity(settings, prompt_tokens)
    return min(settings.num_slots, max(positions // (prompt_tokens + eval_tokens), 1))


def capacity(settings: Settings, prompt_tokens: int) -> int:
    """Return the positions of a cache's row. Rollouts refuse prompts too long for a row with their answer."""
    longest_prompt = max(settings.row_tokens - settings.max_new_tokens, 1)
    return settings.max_new_tokens + min(prompt_tokens, longest_prompt)


def _nearest(step: RLStep, gpu_gb: float) -> str:
    """Return flags with which the leanest savings fit; "" if none of those that are tried do."""

    def fits(flags: dict) -> bool:
        changes = dict(flags)
        rank = changes.pop("qlora_rank", step.qlora_rank)
        wanted = replace(step, settings=replace(step.settings, **changes), qlora_rank=rank)
        savings = wanted.ladder[-1]
        if not wanted.may_fit(savings, gpu_gb):
            return False
        update, sampling = wanted.simulate(savings)
        return update.fits(gpu_gb) and sampling(1).fits(gpu_gb)

    return next(nearest(_smaller(step.settings, step.qlora_rank, step.prompt_tokens), fits), "")


def _smaller(settings: Settings, qlora_rank: int, prompt_tokens: int) -> Iterator[list[dict]]:
    """Yield changes that need less memory, in the order of how much they change what is learned.

    Shorter rows change nothing, no KL little, shorter answers and adapters much. Each list holds one kind of
    change, from the smallest to the largest.
    """
    shortest_row = prompt_tokens + settings.max_new_tokens
    if settings.row_tokens > shortest_row:
        yield [{"row_tokens": shortest_row}]

    if settings.uses_reference and not qlora_rank:
        yield [{"kl_coef": 0.0, "row_tokens": min(settings.row_tokens, shortest_row)}]

    shorter, tokens = [], settings.max_new_tokens // 2
    while tokens >= SHORTEST_ANSWER:
        row_tokens = min(settings.row_tokens, prompt_tokens + tokens)
        shorter.append({"max_new_tokens": tokens, "row_tokens": row_tokens})
        tokens //= 2
    if shorter:
        yield shorter

    if not qlora_rank:
        yield [{"qlora_rank": QLORA_RANK}]


def _fake_episodes(row_tokens: int) -> EpisodeBatch:
    """Return a row that is one episode."""
    row = fake_batch(row_tokens)
    names = EpisodeBatch.TENSORS[len(row.TENSORS) :]  # what an episode has besides a document's tensors
    return EpisodeBatch(**vars(row), **{name: torch.zeros(len(row)) for name in names})
