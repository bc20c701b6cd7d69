"""What a study of the toy valley is made of: arms, sizes, seeds, models, and the cells that come of them.

A cell is one model to make and measure: the model it starts from, an arm (what the traces are), a number of traces, a seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kit.generate.sampling import SamplingParams

BASE = "base"  # the arm of the base model


@dataclass(frozen=True)
class Arm:
    """What the models of one curve are trained on."""

    title: str
    long_share: float  # of the traces, the others being short; the problems are the same in every arm
    growing_batch: bool = False  # as in the paper's Table 2, not one batch at every size


ARMS = {
    "long": Arm("long traces", 1.0),
    "short": Arm("short traces", 0.0),
    "quarter": Arm("a quarter long, the others short", 0.25),
    "mixed": Arm("half short, half long", 0.5),
    "most": Arm("three quarters long, the others short", 0.75),
    "growing": Arm("long traces, growing batch", 1.0, growing_batch=True),
}


@dataclass(frozen=True)
class Cell:
    """One model to make and measure."""

    model: str  # that it starts from: of Study.models
    arm: str  # of ARMS, or BASE
    num_traces: int  # 0 for BASE
    seed: int  # of traces, packs and samples
    batch_traces: int = 0  # traces per step; 0 for BASE

    @property
    def name(self) -> str:
        return f"{Path(self.model).name}-{self.arm}-{self.num_traces}-seed{self.seed}"


@dataclass(frozen=True)
class Study:
    """What all cells share. One batch at every size, so that the sizes differ in the data alone. In the arm with a growing one it
    follows the paper's Table 2 in small: it grows with the data, so that from min_batch * steps_an_epoch traces on the number of
    steps stays the same."""

    models: tuple[str, ...] = (
        "tiny",
        "tinier",
    )  # shipped ones, or folders; all arms for the first, the first arm for the others
    arms: tuple[str, ...] = ("long", "short", "mixed", "growing")
    sizes: tuple[int, ...] = (16, 64, 256, 1_024, 4_096, 8_192)  # traces, of the first arm
    control_sizes: tuple[int, ...] = (64, 1_024, 4_096)  # of the other arms
    seeds: int = 3
    epochs: int = 4
    lr: float = 1e-3
    warmup_ratio: float = 0.05
    batch_traces: int = 16  # traces per step
    min_batch: int = 4  # of the growing batch
    steps_an_epoch: int = 256  # of the growing batch, from min_batch * steps_an_epoch traces on
    params: SamplingParams = field(default_factory=lambda: SamplingParams(max_new_tokens=512))
    num_samples: int = 4  # a question
    num_slots: int = 100
    checkpoint_every: int = 200  # steps: about ten seconds of work can be lost

    def __post_init__(self):
        for arm in self.arms:
            if arm not in ARMS:
                raise ValueError(f"there is no arm {arm!r}; the arms are {', '.join(ARMS)}")
        names = [Path(model).name for model in self.models]
        for name, fits, rule in (
            ("models", len(names) == len(set(names)) > 0, "one or more, each with a name of its own"),
            ("arms", len(self.arms) == len(set(self.arms)) > 0, "one or more, each once"),
            ("sizes", self.sizes and _grows(self.sizes), "numbers of traces, each larger than the one before"),
            ("control_sizes", _grows(self.control_sizes), "numbers of traces, each larger than the one before"),
            ("seeds", self.seeds >= 1, ">= 1"),
            ("batch_traces", self.batch_traces >= 1, ">= 1"),
            ("min_batch", self.min_batch >= 1, ">= 1"),
            ("steps_an_epoch", self.steps_an_epoch >= 1, ">= 1"),
        ):  # fmt: skip
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)} but must be {rule}")

    def batch_of(self, arm: str, num_traces: int) -> int:
        """Traces a step."""
        return (
            max(self.min_batch, num_traces // self.steps_an_epoch)
            if ARMS[arm].growing_batch
            else self.batch_traces
        )

    def place_of(self, cell: Cell) -> list[int]:
        """What the cells are sorted by. More seeds and sizes, or more models and arms behind the others, move no cell."""
        arm = 0 if cell.arm == BASE else self.arms.index(cell.arm)
        return [int(cell.arm != BASE), cell.seed, self.models.index(cell.model), arm, cell.num_traces]

    def cells(self) -> list[Cell]:
        """Every cell, the base models first, then seed by seed, so that one seed's picture is whole before the next begins.

        The arm with a growing batch leaves out where that is the batch of the others.
        """
        cells = [Cell(model, BASE, 0, seed) for seed in range(self.seeds) for model in self.models]
        for seed in range(self.seeds):
            for model in self.models:
                for arm in self.arms if model == self.models[0] else self.arms[:1]:
                    for size in self.sizes if arm == self.arms[0] else self.control_sizes:
                        batch = self.batch_of(arm, size)
                        if not ARMS[arm].growing_batch or batch != self.batch_traces:
                            cells.append(Cell(model, arm, size, seed, batch))
        return cells


def _grows(sizes: Sequence[int]) -> bool:
    return all(before < after for before, after in zip((0, *sizes), sizes, strict=False))
