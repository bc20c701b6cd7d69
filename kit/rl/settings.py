"""What GRPO may be told: the paper's values where it states them, GRPO's and PPO's own where it does not."""

from __future__ import annotations

from dataclasses import dataclass

from kit.rl.objective import NORMALISERS, SCALES


@dataclass(frozen=True)
class Settings:
    """The algorithm. What the paper states is the default: groups of 8, 8,192 tokens, temperature 1, mini-batches of 256, a KL loss
    at 1e-4, advantages scaled by the group's deviation."""

    group_size: int = 8  # completions a prompt
    max_new_tokens: int = 8_192  # tokens per completion
    temperature: float = 1.0  # of sampling and, the same, of the log-probs in the objective
    num_slots: int = 64  # completions sampled at once
    minibatch_prompts: int = 256  # prompts an optimizer step
    row_tokens: int = 16_384  # tokens a pack; a prompt with max_new_tokens must fit
    advantage_scale: str = "group-std"  # none: Dr. GRPO
    normaliser: str = "sequences"  # GRPO's; tokens: DAPO
    clip_low: float = 0.2  # ratio clipped at 1 - clip_low
    clip_high: float = 0.2  # ratio clipped at 1 + clip_high; DAPO: 0.28
    kl_coef: float = 1e-4  # of the KL loss (k3) against the model that training starts from; 0 = none
    mask_truncated: bool = False  # learn nothing from completions that were cut off
    seed: int = 0

    def __post_init__(self):
        if self.group_size < 2:
            raise ValueError(
                f"group_size is {self.group_size} but an advantage is the difference to the others of the group, and one alone "
                "has none: every update would be zero; pass group_size >= 2 (the paper: 8)"
            )
        for name, fits, rule in (
            ("temperature", self.temperature > 0, "> 0: greedy text has no probability to raise or lower"),
            ("max_new_tokens", self.max_new_tokens >= 1, ">= 1"),
            ("minibatch_prompts", self.minibatch_prompts >= 1, ">= 1"),
            ("advantage_scale", self.advantage_scale in SCALES, f"one of {', '.join(SCALES)}"),
            ("normaliser", self.normaliser in NORMALISERS, f"one of {', '.join(NORMALISERS)}"),
            ("clip_low", 0 <= self.clip_low <= 1, "in 0..1"),
            ("clip_high", self.clip_high >= 0, ">= 0"),
            ("kl_coef", self.kl_coef >= 0, ">= 0 (0 = no KL)"),
        ):
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)!r} but must be {rule}")

    @property
    def uses_reference(self) -> bool:
        return self.kl_coef > 0
