"""Settings of --plan, and of choosing settings for a card. Every recipe that runs on a card has them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TypeVar

from kit.config import Checked
from kit.train.adapters import Adapters
from kit.train.savings import Savings

Config = TypeVar("Config", bound="PlanSettings")
CHOSEN = {*vars(Savings()), "num_slots", "batch_traces", "max_grad_norm"}  # settings that gpu_gb chooses


@dataclass(frozen=True)
class PlanSettings(Checked):
    """The card that a run is planned for, and what the plan assumes."""

    # plan
    plan: bool = False  # print what fits, hours, disk and the command, and stop: no GPU, no download
    gpu_gb: str = (
        ""  # choose settings that fit so many GB; auto: the card here; "" = do not [auto | 0.0..1024.0]
    )
    desktop_gb: float = 0.7  # GB of the card that a desktop shown on it uses; 0 = none [0..1024]
    card: str = ""  # with --plan: hours for this card, such as 3060; "" = the one here, else an RTX 3090
    response_tokens: int = 4_000  # with --plan: tokens per response, on average; assumed [>= 1]
    json: str = ""  # with --plan: file for the plan; "" = none
    typed: tuple[str, ...] = field(default=(), compare=False, repr=False)  # kit.config.parse fills it

    @property
    def held(self) -> dict:
        """Return the settings that gpu_gb would choose but the user typed. num_slots 0 counts as open."""
        typed = {name: getattr(self, name) for name in self.typed if name in CHOSEN}
        return {name: value for name, value in typed.items() if name != "num_slots" or value}

    @property
    def gpu_gib(self) -> float:
        """GiB of the card to choose settings for; 0 = none. Raises ValueError for auto without a card.

        It is 0 for a run that is resumed: its settings were chosen when it began.
        """
        if getattr(self, "resume", False):
            return 0.0
        if self.gpu_gb != "auto":
            return float(self.gpu_gb or 0)

        import torch  # takes seconds: not before flags are read

        if not torch.cuda.is_available():
            raise ValueError(
                "gpu_gb is auto but no NVIDIA GPU is here; pass a card's size to plan for it, such as --plan "
                "--gpu_gb 12, or --smoke for a tiny model on this CPU, or --gpu_gb '' to choose nothing"
            )
        return torch.cuda.mem_get_info()[1] / 2**30

    @property
    def room(self) -> float:
        """GiB of the card that a desktop leaves to the run."""
        return self.gpu_gib - self.desktop_gb

    @property
    def size(self) -> str:
        """How an error begins that names a card which is too small."""
        desktop = f" and desktop_gb {self.desktop_gb:g}" if self.desktop_gb else ""
        return f"gpu_gb is {self.gpu_gib:g}{desktop}"

    def to_start(self: Config) -> Config:
        """Return the settings that start what was planned: the plan's own are as they are by default."""
        own = (field for base in type(self).__mro__ if base.__module__ == __name__ for field in fields(base))
        return replace(self, **{field.name: field.default for field in own})


@dataclass(frozen=True)
class TrainingPlanSettings(PlanSettings):
    """The same for a run that is trained on traces."""

    # plan
    faster: bool = False  # with --gpu_gb, full fine-tuning: change the update rather than offload states
    trace_tokens: int = 4_500  # with --plan: tokens per trace; mean of 291 R1 traces on AIME problems [>= 1]

    def __post_init__(self):
        super().__post_init__()
        if self.faster and not self.gpu_gb:
            raise ValueError(
                "faster is on but gpu_gb is not set, so no settings are chosen; pass --gpu_gb auto, or leave "
                "--faster out"
            )
        if self.faster and isinstance(self, Adapters) and any(self.ranks.values()):
            raise ValueError(
                "faster is on but adapters are trained, whose few states stay on the card; leave --faster out"
            )
