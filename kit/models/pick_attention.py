"""What attention `auto` is on this card: varlen where recipes/check_card.py found it better, else the kit's.

It must have been right and faster. Of this card, with this torch, the newest results that tell are decisive.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from kit.card_checks import rows_of_this_card
from kit.models.attention import OURS, VARLEN, varlen_obstacle
from kit.models.families import head_dim, layer_windows
from kit.models.loading import default_dtype, load_config
from kit.progress import print_line

Row = tuple[Path, dict]  # a folder of check_card, and one of its results


def pick_attention(names: Sequence[str], device: str) -> str:
    """Return "varlen", and print why, if that is better here for each of these models; else "auto".

    A run picks once, when it begins, and records the result: later it would change what the run computes.
    Raises ValueError as load_config does.
    """
    where = torch.device(device)
    rows = _measured() if where.type == "cuda" else []
    if not rows:
        return "auto"
    configs, dtype = [load_config(name) for name in names], default_dtype(where)
    if any(varlen_obstacle(head_dim(config), where, dtype) for config in configs):
        return "auto"
    found = [_evidence(config, rows) for config in configs]
    if not all(found):
        return "auto"
    widths = " and ".join(str(width) for width in sorted({head_dim(config) for config in configs}))
    folders = ", ".join(sorted({str(folder) for folders in found for folder in folders}))
    print_line(
        f"attention   varlen: right, and faster than kit's with heads {widths} wide (measured: {folders})"
    )
    return "varlen"


def _measured() -> list[Row]:
    """Return what check_card measured of attention on this card with this torch, the newest first."""
    of_this_torch = (found for found in rows_of_this_card() if found[1].get("torch") == torch.__version__)
    return [found for found in of_this_torch if {"head_dim", "window"} <= found[1].keys()]


def _evidence(config: PreTrainedConfig, rows: Iterable[Row]) -> set[Path]:
    """Return the folders in which varlen was right and faster for every layer; none if it was not."""
    folders: set[Path] = set()
    for has_window in {window is not None for window in layer_windows(config)}:
        fitting = [
            (folder, row)
            for folder, row in rows
            if row["head_dim"] == head_dim(config) and (row["window"] is not None) == has_window
        ]
        truths = _newest((folder, row) for folder, row in fitting if row.get("attention") == "varlen")
        times = _newest((folder, row) for folder, row in fitting if "milliseconds" in row)
        is_right = truths and all(row["status"] == "pass" for _, row in truths)
        pairs = [(row["milliseconds"][OURS], row["milliseconds"].get(VARLEN)) for _, row in times]
        is_faster = times and all(theirs and sum(theirs) < sum(ours) for ours, theirs in pairs)
        if not (is_right and is_faster):
            return set()
        folders |= {truths[0][0], times[0][0]}
    return folders


def _newest(rows: Iterable[Row]) -> list[Row]:
    """Return the rows of the first folder, which is the newest."""
    rows = list(rows)
    return [(folder, row) for folder, row in rows if folder == rows[0][0]]
