"""How many hours a run takes, tokens / (tokens per second), and what it leaves on disk.

The speed is the one that recipes/check_card.py measured on this card. Without a measurement, or for another
card, it is an estimate: a share of the rates in the card's datasheet. Training rows count as full, copies to
and from CPU memory as free. How long answers get is the experiment's question: their length is assumed, and
so is that of a trace.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from kit.card_checks import card_name, rows_of_this_card
from kit.command_line import command_of
from kit.config import as_flags
from kit.generate.slots import USUAL_SLOTS
from kit.machine import GIB, free_memory
from kit.memory.flops import Sizes
from kit.memory.phases import RunPlan
from kit.models.loading import load_config
from kit.train.checkpoint import KEPT
from kit.train.savings import Savings

EFFICIENCY = 0.4  # share of a datasheet's rates that a run reaches; an assumption
TEXT_BYTES = 5  # of a log per sampled token: about four characters, and what is written with them
OPTIMIZER_BYTES = 2 + 8 / 256  # per trained weight: two 8-bit states and their scales; 2 more if exact
ID_BYTES = 4  # per token of the cache of tokenised traces
MODEL, SAMPLES, TOKENS = "model", "samples", "tokenised traces"
CHECKPOINTS = "checkpoints, while training"


@dataclass(frozen=True)
class Card:
    """Rates in a card's datasheet."""

    short_name: str  # as --card takes it
    name: str  # as torch.cuda.get_device_name() has it
    teraflops: float  # dense bf16 tensor TFLOP/s with fp32 accumulation
    bandwidth: float  # GB/s of the card's own memory


# Sources: NVIDIA's whitepapers of GA102 (3090), Ada (4090), RTX Blackwell (5090), A100 and H100; for the
# others its product pages, which give sparse "Tensor TFLOPS" with fp16 accumulation (3060: 4 times the figure
# here) or sparse fp8 "AI TOPS" (4060, 4060 Ti, 4070 and 4080: 8 times).
CARDS = {card.name: card for card in (
    Card("3060", "NVIDIA GeForce RTX 3060", 25.5, 360),
    Card("3090", "NVIDIA GeForce RTX 3090", 71, 936),
    Card("4060", "NVIDIA GeForce RTX 4060", 30.2, 272),
    Card("4060ti", "NVIDIA GeForce RTX 4060 Ti", 44.1, 288),
    Card("4070", "NVIDIA GeForce RTX 4070", 58.3, 504),
    Card("4080", "NVIDIA GeForce RTX 4080", 97.5, 717),
    Card("4090", "NVIDIA GeForce RTX 4090", 165.2, 1_008),
    Card("5090", "NVIDIA GeForce RTX 5090", 209.5, 1_792),
    Card("a100", "NVIDIA A100-SXM4-80GB", 312, 2_039),
    Card("h100", "NVIDIA H100 80GB HBM3", 989.4, 3_352),
)}  # fmt: skip
REFERENCE = CARDS["NVIDIA GeForce RTX 3090"]  # whose datasheet counts if no known card is here


@dataclass(frozen=True)
class Speed:
    """How fast this card trains or samples."""

    tokens_per_second: float
    source: str

    @classmethod
    def measured(cls, row: dict, folder: Path, differs: dict) -> Speed:
        """Return check_card's figure. differs: settings in which it differs from those asked for."""
        settings = f" with {as_flags(differs)}" if differs else ""
        return cls(row["tokens_per_second"], f"measured here{settings}, {folder}")

    @classmethod
    def estimated(cls, card: Card, hint: str, tokens: float, flops: float, num_bytes: float = 0.0) -> Speed:
        """Divide the work for `tokens` by the datasheet's rates. Arithmetic and memory traffic overlap."""
        seconds = max(flops / (card.teraflops * 1e12), num_bytes / (card.bandwidth * 1e9)) / EFFICIENCY
        source = f"estimate: {EFFICIENCY:.0%} of the datasheet's rates of an {card.name}{hint}"
        return cls(tokens / seconds, source)

    def hours(self, tokens: float) -> float:
        return tokens / self.tokens_per_second / 3600

    def time(self, tokens: float) -> str:
        """Describe how long so many tokens take, for a recipe to print."""
        return f"{in_words(self.hours(tokens))} at {self.tokens_per_second:,.0f} tokens/s ({self.source})"


def in_words(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 0.1 else f"{60 * hours:,.1f} minutes"


def card_named(name: str) -> Card | None:
    """Return a card of the table by its name, None for "".

    Raises ValueError for a name that is not in the table, with the list.
    """
    known = {card.short_name: card for card in CARDS.values()}
    short = name.lower().replace(" ", "").removeprefix("rtx")
    if name and short not in known:
        raise ValueError(f"card is {name!r} but the table of rates has {', '.join(known)}; pass one of these")
    return known.get(short)


def _rates(card: str, model: str, section: str) -> tuple[Card, str]:
    """Return (the card whose datasheet counts, a hint if it is neither here nor asked for)."""
    here = card_name()
    found = card_named(card) or CARDS.get(here)
    if found:
        return found, ""
    measure = f"measure this card with {command_of('check-card')} --only {section} --models {model}"
    return REFERENCE, f"; {measure}" if here else "; --card names another"


def training_speed(
    model: str, savings: Savings, rank: int, row_tokens: int, *, nf4: bool = True, card: str = ""
) -> Speed:
    """Return the speed of training in rows of row_tokens.

    rank: of adapters, on weights in NF4 or, with nf4 False, as they are, which check_card does not measure.
    card: "" = the one that is here, whose measurements of this model count first: the newest with the
    settings nearest to `savings`. An estimate is for rows of one document, the most that attention can cost.
    """
    found = []
    for folder, row in _measured(model, "savings", card):
        if bool(row["qlora_rank"]) == bool(rank) and (nf4 or not rank):
            wanted = asdict(savings)
            differs = {name: value for name, value in row["savings"].items() if value != wanted.get(name)}
            found.append((row, folder, differs))
    if found:
        return Speed.measured(*min(found, key=lambda measured: len(measured[-1])))  # of equals the newest
    flops = Sizes.of(load_config(model)).row_flops(row_tokens, savings, rank)
    return Speed.estimated(*_rates(card, model, "steps"), row_tokens, flops)


def sampling_speed(
    model: str, num_slots: int, response_tokens: int, *, nf4: bool = False, card: str = ""
) -> Speed:
    """Return the speed of sampling responses of response_tokens.

    card: "" = the one that is here, whose measurements of this model in bf16 count first: the newest with the
    number of slots nearest to num_slots. An estimate has every slot busy and whole responses in the cache.
    Launch overhead, which the efficiency has to cover, weighs more here than in training.
    """
    found = [] if nf4 else list(_measured(model, "num_slots", card))
    if found:
        folder, row = min(found, key=lambda measured: abs(measured[1]["num_slots"] - num_slots))
        differs = {"num_slots": row["num_slots"]} if row["num_slots"] != num_slots else {}
        return Speed.measured(row, folder, differs)
    flops, num_bytes = Sizes.of(load_config(model)).token_step(num_slots, response_tokens, nf4=nf4)
    return Speed.estimated(*_rates(card, model, "sampler"), num_slots, flops, num_bytes)


NO_CARD = "not known without a card; the progress line shows the time left"


def training_time(
    model: str, savings: Savings, ranks: Mapping[str, int], tokens: int, row_tokens: int
) -> str:
    """Describe how long training takes on the card that is here, for a recipe to print.

    ranks: qlora_rank and lora_rank, one of which may be above 0.
    """
    if not card_name():
        return NO_CARD
    nf4 = bool(ranks["qlora_rank"])
    return training_speed(model, savings, sum(ranks.values()), row_tokens, nf4=nf4).time(tokens)


def sampling_time(model: str, num_samples: int, max_new_tokens: int, num_slots: int) -> str:
    """Describe how long sampling takes at most, if no response ends early, as training_time does."""
    if not card_name():
        return NO_CARD
    speed = sampling_speed(model, num_slots or USUAL_SLOTS, max_new_tokens)
    longest = f"if every response takes all of {max_new_tokens:,} tokens"
    return f"at most {speed.time(num_samples * max_new_tokens)}, {longest}"


def _measured(model: str, key: str, card: str) -> Iterator[tuple[Path, dict]]:
    """Yield (folder, row) of this card's and model's measurements that have `key`, the newest run first."""
    if card and card_named(card).name != card_name():
        return
    for folder, row in rows_of_this_card():
        if row.get("model") == model and key in row and row.get("tokens_per_second"):
            yield folder, row


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
    num_logged: int = 0  # of the num_samples, those whose text is written to disk; 0 = all
    trained_on: str = "traces"
    save_fp32: bool = False  # the finished model; off: bf16


@dataclass(frozen=True)
class Estimate:
    """How long a run takes, and what it leaves on disk."""

    work: Work
    num_steps: float = 0.0  # optimizer steps
    training_hours: float = 0.0
    sampling_hours: float = 0.0  # of one evaluation by the model that is trained
    baseline_hours: float = 0.0  # of one evaluation by the base model in bf16
    sources: tuple[str, ...] = ()  # of these hours in their order: measured or estimated
    disk: dict[str, int] = field(default_factory=dict)  # bytes of what is written

    @property
    def hours(self) -> float:
        """Hours in all; the evaluation before training is counted like the one after it."""
        return self.training_hours + self.work.evaluations * self.sampling_hours

    @property
    def disk_kept(self) -> int:
        """Bytes of the model and the samples, which stay."""
        return self.disk.get(MODEL, 0) + self.disk[SAMPLES]

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
        total = sum(self.disk.values()) / GIB
        parts = ", ".join(f"{name} {n / GIB:.2f}" for name, n in self.disk.items() if n)
        return "\n".join([
            *lines,
            f"time        {hours}: {work.num_samples:,} answers of {work.response_tokens:,} tokens (assumed)",
            *(f"            {source}" for source in dict.fromkeys(self.sources[:-1])),
            f"disk        {total:.2f} GiB: {parts}; and what the hub's client downloads",
            f"CPU memory  {host / GIB:.2f} GiB, pinned, for what is offloaded{free}",
        ])  # fmt: skip


def estimate_run(found: RunPlan, work: Work, *, card: str = "") -> Estimate:
    """Estimate hours and disk. card: as for training_speed."""
    model, step, nf4 = found.sampling.model, found.update, bool(found.sampling.qlora_rank)
    rank = found.sampling.qlora_rank or found.sampling.lora_rank
    answers = model, found.num_slots, work.response_tokens
    sampling, baseline = (sampling_speed(*answers, nf4=kind, card=card) for kind in (nf4, False))
    sampled, logged = work.num_samples * work.response_tokens, work.num_logged or work.num_samples
    estimate = Estimate(
        work,
        sampling_hours=sampling.hours(sampled),
        baseline_hours=baseline.hours(sampled),
        sources=(sampling.source, baseline.source),
        disk={SAMPLES: work.evaluations * logged * work.response_tokens * TEXT_BYTES},
    )
    if step is None:
        return estimate

    traces = work.epochs * work.num_traces
    length = min(work.trace_tokens, step.row_tokens)  # longer traces are dropped
    rows = traces * length / step.row_tokens
    steps = rows if step.savings.update_in_backward else min(rows, traces / work.batch_traces)
    share = min(1.0, work.max_steps / steps) if work.max_steps else 1.0
    training = training_speed(model, step.savings, rank, step.row_tokens, nf4=nf4, card=card)
    sizes = Sizes.of(load_config(model))
    trained = sizes.adapters(rank) if rank else sizes.weights
    in_checkpoint = 2 + OPTIMIZER_BYTES + 2 * step.savings.exact_weights  # bytes per trained weight
    disk = {
        MODEL: (4 if work.save_fp32 else 2) * trained,
        **estimate.disk,
        TOKENS: ID_BYTES * work.num_traces * length * (work.trained_on == "traces"),
        CHECKPOINTS: round((KEPT + 1) * trained * in_checkpoint),  # one is written beside those that are kept
    }
    return replace(
        estimate,
        num_steps=share * steps,
        training_hours=training.hours(share * traces * length),
        sources=(training.source, *estimate.sources),
        disk=disk,
    )
