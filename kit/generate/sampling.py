"""Sampling: from logits to a token, with a separate random stream for each sample.

The token is argmax_v(log p_v + g_v) with Gumbel noise g_v = -log(-log u_v), which draws v with probability
p_v. A constant added to every log p_v changes nothing.

Each u_v is a hash of (the sample's key, position, v). Such a counter-based stream needs no state: a result
depends neither on the slot of a sample nor on what ran before it, and a resumed run repeats it. A change in
the last bit of a logit can change the draw only if the two highest sums are that close; inverting the
cumulative sum over a sorted vocabulary is far more fragile.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass

import torch

from kit.config import Checked

# candidates at first, and by what factor they grow if they do not hold the nucleus: a trained model's mostly
# fits in the first, and sorting 262,144 logits per row would dominate
FIRST_LOOK, WIDER = 64, 16
RACED_AT_ONCE = 2**21  # logits; a draw from a whole vocabulary takes 60 bytes each, 16 MB per row of 262,144


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


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Hash int64 with the finaliser of splitmix64 (Steele et al., 2014).

    Every input bit flips half the output bits.
    """
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = _fold(x, shift).mul_(factor)
    return _fold(x, 31)


def _fold(x: torch.Tensor, shift: int) -> torch.Tensor:
    """Compute x ^ (x >> shift), unsigned: >> extends the sign, so the new bits are masked off.

    In place, on one copy; several copies take half as long again.
    """
    return (x >> shift).bitwise_and_((1 << (64 - shift)) - 1).bitwise_xor_(x)


def gumbel(keys: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Draw Gumbel noise (B, K) in float64.

    keys (B,), positions (B,) and token_ids (B, K) or (K,) are int64.
    """
    bits = _mix(_mix(keys + positions * -0x61C8864680B583EB)[:, None] + token_ids * -0x2917014799A6026D)
    u = (bits >> 12).bitwise_and_((1 << 52) - 1).double().add_(0.5).div_(1 << 52)  # exact, so never 0 or 1
    return u.log_().neg_().log_().neg_()


def _candidates(logits: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the candidates' ids, (B, K) or (K,), and logits, (B, K); those cut off have the logit -inf."""
    V = logits.shape[-1]
    logits = logits / params.temperature
    if not params.top_k and params.top_p == 1:
        return torch.arange(V, device=logits.device), logits
    K = min(params.top_k or FIRST_LOOK, V)
    while True:
        values, token_ids = logits.topk(K, dim=-1)
        # minus the largest: half the passes of logsumexp
        shifted = (values if params.top_k else logits) - values[:, :1]
        # e^-80 is as good as 0 in a sum that contains a 1, and a CPU takes sixty times as long for results
        # below 1e-38
        probabilities = (values - values[:, :1]).exp() / shifted.clamp_(min=-80).exp_().sum(-1, keepdim=True)
        before = probabilities.cumsum(-1) - probabilities
        if K == V or params.top_k or bool((before[:, -1] >= params.top_p).all()):
            break
        K = min(K * WIDER, V)  # a flatter distribution, whose nucleus is larger
    return token_ids, values.masked_fill(before >= params.top_p, -torch.inf)


def sample(
    logits: torch.Tensor, params: SamplingParams, keys: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row. Return (token ids (B,) int64, log-probs (B,) fp32).

    The log-probs are those of the distribution that was sampled.

    logits: (B, V) fp32. keys, positions: (B,) int64, each sample's random stream and the number of tokens
    that it has. Greedy decoding (temperature 0) returns the log-probs of the model's own distribution.
    """
    if params.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)

    at_once = max(RACED_AT_ONCE // logits.shape[-1], 1)
    whole_vocabulary = params.top_p == 1 and not params.top_k
    if whole_vocabulary and len(logits) > at_once:
        parts = zip(*(x.split(at_once) for x in (logits, keys, positions)), strict=True)
        tokens, logprobs = zip(*(sample(some, params, *streams) for some, *streams in parts), strict=True)
        return torch.cat(tokens), torch.cat(logprobs)

    token_ids, kept = _candidates(logits, params)
    # drawn before they are normalised: how many candidates the other rows of the batch need cannot change a
    # draw
    winner = (kept + gumbel(keys, positions, token_ids)).argmax(-1, keepdim=True)
    tokens = token_ids.expand_as(kept).gather(-1, winner).squeeze(-1)
    return tokens, kept.log_softmax(-1).gather(-1, winner).squeeze(-1)


def finite(logprobs: list[float]) -> list[float]:
    """Return log-probs of drawn tokens unchanged. Raises ValueError if one is NaN or infinite.

    A NaN or +inf among a row's logits makes the log-prob of its token NaN. The numbers are in Python already,
    so a card does not wait for this.
    """
    if not all(map(math.isfinite, logprobs)):
        count = sum(not math.isfinite(logprob) for logprob in logprobs)
        raise ValueError(
            f"the model's logits are NaN or infinite for {count} of {len(logprobs)} responses, so its tokens "
            "mean nothing. If its weights are finite, a sum overflows: load it in float32 or bfloat16; after "
            "training, go back to an earlier checkpoint and lower --lr"
        )
    return logprobs
