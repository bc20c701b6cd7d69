"""Count what 1, 8 and 64 cards have to move and how long they take, on paper: no GPU, no download.

    python recipes/bench/many_cards.py                 24 GB cards: the datasheet of an RTX 3090
    python recipes/bench/many_cards.py --card 4090     another card

The base is the speed of one card: what recipes/check_card.py has measured here, or an estimate from its
datasheet; the first line says which. Full fine-tuning in rows of 16,384 tokens, answers of 4,000 tokens.

Time: seconds. Left out on purpose: what of a sum the backward pass hides, and waiting for a slower card.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from contest import table

from kit.config import Checked, parse
from kit.generate.slots import USUAL_SLOTS
from kit.machine import GIB
from kit.memory.flops import Sizes
from kit.memory.hours import OPTIMIZER_BYTES, Estimate, Work, sampling_speed, training_speed
from kit.memory.settings import TrainingPlanSettings
from kit.models.loading import load_config
from kit.paper import MODELS, SAMPLES, TABLE
from kit.train.savings import Savings
from kit.valley.estimate import hours_on
from kit.valley.study import Study, short_name

CARDS = (1, 8, 64)
ROW_TOKENS, ANSWER_TOKENS, TRACE_TOKENS = 16_384, 4_000, TrainingPlanSettings.trace_tokens
ANSWERS = sum(SAMPLES[name][0] * SAMPLES[name][1] for name in ("math500", "aime24", "amc23"))
# GB/s in one direction, from datasheets: 16 lanes of 16 GT/s in 128/130 coding; 18 links of 25; 100 Gb/s
PCIE, NVLINK, NETWORK = 31.5, 450.0, 12.5
WEIGHTS = GRADIENTS = RESTS = 2  # bytes per weight, in bf16; the states take OPTIMIZER_BYTES
DESKTOP = 0.7  # GiB of a card, as --desktop_gb has it
# GiB that Qwen2.5-3B holds besides the bytes per weight: 26.53 in README.md's memory table, less 8.03 bytes
# for each of 3.09 billion weights. A larger model holds more.
BESIDES = 3.4


@dataclass(frozen=True)
class Config(Checked):
    card: str = ""  # of the table in kit/memory/hours.py, such as 4090; "" = the one here, else an RTX 3090


def sent(num_cards: int, num_bytes: float) -> float:
    """Return the bytes that each card sends to sum so many bytes in a ring: 2 (n - 1) of their n parts."""
    return 2 * (num_cards - 1) / num_cards * num_bytes


def of_one_step(training: Mapping[str, float]) -> str:
    """Return what a step moves beside how long a row takes. training: tokens per second of one card."""
    over = f"over PCIe 4.0 x16 ({PCIE} GB/s) | NVLink of an H100 ({NVLINK:g}) | 100 Gb/s ({NETWORK})"
    cards = " | ".join(f"optimizer in CPU memory, GiB per card: {n}" if n == 1 else str(n) for n in CARDS)
    heading, rows = f"| | one row, s | a sum on {CARDS[1]} cards: GB per card | s {over} | {cards}", {}
    for model, speed in training.items():
        weights = Sizes.of(load_config(model)).weights
        num_bytes = sent(CARDS[1], GRADIENTS * weights) / 1e9
        seconds = [ROW_TOKENS / speed, num_bytes, *(num_bytes / rate for rate in (PCIE, NVLINK, NETWORK))]
        kept = (OPTIMIZER_BYTES + RESTS + GRADIENTS) * weights / GIB
        rows[short_name(model)] = [f"{x:.2f}" for x in (*seconds, *(kept / n for n in CARDS))]
    return table(heading, rows)


def of_the_figure(training: Mapping[str, float], answers: Mapping[str, float]) -> str:
    """Return the hours of the paper's figure. training, answers: tokens per second of one card."""
    estimates, baselines, together = {}, {}, dict.fromkeys(CARDS, 0.0)
    for cell in Study(tuple((m, ("full",)) for m in MODELS), tuple(row.traces for row in TABLE)).cells():
        sampling = ANSWERS * ANSWER_TOKENS / answers[cell.model] / 3600
        hours = cell.epochs * cell.num_traces * TRACE_TOKENS / training[cell.model] / 3600
        work = Work(ANSWERS, ANSWER_TOKENS)
        estimates[cell] = Estimate(work, training_hours=hours, sampling_hours=sampling)
        for n in CARDS:
            rows_per_step = cell.batch_traces * TRACE_TOKENS / ROW_TOKENS
            new = cell.baseline not in baselines
            together[n] += hours / min(n, rows_per_step) + (1 + new) * sampling / n
        baselines[cell.baseline] = sampling
    dealt = [hours_on(n, baselines, estimates) for n in CARDS]
    heading = (
        f"| {len(estimates)} cells and {len(baselines)} baselines, hours on | {' | '.join(map(str, CARDS))}"
    )
    rows = {"one run per card": dealt, "one run after another, each on all cards": together.values()}
    return table(heading, {name: [f"{x:,.0f}" for x in row] for name, row in rows.items()})


def largest() -> str:
    """Return the size of the largest models that a card of 24 GB holds whole."""
    rows, room = {}, (24 - DESKTOP - BESIDES) * GIB
    for name, moved in (
        ("full fine-tuning", 0),
        ("`--offload_optimizer`", OPTIMIZER_BYTES + RESTS),
        ("`--offload_optimizer --offload_gradients`", OPTIMIZER_BYTES + RESTS + GRADIENTS),
    ):
        each = WEIGHTS + GRADIENTS + OPTIMIZER_BYTES + RESTS - moved
        rows[name] = [f"{each:.2f}", f"{room / each / 1e9:.1f}", f"{moved * room / each / GIB:.0f}"]
    heading = "bytes per weight | billion weights, at most | GiB in the CPU memory of all"
    return table(f"| on a card of 24 GB | {heading}", rows)


def tables(config: Config) -> str:
    """Return the page's figures."""
    savings = Savings(optimizer="adamw8bit")
    trained = {m: training_speed(m, savings, 0, ROW_TOKENS, card=config.card) for m in MODELS}
    sampled = {m: sampling_speed(m, USUAL_SLOTS, ANSWER_TOKENS, card=config.card) for m in MODELS}
    sources = dict.fromkeys(speed.source.split(";")[0] for speed in (*trained.values(), *sampled.values()))
    training, answers = ({m: s.tokens_per_second for m, s in both.items()} for both in (trained, sampled))
    parts = of_one_step(training), of_the_figure(training, answers), largest()
    return "\n\n".join([f"One card: {'; '.join(sources)}.", *parts])


if __name__ == "__main__":
    print(tables(parse(Config)))
