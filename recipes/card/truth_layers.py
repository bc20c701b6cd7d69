"""Norms, rotations and gates against float64, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import torch

from kit.kernels.glu import ACTIVATIONS, glu, glu_reference
from kit.kernels.rms_norm import rms_norm, rms_norm_reference
from kit.kernels.rope import rope, rope_reference
from kit.recipes.card.compare import DTYPES, beside_float64, judge, name_of, normal, rms
from kit.recipes.card.results import Card, Results

HEADS = (14, 2, 64), (24, 8, 128), (4, 1, 256)  # of q and of k, head_dim: Qwen2.5, Llama-3.2-3B, Gemma 3


def run(results: Results, card: Card) -> None:
    for dtype, (label, make) in product(DTYPES[:: 2 if card.quick else 1], cases(card).items()):
        results.run(f"{label} {name_of(dtype)}", check, dtype, make, seconds=1)
        card.free()


def cases(card: Card) -> dict[str, Callable]:
    """Return name -> a function that makes (ours, reference, inputs). Sizes are awkward on purpose."""
    T = 13 if card.small else 4_001

    def norm(H: int, offset: float) -> tuple:
        sides = (partial(function, eps=1e-6, offset=offset) for function in (rms_norm, rms_norm_reference))
        return *sides, [normal(card, T, H, dtype=torch.float32, scale=3.0), normal(card, H)]

    def head_norm(D: int) -> tuple:
        ours, reference, (_, weight) = norm(D, 0.0)
        sides = (lambda heads, weight, f=f: f(heads[:, 1:3], weight) for f in (ours, reference))
        return *sides, [normal(card, T, 4, D, scale=3.0), weight]

    def rotation(Hq: int, Hkv: int, D: int) -> tuple:
        angles = 10 * torch.rand(T, D, device=card.device)

        def in_its_dtype(function: Callable) -> Callable:
            def turn(heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                q, k, _ = heads.split([Hq, Hkv, Hkv], dim=1)
                return function(q, k, angles.cos().to(q.dtype), angles.sin().to(q.dtype))

            return turn

        sides = map(in_its_dtype, (rope, rope_reference))
        return *sides, [normal(card, T, Hq + 2 * Hkv, D)]

    def gate(activation: str) -> tuple:
        sides = (partial(function, activation=activation) for function in (glu, glu_reference))
        return *sides, [normal(card, T, 1_003, scale=3.0), normal(card, T, 1_003)]

    return {
        "rms_norm H = 1,152 offset 1": partial(norm, 1_152, 1.0),
        "rms_norm H = 77 offset 0": partial(norm, 77, 0.0),
        "rms_norm of heads, D = 77": partial(head_norm, 77),
        **{f"rope D = {heads[-1]}": partial(rotation, *heads) for heads in HEADS},
        **{f"glu {activation}": partial(gate, activation) for activation in ACTIVATIONS},
    }


def check(results: Results, card: Card, name: str, dtype: torch.dtype, make: Callable) -> None:
    """Compare outputs and gradients with float64's.

    One unit in the last place more than twice torch's error is allowed: torch may be exact by luck.
    """
    torch.manual_seed(8)
    ours, reference, inputs = make()
    inputs = [x.to(dtype) for x in inputs]
    sides = beside_float64(ours, reference, inputs)
    num_outputs = len(sides[0]) - len(inputs)
    labels = [*(f"output {i}" for i in range(num_outputs)), *(f"gradient {i}" for i in range(len(inputs)))]
    judge(results, name, labels, *sides, [torch.finfo(dtype).eps * rms(true) for true in sides[2]])
