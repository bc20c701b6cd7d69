"""Advantages: how much better a completion did than the others of its group, and how much each of its tokens counts.

    A_i = (r_i - mean(r)) / (std(r) + 1e-4)        group-std: GRPO (Shao et al., 2024); std with n - 1
    A_i =  r_i - mean(r)                           none: Dr. GRPO (Liu et al., 2025), which weighs hard and easy prompts alike

    tokens        w = 1 / tokens in the step              DAPO (Yu et al., 2025): a token is a token
    sequences     w = 1 / (sequences * own tokens)        GRPO: each completion counts once, a long one's tokens little
    constant      w = 1 / (sequences * max_new_tokens)    Dr. GRPO: no length in it

Plain numbers in, plain numbers out; everything in float64. A completion that was rejected has no part in its group's mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev

SCALES = ("group-std", "none")
NORMALISERS = ("tokens", "sequences", "constant")
STD_FLOOR = 1e-4  # TRL's, so that the two can be compared; verl has 1e-6. A group of equal rewards is 0 either way


def shaped_reward(reward: float, tokens: int, *, max_new_tokens: int, length_penalty: float) -> float:
    """reward - length_penalty * share of max_new_tokens that was used. length_penalty: 0 = off."""
    return reward - length_penalty * tokens / max_new_tokens if length_penalty else reward


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


def token_weights(lengths: Sequence[int], normaliser: str, *, num_sequences: int, max_new_tokens: int) -> list[float]:
    """What each token of each completion is multiplied by, so that the step's loss is a sum.

    lengths: tokens of each completion that is learned from. num_sequences: all of the step, also those that are masked: what is
    left does not count for more because others were cut off.
    """
    if normaliser == "tokens":
        return [1 / sum(lengths) for _ in lengths]
    if normaliser == "sequences":
        return [1 / (num_sequences * length) for length in lengths]
    return [1 / (num_sequences * max_new_tokens)] * len(lengths)
