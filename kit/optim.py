"""AdamW (Loshchilov & Hutter, 2019) and the learning-rate schedule of the paper's Table 2.

fp32 weights take torch's own AdamW. bf16 weights need one more thing: near 0.02 a bf16 step is 1e-4 wide, an update at lr 5e-5
is narrower, and rounding to nearest would drop it. Stochastic rounding goes up or down with the probability that makes the
mean exact, so the update arrives on average, without an fp32 copy of the weights.
"""

from __future__ import annotations

import math

import torch


def cosine_with_warmup(step: int, num_steps: int, warmup_ratio: float) -> float:
    """Factor on the learning rate for step 0..num_steps-1: a line up over the warm-up, then half a cosine towards 0."""
    warmup = math.ceil(warmup_ratio * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(num_steps - warmup, 1)))


@torch.no_grad()
def stochastic_round_(target: torch.Tensor, source: torch.Tensor, generator: torch.Generator) -> None:
    """target (bf16) <- source (fp32, overwritten), rounded up with probability equal to the fraction that is cut off."""
    bits = source.view(torch.int32)
    bits += torch.randint(1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    bits &= -(1 << 16)  # the upper half of an fp32 number is a bf16 number
    target.copy_(source)


def _mix(seed: int, step: int, index: int) -> int:
    """A stream of its own for every (seed, step, parameter): large odd multipliers keep neighbours apart."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + index * 0x94D049BB133111EB) % 2**63


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW on bf16 parameters: fp32 states, no fp32 master copy, stochastic rounding keyed by (seed, step, parameter).

    10 bytes a parameter with its bf16 weight, besides the gradient; while it steps, four fp32 copies of one parameter at a time.
    Resuming repeats the same random numbers.
    """

    def __init__(self, parameters, *, lr: float, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, seed=0):
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        if closure is not None:
            raise ValueError("StochasticAdamW takes no closure; run the backward pass, then call step()")
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
                state["step"] += 1
                step = int(state["step"])
                gradient = parameter.grad.float()
                state["exp_avg"].lerp_(gradient, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                denominator = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
                weight = parameter.float() * (1 - lr * group["weight_decay"])
                weight.addcdiv_(state["exp_avg"], denominator, value=-lr / (1 - beta1**step))
                generator = torch.Generator(parameter.device).manual_seed(_mix(group["seed"], step, index))
                stochastic_round_(parameter, weight, generator)


def make_optimizer(model: torch.nn.Module, *, lr: float, weight_decay: float = 0.0, betas=(0.9, 0.999), seed: int = 0):
    """AdamW for the model's trainable parameters, by their dtype. Raises ValueError for a mixture or for none."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    dtypes = {parameter.dtype for parameter in parameters}
    if dtypes == {torch.float32}:
        return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
    if dtypes == {torch.bfloat16}:
        return StochasticAdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay, seed=seed)
    raise ValueError(f"trainable parameters are {sorted(map(str, dtypes)) or 'none'}; load the model in float32 or bfloat16")
