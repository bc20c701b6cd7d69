"""Sampling: from logits to a token, with a separate random stream for each sample.

kernels/gumbel.py draws. Each random number is a hash of (the sample's key, position, token). Such a
counter-based stream needs no state: a result depends neither on the slot of a sample nor on what ran before
it, and a resumed run repeats it. A change in the last bit of a logit can change the draw only if the two
highest sums are that close; inverting the cumulative sum over a sorted vocabulary is far more fragile.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass

import torch

from kit.config import Checked
from kit.kernels.gumbel import draw


@dataclass(frozen=True)
class SamplingParams(Checked):
    """How tokens are drawn. The defaults are those of the paper's evaluation."""

    temperature: float = 0.6  # 0 = greedy [0 | 0.001..1000]
    top_p: float = 0.95  # keep the smallest set of tokens with this much probability; 1 = off [> 0, <= 1]
    top_k: int = 0  # keep the k most likely tokens first; 0 = off [>= 0]
    max_new_tokens: int = 16_384  # tokens per response [>= 1]


def stream_key(seed: int, key: object) -> int:
    """Return the 64-bit key of one sample's random stream, as a signed integer. key: any JSON value."""
    name = hashlib.blake2b(json.dumps([seed, key]).encode(), digest_size=8).digest()
    return int.from_bytes(name, "little", signed=True)


def sample(
    logits: torch.Tensor, params: SamplingParams, keys: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row. Return (token ids (B,) int64, their log-probs (B,) fp32 when they were drawn).

    logits: (B, V). keys, positions: (B,) int64, each sample's random stream and the number of tokens that it
    has. Greedy decoding (temperature 0) returns the log-probs of the model's own distribution.
    """
    settings = {"temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p}
    return draw(logits, keys, positions, **settings)


def check_finite(logprobs: list[float]) -> None:
    """Raise ValueError if the log-prob of a drawn token is NaN or infinite.

    A NaN or +inf among a row's logits makes the log-prob of its token NaN. The numbers are in Python already,
    so a card does not wait for this.
    """
    if count := sum(not math.isfinite(logprob) for logprob in logprobs):
        raise ValueError(
            f"the model's logits are NaN or infinite for {count} of {len(logprobs)} responses, so its tokens "
            "mean nothing. If its weights are finite, a sum overflows: load it in float32 or bfloat16; after "
            "training, go back to an earlier checkpoint and lower --lr"
        )
