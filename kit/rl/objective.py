"""The objective of GRPO, token by token, and the statistics collected on the way.

    ratio = exp(logp - old)                  probability of a token now / when it was sampled
    loss  = -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) + kl_coef * k3
            where A < 0: at most dual_clip * |A|, before the KL is added
    k3    = exp(ref - logp) - (ref - logp) - 1

k3 is an unbiased estimate of KL(policy || reference), never negative and of low variance (Schulman, 2020).
GRPO adds it to the loss, where its on-policy gradient is that of KL(reference || policy) (Tang & Munos,
2025). Near the reference the two agree.

Relatives of GRPO differ in one line each, found below by name: Dr. GRPO (Liu et al., 2025) in the advantage,
DAPO (Yu et al., 2025) in the mean over tokens and the upper clip, GSPO (Zheng et al., 2025) in the ratio.
Dual-clip PPO (Ye et al., 2020) bounds what a single improbable token of a wrong answer can do.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev

import torch
from torch import Tensor

from kit.ranks import here
from kit.rl.settings import Settings

STD_FLOOR = 1e-4  # TRL's, so that the two can be compared; verl has 1e-6


def has_signal(rewards: Sequence[float]) -> bool:
    """Return whether the rewards of a group differ. If they are all equal, every advantage is 0."""
    return len(set(rewards)) > 1


def group_advantages(rewards: Sequence[float], scale: str) -> list[float]:
    """Return each completion's advantage: its reward compared with the mean of its group."""
    if not has_signal(rewards):
        return [0.0] * len(rewards)
    mean = fmean(rewards)
    divisor = 1.0 if scale == "none" else stdev(rewards) + STD_FLOOR  # none: Dr. GRPO
    return [(reward - mean) / divisor for reward in rewards]


def token_weight(num_tokens: int, normaliser: str, *, all_tokens: int, all_sequences: int) -> float:
    """Return the weight of each token of a completion of num_tokens; weighted so, the step's loss is a sum.

    all_tokens: of the completions that the step learns from. all_sequences: also counts those masked because
    they were cut off, so that the others do not weigh more for it.
    """
    if normaliser == "tokens":  # DAPO: the mean over all tokens, in which longer completions weigh more
        return 1 / all_tokens
    return 1 / (all_sequences * num_tokens)  # GRPO: the mean over completions of the mean over their tokens


def token_losses(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    settings: Settings,
    *,
    sequence: Tensor | None = None,
    reference: Tensor | None = None,
    stats: RunningStats | None = None,
) -> Tensor:
    """Return the losses (R,) of R tokens, unreduced and differentiable by logprobs (R,).

    old, advantages (R,): the log-prob a token was sampled with, and the advantage of its completion.
    sequence (R,) int64: which completion a token belongs to, counted from 0 without gaps; for GSPO's ratio,
        which needs all tokens of a completion among the R. None = a ratio per token.
    reference (R,): log-probs of the reference model; None = no KL.
    """
    log_ratio = logprobs - old
    if sequence is not None:  # GSPO: the geometric mean of the ratios of a completion's tokens
        zeros = torch.zeros_like(log_ratio)
        log_ratio = zeros.scatter_reduce(0, sequence, log_ratio, "mean", include_self=False)[sequence]
    ratio = log_ratio.exp()
    low, high = 1 - settings.clip_low, 1 + settings.clip_high  # DAPO: clip_high above clip_low
    losses = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    measured = {
        "clipped_low": (ratio < low) & (advantages < 0),
        "clipped_high": (ratio > high) & (advantages > 0),
    }
    if settings.dual_clip:  # where A > 0 the loss is below 0, and the bound is never met
        losses = torch.minimum(losses, settings.dual_clip * advantages.abs())
        measured["clipped_dual"] = (ratio > settings.dual_clip) & (advantages < 0)

    if reference is not None:
        difference = reference - logprobs
        measured["kl"] = difference.exp() - difference - 1  # k3
        losses = losses + settings.kl_coef * measured["kl"]

    if stats is not None:
        stats.add(ratio, **measured)
    return losses


class RunningStats:
    """Means and extremes over the tokens of all ranks, kept on the device: reading one there would make the
    CPU wait."""

    def __init__(self):
        self.num_tokens = 0
        self.sums: dict[str, Tensor] = {}
        self.extremes: Tensor | None = None  # (2,): of -ratio and ratio, the largest

    @torch.no_grad()
    def add(self, ratio: Tensor, **values: Tensor) -> None:
        """Add the ratios (R,) of R tokens, and other values (R,) of which only the mean is of interest."""
        self.num_tokens += len(ratio)
        for name, added in {"ratio_mean": ratio, **values}.items():
            total = added.sum(dtype=torch.float64 if added.device.type == "cpu" else torch.float32)
            self.sums[name] = self.sums.get(name, 0) + total
        low, high = ratio.aminmax()
        extremes = torch.stack([-low, high])
        self.extremes = extremes if self.extremes is None else torch.maximum(self.extremes, extremes)

    def read(self) -> dict[str, float]:
        """Return the means, and the smallest and largest ratio; nothing if there were no tokens.

        Every rank must call this.
        """
        sums = {name: total.item() for name, total in self.sums.items()}
        extremes = [] if self.extremes is None else self.extremes.tolist()
        of_ranks = [found for found in here().gather([self.num_tokens, sums, extremes]) if found[0]]
        if not of_ranks:
            return {}
        counts, sums, extremes = zip(*of_ranks, strict=True)
        means = {name: sum(found[name] for found in sums) / sum(counts) for name in sums[0]}
        negative_low, high = map(max, zip(*extremes, strict=True))
        return means | {"ratio_min": -negative_low, "ratio_max": high}
