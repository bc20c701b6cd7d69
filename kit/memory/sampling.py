"""What sampling holds: what lasts beside it, the KV cache, and a step that reads prompts or draws tokens.

The step is what the sampler computes, on fake tensors; the cache is a product of sizes (cache_bytes).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kit.generate.kv_cache import cache_bytes
from kit.generate.sampler import PREFILL_TOKENS
from kit.generate.sampling import SamplingParams, sample
from kit.memory.live_bytes import Ledger
from kit.memory.simulate import Plan, fake_batch, fake_model
from kit.models.backbone import hidden_states, next_token_logits
from kit.models.loading import load_config
from kit.train.savings import Savings

CACHE, SAMPLER = "sampler's cache", "sampler's step"
PROMPT_TOKENS = 1_024  # the longest prompt, which sets all rows of a cache; MATH's reach 800 (mean: 75)
MOST_SLOTS = 2_048  # answers at once: so many share the reading of the weights that more gain nothing

Sampling = Callable[[int], Plan]  # answers at once -> what sampling them holds


def plan_sampling(
    model: str,
    params: SamplingParams,
    *,
    qlora_rank: int = 0,
    desktop_gb: float = 0.0,
    prompt_tokens: int = PROMPT_TOKENS,
) -> Sampling:
    """Plan sampling from a model that is not being trained. model, qlora_rank, desktop_gb: as for plan."""
    fake, mode = fake_model(load_config(model), qlora_rank)
    weights = Ledger(fake)
    weights.close()
    lasting = Plan(model, 0, qlora_rank, Savings(), 0, "", weights.owners, 0, desktop_gb=desktop_gb)
    return simulate_sampling(fake, mode, params, prompt_tokens, lasting)


def simulate_sampling(
    fake: nn.Module, mode: FakeTensorMode, params: SamplingParams, prompt_tokens: int, lasting: Plan
) -> Sampling:
    """Return what sampling holds on fake tensors. lasting: its owners are on the card all the time."""
    positions = min(prompt_tokens + params.max_new_tokens, fake.config.max_position_embeddings)

    @cache
    def reading(num_tokens: int) -> int:
        return transient(fake, lambda: hidden_states(fake, fake_batch(num_tokens)))

    @cache
    def sampling(num_slots: int) -> Plan:
        with mode:
            drawing = transient(fake, lambda: _draw(fake, num_slots, params))
            step = max(drawing, reading(min(PREFILL_TOKENS, num_slots * prompt_tokens)))

        owners = lasting.owners | {CACHE: cache_bytes(fake, num_slots, positions), SAMPLER: step}
        what = f"{num_slots} answers of up to {params.max_new_tokens:,} tokens at once"
        return replace(lasting, what=what, when="sampling", owners=owners, peak=sum(owners.values()))

    return sampling


def most_slots(sampling: Sampling, gpu_gb: float, bound: int = MOST_SLOTS) -> int:
    """Return the most answers at once, up to bound, that fit a card; 0 if not even one does."""
    return bisect_left(range(1, bound + 1), True, key=lambda slots: not sampling(slots).fits(gpu_gb))


def transient(fake: nn.Module, call: Callable[[], object]) -> int:
    """Return the most bytes that a call without gradients holds besides the model."""
    fake.eval()
    ledger = Ledger(fake)
    before = ledger.now
    with torch.no_grad(), ledger:
        call()
    ledger.close()
    return ledger.peak - before


def _draw(fake: nn.Module, num_slots: int, params: SamplingParams) -> None:
    """Draw one token in each slot. A nucleus (top_p < 1) may reach the whole vocabulary: count that."""
    weight = fake.get_input_embeddings().weight
    hidden = torch.empty(num_slots, weight.shape[1], dtype=weight.dtype)
    keys = torch.zeros(num_slots, dtype=torch.int64)
    if params.top_p < 1:
        params = replace(params, top_k=params.top_k or weight.shape[0])
    sample(next_token_logits(fake, hidden), params, keys, keys)
