"""The phases of a run, sampling and training. They alternate, so a card needs the larger.

Sampling holds what lasts beside it, the KV cache, and a step that reads prompts or draws tokens. The step is
what the sampler computes in torch's operators, on fake tensors: the kernels of a card hold less. The cache is
a product of sizes (cache_bytes).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from typing import ClassVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kit.generate.kv_cache import cache_bytes
from kit.generate.sampler import PREFILL_TOKENS
from kit.generate.sampling import SamplingParams, sample
from kit.generate.slots import USUAL_SLOTS
from kit.machine import GIB
from kit.memory.live_bytes import ROUNDING, Ledger, LiveBytes
from kit.memory.simulate import CARDS, Plan, fake_batch, fake_model, plan
from kit.models.attention import varlen_extra_bytes
from kit.models.backbone import hidden_states, next_token_logits
from kit.models.loading import load_config
from kit.train.adapters import Adapters
from kit.train.savings import Savings

CACHE, SAMPLER, VARLEN = "sampler's cache", "sampler's step", "torch's varlen"
PROMPT_TOKENS = 1_024  # the longest prompt, which sets all rows of a cache; MATH's reach 800 (mean: 75)
MOST_SLOTS = 2_048  # answers at once: so many share the reading of the weights that more gain nothing
SHORTER = 1024  # tokens: shorter rows are tried in multiples of this
QLORA_RANK = 16

Sampling = Callable[[int], Plan]  # answers at once -> what sampling them holds


@dataclass(frozen=True)
class RunPlan:
    """What the phases of a run hold."""

    update: Plan | None  # a training step; None = nothing is trained
    at: Sampling  # an evaluation's, or a rollout's
    num_slots: int  # answers at once
    run: Run | None = None  # that this is the plan of
    is_flexible: bool = False  # the run samples fewer answers at once if the card holds fewer

    @property
    def sampling(self) -> Plan:
        return self.at(self.num_slots)

    @property
    def larger(self) -> Plan:
        """The phase that decides whether a card is large enough."""
        return max(filter(None, (self.update, self.least_sampling)), key=lambda phase: phase.peak)

    @property
    def least_sampling(self) -> Plan:
        """Sampling with the fewest answers at once that the run allows."""
        return self.at(1) if self.is_flexible else self.sampling

    @property
    def host(self) -> int:
        """Bytes of CPU memory that training holds."""
        return self.update.host if self.update else 0

    def fits(self, gib: float) -> bool:
        return self.larger.fits(gib)

    def fits_text(self, desktop_gb: float) -> str:
        """Say which of the usual cards are large enough. desktop_gb: GiB of each that a desktop uses."""
        words = (f"{gb} GB: {'yes' if self.fits(gb - desktop_gb) else 'no'}" for gb in CARDS)
        desktop = f"; {desktop_gb:g} GB of each is left to a desktop" if desktop_gb else ""
        return f"fits {', '.join(words)}{desktop}"

    def describe(self, desktop_gb: float) -> str:
        """Return the lines to print. desktop_gb: as for fits_text."""
        lines = [f"sampling    {self.sampling}"]
        if self.update is not None:
            lines.insert(0, f"training    {self.update}")
            owner = "training" if self.larger is self.update else "sampling"
            fewer = self.is_flexible and self.sampling.total > self.larger.total
            way = ", where sampling takes fewer answers at once" if fewer else ""
            lines.append(f"a card needs {self.larger.total / GIB:.2f} GiB (simulated), for {owner}{way}")
        lines.append(self.fits_text(desktop_gb))

        for gb in CARDS:
            gib = gb - desktop_gb
            trains = self.update is None or self.update.fits(gib)
            if trains and not self.sampling.fits(gib) and (slots := most_slots(self.at, gib, self.num_slots)):
                on = f"{gb} GB: {slots} answers at once" if self.is_flexible else ""
                lines.append(f"  {on or f'with --num_slots {slots} sampling fits {gb} GB, too'}")
        return "\n".join(lines)

    def switches(self) -> dict:
        """Return what was chosen as a recipe's settings, with those that follow from it.

        Updating in the backward pass takes one row per step, and knows no norm to clip by.
        """
        if self.update is None:
            return {"num_slots": self.num_slots}
        savings = self.update.savings
        one_row = {"batch_traces": 1, "max_grad_norm": 0.0} if savings.update_in_backward else {}
        return asdict(savings) | {"num_slots": self.num_slots} | one_row

    def as_json(self, desktop_gb: float) -> dict:
        parts = {"sampling": self.sampling, "update": self.update, "larger": self.larger}
        found = {name: phase and phase.as_json(desktop_gb) for name, phase in parts.items()}
        return found.pop("larger") | found | {"num_slots": self.num_slots}


@dataclass(frozen=True, kw_only=True)
class Run(Adapters):
    """What a plan is made for: MeasuredRun, or reinforcement learning (kit.rl.memory_plan)."""

    model: str  # as load_config takes it
    attention: str = "auto"  # of kit.models.attention
    num_samples: int = MOST_SLOTS  # of an evaluation or a rollout: more slots would stay empty
    prompt_tokens: int = PROMPT_TOKENS
    cuda_graphs: bool = True  # the sampler replays its steps
    without: ClassVar[tuple[str, ...]] = ()  # savings that it cannot have
    drops_unneeded: ClassVar[bool] = True  # savings of the ladder without which it fits, too

    @property
    def has_adapters(self) -> bool:
        return any(self.ranks.values())

    def with_varlen(self, update: Plan) -> Plan:
        """Return a step's plan with what varlen holds and kit does not, as if it did at the worst moment."""
        if self.attention != "varlen":
            return update
        extra = varlen_extra_bytes(load_config(self.model), update.row_tokens)
        return replace(update, peak=update.peak + extra, owners=update.owners | {VARLEN: extra})

    def simulate(self, savings: Savings) -> RunPlan:
        """Return what it holds; takes seconds."""
        raise NotImplementedError

    def smaller(self) -> Iterator[list[dict]]:
        """Yield flags that need less memory: of each kind of change a list, the smallest change first."""
        raise NotImplementedError

    def changed(self, flags: dict) -> Run:
        return replace(self, **flags)


@dataclass(frozen=True, kw_only=True)
class MeasuredRun(Run):
    """A run that is measured and, if row_tokens > 0, trained on traces."""

    params: SamplingParams
    num_slots: int  # answers at once; 0 = as many as the run finds room for, planned as USUAL_SLOTS
    row_tokens: int = 0  # 0 = nothing is trained
    rows: int = 1  # per step, unless it updates in the backward pass

    @cached_property
    def at(self) -> Sampling:
        """What sampling holds from a model that is not being trained."""
        fake, mode = fake_model(load_config(self.model), **self.ranks)
        weights = Ledger(fake)
        weights.close()
        lasting = Plan.of_step(weights, model=self.model, row_tokens=0, savings=Savings(), **self.ranks)
        sizes = self.prompt_tokens, self.cuda_graphs
        return simulate_sampling(fake, mode, self.params, *sizes, lasting)

    def simulate(self, savings: Savings) -> RunPlan:
        num_slots = self.num_slots or min(USUAL_SLOTS, self.num_samples)
        sampling = {"at": self.at, "num_slots": num_slots, "run": self, "is_flexible": not self.num_slots}
        if not self.row_tokens:
            return RunPlan(None, **sampling)
        rows = 1 if savings.update_in_backward else self.rows
        sizes = {"row_tokens": self.row_tokens, "rows": rows} | self.ranks
        return RunPlan(self.with_varlen(plan(self.model, savings=savings, **sizes)), **sampling)

    def smaller(self) -> Iterator[list[dict]]:
        shorter = range((self.row_tokens - 1) // SHORTER, 0, -1)
        yield [{"row_tokens": count * SHORTER} for count in shorter]
        if not self.has_adapters:
            yield [{"qlora_rank": QLORA_RANK}]


def simulate_sampling(
    fake: nn.Module,
    mode: FakeTensorMode,
    params: SamplingParams,
    prompt_tokens: int,
    cuda_graphs: bool,
    lasting: Plan,
) -> Sampling:
    """Return what sampling holds on fake tensors.

    cuda_graphs: steps are replayed, in the graphs' memory. lasting: its owners are on the card all the time.
    """
    positions = min(prompt_tokens + params.max_new_tokens, fake.config.max_position_embeddings)

    @cache
    def reading(num_tokens: int) -> int:
        prompts = replace(fake_batch(num_tokens), max_seqlen=prompt_tokens)
        return transient(fake, lambda: hidden_states(fake, prompts))

    @cache
    def sampling(num_slots: int) -> Plan:
        with mode:
            drawing = transient(fake, lambda: _draw(fake, num_slots, params))
            both = (drawing, reading(min(PREFILL_TOKENS, num_slots * prompt_tokens)))
            # Graphs keep their memory. The eager step that proves one is not added: its logits and the
            # graph's, in bf16, are less than what a CPU's draw holds
            step = sum(both) if cuda_graphs else max(both)

        owners = lasting.owners | {CACHE: cache_bytes(fake, num_slots, positions), SAMPLER: step}
        answers = "1 answer" if num_slots == 1 else f"{num_slots} answers"
        what = f"{answers} of up to {params.max_new_tokens:,} tokens at once"
        return replace(lasting, what=what, when="sampling", owners=owners, peak=sum(owners.values()))

    return sampling


def most_slots(sampling: Sampling, gib: float, bound: int = MOST_SLOTS) -> int:
    """Return the most answers at once, up to bound, that fit a card; 0 if not even one does.

    gib: as for Plan.fits.
    """
    if cache_of_one := sampling(1).owners.get(CACHE):
        bound = min(bound, int(gib * GIB / cache_of_one))  # to simulate thousands of slots takes minutes
    return bisect_left(range(1, bound + 1), True, key=lambda slots: not sampling(slots).fits(gib))


def transient(fake: nn.Module, call: Callable[[], object]) -> int:
    """Return the most bytes that a call without gradients holds besides the model."""
    fake.eval()
    with torch.no_grad(), LiveBytes(ROUNDING) as held:
        call()
    return held.peak


def _draw(fake: nn.Module, num_slots: int, params: SamplingParams) -> None:
    """Draw one token in each slot, as a CPU does: all tokens may be kept. A card needs less."""
    weight = fake.get_input_embeddings().weight
    hidden = torch.empty(num_slots, weight.shape[1], dtype=weight.dtype)
    keys = torch.zeros(num_slots, dtype=torch.int64)
    if params.top_p < 1 or params.top_k:
        params = replace(params, top_k=weight.shape[0])
    sample(next_token_logits(fake, hidden), params, keys, keys)
