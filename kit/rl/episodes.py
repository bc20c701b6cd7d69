"""Episodes: what the policy wrote and what it was worth; and a pack of them, with what the objective needs of each token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from kit.generate.sampler import Completion
from kit.packing import IGNORE_INDEX, Document, PackedBatch


@dataclass(frozen=True)
class Episode:
    """One completion of one prompt, with its reward."""

    group: int  # the completions of one prompt share it
    question: str  # the question's id
    prompt: list[int]  # token ids
    completion: Completion  # with the log-probs it was sampled at
    reward: float | None  # None: the grader could not decide

    @cached_property
    def rejection(self) -> str:
        """The reason why nothing is learned from this episode; "" if there is none. Reads every log-prob, once."""
        if not self.completion.ids:
            return "empty completion"
        if len(self.completion.logprobs) != len(self.completion.ids):
            return "not one log-prob a token"
        if not all(math.isfinite(logprob) for logprob in self.completion.logprobs):
            return "log-prob not finite"
        if self.reward is None:
            return "undecided"
        if not math.isfinite(self.reward):
            return "reward not finite"
        return ""


def by_group(episodes: Sequence[Episode]) -> list[list[Episode]]:
    """The episodes of each prompt, in the order in which the prompts first appear."""
    groups: dict[int, list[Episode]] = {}
    for episode in episodes:
        groups.setdefault(episode.group, []).append(episode)
    return list(groups.values())


@dataclass(frozen=True)
class WeightedEpisode:
    """An episode with what its tokens are worth."""

    episode: Episode
    advantage: float
    token_weight: float

    @property
    def num_tokens(self) -> int:
        """Prompt and completion."""
        return len(self.episode.prompt) + len(self.episode.completion.ids)


@dataclass(frozen=True)
class EpisodeBatch(PackedBatch):
    """A pack of T tokens whose targets are completion tokens; what belongs to a target stands where the target stands."""

    advantages: torch.Tensor  # (T,) fp32
    token_weight: torch.Tensor  # (T,) fp32, 0 where there is no target
    old_logprobs: torch.Tensor  # (T,) fp32: the sampler's
    reference_logprobs: torch.Tensor  # (T,) fp32: the reference's; the sampler's where none is used

    TENSORS = (
        *PackedBatch.TENSORS,
        "advantages",
        "token_weight",
        "old_logprobs",
        "reference_logprobs",
    )

    @classmethod
    def of(cls, weighted_episodes: Sequence[WeightedEpisode]) -> EpisodeBatch:
        """Lay episodes end to end."""
        pack = PackedBatch.build(
            [
                Document(torch.tensor(x.episode.prompt + x.episode.completion.ids), len(x.episode.prompt))
                for x in weighted_episodes
            ]
        )
        kept = pack.targets != IGNORE_INDEX  # completion tokens, one document after another
        lengths = torch.tensor([len(weighted.episode.completion.ids) for weighted in weighted_episodes])

        def spread(values: torch.Tensor) -> torch.Tensor:
            found = torch.zeros(len(pack))
            found[kept] = values.float()
            return found

        logprobs = spread(
            torch.tensor([x for weighted in weighted_episodes for x in weighted.episode.completion.logprobs])
        )
        return cls(
            **vars(pack),
            advantages=spread(
                torch.tensor([x.advantage for x in weighted_episodes], dtype=torch.float64).repeat_interleave(
                    lengths
                )
            ),
            token_weight=spread(
                torch.tensor(
                    [x.token_weight for x in weighted_episodes], dtype=torch.float64
                ).repeat_interleave(lengths)
            ),
            old_logprobs=logprobs,
            reference_logprobs=logprobs,
        )
