"""
Draw one token per row of logits: temperature, random numbers, argmax and log-prob in one pass.

    z[n, v]    = logits[n, v] / temperature
    u[n, v]    = (52 bits of a hash of (key_n, position_n, v) + 1/2) / 2^52
    token[n]   = argmax_v(z[n, v] - log(-log u[n, v]))          over the tokens that are kept
    logprob[n] = z[n, token] - logsumexp_v(z[n, v])             over the same

Gumbel noise g = -log(-log u) makes v win with probability softmax(z)[v] (Gumbel, 1954). Because u is a hash,
a stream has no state: a draw depends neither on its row nor on what was drawn before.

top_k keeps the tokens whose z is at least the k-th largest. top_p then keeps a token if those above it have
less than top_p of the probability that is left. Tokens with equal z are kept together, so what is kept does
not depend on how a device sorts. Temperature 0 takes the first of the largest and cuts nothing.

How it works. The race kernel reads the logits once, one program per row and BLOCK_V columns. It stores three
numbers per tile: the largest z, the sum of exp(z - largest), and the best of z + g with g roughly, in fp32.
The join kernel, one program per row, adds up the sums and draws again, in float64 as a CPU does, among the
tiles whose rough result is within rounding of the best: nearly always one. So a consumer card, where float64
takes 64 times as long, computes it for one tile per row, and the token is the CPU's. With top_k or top_p a
cut kernel first finds the smallest z that is kept, from torch.topk's first CANDIDATES; if they do not hold
top_p, it bisects over all logits of the row, on the device: the host waits for nothing.

Two devices draw the same token from the same logits, unless two sums differ by less than float64's rounding,
or the probability above a token is top_p to the last bit of fp32. There are no atomics, so the bits repeat.

64 rows, V = 151,936, bf16: the logits are 18.5 MiB, and are read once, with 8 KiB per row a second time. With
top_k or top_p the kernels read them twice, after torch.topk. In torch, a draw from whole rows takes 43
operations and 60 bytes per logit.
"""

import torch
from torch import Tensor

from kit.kernels.backend import triton, uses_triton
from kit.kernels.gumbel_tiles import _cut_kernel, _join_kernel, _race_kernel

# How many logits per row are sorted to find the nucleus, and on a CPU by what factor they grow if they do not
# hold it. A trained model's mostly fits in the first, and sorting 262,144 logits per row would dominate.
CANDIDATES, WIDER = 64, 16
RACED_AT_ONCE = 2**21  # logits on a CPU; a draw from a whole vocabulary takes 60 bytes each, 16 MB per row
BLOCK_V = 4096  # columns per tile: 16 per thread, which are two 16-byte loads of bf16
NUM_WARPS = 8


def _mix(x: Tensor) -> Tensor:
    """Hash int64 with the finaliser of splitmix64 (Steele et al., 2014).

    Every input bit flips half the output bits.
    """
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = _fold(x, shift).mul_(factor)
    return _fold(x, 31)


def _fold(x: Tensor, shift: int) -> Tensor:
    """Compute x ^ (x >> shift), unsigned: >> extends the sign, so the new bits are masked off.

    In place, on one copy; several copies take half as long again.
    """
    return (x >> shift).bitwise_and_((1 << (64 - shift)) - 1).bitwise_xor_(x)


def gumbel(keys: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Draw Gumbel noise (B, K) in float64.

    keys (B,), positions (B,) and token_ids (B, K) or (K,) are int64.
    """
    bits = _mix(_mix(keys + positions * -0x61C8864680B583EB)[:, None] + token_ids * -0x2917014799A6026D)
    u = (bits >> 12).bitwise_and_((1 << 52) - 1).double().add_(0.5).div_(1 << 52)  # exact, so never 0 or 1
    return u.log_().neg_().log_().neg_()


def draw_reference(logits, keys, positions, *, temperature=1.0, top_k=0, top_p=1.0):
    """Compute the same in plain torch: what this file means, what a CPU runs, and what tests compare with."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)

    at_once = max(RACED_AT_ONCE // logits.shape[-1], 1)
    if top_p == 1 and not top_k and len(logits) > at_once:
        parts = zip(*(x.split(at_once) for x in (logits, keys, positions)), strict=True)
        drawn = (draw_reference(*part, temperature=temperature) for part in parts)
        tokens, logprobs = zip(*drawn, strict=True)
        return torch.cat(tokens), torch.cat(logprobs)

    token_ids, kept = _candidates(logits / temperature, top_k, top_p)
    # drawn before they are normalised: how many candidates the other rows of the batch need cannot change a
    # draw
    winner = (kept + gumbel(keys, positions, token_ids)).argmax(-1, keepdim=True)
    tokens = token_ids.expand_as(kept).gather(-1, winner).squeeze(-1)
    return tokens, kept.log_softmax(-1).gather(-1, winner).squeeze(-1)


def _candidates(z: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the candidates' ids, (B, K) or (K,), and scaled logits, (B, K); -inf for those cut off."""
    V = z.shape[-1]
    if not top_k and top_p == 1:
        return torch.arange(V, device=z.device), z
    K = min(top_k + 1 if top_k else CANDIDATES, V)  # one more than top_k shows whether the k-th has equals
    while True:
        values, token_ids = z.topk(K, dim=-1)
        last = values[:, -1:]
        if top_k:
            floor = values[:, min(top_k, V) - 1, None]
            values = values.masked_fill(values < floor, -torch.inf)
        # minus the largest: half the passes of logsumexp
        shifted = (values if top_k else z) - values[:, :1]
        # e^-80 is as good as 0 in a sum that contains a 1, and a CPU takes sixty times as long for results
        # below 1e-38
        probabilities = (values - values[:, :1]).exp() / shifted.clamp_(min=-80).exp_().sum(-1, keepdim=True)
        above = probabilities.cumsum(-1) - probabilities
        threshold = values.masked_fill(above >= top_p, torch.inf).amin(-1, keepdim=True)
        if K == V or bool((last < (floor if top_k else threshold)).all()):
            return token_ids, values.masked_fill(values < threshold, -torch.inf)
        K = min(K * WIDER, V)  # a flatter distribution, whose nucleus is larger, or many equals


@torch.library.custom_op("kit::draw", mutates_args=())
def _draw(
    logits: Tensor, keys: Tensor, positions: Tensor, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """Return (tokens, log-probs) of logits (N, V) whose columns lie side by side."""
    if not uses_triton(logits):
        return draw_reference(logits, keys, positions, temperature=temperature, top_k=top_k, top_p=top_p)
    N, V = logits.shape
    tokens, logprobs = keys.new_empty(N), logits.new_empty(N, dtype=torch.float32)
    if not N:
        return tokens, logprobs

    noise = float(temperature != 0)
    temperature, top_k = temperature or 1.0, top_k if top_k < V else 0
    tiles, stride, threshold = triton.cdiv(V, BLOCK_V), logits.stride(0), None
    parts = logits.new_empty(3, N, tiles, dtype=torch.float32)
    with torch.cuda.device_of(logits):
        if noise and (top_k or top_p < 1):
            threshold = torch.empty_like(logprobs)
            values = logits.topk(min(top_k or CANDIDATES, V)).values  # (N, K)
            sizes = stride, V, values.shape[1], top_k, temperature, top_p, BLOCK_V, CANDIDATES
            _cut_kernel[(N,)](logits, values, threshold, *sizes, num_warps=NUM_WARPS)
        streams = logits, keys, positions, threshold, parts
        _race_kernel[(N, tiles)](*streams, stride, V, temperature, noise, BLOCK_V, num_warps=NUM_WARPS)
        sizes = stride, V, tiles, temperature, noise, BLOCK_V, triton.next_power_of_2(tiles)
        _join_kernel[(N,)](*streams, tokens, logprobs, *sizes, num_warps=NUM_WARPS)
    return tokens, logprobs


@_draw.register_fake
def _(logits, keys, positions, temperature, top_k, top_p):
    N, wide = logits.shape[0], torch.promote_types(logits.dtype, torch.float32)
    return keys.new_empty(N), logits.new_empty(N, dtype=wide)


def draw(
    logits: Tensor,
    keys: Tensor,
    positions: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Draw one token per row. Return (tokens (B,) int64, their log-probs (B,) fp32).

    logits: (B, V), any floating dtype. keys, positions: (B,) int64, each row's random stream and its place in
    it. temperature: 0 = greedy, with the log-probs of the model's own distribution; otherwise the log-probs
    are those of the distribution that was sampled. top_k: 0 = off. top_p: 1 = off. A NaN or +inf in a row
    makes its log-prob NaN or infinite, and its token meaningless, but >= 0 and < V.

    Raises ValueError for shapes, dtypes and devices that do not fit, and for settings out of range.
    """
    if logits.dim() != 2 or not logits.shape[1] or not logits.is_floating_point():
        raise ValueError(
            f"logits are {logits.dtype} of shape {tuple(logits.shape)}; needed are floating (B, V), V >= 1"
        )
    for name, x in (("keys", keys), ("positions", positions)):
        if x.shape != logits.shape[:1] or x.dtype != torch.int64 or x.device != logits.device:
            raise ValueError(
                f"{name} is {x.dtype} of shape {tuple(x.shape)} on {x.device}, but logits has "
                f"{len(logits)} rows on {logits.device}; pass one int64 per row, on the same device"
            )
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature is {temperature}, top_k {top_k} and top_p {top_p}; needed are >= 0, >= 0 and a "
            "top_p > 0 and <= 1"
        )
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    if not uses_triton(logits):  # directly: an operator's call takes a CPU as long as a small draw
        return draw_reference(logits, keys, positions, **settings)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    return _draw(logits, keys.contiguous(), positions.contiguous(), **settings)
