"""
Bytes moved, flops and launches of a loss, forward and backward, ours and the peers': formulas and a table.
Beside it, the bytes of decode attention.

    python recipes/bench/kernel_traffic.py                 three models, 16,384 tokens, bf16
    python recipes/bench/kernel_traffic.py --ignored 0.1   a tenth of the targets are ignored

The unfused loss is counted on fake tensors; counting.py says what a count is: no cache between two kernels,
and no time. Each formula is exact in its launches and in every term with V or H in it; bytes of vectors, one
number per row, are left out. tests/recipes/test_kernel_traffic.py compares them with counts of real calls at
small shapes. K of N rows have a target that counts; e = bytes per element.

If a peer's code works differently on a GPU than on the CPU where it is counted, or cannot run on a CPU, the
formula comes from its source, and its docstring says so.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from functools import partial

import torch
from counting import Count, Counter
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.loss.loss_utils import ForCausalLMLoss

from kit.config import Checked, parse
from kit.kernels import decode_attention
from kit.kernels.linear_cross_entropy_chunks import COPIED_ELEMENTS, halves, rows_per_chunk

WIDE = 4  # bytes of an fp32 number


@dataclass(frozen=True)
class Loss:
    """Sizes of one loss."""

    N: int  # rows
    K: int  # of them with a target that counts
    V: int
    H: int
    dtype: torch.dtype

    @property
    def e(self) -> int:
        return self.dtype.itemsize


def ours(loss: Loss, *, scaled: bool = True) -> dict[str, Count]:
    """Count kit.kernels.linear_cross_entropy.

    scaled: whether backward multiplies the gradients, as it always does on a GPU; a CPU skips a factor of 1.
    """
    N, K, V, H, e = loss.N, loss.K, loss.V, loss.H, loss.e
    chunks = math.ceil(K / rows_per_chunk(K, V, H, e)) if K else 0
    held = WIDE if loss.dtype == torch.float16 else e  # bytes per element of gradients until backward
    parts = 2 if loss.dtype == torch.bfloat16 else 1  # of the sum of dW
    X, L, W = K * H * e, K * V * e, V * H * e
    rescaled = Count(2, N * H * held + V * H * held, N * H * held + V * H * held) if scaled else Count()
    cast = Count()  # from the fp32 sum of dW; fp16's gradients are cast after backward has scaled them
    if loss.dtype == torch.float16:
        cast = Count(2, (N + V) * H * WIDE, (N + V) * H * e)
    elif e < WIDE:  # in the memory of the first half, in steps that double in size
        first = halves(V)[0] * H
        copied = min(COPIED_ELEMENTS, first)
        steps = math.ceil(math.log2(first / copied))
        cast = Count(3 + steps, V * H * WIDE + copied * e, V * H * e + copied * e)
    widened = Count(chunks, X, K * H * held) if held != e else Count()
    # divided by D, copied, zeros elsewhere
    scattered = Count(2 * chunks + 1, 2 * K * H * held, 2 * K * H * held + N * H * held)
    sums = max(chunks - 1, 0) * V * H * WIDE  # read again by every chunk but the first
    return {
        "logits": Count(2 * chunks, 2 * X + chunks * W, X + L, 2 * K * V * H),  # the rows are gathered first
        "row kernel": Count(chunks, 2 * L, L),
        "dX": Count(chunks, L + chunks * W, X, 2 * K * V * H) + widened + scattered,
        "dW": Count(parts * (chunks or 1), L + parts * X + sums, (chunks or 1) * V * H * WIDE, 2 * K * V * H),
        "hand over": cast + rescaled,
        "vectors": Count(4 * chunks + 7),
    }


def unfused(loss: Loss) -> Count:
    """Count transformers' operators: lm_head, then ForCausalLMLoss. Ignored rows are computed too."""
    with FakeTensorMode():
        matrix = partial(torch.empty, dtype=loss.dtype, requires_grad=True)
        hidden, weight = matrix(loss.N, loss.H), matrix(loss.V, loss.H)
        targets, upstream = torch.empty(loss.N, dtype=torch.int64), torch.ones(())
        with Counter() as counter:
            ForCausalLMLoss(hidden @ weight.T, None, loss.V, shift_labels=targets).backward(upstream)
    return counter.total


def liger(loss: Loss, *, on_gpu: bool = True, scaled: bool = False) -> dict[str, Count]:
    """Count liger-kernel 0.8.5, fused_linear_cross_entropy with its defaults: dW is summed in the weight's
    dtype.

    on_gpu: on a GPU of compute capability 8 or later it calls mm(out=) and addmm(out=), elsewhere a product
    and an addition. Only the latter can be counted on a CPU; the former, which moves less, is from its
    source.
    scaled: backward multiplies the gradients if the upstream gradient is not 1.
    """
    N, K, V, H, e = loss.N, loss.K, loss.V, loss.H, loss.e
    rows = math.ceil(N / math.ceil(V / H))  # of a chunk: about as many logits as hidden states
    chunks = math.ceil(N / min(1 << (rows - 1).bit_length(), N))
    X, L, W = N * H * e, N * V * e, V * H * e
    if on_gpu:
        dX, dW = Count(), Count(chunks, L + X + chunks * W, chunks * W, 2 * N * V * H)
    else:
        cast = Count(chunks, chunks * W, chunks * V * H * WIDE) if e < WIDE else Count()
        dX = Count(chunks, X, X)
        dW = Count(2 * chunks, L + X + chunks * (W + V * H * WIDE), 2 * chunks * W, 2 * N * V * H) + cast
    return {
        "zeros": Count(2, 0, X + W),
        "logits": Count(chunks, X + chunks * W, L, 2 * N * V * H),
        # ignored rows are not read, but overwritten with zeros
        "row kernel": Count(chunks, 2 * K * V * e, L),
        "dX": Count(chunks, L + chunks * W, X, 2 * N * V * H) + dX,
        "dW": dW,
        "hand over": Count(2, X + W, X + W) if scaled else Count(),
        "vectors": Count(5),
    }


def total(terms: dict[str, Count]) -> Count:
    return sum(terms.values(), Count())


def decode_bytes(
    lengths: list[int], W: int, heads: tuple[int, int, int], e: int, window: int | None = None
) -> Count:
    """Count kit.kernels.decode_attention in one layer, without flops. heads: Hq, Hkv, D. W: places of a row.

    Keys and values are those that the rows see, whatever the longest row is. Every program loads its row's
    length, those past the row's end too.
    """
    Hq, Hkv, D = heads
    largest = min(window or W, W)
    split_keys, num_splits = decode_attention.splits(largest)
    seen = [max(min(length, largest), 0) for length in lengths]
    used = sum(math.ceil(keys / split_keys) for keys in seen)  # splits
    parts = used * Hq * (D + 1) * WIDE
    int64 = 8 * len(lengths) * (Hkv * num_splits + Hq)
    loaded = 2 * sum(seen) * Hkv * D * e + used * Hq * D * e + parts + int64
    return Count(2, loaded, parts + len(lengths) * Hq * D * e)


MODELS = {
    "Gemma-3-1B": (262_144, 1_152),
    "Qwen2.5-3B": (151_936, 2_048),
    "Llama-3.2-3B": (128_256, 3_072),
}  # V, H


@dataclass(frozen=True)
class Config(Checked):
    num_tokens: int = 16_384  # N [>= 1]
    ignored: float = 0.0  # share of the targets that are ignored [>= 0, < 1]


def main(config: Config) -> list[dict]:
    """Print and return one row per model and implementation, in bf16; ratio = bytes / ours."""
    N, rows = config.num_tokens, []
    print(f"Linear cross-entropy, forward and backward, N = {N:,} ({config.ignored:.0%} ignored), bf16.")
    print("Counted, not timed: tests compare the formulas with counts at small shapes; ratio = bytes / ours.")
    for model, (V, H) in MODELS.items():
        print(f"\n{model}: V = {V:,}, H = {H:,}")
        print(f"    {'':<36}{'GB':>9}{'ratio':>8}{'Tflop':>9}{'launches':>10}")
        loss = Loss(N, N - round(config.ignored * N), V, H, torch.bfloat16)
        counts = {"ours": total(ours(loss)), "unfused, as transformers": unfused(loss)}
        for name, count in (counts | {"Liger": total(liger(loss))}).items():
            gigabytes, teraflops = count.bytes / 1e9, count.flops / 1e12
            row = {"model": model, "name": name, "launches": count.launches, "gigabytes": gigabytes}
            row |= {"ratio": count.bytes / counts["ours"].bytes, "teraflops": teraflops}
            figures = "{gigabytes:>9.1f}{ratio:>8.2f}{teraflops:>9.1f}{launches:>10,}".format(**row)
            print(f"    {name:<36}{figures}")
            rows.append(row)
    if not importlib.util.find_spec("liger_kernel"):
        print("\nLiger: liger_kernel is not installed here, so its formula was not checked on this machine")
    _show_decoding()
    return rows


def _show_decoding() -> None:
    heads, W, uneven = (14, 2, 64), 16_384, [16_000] + [200] * 31
    print(f"\nDecode attention, one layer of Qwen2.5-0.5B in bf16, 32 rows of {W:,} places")
    for name, lengths in (
        ("[200] x 32", [200] * 32),
        ("[16,000] + [200] x 31", uneven),
        ("the same, each row read as far as the longest", [max(uneven)] * 32),
    ):
        print(f"    {decode_bytes(lengths, W, heads, 2).bytes / 1e6:>9.1f} MB  {name}")


if __name__ == "__main__":
    main(parse(Config))
