"""Plan the memory of reinforcement learning, whose sampling and updates alternate: a card needs the larger.

    sampling    weights + optimizer states + reference + the sampler's cache and step
    update      weights + optimizer states + reference + gradients + a row's training step
                or, before it, without gradients: the pass that scores a row for the KL

Both are simulated on fake tensors, as in kit.memory.simulate: the update is the real training step with the
real objective, on two rows, the second of which finds the gradients of the first; sampling is what the
sampler computes with the model and draws with. The cache is a product of sizes. Evaluation has the same cache
without an optimizer (see eval_slots), so it needs less.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache

import torch
from torch import nn

from kit.config import as_flags
from kit.generate.kv_cache import cache_bytes
from kit.generate.sampler import PREFILL_TOKENS
from kit.generate.sampling import SamplingParams, sample
from kit.machine import GIB
from kit.memory import live_bytes
from kit.memory.choose import QLORA_RANK, ladder_steps
from kit.memory.flops import Sizes
from kit.memory.live_bytes import Ledger
from kit.memory.simulate import Plan, card_bytes, fake_batch, fake_model, measure
from kit.models.backbone import hidden_states, next_token_logits
from kit.models.loading import load_config
from kit.rl.episodes import EpisodeBatch
from kit.rl.grpo import grpo_loss, score
from kit.rl.objective import RunningStats
from kit.rl.settings import Settings
from kit.train.savings import Savings

REFERENCE, CACHE, SAMPLER, SCORING = "reference", "sampler's cache", "sampler's step", "reference's pass"
PROMPT_TOKENS = 1_024  # the longest prompt, which sets all rows of a cache; MATH's reach 800 (mean: 75)
MOST_SLOTS = 2_048  # answers at once: so many share the reading of the weights that more gain nothing
SHORTEST_ANSWER = 512  # tokens; no plan suggests shorter answers


@dataclass(frozen=True)
class RLPlan:
    """What one step of reinforcement learning holds."""

    sampling: Plan
    update: Plan
    settings: Settings

    @property
    def larger(self) -> Plan:
        return max(self.sampling, self.update, key=lambda plan: plan.peak)

    def fits(self, gpu_gb: float) -> bool:
        return self.larger.fits(gpu_gb)

    def __str__(self) -> str:
        slots, tokens = self.settings.num_slots, self.settings.max_new_tokens
        return (
            f"sampling, {slots} answers of up to {tokens:,} tokens at once\n{_indent(self.sampling)}\n"
            f"update\n{_indent(self.update)}\n"
            f"a card needs the larger, {self.larger.total / GIB:.2f} GiB (simulated)\n{self.larger.fits_text}"
        )

    def as_json(self) -> dict:
        plans = {"sampling": self.sampling.as_json(), "update": self.update.as_json()}
        total = {"total": self.larger.total, "simulated": True, "fits_gb": self.larger.fits_gb}
        return plans | {"settings": asdict(self.settings)} | total


def _indent(plan: Plan) -> str:
    return "\n".join(f"  {line}" for line in str(plan).splitlines())


Sampling = Callable[[int], Plan]  # answers at once -> what sampling them holds


def plan_rl(
    model: str,
    *,
    settings: Settings,
    savings: Savings | None = None,
    qlora_rank: int = 0,
    prompt_tokens: int = PROMPT_TOKENS,
) -> RLPlan:
    """Simulate a step of reinforcement learning with bf16 weights; takes seconds.

    model: as load_config takes it.
    Raises ValueError for a model without a config at hand and for savings that exclude one another.
    """
    update, sampling = _simulate(model, settings, savings or Savings(), qlora_rank, prompt_tokens)
    return RLPlan(sampling(settings.num_slots), update, settings)


def choose_rl(
    model: str,
    *,
    settings: Settings,
    gpu_gb: float,
    qlora_rank: int = 0,
    most_slots: int = MOST_SLOTS,
    prompt_tokens: int = PROMPT_TOKENS,
) -> RLPlan:
    """Return the plan of the first savings of the ladder that fit a card of gpu_gb GiB; takes up to a minute.

    The plan's settings.num_slots is the most answers at once that fit, up to most_slots; what it was before
    is ignored.
    Raises ValueError if not even one answer at a time fits, naming the three largest owners and the nearest
    setting that does.
    """
    steps = ladder_steps_rl(model, qlora_rank)
    for savings in steps:
        if _may_fit(model, settings, savings, gpu_gb, qlora_rank):
            update, sampling = _simulate(model, settings, savings, qlora_rank, prompt_tokens)
            slots = _most_slots(sampling, gpu_gb, most_slots) if update.fits(gpu_gb) else 0
            if slots:
                return RLPlan(sampling(slots), update, replace(settings, num_slots=slots))

    update, sampling = _simulate(model, settings, steps[-1], qlora_rank, prompt_tokens)
    least = max(update, sampling(1), key=lambda plan: plan.peak)
    nearest = _nearest(model, settings, gpu_gb, qlora_rank, prompt_tokens)
    raise ValueError(
        f"gpu_gb is {gpu_gb:g} but {model} with answers of {settings.max_new_tokens:,} tokens in rows of "
        f"{settings.row_tokens:,} needs {least.total / GIB:.2f} GiB with every saving on and one answer at a "
        f"time; its largest owners are {least.largest_owners()}; "
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


def _most_slots(sampling: Sampling, gpu_gb: float, bound: int) -> int:
    """Return the most answers at once, up to bound, that fit a card; 0 if not even one does."""
    return bisect_left(range(1, bound + 1), True, key=lambda slots: not sampling(slots).fits(gpu_gb))


def _may_fit(model: str, settings: Settings, savings: Savings, gpu_gb: float, qlora_rank: int) -> bool:
    """Return False if what lies on the card for good is too large by itself: a simulation takes seconds."""
    if qlora_rank:
        return True
    copies = 3 if settings.uses_reference else 2  # weights, gradients and the reference in bf16
    states = 0 if savings.offload_optimizer else 2  # bytes per weight, of 8-bit states
    return card_bytes((2 * copies + states) * Sizes.of(load_config(model)).weights) <= gpu_gb * GIB


def _nearest(model: str, settings: Settings, gpu_gb: float, qlora_rank: int, prompt_tokens: int) -> str:
    """Return flags with which the leanest savings fit; "" if none of those that are tried do."""

    @cache
    def fits(flags: tuple[tuple[str, float], ...]) -> bool:
        changed = dict(flags)
        rank = int(changed.pop("qlora_rank", qlora_rank))
        wanted, savings = replace(settings, **changed), ladder_steps_rl(model, rank)[-1]
        if not _may_fit(model, wanted, savings, gpu_gb, rank):
            return False
        update, sampling = _simulate(model, wanted, savings, rank, prompt_tokens)
        return update.fits(gpu_gb) and sampling(1).fits(gpu_gb)

    for options in _smaller(settings, qlora_rank, prompt_tokens):
        options = [tuple(flags.items()) for flags in options]
        if fits(options[-1]):
            return as_flags(dict(options[bisect_left(options, True, key=fits)]))
    return ""


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


def _simulate(
    model: str, settings: Settings, savings: Savings, qlora_rank: int, prompt_tokens: int
) -> tuple[Plan, Sampling]:
    """Return (the update's plan, sampling's as a function of the answers at once)."""
    fake, mode = fake_model(load_config(model), qlora_rank)
    has_copy = settings.uses_reference and not qlora_rank  # the base of adapters is the reference itself
    with mode:
        reference = [torch.empty_like(p) for p in fake.parameters()] if has_copy else []
        loss_of = grpo_loss(fake, settings, RunningStats(), savings.logit_rows)
        ledger = measure(
            fake,
            savings,
            _fake_episodes(settings.row_tokens),
            rows=2,
            loss_of=loss_of,
            resident={REFERENCE: reference},
        )

    def as_plan(when: str, owners: dict[str, int], peak: int) -> Plan:
        owners = {owner: n for owner, n in owners.items() if n}
        row_tokens, host = settings.row_tokens, ledger.host_peak
        return Plan(model, row_tokens, qlora_rank, savings, peak, when, owners, host, rows=2)

    kept = (live_bytes.WEIGHTS, live_bytes.OPTIMIZER, REFERENCE)
    lasting = {owner: ledger.owners.get(owner, 0) for owner in kept}

    @cache
    def reading(num_tokens: int) -> int:
        return _transient(fake, lambda: hidden_states(fake, fake_batch(num_tokens)))

    @cache
    def sampling(num_slots: int) -> Plan:
        positions = capacity(settings, prompt_tokens)
        longest_prompt = positions - settings.max_new_tokens
        with mode:
            drawing = _transient(fake, lambda: _draw(fake, num_slots, settings))
            step = max(drawing, reading(min(PREFILL_TOKENS, num_slots * longest_prompt)))

        owners = lasting | {CACHE: cache_bytes(fake, num_slots, positions), SAMPLER: step}
        return as_plan("sampling", owners, sum(owners.values()))

    update = as_plan(ledger.when, ledger.owners, ledger.peak)
    if settings.uses_reference:
        with mode:
            row = _fake_episodes(settings.row_tokens)
            scoring = _transient(fake, lambda: score(fake, row, settings.temperature, savings.logit_rows))
        owners = lasting | {SCORING: scoring}
        update = max(update, as_plan("scoring", owners, sum(owners.values())), key=lambda plan: plan.peak)
    return update, sampling


def _fake_episodes(row_tokens: int) -> EpisodeBatch:
    """Return a row that is one episode."""
    row = fake_batch(row_tokens)
    names = EpisodeBatch.TENSORS[len(row.TENSORS) :]  # what an episode has besides a document's tensors
    return EpisodeBatch(**vars(row), **{name: torch.zeros(len(row)) for name in names})


def _transient(fake: nn.Module, call: Callable[[], object]) -> int:
    """Return the most bytes that a call without gradients holds besides the model."""
    fake.eval()
    ledger = Ledger(fake)
    before = ledger.now
    with torch.no_grad(), ledger:
        call()
    ledger.close()
    return ledger.peak - before


def _draw(fake: nn.Module, num_slots: int, settings: Settings) -> None:
    """Draw one token in each slot."""
    weight = fake.get_input_embeddings().weight
    hidden = torch.empty(num_slots, weight.shape[1], dtype=weight.dtype)
    keys = torch.zeros(num_slots, dtype=torch.int64)
    params = SamplingParams(settings.temperature, 1.0, 0, settings.max_new_tokens)
    sample(next_token_logits(fake, hidden), params, keys, keys)
