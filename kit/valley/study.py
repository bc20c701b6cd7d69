"""A study: which models are fine-tuned on how many traces of which kind, and the name of every run.

A cell is one model to fine-tune and measure: a run of recipes/gemma3_1b_8k.py with the cell's settings. Cells
of one model and seed share a baseline: the base model's samples, from one run of recipes/evaluate.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from kit.paper import TABLE, Row

FULL, QLORA, LORA = "full", "qlora", "lora"  # methods
TITLES = {FULL: "", QLORA: ", QLoRA", LORA: ", LoRA"}  # behind the name of a curve or model
BASE, LONG, FIXED_BATCH = "base", "long", "fixed"  # arms that the code names; BASE is the base model's own


@dataclass(frozen=True)
class Arm:
    """What the models of one curve are trained on, and with which batch. All arms have the same problems."""

    title: str
    long_share: float = 1.0  # share of the problems with a long trace; the others get a short solution
    grows: bool | None = None  # the batch grows with the data; None: as the study says


ARMS = {
    LONG: Arm("long traces"),
    "short": Arm("short traces", 0.0),
    "quarter": Arm("a quarter long, the others short", 0.25),
    "mixed": Arm("half short, half long", 0.5),
    "most": Arm("three quarters long, the others short", 0.75),
    "growing": Arm("long traces, growing batch", grows=True),
    FIXED_BATCH: Arm("long traces, one batch size", grows=False),
}


def short_name(model: str) -> str:
    """Return what a model is called in folders and tables: the last part of its id or path."""
    return Path(model).name


@dataclass(frozen=True)
class Cell:
    """One model to measure: fine-tuned on num_traces traces of its arm, or the base model itself."""

    model: str  # hub id, folder, .gguf file, or "tiny"
    method: str  # of TITLES
    num_traces: int  # 0 = the base model
    seed: int  # of the subset, the packs and the samples
    epochs: int = 0
    batch_traces: int = 0  # traces per step
    arm: str = LONG  # of ARMS, or BASE

    @classmethod
    def of_base(cls, model: str, seed: int, method: str = FULL) -> Cell:
        """Return the base model's cell. method: how reinforcement learning that starts from it trains."""
        return cls(model, method, 0, seed, arm=BASE)

    @property
    def name(self) -> str:
        """The name of its run, whatever else is in the study. LONG, the paper's own arm, is left out."""
        arm = "" if self.arm in (BASE, LONG) else f"-{self.arm}"
        return f"{short_name(self.model)}-{self.method}-{self.num_traces}{arm}-seed{self.seed}"

    @property
    def baseline(self) -> str:
        """The name of the run that measures its base model."""
        return Cell.of_base(self.model, self.seed).name

    @property
    def curve(self) -> str:
        """The name of its curve within its model."""
        arm = "base model" if self.arm == BASE else ARMS[self.arm].title
        return arm + TITLES[self.method]


@dataclass(frozen=True)
class Study:
    """Which cells there are. Raises ValueError for a study that cannot be run."""

    models: tuple[tuple[str, tuple[str, ...]], ...]  # (model, its methods)
    sizes: tuple[int, ...]  # traces, of the first arm
    seeds: int = 1
    first_seed: int = 0
    arms: tuple[str, ...] = (LONG,)
    control_sizes: tuple[int, ...] = ()  # traces, of the other arms; () = sizes
    control_models: int = 0  # the first so many models have all arms, the others only the first arm; 0 = all
    epochs: int = 0  # passes over the traces; 0 = as in Table 2
    grows: bool = True  # the batch grows with the data, as in Table 2; False = batch_traces at every size
    batch_traces: int = TABLE[-1].batch_traces  # traces per step if the batch does not grow
    min_batch: int = 1  # traces per step, at least, if the batch grows; at most Table 2's largest
    steps_per_epoch: int = 1_000  # of a growing batch that has reached neither end

    def __post_init__(self):
        for arm in self.arms:
            if arm not in ARMS:
                raise ValueError(f"there is no arm {arm!r}; the arms are {', '.join(ARMS)}")
        for model, methods in self.models:
            if not methods or len(set(methods)) < len(methods) or set(methods) - TITLES.keys():
                raise ValueError(
                    f"methods of {model} are {'+'.join(methods) or 'none'}; "
                    f"pass {', '.join(TITLES)}, or several with + between them, each once"
                )

        names = [short_name(model) for model, _ in self.models]
        larger = "numbers of traces, each larger than the one before"
        counts = ("seeds", "batch_traces", "min_batch", "steps_per_epoch")
        for name, fits, rule in (
            ("models", len(names) == len(set(names)) > 0, "one or more, each with a name of its own"),
            ("arms", len(self.arms) == len(set(self.arms)) > 0, "one or more, each once"),
            ("sizes", self.sizes and _grows(self.sizes), larger),
            ("control_sizes", _grows(self.control_sizes), larger),
            *((name, getattr(self, name) >= 1, ">= 1") for name in counts),
        ):
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)} but must be {rule}")

    @property
    def all_seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)

    @property
    def compared(self) -> list[str]:
        """The models that have all arms."""
        return [model for model, _ in self.models][: self.control_models or None]

    def batch_of(self, arm: str, num_traces: int) -> int:
        """Return the traces per step."""
        grows = self.grows if ARMS[arm].grows is None else ARMS[arm].grows
        growing = min(max(self.min_batch, num_traces // self.steps_per_epoch), TABLE[-1].batch_traces)
        return growing if grows else self.batch_traces

    def cells(self) -> list[Cell]:
        """Return the cells to fine-tune. One seed's picture is whole before the next begins.

        An arm leaves out the sizes at which it would repeat an earlier arm's training.
        """
        found: dict[tuple, Cell] = {}  # what a training depends on -> its first cell
        methods = [(model, method) for model, methods in self.models for method in methods]
        for seed, (model, method), arm in product(self.all_seeds, methods, self.arms):
            first = arm == self.arms[0]
            if first or model in self.compared:
                for size in self.sizes if first else self.control_sizes or self.sizes:
                    epochs, batch = self.epochs or Row.of(size).epochs, self.batch_of(arm, size)
                    training = (model, method, ARMS[arm].long_share, size, seed, epochs, batch)
                    found.setdefault(training, Cell(model, method, size, seed, epochs, batch, arm))
        return list(found.values())

    def deviations(self, rank: int) -> list[str]:
        """Return how the choice of cells differs from the paper. rank: of the adapters."""
        table, found = {row.traces for row in TABLE}, []
        if own := [f"{size:,}" for size in self.sizes if size not in table]:
            found.append(
                f"{', '.join(own)} traces, which the paper lacks; batch and epochs continue its Table 2"
            )
        if missing := [f"{size:,}" for size in sorted(table - {*self.sizes})]:
            found.append(f"without {', '.join(missing)} traces")
        for method in (QLORA, LORA):
            adapted = [short_name(model) for model, methods in self.models if method in methods]
            if adapted and any({*methods} - {method} for _, methods in self.models):
                title = TITLES[method].removeprefix(", ")
                found.append(f"{title} of rank {rank} for {', '.join(adapted)} (paper: all parameters)")
        if FIXED_BATCH in self.arms:
            found.append(f"a control arm with {self.batch_traces} traces per step at every size")
        if others := [ARMS[arm].title for arm in self.arms if ARMS[arm].long_share < 1]:
            found.append(f"training sets of its own: {'; '.join(others)}")
        return found


def ranks_of(method: str, rank: int) -> dict[str, int]:
    """Return the settings of a recipe for this method. rank: of the adapters, if it has any."""
    return {"qlora_rank": rank if method == QLORA else 0, "lora_rank": rank if method == LORA else 0}


def _grows(sizes: Sequence[int]) -> bool:
    return all(before < after for before, after in zip((0, *sizes), sizes, strict=False))


def parse_models(models: str, methods: str = FULL) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Read (model, its methods) from `model,model=qlora,model=full+qlora`. methods: the default."""
    found = []
    for word in filter(None, (word.strip() for word in models.split(","))):
        model, _, own = word.partition("=")
        found.append((model, tuple((own or methods).split("+"))))
    return tuple(found)


def parse_numbers(text: str) -> tuple[int, ...]:
    """Read whole numbers with commas between them; a recipe's settings have been checked to hold such."""
    return tuple(int(word) for word in text.split(",") if word.strip())
