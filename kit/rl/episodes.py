"""Episodes: what the policy wrote and its reward; and packed rows of them, with what the objective needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

import torch

from kit.generate.sampler import Completion
from kit.packing import IGNORE_INDEX, Document, PackedBatch
from kit.ranks import here


@dataclass(frozen=True)
class Episode:
    """One completion of one prompt, with its reward."""

    group: int  # number of the prompt in the run, shared by its completions
    question: str  # the question's id
    prompt: list[int]  # token ids
    completion: Completion  # with the log-probs it was sampled with
    reward: float | None  # None: the grader could not decide
    rewards: Mapping[str, float | None] = field(default_factory=dict)  # by name; `reward` is their sum

    @cached_property
    def rejection(self) -> str:
        """The reason why nothing is learned from it; "" if there is none. Reads every log-prob, once."""
        if not self.completion.ids:
            return "empty completion"
        if len(self.completion.logprobs) != len(self.completion.ids):
            return "not one log-prob per token"
        if not all(math.isfinite(logprob) for logprob in self.completion.logprobs):
            return "log-prob not finite"
        if self.reward is None:
            return "undecided"
        if not math.isfinite(self.reward):
            return "reward not finite"
        return ""


def by_group(episodes: Sequence[Episode]) -> list[list[Episode]]:
    """Return the episodes of each prompt, in the order in which the prompts first appear."""
    groups: dict[int, list[Episode]] = {}
    for episode in episodes:
        groups.setdefault(episode.group, []).append(episode)
    return list(groups.values())


def gathered(episodes: Sequence[Episode]) -> list[Episode]:
    """Return the episodes of all ranks, prompt by prompt."""
    if here().count == 1:
        return list(episodes)
    groups, rows = by_group(episodes), []
    for i in range(max(here().gather(len(groups)))):  # not all at once: JSON would hold up the heartbeat
        own = [_plain(episode) for group in groups[i : i + 1] for episode in group]
        rows += [row for found in here().gather(own) for row in found]
    found = [Episode(**row | {"completion": Completion(**row["completion"])}) for row in rows]
    return sorted(found, key=lambda episode: episode.group)


def _plain(episode: Episode) -> dict:
    """Return an episode's fields, as asdict does, but without copying every number."""
    found = {part.name: getattr(episode, part.name) for part in fields(Episode)}
    return found | {"completion": vars(episode.completion)}


def undecided_as_wrong(episodes: Sequence[Episode]) -> list[Episode]:
    """Return the episodes with the reward 0 for what the grader could not decide."""
    return [replace(episode, reward=0.0) if episode.reward is None else episode for episode in episodes]


@dataclass(frozen=True)
class WeightedEpisode:
    """An episode with its advantage and the weight of each of its tokens in the step's loss."""

    episode: Episode
    advantage: float
    token_weight: float

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.episode.prompt) + len(self.episode.completion.ids)


@dataclass(frozen=True)
class EpisodeBatch(PackedBatch):
    """A packed row of T tokens whose targets are completion tokens.

    A target's values are stored at its position; they are 0 where there is no target.
    """

    advantages: torch.Tensor  # (T,) fp32
    token_weight: torch.Tensor  # (T,) fp32
    old_logprobs: torch.Tensor  # (T,) fp32: the sampler's
    reference_logprobs: torch.Tensor  # (T,) fp32: the reference model's; all 0 if there is none

    TENSORS = (*PackedBatch.TENSORS, "advantages", "token_weight", "old_logprobs", "reference_logprobs")

    @classmethod
    def of(cls, weighted_episodes: Sequence[WeightedEpisode]) -> EpisodeBatch:
        """Lay episodes end to end."""
        episodes = [weighted.episode for weighted in weighted_episodes]
        documents = [Document(torch.tensor(e.prompt + e.completion.ids), len(e.prompt)) for e in episodes]
        pack = PackedBatch.build(documents)
        lengths = torch.tensor([len(episode.completion.ids) for episode in episodes])
        is_target = pack.targets != IGNORE_INDEX  # completion tokens, one document after another
        if pack.num_targets != int(lengths.sum()):
            raise ValueError(
                f"the episodes have {int(lengths.sum())} tokens but {pack.num_targets} of them have a token "
                "before them to be predicted from; give every episode a prompt"
            )

        advantages = torch.tensor([weighted.advantage for weighted in weighted_episodes])
        weights = torch.tensor([weighted.token_weight for weighted in weighted_episodes])
        logprobs = torch.tensor([x for episode in episodes for x in episode.completion.logprobs])
        zeros = torch.zeros(len(pack))
        return cls(
            **vars(pack),
            advantages=zeros.masked_scatter(is_target, advantages.repeat_interleave(lengths)),
            token_weight=zeros.masked_scatter(is_target, weights.repeat_interleave(lengths)),
            old_logprobs=zeros.masked_scatter(is_target, logprobs),
            reference_logprobs=zeros,
        )

    @property
    def sequence(self) -> torch.Tensor:
        """Number of the episode that each token belongs to, (T,) int64, counted from 0."""
        return (self.position_ids == 0).cumsum(0) - 1
