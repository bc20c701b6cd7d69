"""The clipped objective of one token, and what is measured on the way.

    ratio = exp(logp - old)                          policy now / policy that sampled
    loss  = -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) + kl_coef * k3


    k3   = exp(ref - logp) - (ref - logp) - 1        never negative, low variance (Schulman, 2020); as a loss, in GRPO

k3 estimates KL(policy || reference); as a loss its gradient, on-policy, is that of KL(reference || policy) (Tang & Munos, 2025).
Near the reference the two agree.

Elementwise in the log-prob: kit.kernels.linear_cross_entropy makes its gradient in the forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

import torch
from torch import Tensor


@dataclass
class RunningStats:
    """Sums over tokens, kept on the device: reading one would make a card wait."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    lows: dict[str, Tensor] = field(default_factory=dict)
    highs: dict[str, Tensor] = field(default_factory=dict)
    num_tokens: int = 0

    def count(self, num_tokens: int) -> None:
        """Tokens that every figure added from here to the next count is about."""
        self.num_tokens += num_tokens

    def range(self, name: str, values: Tensor) -> None:
        """Smallest, mean and largest."""
        self.add(name, values)
        low, high = values.aminmax()
        self.lows[name] = torch.minimum(self.lows[name], low) if name in self.lows else low
        self.highs[name] = torch.maximum(self.highs[name], high) if name in self.highs else high

    def add(self, name: str, values: Tensor) -> None:
        total = values.sum(dtype=torch.float64 if values.device.type == "cpu" else torch.float32)
        self.sums[name] = self.sums[name] + total if name in self.sums else total

    def read(self) -> dict[str, float]:
        """Means over the tokens counted; NaN where none was."""
        found = {
            name: total.item() / self.num_tokens if self.num_tokens else math.nan
            for name, total in self.sums.items()
        }
        for end, extremes in (("min", self.lows), ("max", self.highs)):
            found |= {f"{name}_{end}": value.item() for name, value in extremes.items()}
        return {f"{name}_mean" if name in self.lows else name: value for name, value in found.items()}


def token_losses(
    logprobs: Tensor, old: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, kl_coef: float = 0.0,
    reference: Tensor | None = None, stats: RunningStats | None = None,
) -> Tensor:  # fmt: skip
    """Losses (R,), unreduced, differentiable by logprobs (R,). All others (R,): old log-probs, advantages, the reference's
    log-probs (None = no KL). stats: takes what is measured."""
    log_ratio = logprobs - old
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    losses = -surrogate
    if reference is not None:
        difference = reference - logprobs
        k3 = difference.exp() - difference - 1
        losses = losses + kl_coef * k3
    if stats is not None:
        with torch.no_grad():
            stats.count(len(logprobs))
            stats.range("ratio", ratio)
            stats.add("clipped_low", (ratio < 1 - clip_low) & (advantages < 0))
            stats.add("clipped_high", (ratio > 1 + clip_high) & (advantages > 0))
            if reference is not None:
                stats.add("kl", k3)
    return losses


SCALES = ("group-std", "none")
NORMALISERS = ("sequences", "tokens")
STD_FLOOR = (
    1e-4  # TRL's, so that the two can be compared; verl has 1e-6. A group of equal rewards is 0 either way
)


def group_advantages(rewards: Sequence[float | None], scale: str) -> list[float]:
    """One advantage a reward. None: rejected, no part of the mean, advantage 0. Fewer than two rewards: nothing to compare, 0."""
    kept = [reward for reward in rewards if reward is not None]
    if not has_signal(rewards):
        return [0.0] * len(rewards)
    mean = fmean(kept)
    divisor = stdev(kept) + STD_FLOOR if scale == "group-std" else 1.0
    return [0.0 if reward is None else (reward - mean) / divisor for reward in rewards]


def has_signal(rewards: Sequence[float | None]) -> bool:
    """Whether at least two rewards of a group differ: else its completions teach nothing against one another."""
    return len({reward for reward in rewards if reward is not None}) > 1


def token_weights(lengths: Sequence[int], normaliser: str, *, num_sequences: int) -> list[float]:
    """Return what each token of each completion is multiplied by, so that the step's loss is a sum.

    lengths: tokens of each completion that is learned from. num_sequences: all of the step, also those that are masked: what is
    left does not count for more because others were cut off.
    """
    if normaliser == "tokens":
        return [1 / sum(lengths) for _ in lengths]
    return [1 / (num_sequences * length) for length in lengths]
