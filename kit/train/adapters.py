"""Settings of adapters: of low rank, on frozen weights in 4 bits (QLoRA) or as they are (LoRA)."""

from __future__ import annotations

from dataclasses import dataclass

from kit.config import Checked


@dataclass(frozen=True)
class Adapters(Checked):
    """At most one of the two is set; without either, all weights are trained."""

    # model
    qlora_rank: int = 0  # > 0: train adapters of this rank on the model in NF4, 4 bits; 0 = none [0..4096]
    lora_rank: int = 0  # > 0: the same on the model as it is, in 16 bits on a card; 0 = none [0..4096]

    def __post_init__(self):
        super().__post_init__()
        if self.qlora_rank and self.lora_rank:
            raise ValueError(
                f"qlora_rank is {self.qlora_rank} and lora_rank {self.lora_rank}, but adapters have one "
                "base: pass --qlora_rank for frozen weights in 4 bits, or --lora_rank for weights as they are"
            )

    @property
    def ranks(self) -> dict[str, int]:
        """The two settings by name, as loading and planning take them."""
        return {"qlora_rank": self.qlora_rank, "lora_rank": self.lora_rank}
