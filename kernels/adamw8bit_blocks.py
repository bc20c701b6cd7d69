"""
Numbers of an optimizer state as 8-bit codes, in blocks of 256 that share a scale, and their random bits.

    x = scale * (code / L)^4     scale = the block's largest |x|, fp32     L = 127 and a sign, or 255

A number between two codes goes up with the probability that makes the mean exact. To nearest, an exponential
mean of small changes would never move: with beta2 = 0.999 v falls by 0.1 % per step, and codes are 0.8 % to
20 % apart. The random bits are a hash of (key, element): they need no state, and they depend neither on a
resume, nor on the launch, nor on the device. The torch functions return the Triton functions' bits.
kernels/adamw8bit.py is the optimizer that uses them, m with L = 127 and sqrt(v) with L = 255.
"""

import torch
from torch import Tensor

from kit.kernels.backend import tl, triton

BLOCK = 256  # numbers per scale: 1.6 % more bytes than the codes alone; one warp's 16-byte loads of bf16
M_LEVELS, V_LEVELS = 127, 255  # the largest int8 and uint8
# Why the power 4, and the root of v. Relative error of the update against float64 AdamW after 3,000 steps, if
# the scales of a block's gradients are log-normal with sigma 0.7 / 2.0 and all is rounded stochastically:
# power 2 of sqrt(v) 0.09 / 0.85; power 4 of sqrt(v) 0.10 / 0.22; power 4 of v 0.10 / 0.61; the bits of an fp8
# number (E4M3, E5M3 for v) 0.15 / 0.18. Rounded to nearest it is 0.08 / 0.17, and 0.10 / 0.40 with the tables
# of bitsandbytes. But if half of a block's gradients fall to 3 %, rounding to nearest leaves v 25 times too
# large 2,000 steps later (those tables: 10), and the weights are 61 % (51 %) off; stochastically: 17 %.


@triton.jit
def random_bits(key, element):
    """Hash key + element * the golden ratio to an int64: splitmix64's finaliser (Steele et al., 2014)."""
    x = element * -0x61C8864680B583EB + key
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47  # >> keeps the sign: mask it off
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def level(code, LEVELS: tl.constexpr):
    """Return (code / L)^4."""
    root = code * (1.0 / LEVELS)
    square = root * root
    return square * square


@triton.jit
def largest(x):
    """Return the largest |x| of every row, compared as integers: an fp32 maximum would drop a NaN."""
    return tl.max(tl.abs(x).to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)


@triton.jit
def encode(x, scale, random, LEVELS: tl.constexpr):
    """Return the codes, as fp32, of x >= 0; 0 where the scale is 0, infinite or NaN. random: 24 bits."""
    usable = (scale > 0) & (scale < float("inf"))
    x = tl.where(usable, tl.div_rn(x, tl.where(usable, scale, 1.0)), 0.0)
    lower = tl.minimum(tl.floor(tl.sqrt_rn(tl.sqrt_rn(x)) * LEVELS), LEVELS - 1)
    low = level(lower, LEVELS)
    gap = level(lower + 1, LEVELS) - low
    u = random.to(tl.float32) * (1.0 / (1 << 24))
    return lower + tl.where(u * gap < x - low, 1.0, 0.0)


def torch_random_bits(key: int, first: int, count: int, device) -> Tensor:
    """Return random_bits of elements first .. first + count - 1, (count / BLOCK, BLOCK) int64."""
    x = torch.arange(first, first + count, device=device).mul_(-0x61C8864680B583EB).add_(key)
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
    return x.view(-1, BLOCK)


def torch_level(code: Tensor, levels: int) -> Tensor:
    return (code * (1.0 / levels)).square_().square_()


def torch_encode(x: Tensor, scale: Tensor, random: Tensor, levels: int) -> Tensor:
    """Encode as encode does, in torch; overwrites x."""
    usable = (scale > 0) & (scale < torch.inf)
    x = x.div_(scale.where(usable, 1.0)).masked_fill_(~usable, 0.0)
    lower = x.sqrt().sqrt_().mul_(levels).floor_().clamp_(max=levels - 1)
    low = torch_level(lower, levels)
    gap = torch_level(lower + 1, levels).sub_(low)
    return lower.add_(random.float().mul_(1.0 / (1 << 24)).mul_(gap).lt(x.sub_(low)))


def in_blocks(x: Tensor, dtype=torch.float32) -> Tensor:
    """Reshape (n,) to (blocks, BLOCK); the last block is filled up with zeros."""
    x, missing = x.to(dtype), -len(x) % BLOCK
    return (torch.nn.functional.pad(x, (0, missing)) if missing else x).view(-1, BLOCK)
