"""What recipes/check_card.py measured on the card that is here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kit.journal import Journal
from kit.run import numbered

CHECKS = Path("runs/check_card")  # a numbered folder per run of check_card


def card_name() -> str:
    """Return the name of the card that is here; "" if none is."""
    import torch  # takes seconds: not before flags are read

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def rows_of_this_card() -> Iterator[tuple[Path, dict]]:
    """Yield (folder, row) of the results of this card, those of the newest run first.

    There are none without a card: check_card then rehearses with tiny shapes.
    """
    here = card_name()
    for folder in reversed(numbered(CHECKS)) if here else ():
        for row in Journal(folder / "results.jsonl").read():
            if row.get("gpu") == here:
                yield folder, row
