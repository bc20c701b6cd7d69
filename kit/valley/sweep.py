"""A sweep: many models, numbers of traces, methods and seeds, from one table of settings.

TABLE is the paper's Table 2. A cell is one model that is fine-tuned and measured; it is a run of recipes/gemma3_1b_8k.py with the
cell's settings. Cells of one model and seed share a baseline, the base model's samples, which are made once.

    folder/sweep.json             the cells, and how the settings deviate from the paper
    folder/jobs.jsonl             a line a run that ended: done, or failed and why (kit/valley/jobs.py)
    folder/baselines/NAME, cells/NAME, rl/NAME        the run folders, each with the log of its process
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kit.run import write_json

FULL, QLORA = "full", "qlora"  # methods
PAPER_BATCH, FIXED_BATCH = (
    "table",
    "fixed",
)  # arms: the batch grows with the data as in Table 2, or is the same at every size
BASELINES, CELLS, RL = "baselines", "cells", "rl"  # folders of a sweep
SWEEP = "sweep.json"


@dataclass(frozen=True)
class Row:
    """A column of the paper's Table 2."""

    traces: int
    epochs: int
    batch_traces: int

    @property
    def steps(self) -> int:
        """Optimizer steps, by arithmetic."""
        return self.traces * self.epochs // self.batch_traces


TABLE = (
    Row(8_000, 4, 8), Row(16_000, 4, 16), Row(32_000, 4, 32), Row(64_000, 3, 64), Row(128_000, 3, 128), Row(220_000, 2, 128),
)  # fmt: skip

# The paper's models that the kit covers.
MODELS = (
    "google/gemma-3-1b-it", "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-3B-Instruct",
    "meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-3B-Instruct",
)  # fmt: skip
# The paper's accuracies, in percent, mean of its three benchmarks: (model, traces) -> what its text says. Its curves carry no
# values, so what is not here is not known.
PAPER = {
    ("gemma-3-1b-it", 0): "24",
    ("gemma-3-1b-it", 8_000): "about a quarter of its 24",
    ("gemma-3-1b-it", 220_000): "15",
    ("qwen2.5-0.5b-instruct", 0): "14",
    ("qwen2.5-0.5b-instruct", 220_000): "11",
    ("qwen2.5-1.5b-instruct", 32_000): "slightly above its baseline",
}


def schedule(num_traces: int) -> Row:
    """Table 2's row. Other numbers continue its rule: a thousandth of the traces per step, from 1 to the
    table's largest batch, and the epochs of the largest row that is no larger, or else of the first."""
    row = next((row for row in reversed(TABLE) if row.traces <= num_traces), TABLE[0])
    if row.traces == num_traces:
        return row
    steps_an_epoch = TABLE[0].traces // TABLE[0].batch_traces
    return Row(num_traces, row.epochs, min(max(1, num_traces // steps_an_epoch), TABLE[-1].batch_traces))


def short_name(model: str) -> str:
    """What a model is called in folders and tables: the last part of its id or path."""
    return Path(model).name


@dataclass(frozen=True)
class Cell:
    """One model to make and measure."""

    model: str  # hub id, folder, .gguf file, or "tiny"
    method: str  # FULL or QLORA
    num_traces: int
    seed: int  # of the subset, the packs and the samples
    epochs: int
    batch_traces: int
    arm: str = PAPER_BATCH

    @property
    def name(self) -> str:
        fixed = f"-batch{self.batch_traces}" if self.arm == FIXED_BATCH else ""
        return f"{short_name(self.model)}-{self.method}-{self.num_traces}{fixed}-seed{self.seed}"

    @property
    def baseline(self) -> str:
        """Name of the evaluation of the base model that it is compared with."""
        return baseline_name(self.model, self.seed)


def baseline_name(model: str, seed: int) -> str:
    return f"{short_name(model)}-seed{seed}"


def rl_name(model: str, method: str, num_traces: int, seed: int) -> str:
    """Name of reinforcement learning from the model after num_traces traces, 0 = the base model."""
    return f"{short_name(model)}-{method}-{num_traces}-seed{seed}"


@dataclass(frozen=True)
class Grid:
    """Which cells there are. Raises ValueError for a grid that cannot be run."""

    models: tuple[tuple[str, tuple[str, ...]], ...]  # (model, its methods)
    sizes: tuple[int, ...]  # traces
    seeds: int = 1
    fixed_batch: int = 0  # traces a step of a control arm with one batch at every size; 0 = no such arm

    def __post_init__(self):
        names = [short_name(model) for model, _ in self.models]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice or not names:
            raise ValueError(
                f"models is {names} but must be one or more, each with a name of its own ({', '.join(twice)})"
            )
        for model, methods in self.models:
            if not methods or len(set(methods)) < len(methods) or set(methods) - {FULL, QLORA}:
                raise ValueError(
                    f"methods of {model} are {'+'.join(methods) or 'none'}; pass {FULL}, {QLORA} or {FULL}+{QLORA}, each once"
                )
        if not self.sizes or any(
            before >= after for before, after in zip((0, *self.sizes), self.sizes, strict=False)
        ):
            raise ValueError(
                f"sizes is {self.sizes} but must be numbers of traces, each larger than the one before"
            )
        for name, least in (("seeds", 1), ("fixed_batch", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)} but must be at least {least}")

    def cells(self) -> list[Cell]:
        """Seed by seed, so that one seed's picture is whole before the next begins; the control arm leaves out what it shares
        with Table 2."""
        found = []
        for seed in range(self.seeds):
            for model, methods in self.models:
                for method in methods:
                    rows = [schedule(size) for size in self.sizes]
                    found += [
                        Cell(model, method, row.traces, seed, row.epochs, row.batch_traces) for row in rows
                    ]
                    if self.fixed_batch:
                        found += [
                            Cell(model, method, row.traces, seed, row.epochs, self.fixed_batch, FIXED_BATCH)
                            for row in rows if row.batch_traces != self.fixed_batch
                        ]  # fmt: skip
        return found

    def deviations(self, qlora_rank: int) -> list[str]:
        """What differs from the paper in which cells there are."""
        table, found = {row.traces for row in TABLE}, []
        if own := [f"{size:,}" for size in self.sizes if size not in table]:
            found.append(
                f"{', '.join(own)} traces, which the paper lacks; batch and epochs continue its Table 2"
            )
        if missing := [f"{size:,}" for size in sorted(table - {*self.sizes})]:
            found.append(f"without {', '.join(missing)} traces")
        if adapted := [short_name(model) for model, methods in self.models if QLORA in methods]:
            found.append(f"QLoRA of rank {qlora_rank} for {', '.join(adapted)} (paper: all parameters)")
        if self.fixed_batch:
            found.append(
                f"a control arm with {self.fixed_batch} traces per step at every size, which the paper lacks"
            )
        return found


def parse_models(models: str, methods: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(model, its methods) from `model,model=qlora,model=full+qlora`; methods: of those that name none, `full+qlora`."""
    found = []
    for word in filter(None, (word.strip() for word in models.split(","))):
        model, _, own = word.partition("=")
        found.append((model, tuple((own or methods).split("+"))))
    return tuple(found)


def parse_numbers(name: str, text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them. Raises ValueError naming the setting."""
    try:
        return tuple(int(word) for word in text.split(",") if word.strip())
    except ValueError as error:
        raise ValueError(
            f"{name} is {text!r} but must be whole numbers with commas between them, such as 8000,16000"
        ) from error


def write_sweep(
    path: Path, cells: Sequence[Cell], deviations: Sequence[str], rl_sizes: Sequence[int]
) -> None:
    """What the report needs to know beside the run folders."""
    rows = [asdict(cell) for cell in cells]
    write_json(path / SWEEP, {"cells": rows, "deviations": list(deviations), "rl_sizes": list(rl_sizes)})


def read_sweep(path: Path) -> tuple[list[Cell], list[str], list[int]]:
    """(cells, deviations, sizes that RL starts from). Raises ValueError if there is no sweep."""
    if not (path / SWEEP).is_file():
        raise ValueError(
            f"{path} holds no sweep ({SWEEP}); pass the folder of a run of recipes/valley_sweep.py"
        )
    stored = json.loads((path / SWEEP).read_text(encoding="utf-8"))
    return [Cell(**row) for row in stored["cells"]], stored["deviations"], stored["rl_sizes"]
