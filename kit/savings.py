"""What a training step does to hold less memory. Each costs something; kit.memory knows how much each saves."""

from __future__ import annotations

from dataclasses import dataclass

HEAD_UPDATES = ("whole", "blocked")


@dataclass(frozen=True)
class Savings:
    """Settings of a training step that change its memory and its speed, and nothing it computes beyond rounding."""

    recompute: bool = True  # keep each layer's input only; costs a forward pass more
    tile_tokens: int = 0  # feed-forward of the recomputed layers in tiles of this many tokens; 0 = whole
    optimizer: str = "auto"  # adamw (fp32 states), adamw8bit, or auto: adamw for fp32 weights, adamw8bit for bf16
    update_in_backward: bool = False  # a gradient dies with its layer: one row a step, no clipping by the global norm
    offload_inputs: bool = False  # layer inputs in CPU memory between forward and backward
    logit_rows: int = 0  # rows of logits at once in the loss; 0 = as many as half a GiB holds
    offload_optimizer: bool = False  # optimizer states in CPU memory
    head_update: str = "whole"  # "blocked": the tied embedding's gradient a block of the vocabulary at a time

    def __post_init__(self):
        if self.head_update not in HEAD_UPDATES:
            raise ValueError(f"head_update is {self.head_update!r}; pass one of {', '.join(HEAD_UPDATES)}")
        if self.logit_rows < 0:
            raise ValueError(f"logit_rows is {self.logit_rows}; pass rows such as 512, or 0 for half a GiB of logits")
        if self.head_update == "blocked" and not self.update_in_backward:
            raise ValueError(
                "head_update is blocked but update_in_backward is off: blocks are updated as they are made; pass both, or "
                "--head_update whole"
            )
        if (self.tile_tokens or self.offload_inputs) and not self.recompute:
            raise ValueError(
                f"tile_tokens is {self.tile_tokens} and offload_inputs {self.offload_inputs} but recompute is off; both belong "
                "to the recomputation: pass --recompute, or leave them out"
            )
        if self.update_in_backward and self.optimizer == "adamw":
            raise ValueError("update_in_backward is on but optimizer is adamw, which updates all at once; pass adamw8bit")
