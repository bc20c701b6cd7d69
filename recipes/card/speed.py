"""Kernels beside the peers that are installed, and beside two limits of the card: copying and multiplying."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kit.kernels.adamw8bit import adamw8bit_, init_state
from kit.kernels.gumbel import draw, draw_reference
from kit.kernels.linear_cross_entropy import linear_cross_entropy
from kit.kernels.linear_cross_entropy_rows import row_gradients_, row_logprobs
from kit.machine import GIB
from kit.recipes.card import speed_attention, speed_decode
from kit.recipes.card.compare import attempt, normal
from kit.recipes.card.memory import held_gib, measured
from kit.recipes.card.peers import cce, liger, three_matmuls
from kit.recipes.card.results import Card, Results
from kit.recipes.card.timing import Limits, claim, measure_limits, milliseconds

HEADS = {  # model -> V, H. quick takes the first
    "Gemma-3-1B": (262_144, 1152),
    "Qwen2.5-1.5B": (151_936, 1536),
    "Llama-3.2-3B": (128_256, 3072),
}
CHUNK = 1024  # rows of logits at once, in the matmuls alone and in torch's loss
MATMULS = "its three matmuls"
NEED_A_CARD = "bitsandbytes", "Liger", "CCE", "CCE exact"


def run(results: Results, card: Card) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    limits = measure_limits(results, card)
    for name, measure in (("row kernel", time_rows), ("drawing", time_draw), ("AdamW8bit", time_adamw)):
        with results.case(name):
            results.need(seconds=5)
            measure(results, card, limits)
        card.free()
    with results.case("attention"):
        speed_attention.run(results, card, limits)
    with results.case("decode attention"):
        speed_decode.run(results, card, limits)
    time_losses(results, card, limits)


def time_rows(results: Results, card: Card, limits: Limits) -> None:
    """Time a chunk of logits becoming its gradient, which is read twice and written once."""
    R, V = (8, 600) if card.small else (1024, 262_144)
    logits, targets = normal(card, R, V), torch.randint(V, (R,), device=card.device)
    gbs = {}
    for label, moved, call in (
        ("log-prob", 1, lambda: row_logprobs(logits, targets, 1.0, 0.0)),
        ("gradient", 3, lambda: row_gradients_(logits, targets, 1.0, 0.0)),
        ("gradient with softcap", 3, lambda: row_gradients_(logits, targets, 1.0, 30.0)),
    ):
        gbs[label] = moved * logits.nbytes / milliseconds(card, call) / 1e6

    share = gbs["gradient"] / limits.copy_gbs
    text = ", ".join(f"{label} {rate:,.0f} GB/s" for label, rate in gbs.items())
    claim(results, card, "row kernel: 75 % of copy bandwidth", share >= 0.75, f"{share:.0%}; {text}", gbs=gbs)


def time_draw(results: Results, card: Card, limits: Limits) -> None:
    """Time drawing a token in each of 64 rows, beside the same in torch's operators."""
    rows, V = (4, 600) if card.small else (64, 151_936)
    logits = normal(card, rows, V, scale=3.0)
    streams = torch.arange(2 * rows, device=card.device).view(2, rows)
    for label, settings in (("top_p 0.95", {"temperature": 0.6, "top_p": 0.95}), ("all tokens", {})):
        calls = (partial(function, logits, *streams, **settings) for function in (draw, draw_reference))
        ours, torchs = (milliseconds(card, call) for call in calls)
        text = f"{ours:.3f} ms, {logits.nbytes / ours / 1e6:,.0f} GB/s; torch {torchs:.3f} ms"
        results.figure(f"drawing from {label}", text, draw_ms=ours, torch_ms=torchs)


def time_adamw(results: Results, card: Card, limits: Limits) -> None:
    """Time an update of Gemma-3-1B's embedding, which moves 10 bytes per weight and 16 per 256 weights."""
    N = 2**14 if card.small else 262_144 * 1152
    results.need(gib=12 * N / GIB + 1)  # weights, gradient and a peer's copy of the weights and states
    weights, gradient = normal(card, N, scale=0.02), normal(card, N, scale=1e-3)
    moved = 10 * N + 16 * N // 256

    def time_steps(make: Callable[[torch.nn.Parameter], Callable]) -> float:
        parameter = torch.nn.Parameter(weights.clone())
        parameter.grad = gradient
        return milliseconds(card, make(parameter))

    gbs = {"ours": moved / time_steps(our_step) / 1e6}
    words = [f"ours {gbs['ours']:,.0f} GB/s"]
    for peer, make, size in (("bitsandbytes", bitsandbytes_step, moved), ("torch fused", fused_step, 14 * N)):
        found, why = run_peer(card, peer, time_steps, make)
        card.free()
        if found is not None:
            gbs[peer] = size / found / 1e6
            why = f"{gbs[peer]:,.0f} GB/s, {moved / gbs['ours'] / 1e6 / found:.2f}x ours' speed"
        words.append(f"{peer} {why}")
    share = gbs["ours"] / limits.copy_gbs
    text = "; ".join([f"{share:.0%}", *words])
    claim(results, card, "AdamW8bit: 30 % of copy bandwidth", share >= 0.3, text, gbs=gbs)


def our_step(parameter: torch.nn.Parameter) -> Callable:
    weights, state = parameter.data, init_state(parameter.data)
    return lambda: adamw8bit_(weights, parameter.grad, state, step=3, lr=1e-5, seed=0)


def bitsandbytes_step(parameter: torch.nn.Parameter) -> Callable:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit([parameter], lr=1e-5).step


def fused_step(parameter: torch.nn.Parameter) -> Callable:
    """Return a step of torch's fused AdamW, whose states of a bf16 weight are bf16."""
    return torch.optim.AdamW([parameter], lr=1e-5, fused=True).step


def run_peer(card: Card, name: str, function: Callable, *arguments):
    """Return (result, "") or (None, why)."""
    if name in NEED_A_CARD and not card.is_cuda:
        return None, "runs on a card only"
    return attempt(card, function, *arguments)


def time_losses(results: Results, card: Card, limits: Limits) -> None:
    """Time the loss of three models' heads beside the three matmuls that no exact loss can do without."""
    N = 64 if card.small else 16_384
    ratios: list[float] = []
    for model, (V, H) in list(HEADS.items())[: 1 if card.quick else None]:
        name = f"loss of {model}'s head"
        V, H = (600, 32) if card.small else (V, H)
        if card.is_cuda:
            V = shrink(results, card, name, N, V, H)
        if not V:
            continue
        runs = 6 * 4  # of six contestants
        seconds = 10 + runs * 6 * N * V * H / limits.matmul_tflops / 1e12
        results.run(name, time_loss, (N, V, H), ratios, seconds=seconds)
        card.free()
    if card.is_cuda and ratios:
        text = f"{min(ratios):.2f}x to {max(ratios):.2f}x the time of its three matmuls"
        results.figure("loss beside its matmuls", text, headline=f"loss {text}")


def shrink(results: Results, card: Card, name: str, N: int, V: int, H: int) -> int:
    """Return the largest of V, V / 2, V / 4 ... whose loss fits the card; 0 if none does."""

    def need(V: int) -> float:
        weights = 8 * V * H  # bytes of the weight, its gradient and that one's fp32 sum
        return (weights + 6 * N * H) / GIB + 1.5  # a chunk of logits, CUDA itself

    fitting = V
    while fitting and need(fitting) > card.gib:
        fitting //= 2
    if fitting != V:
        rest = f"measured with {fitting:,}" if fitting else "nothing measured"
        results.not_run(f"{name}, V = {V:,}", f"needs {need(V):.1f} GiB, the card has {card.gib:.1f}; {rest}")
    return fitting


def time_loss(results, card, name, shape, ratios) -> None:
    """Time one head, shape = (N, V, H); append our time over that of the three matmuls to ratios."""
    N, V, H = shape
    torch.manual_seed(0)
    hidden, weight = normal(card, N, H), normal(card, V, H, scale=H**-0.5)
    targets = torch.randint(V, (N,), device=card.device)

    def measure(make: Callable) -> tuple[float, float | None]:
        call = make(hidden, weight, targets)
        taken = milliseconds(card, call)
        return taken, measured(card, call, held=held_gib(card)).allocated if card.is_cuda else None

    found, words = {}, []
    for label, make in LOSSES.items():
        if label in (MATMULS, "ours"):
            result, why = measure(make), ""
        else:
            with torch.compiler.set_stance("force_eager"):  # CCE would compile a sort of V numbers for 10 s
                result, why = run_peer(card, label, measure, make)
        card.free()
        if result is None:
            words.append(f"{label}: {why}")
            continue
        found[label] = result
        text = f"{label} {result[0]:.1f} ms, {result[0] / found[MATMULS][0]:.2f}x"
        words.append(text if result[1] is None else f"{text}, {result[1]:.2f} GiB")

    ratio = found["ours"][0] / found[MATMULS][0]
    ratios.append(ratio)
    numbers = {"milliseconds_and_gib": found, "shape": shape}
    name += ": at most 1.25x its three matmuls"
    claim(results, card, name, ratio <= 1.25, "; ".join(words), **numbers)


def torch_in_chunks(hidden: Tensor, weight: Tensor, targets: Tensor) -> Callable:
    def call():
        h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        for start in range(0, len(h), CHUNK):
            rows = slice(start, start + CHUNK)
            (F.cross_entropy((h[rows] @ w.T).float(), targets[rows], reduction="sum") / len(h)).backward()

    return call


def with_gradients(loss: Callable) -> Callable:
    """Return a maker of calls that compute the loss and both gradients."""

    def make(hidden, weight, targets):
        h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        return lambda: torch.autograd.grad(loss(h, w, targets), (h, w))

    return make


LOSSES = {
    MATMULS: lambda *tensors: partial(three_matmuls, *tensors, chunk=CHUNK),
    "ours": with_gradients(linear_cross_entropy),
    "Liger": with_gradients(liger),
    "CCE": with_gradients(cce),
    "CCE exact": with_gradients(partial(cce, filter_eps=None)),  # leaves no small gradient out
    "torch in chunks": torch_in_chunks,
}
