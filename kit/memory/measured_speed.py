"""How many hours a run takes on this card, from the tokens per second that recipes/check_card.py measured here.

Nothing is estimated: if this card was not checked, or not with this model, the answer says what to run.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from kit.config import as_flags
from kit.run import Journal
from kit.train.savings import Savings

CHECKS = Path("runs/check_card")  # a numbered folder per run of check_card


@dataclass(frozen=True)
class Measured:
    """One figure of check_card."""

    tokens_per_second: float
    folder: Path
    differs: str  # settings that differ from those asked for, as flags; "" = none

    def __str__(self) -> str:
        how = f"measured here with {self.differs}" if self.differs else "measured here"
        return f"{self.tokens_per_second:,.0f} tokens/s ({how}, {self.folder})"


def training_speed(
    model: str, savings: Savings, qlora_rank: int, *, checks: Path = CHECKS
) -> Measured | None:
    """The newest measured training speed of this model on this card, with the settings nearest to `savings`; None if none is."""
    found = []
    for folder, row in _rows(checks, model, "savings"):
        if bool(row["qlora_rank"]) == bool(qlora_rank):
            differs = {
                name: value for name, value in row["savings"].items() if value != asdict(savings).get(name)
            }
            found.append((len(differs), Measured(row["tokens_per_second"], folder, as_flags(differs))))
    return (
        min(found, key=lambda pair: pair[0])[1] if found else None
    )  # of equals the newest, which comes first


def sampling_speed(model: str, num_slots: int, *, checks: Path = CHECKS) -> Measured | None:
    """The newest measured sampling speed of this model on this card, with the number of rows nearest to num_slots."""
    found = [
        (abs(row["num_slots"] - num_slots), row["num_slots"], row, folder)
        for folder, row in _rows(checks, model, "num_slots")
    ]
    if not found:
        return None
    _, slots, row, folder = min(found, key=lambda entry: entry[0])
    return Measured(row["tokens_per_second"], folder, "" if slots == num_slots else f"--num_slots {slots}")


def training_time(
    model: str, savings: Savings, qlora_rank: int, tokens: int, *, checks: Path = CHECKS
) -> str:
    """What training on so many tokens takes, as words for a recipe to print."""
    found = training_speed(model, savings, qlora_rank, checks=checks)
    return f"{_hours(tokens / found.tokens_per_second)} at {found}" if found else _not_known(model, "steps")


def sampling_time(
    model: str, samples: int, max_new_tokens: int, num_slots: int, *, checks: Path = CHECKS
) -> str:
    """What so many responses take at most, as words for a recipe to print: no response is taken to end early."""
    found = sampling_speed(model, num_slots, checks=checks)
    if found is None:
        return _not_known(model, "sampler")
    longest = f"if every response takes all of {max_new_tokens:,} tokens"
    return f"at most {_hours(samples * max_new_tokens / found.tokens_per_second)}, {longest}, at {found}"


def _not_known(model: str, section: str) -> str:
    if not torch.cuda.is_available():
        return "not known: no card is here to measure"
    return f"not known: measure this card with python recipes/check_card.py --only {section} --models {model}"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} hours" if seconds >= 360 else f"{seconds / 60:,.1f} minutes"


def _rows(checks: Path, model: str, key: str):
    """Yield (folder, row) of the figures that have `key`, for this model and card, the newest run of check_card first."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    for folder in sorted(checks.glob("[0-9]*"), reverse=True):
        for row in Journal(folder / "results.jsonl").read():
            if (
                row.get("model") == model
                and row.get("gpu") == card
                and key in row
                and row.get("tokens_per_second")
            ):
                yield folder, row
