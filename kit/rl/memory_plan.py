"""The memory plan of reinforcement learning: sampling and updating take turns, so a card needs the larger of the two.

    sampling    weights + optimizer states + reference + the sampler's cache + what drawing a token or reading prompts takes
    update      weights + optimizer states + reference + gradients + a row's training step

Both are simulated on fake tensors, as kit.memory.simulate does it: the real training step with the real objective, on a row that
finds the gradients of the row before it there; what the sampler computes with the model and draws with. The
cache is a product of sizes. Evaluation has the same cache and no optimizer beside it (see eval_slots), so it is below.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from kit.config import as_flags
from kit.generate.kv_cache import cache_bytes
from kit.generate.sampler import PREFILL_TOKENS
from kit.generate.sampling import SamplingParams, sample
from kit.machine import CONTEXT, GIB
from kit.memory import live_bytes
from kit.memory.choose import ladder_steps
from kit.memory.closed_form import formula
from kit.memory.live_bytes import Ledger
from kit.memory.simulate import CARDS, Plan, fake_batch, measure, steps_to_count
from kit.models.attention import REGISTERED
from kit.models.backbone import hidden_states, next_token_logits
from kit.models.loading import load_config
from kit.rl.episodes import EpisodeBatch
from kit.rl.grpo import grpo_loss
from kit.rl.objective import RunningStats
from kit.rl.settings import Settings
from kit.train.savings import Savings

REFERENCE, CACHE, SAMPLER = "reference", "sampler's cache", "sampler's step"
PROMPT_TOKENS = 1_024  # the longest prompt; one of them decides for all rows of a cache, and MATH's problems reach 800 (mean: 75)
MOST_SLOTS = 2_048  # answers at once: by then the weights' trip to the cores is shared by so many that more gain nothing
SHORTEST_ANSWER = 512  # tokens; no plan proposes shorter ones


@dataclass(frozen=True)
class RLPlan:
    """What one step of reinforcement learning holds. slots: GiB of a card -> most answers sampled at once there, 0 = none."""

    sampling: Plan
    update: Plan
    settings: Settings
    slots: dict[int, int]

    @property
    def larger(self) -> Plan:
        return max(self.sampling, self.update, key=lambda plan: plan.peak)

    def fits(self, gpu_gb: float) -> bool:
        return self.larger.fits(gpu_gb)

    def __str__(self) -> str:
        rows = []
        for gb, slots in self.slots.items():
            verdict = "yes" if self.fits(gb) else "no"
            most = (
                f"up to {slots:,} answers at once"
                if slots and self.update.fits(gb)
                else "not even one answer at once"
            )
            reason = most if self.update.fits(gb) else "the update does not fit"
            rows.append(f"    {gb:>3} GB: {verdict:<4} {reason}")
        how = f"{self.settings.num_slots} answers of up to {self.settings.max_new_tokens:,} tokens at once"
        return "\n".join(
            [f"sampling, {how}", _indent(self.sampling), "update", _indent(self.update),
             f"a card needs the larger, {self.larger.total / GIB:.2f} GiB; it fits (simulated)", *rows]
        )  # fmt: skip

    def as_json(self) -> dict:
        return {
            "sampling": self.sampling.as_json(), "update": self.update.as_json(), "settings": asdict(self.settings),
            "total": self.larger.total, "simulated": True, "fits_gb": [gb for gb in CARDS if self.fits(gb)], "slots": self.slots,
        }  # fmt: skip


def _indent(plan: Plan) -> str:
    return "\n".join(f"  {line}" for line in str(plan).splitlines())


Sampling = Callable[[int], Plan]  # answers at once -> what sampling them holds


def plan_rl(
    model: str, *, settings: Settings, savings: Savings | None = None, qlora_rank: int = 0, prompt_tokens: int = PROMPT_TOKENS,
    dtype: torch.dtype = torch.bfloat16,
) -> RLPlan:  # fmt: skip
    """Simulate a step of reinforcement learning. model: as kit.models.loading.load_config takes it. Takes seconds to a minute.

    Raises ValueError for a model without a config at hand and for savings that exclude one another.
    """
    return _as_plan(
        *_simulate(model, settings, savings or Savings(), qlora_rank, prompt_tokens, dtype), settings
    )


def choose_rl(
    model: str, *, settings: Settings, gpu_gb: float, qlora_rank: int = 0, most_slots: int = MOST_SLOTS,
    prompt_tokens: int = PROMPT_TOKENS,
) -> RLPlan:  # fmt: skip
    """The plan of the fastest savings with which an update fits a card of gpu_gb GiB, and of the most answers at once that fit
    it then: at most most_slots, in the plan's settings.num_slots. What settings.num_slots was before does not matter.

    Raises ValueError if not even one answer at a time fits, naming the three largest owners and the nearest setting that does.
    """
    *richer, leanest = ladder_steps_rl(model, qlora_rank)
    for savings in [*(s for s in richer if _may_fit(model, settings, s, gpu_gb, qlora_rank)), leanest]:
        update, sampling = _simulate(model, settings, savings, qlora_rank, prompt_tokens)
        slots = _most(sampling, gpu_gb, most_slots) if update.fits(gpu_gb) else 0
        if slots:
            return _as_plan(update, sampling, replace(settings, num_slots=slots))
    least = max(update, sampling(1), key=lambda plan: plan.peak)
    nearest = _nearest(model, settings, gpu_gb, qlora_rank, prompt_tokens)
    raise ValueError(
        f"gpu_gb is {gpu_gb:g} but {model} with answers of {settings.max_new_tokens:,} tokens in rows of {settings.row_tokens:,} "
        f"needs {least.total / GIB:.2f} GiB with every saving on and one answer at a time; its largest owners are "
        f"{least.largest_owners()}; pass {nearest + ', or ' if nearest else ''}a larger card"
    )


def ladder_steps_rl(model: str, qlora_rank: int) -> list[Savings]:
    """kit.memory.choose's settings, from fastest to leanest, without what one row per step and cross-entropy alone can have."""
    ladder = ladder_steps(load_config(model), qlora_rank)
    return list(
        dict.fromkeys(replace(savings, update_in_backward=False, head_update="whole") for savings in ladder)
    )


def eval_slots(settings: Settings, eval_tokens: int, prompt_tokens: int = PROMPT_TOKENS) -> int:
    """Answers of eval_tokens that are measured at once: as many as the rollout's cache has room for, and at least one."""
    held = settings.num_slots * capacity(settings, prompt_tokens)
    return min(settings.num_slots, max(held // (prompt_tokens + eval_tokens), 1))


def capacity(settings: Settings, prompt_tokens: int) -> int:
    """Positions of an answer's row in the cache: a rollout refuses prompts that with max_new_tokens exceed row_tokens."""
    return settings.max_new_tokens + min(prompt_tokens, max(settings.row_tokens - settings.max_new_tokens, 1))


def _may_fit(model: str, settings: Settings, savings: Savings, gpu_gb: float, qlora_rank: int) -> bool:
    """Whether the update may fit by kit.memory.closed_form, which is good to a tenth and takes no time."""
    owners = formula(load_config(model), settings.row_tokens, savings, qlora_rank, rows=2)
    reference = owners[live_bytes.WEIGHTS] if settings.uses_reference and not qlora_rank else 0
    return (sum(owners.values()) + reference) / 1.1 + CONTEXT <= gpu_gb * GIB


def _nearest(model: str, settings: Settings, gpu_gb: float, qlora_rank: int, prompt_tokens: int) -> str:
    """Flags with which the leanest savings fit; "" = none that are tried. Tried in the order of how much they change what is
    learned: shorter rows nothing, the KL little, shorter answers and adapters much."""
    tried: list[dict] = []
    if settings.row_tokens > prompt_tokens + settings.max_new_tokens:
        tried.append({"row_tokens": prompt_tokens + settings.max_new_tokens})
    if settings.uses_reference and not qlora_rank:
        tried.append(
            {"kl_coef": 0.0, "row_tokens": min(settings.row_tokens, prompt_tokens + settings.max_new_tokens)}
        )
    tokens = settings.max_new_tokens // 2
    while tokens >= SHORTEST_ANSWER:
        tried.append(
            {"max_new_tokens": tokens, "row_tokens": min(settings.row_tokens, prompt_tokens + tokens)}
        )
        tokens //= 2
    if not qlora_rank:
        tried.append({"qlora_rank": 16})
    for flags in tried:
        rank = flags.get("qlora_rank", qlora_rank)
        changed = replace(settings, **{name: value for name, value in flags.items() if name != "qlora_rank"})
        savings = ladder_steps_rl(model, rank)[-1]
        if _may_fit(model, changed, savings, gpu_gb, rank):
            update, sampling = _simulate(model, changed, savings, rank, prompt_tokens)
            if update.fits(gpu_gb) and sampling(1).fits(gpu_gb):
                return as_flags(flags)
    return ""


def _most(sampling: Sampling, gpu_gb: float, bound: int) -> int:
    """The most answers at once, up to bound, that fit a card; 0 = not even one."""
    return bisect_left(range(1, bound + 1), True, key=lambda num_slots: not sampling(num_slots).fits(gpu_gb))


def _as_plan(update: Plan, sampling: Sampling, settings: Settings) -> RLPlan:
    return RLPlan(
        sampling(settings.num_slots),
        update,
        settings,
        {gb: _most(sampling, gb, MOST_SLOTS) for gb in CARDS if gb >= 8},
    )


def _simulate(
    model: str,
    settings: Settings,
    savings: Savings,
    qlora_rank: int,
    prompt_tokens: int,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Plan, Sampling]:
    """The update, and what sampling holds by the number of answers at once. settings.num_slots has no part in it."""
    config = load_config(model)
    if qlora_rank:  # not below, where a tensor made by an import would be fake for good
        from kit.models.nf4 import simulate_quantised_decoder
        from kit.models.qlora import add_adapters
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fake = AutoModelForCausalLM.from_config(config, attn_implementation=REGISTERED["kit"], dtype=dtype)
        if qlora_rank:
            simulate_quantised_decoder(fake)
            add_adapters(fake, base="", rank=qlora_rank)
        copied = (
            [torch.empty_like(p) for p in fake.parameters()]
            if settings.uses_reference and not qlora_rank
            else []
        )
        row = fake_batch(settings.row_tokens)
        batch = EpisodeBatch(
            **vars(row), **{name: torch.zeros(len(row)) for name in EpisodeBatch.TENSORS[len(row.TENSORS) :]}
        )
        loss_of = grpo_loss(fake, settings, RunningStats(), savings.logit_rows)
        book = measure(fake, savings, batch, steps=steps_to_count(savings, dtype), later_row=True, loss_of=loss_of,
                       resident={REFERENCE: copied})  # fmt: skip
    what = Plan(model, settings.row_tokens, qlora_rank, savings, 0, "", {}, book.host_peak, rows=2)
    resident = {
        name: book.owners.get(name, 0) for name in (live_bytes.WEIGHTS, live_bytes.OPTIMIZER, REFERENCE)
    }

    @cache
    def reading(num_tokens: int) -> int:
        return _transient(fake, lambda: hidden_states(fake, fake_batch(num_tokens)))

    @cache
    def sampling(num_slots: int) -> Plan:
        with mode:
            drawing = _transient(fake, lambda: _draw(fake, num_slots, settings))
            longest = capacity(settings, prompt_tokens) - settings.max_new_tokens
            step = max(drawing, reading(min(PREFILL_TOKENS, num_slots * longest)))
        held = cache_bytes(fake, num_slots, capacity(settings, prompt_tokens))
        return _plan(what, "sampling", {**resident, CACHE: held, SAMPLER: step})

    return replace(
        what, peak=book.peak, when=book.when, owners={name: n for name, n in book.owners.items() if n}
    ), sampling


def _plan(what: Plan, when: str, owners: dict[str, int]) -> Plan:
    on_card = {name: n for name, n in owners.items() if n}
    return replace(what, peak=sum(on_card.values()), when=when, owners=on_card)


def _transient(fake, call) -> int:
    """Bytes that a call without gradients holds at its worst moment, besides the model."""
    fake.eval()
    book = Ledger(fake)
    before = book.now
    with torch.no_grad(), book:
        call()
    book.close()
    return book.peak - before


def _draw(fake, num_slots: int, settings: Settings) -> None:
    weight = fake.get_input_embeddings().weight
    hidden = torch.empty(num_slots, weight.shape[1], dtype=weight.dtype)
    keys = torch.zeros(num_slots, dtype=torch.int64)
    sample(
        next_token_logits(fake, hidden),
        SamplingParams(settings.temperature, 1.0, 0, settings.max_new_tokens),
        keys,
        keys,
    )
