"""Plan the memory of reinforcement learning, whose sampling and updates alternate: a card needs the larger.

    sampling    weights + optimizer states + reference + the sampler's cache and step
    update      weights + optimizer states + reference + gradients + a row's training step
                or, before it, without gradients: the pass that scores a row for the KL

Both are simulated on fake tensors: the update is the real training step with the real objective, on two rows,
the second of which finds the gradients of the first; sampling is as in kit.memory.phases. Evaluation has the
same cache without an optimizer (see eval_slots), so it needs less.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from kit.generate.sampling import SamplingParams
from kit.memory import live_bytes
from kit.memory.phases import PROMPT_TOKENS, QLORA_RANK, Run, RunPlan, simulate_sampling, transient
from kit.memory.simulate import Plan, fake_batch, fake_model, measure
from kit.models.loading import load_config
from kit.rl.episodes import EpisodeBatch
from kit.rl.grpo import grpo_loss, score
from kit.rl.objective import RunningStats
from kit.rl.settings import Settings
from kit.train.savings import Savings

SCORING = "reference's pass"
SHORTEST_ANSWER = 512  # tokens; no plan suggests shorter answers


@dataclass(frozen=True, kw_only=True)
class RLRun(Run):
    """Rollouts and the updates that learn from them."""

    settings: Settings
    # several rows per step, and another loss than cross-entropy, exclude these
    without: ClassVar[tuple[str, ...]] = ("update_in_backward", "head_update")
    drops_unneeded: ClassVar[bool] = False

    @property
    def row_tokens(self) -> int:
        return self.settings.row_tokens

    def simulate(self, savings: Savings) -> RunPlan:
        settings = self.settings
        fake, mode = fake_model(load_config(self.model), **self.ranks)
        has_copy = settings.uses_reference and not self.has_adapters  # whose base is the reference itself
        with mode:
            reference = [torch.empty_like(p) for p in fake.parameters()] if has_copy else []
            loss_of = grpo_loss(fake, settings, RunningStats(), savings.logit_rows)
            row = _fake_episodes(self.row_tokens)
            ledger = measure(fake, savings, row, rows=2, loss_of=loss_of, reference=reference)
        sizes = {"row_tokens": self.row_tokens, "savings": savings, "rows": 2} | self.ranks
        update = self.with_varlen(Plan.of_step(ledger, model=self.model, **sizes))

        kept = (live_bytes.WEIGHTS, live_bytes.OPTIMIZER, live_bytes.REFERENCE)
        owners = {owner: update.owners[owner] for owner in kept if owner in update.owners}
        lasting = replace(update, owners=owners)
        if settings.uses_reference:
            with mode:
                how = _fake_episodes(self.row_tokens), settings.temperature, savings.logit_rows
                owners = owners | {SCORING: transient(fake, lambda: score(fake, *how))}
            scoring = replace(update, when="scoring", owners=owners, peak=sum(owners.values()))
            update = max(update, scoring, key=lambda plan: plan.peak)

        params = SamplingParams(settings.temperature, 1.0, 0, settings.max_new_tokens)
        longest_prompt = capacity(settings, self.prompt_tokens) - settings.max_new_tokens
        sampling = simulate_sampling(fake, mode, params, longest_prompt, self.cuda_graphs, lasting)
        return RunPlan(update, sampling, settings.num_slots, self)

    def smaller(self) -> Iterator[list[dict]]:
        """Yield changes in the order of how much they change what is learned.

        Shorter rows change nothing, no KL little, shorter answers and adapters much.
        """
        settings, tokens = self.settings, self.settings.max_new_tokens
        shortest_row = self.prompt_tokens + tokens
        if settings.row_tokens > shortest_row:
            yield [{"row_tokens": shortest_row}]
        if settings.uses_reference and not self.has_adapters:
            yield [{"kl_coef": 0.0, "row_tokens": min(settings.row_tokens, shortest_row)}]

        shorter = []
        while (tokens := tokens // 2) >= SHORTEST_ANSWER:
            row_tokens = min(settings.row_tokens, self.prompt_tokens + tokens)
            shorter.append({"max_new_tokens": tokens, "row_tokens": row_tokens})
        yield shorter
        if not self.has_adapters:
            yield [{"qlora_rank": QLORA_RANK}]

    def changed(self, flags: dict) -> RLRun:
        if "qlora_rank" in flags:
            return replace(self, **flags)
        return replace(self, settings=replace(self.settings, **flags))


def eval_slots(settings: Settings, eval_tokens: int, prompt_tokens: int = PROMPT_TOKENS) -> int:
    """Return how many answers of eval_tokens the rollout's cache holds for an evaluation; at least one."""
    positions = settings.num_slots * capacity(settings, prompt_tokens)
    return min(settings.num_slots, max(positions // (prompt_tokens + eval_tokens), 1))


def capacity(settings: Settings, prompt_tokens: int) -> int:
    """Return the positions of a cache's row. Rollouts refuse prompts too long for a row with their answer."""
    longest_prompt = max(settings.row_tokens - settings.max_new_tokens, 1)
    return settings.max_new_tokens + min(prompt_tokens, longest_prompt)


def _fake_episodes(row_tokens: int) -> EpisodeBatch:
    """Return a row that is one episode."""
    row = fake_batch(row_tokens)
    names = EpisodeBatch.TENSORS[len(row.TENSORS) :]  # what an episode has besides a document's tensors
    return EpisodeBatch(**vars(row), **{name: torch.zeros(len(row)) for name in names})
