"""How many hours a run takes: work / rate.

The rate is the tokens per second that recipes/check_card.py measured on this card. Without a measurement it
is a share of the rates in the card's datasheet, and the answer says "estimate". A card that is in neither
gets no answer but the command that measures it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from kit.config import as_flags
from kit.memory.flops import Sizes
from kit.models.loading import load_config
from kit.run import Journal
from kit.train.savings import Savings

CHECKS = Path("runs/check_card")  # a numbered folder per run of check_card
EFFICIENCY = 0.4  # share of a datasheet's rates that a run reaches; an assumption


@dataclass(frozen=True)
class Card:
    """Rates in a card's datasheet."""

    name: str  # as torch.cuda.get_device_name() has it
    teraflops: float  # dense bf16 tensor TFLOP/s with fp32 accumulation
    bandwidth: float  # GB/s of the card's own memory


# Sources: NVIDIA's whitepapers of GA102 (3090), Ada (4090), RTX Blackwell (5090), A100 and H100. Of the others, its
# product pages give sparse "Tensor TFLOPS" with fp16 accumulation (3060: 4 times the figure here), or sparse fp8
# "AI TOPS" (4060 Ti and 4070: 8 times).
CARDS = {card.name: card for card in (
    Card("NVIDIA GeForce RTX 3060", 25.5, 360),
    Card("NVIDIA GeForce RTX 3090", 71, 936),
    Card("NVIDIA GeForce RTX 4060 Ti", 44.1, 288),
    Card("NVIDIA GeForce RTX 4070", 58.3, 504),
    Card("NVIDIA GeForce RTX 4090", 165.2, 1_008),
    Card("NVIDIA GeForce RTX 5090", 209.5, 1_792),
    Card("NVIDIA A100-SXM4-80GB", 312, 2_039),
    Card("NVIDIA H100 80GB HBM3", 989.4, 3_352),
)}  # fmt: skip


@dataclass(frozen=True)
class Hours:
    """How long something takes: work / rate."""

    hours: float
    how: str  # the rate, and whether it was measured

    def __str__(self) -> str:
        return f"{self.hours:,.1f} hours" if self.hours >= 0.1 else f"{60 * self.hours:,.1f} minutes"

    @classmethod
    def measured(cls, tokens: float, tokens_per_second: float, folder: Path, differs: dict) -> Hours:
        """Divide tokens by check_card's rate. differs: settings in which it differs from those asked for."""
        settings = f" with {as_flags(differs)}" if differs else ""
        how = f"at {tokens_per_second:,.0f} tokens/s (measured here{settings}, {folder})"
        return cls(tokens / tokens_per_second / 3600, how)

    @classmethod
    def estimated(cls, card: Card, flops: float, num_bytes: float = 0.0) -> Hours:
        """Divide flops, and bytes moved meanwhile, by the datasheet's rates; the slower of the two counts."""
        seconds = max(flops / (card.teraflops * 1e12), num_bytes / (card.bandwidth * 1e9)) / EFFICIENCY
        return cls(seconds / 3600, f"(estimate: {EFFICIENCY:.0%} of the datasheet's rates of an {card.name})")


def card_name() -> str:
    """Return the name of the card that is here; "" if none is."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def training_hours(
    model: str,
    savings: Savings,
    qlora_rank: int,
    *,
    tokens: float,
    row_tokens: int,
    card: Card | None = None,
    checks: Path = CHECKS,
) -> Hours | None:
    """Return the hours of training on `tokens` in rows of row_tokens; None if nothing is known of the card.

    A measurement on this card of the same model counts first: the newest with the settings nearest to
    `savings`. The estimate assumes that each row is one document, the most that attention can cost. card:
    None = the one that is here.
    """
    found = []
    for folder, row in _measured(checks, model, "savings"):
        if bool(row["qlora_rank"]) == bool(qlora_rank):
            wanted = asdict(savings)
            differs = {name: value for name, value in row["savings"].items() if value != wanted.get(name)}
            found.append((row["tokens_per_second"], folder, differs))
    if found:
        return Hours.measured(tokens, *min(found, key=lambda row: len(row[-1])))  # of equals the newest

    card = card or CARDS.get(card_name())
    if card is None:
        return None
    row_flops = Sizes.of(load_config(model)).row_flops(row_tokens, savings, qlora_rank)
    return Hours.estimated(card, tokens / row_tokens * row_flops)


def sampling_hours(
    model: str,
    num_samples: int,
    response_tokens: int,
    num_slots: int,
    *,
    nf4: bool = False,
    card: Card | None = None,
    checks: Path = CHECKS,
) -> Hours | None:
    """Return the hours of sampling responses of response_tokens each; None if nothing is known of the card.

    A measurement on this card of the same model in bf16 counts first: the newest with the number of slots
    nearest to num_slots. The estimate assumes that every slot is busy to the end, and that every step reads
    whole responses from the cache. Launch overhead, which the efficiency must cover, weighs more here than in
    training. card: None = the one that is here.
    """
    tokens = num_samples * response_tokens
    found = [] if nf4 else list(_measured(checks, model, "num_slots"))
    if found:
        folder, row = min(found, key=lambda pair: abs(pair[1]["num_slots"] - num_slots))
        differs = {"num_slots": row["num_slots"]} if row["num_slots"] != num_slots else {}
        return Hours.measured(tokens, row["tokens_per_second"], folder, differs)

    card = card or CARDS.get(card_name())
    if card is None:
        return None
    flops, num_bytes = Sizes.of(load_config(model)).token_step(num_slots, response_tokens, nf4=nf4)
    steps = tokens / num_slots
    return Hours.estimated(card, steps * flops, steps * num_bytes)


def training_time(
    model: str, savings: Savings, qlora_rank: int, tokens: int, row_tokens: int, **options
) -> str:
    """Describe how long training takes, for a recipe to print. options: as training_hours takes them."""
    found = training_hours(model, savings, qlora_rank, tokens=tokens, row_tokens=row_tokens, **options)
    return f"{found} {found.how}" if found else _not_known(model, "steps")


def sampling_time(model: str, num_samples: int, max_new_tokens: int, num_slots: int, **options) -> str:
    """Describe how long sampling takes at most, if no response ends early, for a recipe to print."""
    found = sampling_hours(model, num_samples, max_new_tokens, num_slots, **options)
    if found is None:
        return _not_known(model, "sampler")
    return f"at most {found}, if every response takes all of {max_new_tokens:,} tokens, {found.how}"


def _not_known(model: str, section: str) -> str:
    if not card_name():
        return "not known: no card is here to measure"
    return f"not known: measure this card with python recipes/check_card.py --only {section} --models {model}"


def _measured(checks: Path, model: str, key: str) -> Iterator[tuple[Path, dict]]:
    """Yield (folder, row) of this card's and model's measurements that have `key`, the newest run first."""
    here = card_name()
    folders = (
        sorted(checks.glob("[0-9]*"), reverse=True) if here else []
    )  # without a card, check_card rehearses
    for folder in folders:
        for row in Journal(folder / "results.jsonl").read():
            matches = row.get("model") == model and row.get("gpu") == here and key in row
            if matches and row.get("tokens_per_second"):
                yield folder, row
