"""Norms, rotations and gates against float64, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from kit.kernels.glu import ACTIVATIONS, glu, glu_reference
from kit.kernels.rms_norm import rms_norm, rms_norm_reference
from kit.kernels.rope import rope, rope_reference
from kit.recipes.card.compare import Part, judge, name_of, normal, poisoned, rms
from kit.recipes.card.results import Card, Results

DTYPES = torch.bfloat16, torch.float16, torch.float32
HEADS = (14, 2, 64), (24, 8, 128), (4, 1, 256)  # of q and of k, head_dim: Qwen2.5, Llama-3.2-3B, Gemma 3


def run(results: Results, card: Card) -> None:
    for dtype, (label, make) in product(DTYPES[:: 2 if card.quick else 1], cases(card).items()):
        name = f"{label} {name_of(dtype)}"
        with results.case(name):
            results.need(seconds=1)
            torch.manual_seed(8)
            check(results, name, dtype, *make())
        card.free()


def cases(card: Card) -> dict[str, Callable]:
    """Return name -> a function that makes (ours, reference, inputs). Sizes are awkward on purpose."""
    T = 13 if card.small else 4_001

    def norm(H: int, offset: float) -> tuple:
        options = {"eps": 1e-6, "offset": offset}
        ours, plain = (with_options(function, options) for function in (rms_norm, rms_norm_reference))
        return ours, plain, [normal(card, T, H, dtype=torch.float32, scale=3.0), normal(card, H)]

    def rotation(Hq: int, Hkv: int, D: int) -> tuple:
        angles = 10 * torch.rand(T, D, device=card.device)

        def in_its_dtype(function: Callable) -> Callable:
            return lambda q, k: function(q, k, angles.cos().to(q.dtype), angles.sin().to(q.dtype))

        return (
            in_its_dtype(rope),
            in_its_dtype(rope_reference),
            [normal(card, T, Hq, D), normal(card, T, Hkv, D)],
        )

    def gate(activation: str) -> tuple:
        options = {"activation": activation}
        ours, plain = (with_options(function, options) for function in (glu, glu_reference))
        return ours, plain, [normal(card, T, 1_003, scale=3.0), normal(card, T, 1_003)]

    return {
        "rms_norm H = 1,152 offset 1": lambda: norm(1_152, 1.0),
        "rms_norm H = 77 offset 0": lambda: norm(77, 0.0),
        **{f"rope D = {heads[-1]}": lambda heads=heads: rotation(*heads) for heads in HEADS},
        **{f"glu {activation}": lambda activation=activation: gate(activation) for activation in ACTIVATIONS},
    }


def with_options(function: Callable, options: dict) -> Callable:
    return lambda *inputs: function(*inputs, **options)


def check(
    results: Results, name: str, dtype: torch.dtype, ours: Callable, reference: Callable, inputs: list[Tensor]
) -> None:
    """Compare outputs and gradients with float64's.

    One unit in the last place more than twice torch's error is allowed: torch may be exact by luck.
    """
    inputs = [x.to(dtype) for x in inputs]
    truth = outputs_and_gradients(reference, [x.double() for x in inputs])
    torchs = outputs_and_gradients(reference, inputs)
    with poisoned():
        found = outputs_and_gradients(ours, inputs)
    num_outputs, eps = len(truth) - len(inputs), torch.finfo(dtype).eps
    labels = [*(f"output {i}" for i in range(num_outputs)), *(f"gradient {i}" for i in range(len(inputs)))]
    sides = zip(labels, found, torchs, truth, strict=True)
    judge(results, name, {label: Part(*side, eps * rms(side[-1])) for label, *side in sides})


def outputs_and_gradients(function: Callable, inputs: list[Tensor]) -> list[Tensor]:
    """Return the outputs, then the inputs' gradients. The upstream gradients are the same in every dtype."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    read = [output.detach().clone() for output in outputs]  # before backward overwrites what it may
    upstream = [
        torch.linspace(-1, 2, x.numel(), device=x.device).reshape(x.shape).to(x.dtype) for x in outputs
    ]
    torch.autograd.backward(outputs, upstream)
    return [*read, *(leaf.grad for leaf in leaves)]
