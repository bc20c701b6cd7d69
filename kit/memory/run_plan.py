"""The plan of a whole run: does it fit, how long does it take, what does it leave on disk?

A run samples and trains in turn, so a card needs the larger of what the two hold. Hours follow from this
card's measured speed or from a datasheet (kit.memory.hours). Training rows count as full, copies to and from
CPU memory as free. How long answers get is the experiment's question: their length is assumed, and so is that
of a trace.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from kit import paper
from kit.command_line import started_as
from kit.config import full_command
from kit.generate.sampling import SamplingParams
from kit.machine import GIB, free_memory
from kit.memory.choose import choose, given_up, rows_of, size_of, suggest_savings, switches
from kit.memory.flops import Sizes
from kit.memory.hours import card_named, in_words, sampling_speed, training_speed
from kit.memory.sampling import CACHE, MOST_SLOTS, Sampling, most_slots, plan_sampling
from kit.memory.settings import PlanSettings
from kit.memory.simulate import CARDS, Plan, plan
from kit.models.loading import load_config
from kit.run import write_json
from kit.train.checkpoint import KEPT
from kit.train.savings import Savings

TEXT_BYTES = 5  # of a log per sampled token: about four characters, and what is written with them
OPTIMIZER_BYTES = 2 + 8 / 256  # per trained weight: two 8-bit states and their scales; 2 more if exact
ID_BYTES = 4  # per token of the cache of tokenised traces


@dataclass(frozen=True)
class RunPlan:
    """What sampling and training hold."""

    sampling: Plan  # for an evaluation, or a rollout
    update: Plan | None  # a training step; None = nothing is trained
    num_slots: int  # answers at once
    at: Sampling = field(repr=False, compare=False)  # sampling's plan with other numbers of slots
    is_plain: bool = True  # the update is a step that plan() simulates, with cross-entropy for its loss

    @property
    def larger(self) -> Plan:
        return max(filter(None, (self.update, self.sampling)), key=lambda plan: plan.peak)

    @property
    def host(self) -> int:
        """Bytes of CPU memory that training holds."""
        return self.update.host if self.update else 0

    def fits(self, gpu_gb: float) -> bool:
        return self.larger.fits(gpu_gb)

    def __str__(self) -> str:
        owner = "sampling" if self.larger is self.sampling else "training"
        lines = [f"sampling    {self.sampling.details}"]
        if self.update is not None:
            lines.insert(0, f"training    {self.update.details}")
            lines.append(
                f"a card needs the larger, {self.larger.total / GIB:.2f} GiB (simulated), for {owner}"
            )
        lines.append(self.larger.fits_text)

        for gb in CARDS:
            if not self.sampling.fits(gb) and (self.update is None or self.update.fits(gb)):
                slots = most_slots(self.at, gb, self.num_slots)
                lines += [f"  with --num_slots {slots} sampling fits {gb} GB, too"] if slots else []
        return "\n".join(lines)

    def for_less(self) -> Iterator[str]:
        """Yield lines to print: what lowers training's need, each with those above it. All are simulated."""
        before = self.update
        if before is not None and self.is_plain:
            for flags, smaller in suggest_savings(before):
                if before.total < self.sampling.total:  # for which there are fewer slots: see __str__
                    return
                price = given_up(smaller.savings)
                note = f", at the price of: {price}" if price != given_up(before.savings) else ""
                yield f"    {flags:<24}{smaller.total / GIB:7.2f} GiB{note}"
                before = smaller

    def switches(self, max_grad_norm: float) -> dict:
        """Return what was chosen as a recipe's settings; max_grad_norm: the recipe's own."""
        return switches(self.update, max_grad_norm) | {"num_slots": self.num_slots}

    def as_json(self) -> dict:
        parts = {"sampling": self.sampling.as_json(), "update": self.update and self.update.as_json()}
        return self.larger.as_json() | parts | {"num_slots": self.num_slots}


def plan_run(
    model: str,
    params: SamplingParams,
    *,
    num_slots: int,
    num_samples: int = MOST_SLOTS,
    row_tokens: int = 0,
    rows: int = 1,
    savings: Savings | None = None,
    qlora_rank: int = 0,
    card: PlanSettings,
) -> RunPlan:
    """Plan a run that is measured and, if row_tokens > 0, trained; takes seconds per setting that is tried.

    card: with gpu_gb, the savings and as many slots as fit are chosen, up to num_samples; otherwise they are
    those that are passed. The rest is as for plan() and choose(). Raises ValueError if nothing fits, with a
    way out, and for a card without known rates.
    """
    gpu_gb, desktop_gb = card.gpu_gib, card.desktop_gb
    card_named(card.card)  # a wrong name is refused now, not in a minute
    print(f"memory plan: simulating {model} takes seconds per setting that is tried", flush=True)
    common = {"qlora_rank": qlora_rank, "desktop_gb": desktop_gb}
    sampling, update = plan_sampling(model, params, **common), None
    if gpu_gb:
        num_slots = most_slots(sampling, gpu_gb, min(num_samples, MOST_SLOTS))
        if not num_slots:
            one = sampling(1)
            without_cache = replace(one, peak=one.peak - one.owners.get(CACHE, 0))
            smaller = "--max_new_tokens" if without_cache.fits(gpu_gb) else "--model"
            raise ValueError(
                f"{size_of(gpu_gb, desktop_gb)} but sampling one answer of {model} at a time, of up to "
                f"{params.max_new_tokens:,} tokens, needs {one.total / GIB:.2f} GiB; its largest owners are "
                f"{one.largest_owners()}; pass a smaller {smaller}, or a larger card"
            )
    common["row_tokens"] = row_tokens
    if row_tokens and gpu_gb:
        update = choose(model, gpu_gb=gpu_gb, rows=rows, **common)
    elif row_tokens:
        savings = savings or Savings()
        update = plan(model, savings=savings, rows=rows_of(savings, rows), **common)
    return RunPlan(sampling(num_slots), update, num_slots, sampling)


@dataclass(frozen=True)
class Work:
    """What a run trains on and samples."""

    num_samples: int  # of one evaluation
    response_tokens: int  # per response, on average; assumed
    num_traces: int = 0  # 0 = nothing is trained
    epochs: int = 1
    batch_traces: int = 1  # traces per step
    trace_tokens: int = 0  # per trace with its problem, on average; assumed
    max_steps: int = 0  # training stops there; 0 = all epochs
    evaluations: int = 2  # before and after; 1 if nothing is trained or a baseline is taken
    trained_on: str = "traces"


@dataclass(frozen=True)
class Estimate:
    """How long a run takes, and what it leaves on disk."""

    work: Work
    num_steps: float = 0.0  # optimizer steps
    training_hours: float = 0.0
    sampling_hours: float = 0.0  # of one evaluation by the model that is trained
    baseline_hours: float = 0.0  # of one evaluation by the base model in bf16
    sources: tuple[str, ...] = ()  # of the hours, the baseline's last: measured or estimated
    disk_model: int = 0  # bytes: trained weights in bf16
    disk_samples: int = 0  # bytes: the samples of both evaluations
    disk_tokens: int = 0  # bytes: the traces as token ids
    disk_while_training: int = 0  # bytes of the checkpoints that are kept, and of one that is written

    @property
    def hours(self) -> float:
        """Hours in all; the evaluation before training is counted like the one after it."""
        return self.training_hours + self.work.evaluations * self.sampling_hours

    @property
    def disk_kept(self) -> int:
        return self.disk_model + self.disk_samples

    def describe(self, host: int) -> str:
        """Return the lines to print. host: bytes of CPU memory that training holds."""
        work, lines, here = self.work, [], free_memory()
        free = f"; {here / GIB:.2f} GiB are free here" if host and here is not None else ""
        times = f"{work.evaluations} x " if work.evaluations > 1 else ""
        hours = f"{times}{in_words(self.sampling_hours)} of sampling"
        if work.num_traces:
            lines.append(
                f"steps       {self.num_steps:,.0f} optimizer steps: {work.epochs} x {work.num_traces:,} "
                f"{work.trained_on} of {work.trace_tokens:,} tokens (assumed)"
            )
            hours = f"{in_words(self.training_hours)} of training, {hours}"
        disk = {
            "model": self.disk_model,
            "samples": self.disk_samples,
            "tokenised traces": self.disk_tokens,
            "checkpoints, while training": self.disk_while_training,
        }
        parts = ", ".join(f"{name} {num_bytes / GIB:.2f}" for name, num_bytes in disk.items() if num_bytes)
        return "\n".join([
            *lines,
            f"time        {hours}: {work.num_samples:,} answers of {work.response_tokens:,} tokens (assumed)",
            *(f"            {source}" for source in dict.fromkeys(self.sources[:2])),
            f"disk        {sum(disk.values()) / GIB:.2f} GiB: {parts}; and what the hub's client downloads",
            f"CPU memory  {host / GIB:.2f} GiB, pinned, for what is offloaded{free}",
        ])  # fmt: skip


def estimate_run(found: RunPlan, work: Work, *, card: str = "") -> Estimate:
    """Estimate hours and disk. card: as for training_speed."""
    model, rank = found.sampling.model, found.sampling.qlora_rank
    answers = model, found.num_slots, work.response_tokens
    sampling, baseline = (sampling_speed(*answers, nf4=nf4, card=card) for nf4 in (bool(rank), False))
    sampled = work.num_samples * work.response_tokens
    evaluated = {
        "work": work,
        "sampling_hours": sampling.hours(sampled),
        "baseline_hours": baseline.hours(sampled),
        "disk_samples": work.evaluations * sampled * TEXT_BYTES,
    }
    if found.update is None:
        return Estimate(**evaluated, sources=(sampling.source,))

    traces, step = work.epochs * work.num_traces, found.update
    length = min(work.trace_tokens, step.row_tokens)  # longer traces are dropped
    tokens = traces * length
    rows = tokens / step.row_tokens
    steps = rows if step.savings.update_in_backward else min(rows, traces / work.batch_traces)
    share = min(1.0, work.max_steps / steps) if work.max_steps else 1.0
    training = training_speed(model, step.savings, rank, step.row_tokens, card=card)
    sizes = Sizes.of(load_config(model))
    trained = sizes.adapters(rank) if rank else sizes.weights
    return Estimate(
        **evaluated,
        num_steps=share * steps,
        training_hours=training.hours(share * tokens),
        sources=(training.source, sampling.source, baseline.source),
        disk_model=2 * trained,
        disk_tokens=ID_BYTES * work.num_traces * length * (work.trained_on == "traces"),
        disk_while_training=round(
            (KEPT + 1) * trained * (2 + OPTIMIZER_BYTES + 2 * step.savings.exact_weights)
        ),
    )


def print_plan(
    config, found: RunPlan, work: Work, deviations: Sequence[str], *, smoke: dict, presets: dict
) -> None:
    """Print the rest of a recipe's plan: what needs less, hours, disk, deviations, and the command to start.

    config: a recipe's, with its PlanSettings. smoke, presets: the recipe's.
    """
    if not found.fits(CARDS[0]) and found.larger is found.update:
        print("training for less, each with those above it (simulated):")
        for line in found.for_less():
            print(line, flush=True)

    estimate = estimate_run(found, work, card=config.card)
    size = config.gpu_gib
    fits = f"a card of {size:.3g} GB {'is' if found.fits(size) else 'is NOT'} large enough; " if size else ""
    print(f"in short    {fits}about {in_words(estimate.hours)} in all")
    print(estimate.describe(found.host))
    print(paper.describe(deviations))
    print(f"start       {full_command(config.to_start(), started_as(), smoke=smoke, presets=presets)}")
    if config.json:
        write_json(Path(config.json), found.as_json() | {"estimate": asdict(estimate)})
