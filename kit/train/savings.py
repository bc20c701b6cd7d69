"""Memory settings of a training step. Each saves memory at a cost; kit.memory.plan simulates how much."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from kit.config import Checked

WHOLE_ONLY = "head_update is blocked but blocks compute cross-entropy alone; pass --head_update whole"
Settings = TypeVar("Settings", bound="Savings")


@dataclass(frozen=True)
class Savings(Checked):
    """Settings of a training step that change its memory and its speed, and its result only by rounding.

    Updating in the backward pass also excludes what needs all gradients at once: several rows per step, and
    clipping by their common norm.
    """

    # memory
    recompute: bool = True  # keep each layer's input only; costs one more forward pass
    tile_tokens: int = 0  # feed-forward of the recomputed layers in tiles of so many tokens; 0 = whole [>= 0]
    optimizer: str = "auto"  # auto: adamw for fp32 weights, else adamw8bit [auto | adamw | adamw8bit]
    exact_weights: bool = True  # bf16 weights as exact as fp32 ones: adamw8bit keeps 2 more bytes of each
    update_in_backward: bool = False  # free each gradient at once: one row per step, no global norm
    offload_inputs: bool = False  # layer inputs in CPU memory between forward and backward
    logit_rows: int = 0  # rows of logits at once in the loss; 0 = as many as half a GiB holds [>= 0]
    offload_optimizer: bool = False  # optimizer states in CPU memory
    offload_gradients: bool = False  # gradients in CPU memory; any number of rows, and a global norm
    head_update: str = "whole"  # blocked: the tied embedding's gradient block by block [whole | blocked]

    def __post_init__(self):
        super().__post_init__()
        if self.head_update == "blocked" and not (self.offload_gradients or self.update_in_backward):
            raise ValueError(
                "head_update is blocked but offload_gradients and update_in_backward are off, so a block's "
                "gradient has nowhere to go; pass --offload_gradients, or --head_update whole"
            )
        if (self.tile_tokens or self.offload_inputs) and not self.recompute:
            raise ValueError(
                f"tile_tokens is {self.tile_tokens} and offload_inputs {self.offload_inputs} but recompute "
                "is off; both are parts of the recomputation: pass --recompute, or leave them out"
            )
        if self.offload_gradients and self.update_in_backward:
            raise ValueError(
                "offload_gradients and update_in_backward are both on, but one keeps the gradients that the "
                "other frees at once; pass --no_update_in_backward (for several rows, a global norm), or "
                "--no_offload_gradients"
            )
        if self.update_in_backward and self.optimizer == "adamw":
            raise ValueError(
                "update_in_backward is on but optimizer is adamw, which updates all at once; pass adamw8bit"
            )

    @property
    def switched_on(self) -> dict[str, bool | int | str]:
        """The settings that differ from the defaults."""
        return {name: value for name, value in vars(self).items() if value != getattr(Savings(), name)}

    def check_clipping(self, max_grad_norm: float) -> None:
        """Raise ValueError for a norm to clip to that is negative, or never known with these savings."""
        if not max_grad_norm >= 0:  # it would turn the gradient round
            raise ValueError(f"max_grad_norm is {max_grad_norm} but must be >= 0; pass 0 for no clipping")
        if max_grad_norm and self.update_in_backward:
            raise ValueError(
                f"max_grad_norm is {max_grad_norm:g} but update_in_backward frees each gradient before the "
                "norm of all is known; pass --max_grad_norm 0, or --no_update_in_backward"
            )

    def check_ranks(self, count: int) -> None:
        """Raise ValueError if so many ranks cannot sum their gradients."""
        if count > 1 and self.update_in_backward:
            raise ValueError(
                f"update_in_backward is on but {count} ranks sum their gradients before any is used; pass "
                "--no_update_in_backward --offload_gradients, which keeps about as little on the card"
            )
        if count > 1 and self.head_update == "blocked":
            raise ValueError(
                f"head_update is blocked but {count} ranks sum whole gradients; pass --head_update whole"
            )

    def for_layers_of(self: Settings, model: str) -> Settings:
        """Return the settings without a preset's tiles if transformers computes the layers of this model.

        Raises ValueError if such tiles were typed, and for a model that cannot be trained: one with dropout,
        or a GGUF file of a family without a layout.
        """
        from kit.models.families import OTHER, family_of  # import torch: not before flags are read
        from kit.models.gguf_file import check_readable
        from kit.models.load_any import check_dropout
        from kit.models.loading import load_config, path_of

        config = load_config(model)
        check_dropout(config, model)
        if model.endswith(".gguf"):
            check_readable(path_of(model), config)
        if not self.tile_tokens or family_of(config, model) is not OTHER:
            return self
        why = f"transformers computes the layers of a {config.model_type} model, each as a whole"
        if "tile_tokens" in getattr(self, "typed", vars(self)):
            raise ValueError(f"tile_tokens is {self.tile_tokens} but {why}; pass --tile_tokens 0")
        print(f"tiles       none: {why}")
        return replace(self, tile_tokens=0)

    def check_saving(self, save_fp32: bool) -> None:
        """Raise ValueError if a model cannot be saved with more bits than bf16 has."""
        if save_fp32 and not self.exact_weights:
            raise ValueError(
                "save_fp32 is on but exact_weights is off, so there are no bits beyond bf16; leave out "
                "--save_fp32 or --no_exact_weights (which --faster may have chosen)"
            )

    def check_rows(self, batch_traces: int) -> None:
        """Raise ValueError if a step of so many traces may need gradients to be added over its rows."""
        if self.update_in_backward and batch_traces > 1:
            raise ValueError(
                f"batch_traces is {batch_traces} but update_in_backward frees each gradient before the next "
                "row; pass --batch_traces 1 (a step is then one row of packed traces), or "
                "--no_update_in_backward to add gradients up"
            )
