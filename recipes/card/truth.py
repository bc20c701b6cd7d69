"""Every kernel against float64, with unwritten outputs visible as NaN."""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
from torch import Tensor

from kit.kernels.adamw8bit import adamw8bit_, init_state
from kit.kernels.cross_entropy import cross_entropy, cross_entropy_reference
from kit.kernels.linear_cross_entropy_rows import block_gradients_, row_gradients_, row_logprobs
from kit.packing import IGNORE_INDEX, Document, PackedBatch, pack_rows
from kit.recipes.card import truth_attention, truth_decode, truth_draw, truth_head, truth_layers
from kit.recipes.card.compare import (
    DTYPES,
    ROUNDING,
    beside_float64,
    judge,
    judge_equal,
    name_of,
    normal,
    poisoned,
    rms,
)
from kit.recipes.card.results import Card, Results

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def run(results: Results, card: Card) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    with results.case("poison"), poisoned():
        first = torch.empty(8, device=card.device)
        fresh = torch.cat([first, first.new_empty(8), torch.empty_like(first)])
        results.check("poison: fresh memory is NaN", bool(fresh.isnan().all()))
    with results.case("attention"):
        truth_attention.run(results, card)
    with results.case("decode attention"):
        truth_decode.run(results, card)
    if not card.arch:  # most of a linear head is cuBLAS, which Triton's target does not change
        truth_head.run(results, card)
    check_rows(results, card)
    truth_layers.run(results, card)
    truth_draw.run(results, card)
    if card.arch:
        with results.case("PTX"):
            truth_attention.check_ptx(results, card)
        return

    check_cross_entropy(results, card)
    check_packing(results, card)
    check_adamw(results, card)


def plain_rows(logits, targets, inv_temperature, softcap, dtype) -> tuple[Tensor, ...]:
    """Return log-prob, entropy, logsumexp, gradient of -log-prob (in the logits' dtype, or in float64)."""
    z = logits.to(dtype)
    slope = torch.full_like(z, inv_temperature)
    if softcap:
        capped = torch.tanh(z / softcap)
        z, slope = softcap * capped, slope * (1 - capped * capped)
    z = z * inv_temperature
    logprobs = z.log_softmax(1)
    p = logprobs.exp()
    entropy = -(p * logprobs).sum(1)
    gradient = p.scatter_add(1, targets[:, None], p.new_full((len(z), 1), -1.0)).mul_(slope)
    gradient = gradient if dtype == FP64 else gradient.to(logits.dtype)
    return logprobs.gather(1, targets[:, None])[:, 0], entropy, z.logsumexp(1), gradient


def check_rows(results: Results, card: Card) -> None:
    """Check log-prob, entropy and gradient of rows, and the gradient of a block of columns."""
    vocabularies = (530, 77) if card.small else (262_144, 128_257)  # a multiple of 16, and not
    cases = list(product(DTYPES, vocabularies, ((0.7, 30.0), (1.0, 0.0))))
    for dtype, V, (temperature, softcap) in cases[:: 3 if card.quick else 1]:
        name = f"rows of logits {name_of(dtype)} V = {V:,} temperature {temperature} softcap {softcap:g}"
        results.run(name, check_row_kernels, dtype, V, 1 / temperature, softcap, seconds=2)
    card.free()


def check_row_kernels(results, card, name, dtype, V, inv_temperature, softcap) -> None:
    R = 6 if card.small else 200
    torch.manual_seed(2)
    logits, targets = normal(card, R, V, dtype=dtype, scale=3.0), torch.randint(V, (R,), device=card.device)
    targets[0], targets[1] = 0, V - 1
    score = inv_temperature, softcap
    truth, torchs = (plain_rows(logits, targets, *score, wide) for wide in (FP64, FP32))

    with poisoned():
        logprobs, entropy = row_logprobs(logits.clone(), targets, *score)
        gradient = logits.clone()
        again = row_gradients_(gradient, targets, *score)
        columns = slice(V // 3 // 16 * 16, V // 3 // 16 * 16 + V // 2)
        block = logits[:, columns].contiguous()
        block_gradients_(block, targets, truth[2].float(), columns.start, *score)

    logprob_floor = ROUNDING * truth[0].abs().max().item()
    eps = torch.finfo(dtype).eps
    if dtype == FP32:
        eps *= 16  # exp of an fp32 number near -16 has lost four bits
    labels = "logprob", "logprob with gradient", "entropy", "gradient", "block"
    ours = logprobs, again, entropy, gradient, block
    torchs, truth = ((x[0], x[0], x[1], x[3], x[3][:, columns]) for x in (torchs, truth))
    floors = [logprob_floor, logprob_floor, 2 * logprob_floor, *(eps * rms(x) + 1e-8 for x in truth[3:])]
    judge(results, name, labels, ours, torchs, truth, floors)


def check_cross_entropy(results: Results, card: Card) -> None:
    for dtype, reduction in list(product(DTYPES, ("mean", "none")))[:: 3 if card.quick else 1]:
        results.run(f"cross_entropy {name_of(dtype)} {reduction}", check_loss, dtype, reduction, seconds=2)
    card.free()


def check_loss(results: Results, card: Card, name: str, dtype: torch.dtype, reduction: str) -> None:
    """Check the loss of given logits and the gradient written over them."""
    N, V = (30, 530) if card.small else (200, 262_144)
    torch.manual_seed(1)
    logits, targets = normal(card, N, V, dtype=dtype, scale=2.0), torch.randint(V, (N,), device=card.device)
    targets[::7] = IGNORE_INDEX
    both = (
        partial(f, targets=targets, reduction=reduction) for f in (cross_entropy, cross_entropy_reference)
    )
    sides = beside_float64(*both, [logits])
    floors = ROUNDING * rms(sides[2][0]), torch.finfo(dtype).eps * rms(sides[2][1])
    judge(results, name, ("loss", "dlogits"), *sides, floors)


def check_packing(results: Results, card: Card) -> None:
    """Check the rows of a step packed on the card against PackedBatch.build on the CPU, bit for bit."""
    torch.manual_seed(4)
    lengths = torch.randint(1, 30 if card.small else 900, (40,)).tolist()
    for dtype in (torch.int32, torch.int64):
        name = f"pack {dtype}"
        with results.case(name):
            documents = [Document(torch.randint(3, 250_000, (n,), dtype=dtype), n // 3) for n in lengths]
            rows = [documents[:1], documents[1:8], documents[8:]]
            with poisoned():
                found = pack_rows(rows, card.device)
            pairs = {
                f"row {i}, {tensor}": (getattr(ours, tensor).cpu(), getattr(expected, tensor))
                for i, (ours, expected) in enumerate(zip(found, map(PackedBatch.build, rows), strict=True))
                for tensor in PackedBatch.TENSORS
            }
            judge_equal(results, name, pairs)
    card.free()


def check_adamw(results: Results, card: Card) -> None:
    """Check AdamW8bit against its CPU path, and that steps far smaller than a weight's last bit add up."""
    pairs = [(BF16, BF16), (FP32, BF16), (BF16, FP32), (FP32, FP32)]
    cases = [(BF16, BF16, True), *((*pair, False) for pair in pairs)]
    for dtype, gradient_dtype, exact in cases[: 3 if card.quick else None]:
        weight = "exact " * exact + name_of(dtype)
        name = f"adamw8bit {weight} weights {name_of(gradient_dtype)} gradients beside the CPU"
        with results.case(name):
            N = 3_001 if card.small else 1_000_003
            torch.manual_seed(6)
            weights = (0.02 * torch.randn(N)).to(dtype)
            gradients = (1e-3 * torch.exp(torch.randn(N)) * torch.randn(3, N)).to(gradient_dtype)
            gradients[:, ::10] = 0
            expected = step_three_times(weights, gradients, torch.device("cpu"), exact)
            found = step_three_times(weights, gradients, card.device, exact)
            pairs = {label: (x.cpu(), expected[label]) for label, x in found.items()}
            judge_equal(results, name, pairs, share=1e-5)  # a root's last bit may decide between two codes

    name = "adamw8bit, 1,000 steps of 1e-5 on bf16 weights near 0.02"
    with results.case(name):
        N, steps, lr = (512, 20, 1e-5) if card.small else (1_000_000, 1000, 1e-5)
        weights = torch.full((N,), 0.02, dtype=BF16, device=card.device)
        gradient = torch.full_like(weights, -1e-3)
        start, state = weights.double().mean().item(), init_state(weights)
        for step in range(1, steps + 1):
            adamw8bit_(weights, gradient, state, step=step, lr=lr, seed=2)
        moved = (weights.double().mean().item() - start) / (steps * lr)
        limit = 0.5 if card.small else 0.02  # a few hundred weights move by chance
        results.check(name, abs(moved - 1) <= limit, f"moved {moved:.4f} of the way", moved=moved)


def step_three_times(
    weights: Tensor, gradients: Tensor, device: torch.device, exact: bool
) -> dict[str, Tensor]:
    """Return the weights and their state after three updates on the device."""
    weights = weights.clone().to(device)
    state = init_state(weights, exact=exact)
    options = {"lr": 1e-3, "seed": 1, "index": 3, "weight_decay": 0.1, "gradient_scale": 0.7}
    for step, gradient in enumerate(gradients, 1):
        adamw8bit_(weights, gradient.to(device), state, step=step, **options)
    return {"weights": weights, **state}
