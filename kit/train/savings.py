"""Memory settings of a training step. Each saves memory at a cost; kit.memory.plan says how much it saves."""

from __future__ import annotations

from dataclasses import dataclass

HEAD_UPDATES = ("whole", "blocked")


@dataclass(frozen=True)
class Savings:
    """Settings of a training step that change its memory and its speed, and nothing it computes beyond rounding."""

    recompute: bool = True  # keep each layer's input only; costs a forward pass more
    tile_tokens: int = 0  # feed-forward of the recomputed layers in tiles of this many tokens; 0 = whole
    optimizer: str = "auto"  # adamw (fp32 weights only), adamw8bit, or auto: adamw8bit for bf16 weights
    update_in_backward: bool = (
        False  # a gradient dies with its layer: one row per step, no clipping by the global norm
    )
    offload_inputs: bool = False  # layer inputs in CPU memory between forward and backward
    logit_rows: int = 0  # rows of logits at once in the loss; 0 = as many as half a GiB holds
    offload_optimizer: bool = False  # optimizer states in CPU memory
    head_update: str = "whole"  # "blocked": the tied embedding's gradient a block of the vocabulary at a time

    def __post_init__(self):
        if self.head_update not in HEAD_UPDATES:
            raise ValueError(f"head_update is {self.head_update!r}; pass one of {', '.join(HEAD_UPDATES)}")
        if self.logit_rows < 0:
            raise ValueError(
                f"logit_rows is {self.logit_rows}; pass rows such as 512, or 0 for half a GiB of logits"
            )
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
            raise ValueError(
                "update_in_backward is on but optimizer is adamw, which updates all at once; pass adamw8bit"
            )

    def check_clipping(self, max_grad_norm: float, max_tensor_norm: float) -> None:
        """Raises ValueError if a norm is to be clipped that these savings never know."""
        if max_grad_norm and self.update_in_backward:
            instead = (
                ""
                if self.head_update == "blocked"
                else f", and --max_tensor_norm {max_grad_norm:g} to clip each parameter"
            )
            raise ValueError(
                f"max_grad_norm is {max_grad_norm:g} but update_in_backward uses each gradient up before the norm of all is "
                f"known; pass --max_grad_norm 0{instead}, or --no_update_in_backward"
            )
        if max_tensor_norm and not self.update_in_backward:
            raise ValueError(
                f"max_tensor_norm is {max_tensor_norm:g} but update_in_backward is off, and the norm of all gradients is known; "
                f"pass --max_grad_norm {max_tensor_norm:g} and --max_tensor_norm 0"
            )
        if max_tensor_norm and self.head_update == "blocked":
            raise ValueError(
                f"max_tensor_norm is {max_tensor_norm:g} but head_update is blocked, which never has the embedding's whole "
                "gradient to measure; pass --max_tensor_norm 0, or --head_update whole"
            )

    def check_rows(self, batch_traces: int) -> None:
        """Raises ValueError if a step of this many traces may have several rows, whose gradients these savings cannot add."""
        if self.update_in_backward and batch_traces > 1:
            raise ValueError(
                f"batch_traces is {batch_traces} but update_in_backward uses each gradient up before the next row; pass "
                "--batch_traces 1 (a step is then one row of packed traces), or --no_update_in_backward to add gradients up"
            )
