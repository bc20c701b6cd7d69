"""Settings of GRPO: the paper's values where it states them, GRPO's and PPO's own where it does not."""

from __future__ import annotations

from dataclasses import dataclass

from kit.train.savings import Savings

SCALES = ("group-std", "none")
NORMALISERS = ("sequences", "tokens")
RATIOS = ("token", "sequence")


@dataclass(frozen=True)
class Settings:
    """The algorithm. The paper states groups of 8, 8,192 tokens, temperature 1, mini-batches of 256, a KL
    loss at 1e-4 and advantages normalised within the group; clip range, normaliser and ratio are GRPO's."""

    # algorithm
    group_size: int = 8  # completions per prompt
    max_new_tokens: int = 8_192  # tokens per completion
    temperature: float = 1.0  # of sampling, and of the log-probs in the objective
    num_slots: int = 64  # completions sampled at once
    minibatch_prompts: int = 256  # prompts per optimizer step
    row_tokens: int = 16_384  # tokens per packed row; a prompt and its completion must fit
    advantage_scale: str = "group-std"  # divisor of the advantages; none: Dr. GRPO
    normaliser: str = "sequences"  # of the loss; tokens: the token mean of DAPO, and of verl
    ratio: str = "token"  # probability ratio per token, or per sequence: GSPO, with clip ranges near 4e-4
    clip_low: float = 0.2  # the ratio is clipped at 1 - clip_low
    clip_high: float = 0.2  # and at 1 + clip_high; DAPO's clip-higher: 0.28
    kl_coef: float = 1e-4  # of the KL loss (k3) against the model that training starts from; 0 = no KL
    mask_truncated: bool = False  # learn nothing from completions that were cut off
    seed: int = 0  # of the prompts' order and the samples

    def __post_init__(self):
        if self.group_size < 2:
            raise ValueError(
                f"group_size is {self.group_size} but an advantage compares a completion with others of its "
                "group, so every update would be zero; pass group_size >= 2 (the paper: 8)"
            )
        for name, fits, rule in (
            ("temperature", self.temperature > 0, "> 0: greedy text has no probability to raise or lower"),
            ("max_new_tokens", self.max_new_tokens >= 1, ">= 1"),
            ("minibatch_prompts", self.minibatch_prompts >= 1, ">= 1"),
            ("advantage_scale", self.advantage_scale in SCALES, f"one of {', '.join(SCALES)}"),
            ("normaliser", self.normaliser in NORMALISERS, f"one of {', '.join(NORMALISERS)}"),
            ("ratio", self.ratio in RATIOS, f"one of {', '.join(RATIOS)}"),
            ("clip_low", 0 <= self.clip_low <= 1, "in 0..1"),
            ("clip_high", self.clip_high >= 0, ">= 0"),
            ("kl_coef", self.kl_coef >= 0, ">= 0 (0 = no KL)"),
        ):
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)!r} but must be {rule}")

    @property
    def uses_reference(self) -> bool:
        return self.kl_coef > 0


def check_savings(savings: Savings) -> None:
    """Raise ValueError for savings that update inside the backward pass: a mini-batch has several rows."""
    if savings.update_in_backward:
        raise ValueError(
            "update_in_backward is on but a mini-batch has several rows, whose gradients must be added up "
            "first; pass --no_update_in_backward (and --qlora_rank 16 if memory is short)"
        )
