"""The memory plan of reinforcement learning: sampling and updating take turns, so a card needs the larger of the two.

    sampling    weights + optimizer states + reference + the sampler's cache + what drawing a token or reading prompts takes
    update      weights + optimizer states + reference + gradients + a row's training step

Both are simulated on fake tensors, as kit.memory does it: the real training step with the real objective, on two rows, because
the second one's backward pass finds the first one's gradients there; what the sampler computes with the model and draws with. The
cache is a product of sizes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from kit import ledger
from kit.episodes import EpisodeBatch
from kit.generate import PREFILL_TOKENS, SamplingParams, cache_bytes
from kit.ledger import Ledger
from kit.machine import GIB
from kit.memory import CARDS, Plan, fake_batch, load_config, measure
from kit.models import hidden_states, next_token_logits, softcap
from kit.objective import Tally
from kit.rl import row_loss
from kit.rl_settings import Settings
from kit.sampling import sample
from kit.savings import Savings

REFERENCE, CACHE, SAMPLER = "reference", "sampler's cache", "sampler's step"
PROMPT_TOKENS = 512  # a prompt's length; the problems of MATH have 75 on average, and 800 at most
SLOTS = tuple(2**i for i in range(12))


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
            most = f"up to {slots:,} answers at once" if slots and self.update.fits(gb) else "not even one answer at once"
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


def plan_rl(
    model: str, *, settings: Settings, savings: Savings | None = None, qlora_rank: int = 0, prompt_tokens: int = PROMPT_TOKENS,
    dtype: torch.dtype = torch.bfloat16,
) -> RLPlan:  # fmt: skip
    """Simulate a step of reinforcement learning. model: as kit.memory.load_config takes it. Takes up to a minute.

    Raises ValueError for a model without a config at hand and for savings that exclude one another.
    """
    savings, config = savings or Savings(), load_config(model)
    if qlora_rank:  # not below, where a tensor made by an import would be fake for good
        from kit.nf4 import simulate_quantised_decoder
        from kit.qlora import add_adapters
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = AutoModelForCausalLM.from_config(config, attn_implementation="kit", dtype=dtype)
        if qlora_rank:
            simulate_quantised_decoder(fake)
            add_adapters(fake, base="", rank=qlora_rank)
        copied = [torch.empty_like(p) for p in fake.parameters()] if settings.uses_reference and not qlora_rank else []
        row = fake_batch(settings.row_tokens)
        batch = EpisodeBatch(**vars(row), **{name: torch.zeros(len(row)) for name in EpisodeBatch.TENSORS[len(row.TENSORS) :]})
        loss_of = partial(row_loss, settings=settings, cap=softcap(fake), tally=Tally(), sampler=Tally(),
                          logit_rows=savings.logit_rows)  # fmt: skip
        lazy = savings.optimizer == "adamw"  # makes its states in the first step
        book = measure(fake, savings, batch, steps=2 if lazy else 1, rows=2, loss_of=loss_of, resident={REFERENCE: copied})
        resident = {name: book.owners.get(name, 0) for name in (ledger.WEIGHTS, ledger.OPTIMIZER, REFERENCE)}
        capacity = prompt_tokens + settings.max_new_tokens
        reading = _transient(
            fake, lambda: hidden_states(fake, fake_batch(min(PREFILL_TOKENS, settings.num_slots * prompt_tokens)))
        )

        def owners(num_slots: int) -> dict[str, int]:
            drawing = _transient(fake, lambda: _draw(fake, num_slots, settings))
            return {**resident, CACHE: cache_bytes(fake, num_slots, capacity), SAMPLER: max(reading, drawing)}

        what = Plan(model, settings.row_tokens, qlora_rank, savings, 0, "", {}, book.host_peak, rows=2)
        ladder = {n: _plan(what, owners(n)) for n in sorted({*SLOTS, settings.num_slots})}
    update = replace(what, peak=book.peak, when=book.when, owners={owner: n for owner, n in book.owners.items() if n})
    slots = {gb: max((n for n, plan in ladder.items() if plan.fits(gb)), default=0) for gb in CARDS if gb >= 8}
    return RLPlan(ladder[settings.num_slots], update, settings, slots)


def _plan(what: Plan, owners: dict[str, int]) -> Plan:
    return replace(what, peak=sum(owners.values()), when="sampling", owners={name: n for name, n in owners.items() if n})


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
    sample(next_token_logits(fake, hidden), SamplingParams(settings.temperature, 1.0, 0, settings.max_new_tokens), keys, keys)
