"""What the paper states: settings that a run may change, and what a run does otherwise.

Sources: the paper's Table 2 (fine-tuning), Table 3 (reinforcement learning) and its section on evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A row of Table 2."""

    traces: int
    epochs: int
    batch_traces: int

    @property
    def steps(self) -> int:
        """Optimizer steps, by arithmetic."""
        return self.traces * self.epochs // self.batch_traces

    @classmethod
    def settings(cls, num_traces: int) -> dict[str, int]:
        """Return the settings of the row with so many traces; of the first row if there is none."""
        row = next((row for row in TABLE if row.traces == num_traces), TABLE[0])
        return {"num_traces": row.traces, "epochs": row.epochs, "batch_traces": row.batch_traces}


TABLE = (
    Row(8_000, 4, 8),
    Row(16_000, 4, 16),
    Row(32_000, 4, 32),
    Row(64_000, 3, 64),
    Row(128_000, 3, 128),
    Row(220_000, 2, 128),
)
EVALUATION = {
    "benchmarks": "math500,aime24,amc23",
    "num_questions": 0,
    "num_samples": 0,
    "temperature": 0.6,
    "top_p": 0.95,
    "max_new_tokens": 16_384,
}
FINE_TUNING = {"row_tokens": 16_384, "lr": 5e-5, "warmup_ratio": 0.05, "max_steps": 0, **EVALUATION}
RL = {
    "batch_prompts": 1_024,
    "group_size": 8,
    "max_new_tokens": 8_192,
    "temperature": 1.0,
    "minibatch_prompts": 256,
    "advantage_scale": "group-std",
    "kl_coef": 1e-4,
    "lr": 5e-7,
    "qlora_rank": 0,
    "mask_truncated": False,
}
# settings whose value stands for something else -> what the paper does, in words
WORDS = {"max_steps": "all", "num_questions": "all", "num_samples": "8 for AIME24 and AMC23, 4 for MATH-500"}
ADAMW8BIT = "AdamW with 8-bit states, bf16 weights rounded stochastically (paper: AdamW, bf16)"
ADAMW8BIT_EXACT = "AdamW with 8-bit states, bf16 weights with their fp32 rests (paper: AdamW, bf16)"


def deviations(config, paper: Mapping[str, object]) -> list[str]:
    """List the settings of a config that are not the paper's."""
    return [
        f"{name} {getattr(config, name)} (paper: {WORDS.get(name, value)})"
        for name, value in paper.items()
        if getattr(config, name) != value
    ]
