"""Settings of GRPO: the paper's values where it states them, and verl's, which it ran, where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kit.config import Checked
from kit.train.savings import WHOLE_ONLY, Savings


@dataclass(frozen=True)
class Settings(Checked):
    """The algorithm. The paper states groups of 8, 8,192 tokens, temperature 1, mini-batches of 256, a KL
    loss at 1e-4 and advantages normalised within the group; `kit.paper` names the source of each other."""

    # algorithm
    group_size: int = 8  # completions per prompt; an advantage compares one with the others [2..10000]
    max_new_tokens: int = 8_192  # tokens per completion [>= 1]
    temperature: float = 1.0  # of sampling and log-probs; greedy answers to a prompt are equal [0.001..1000]
    num_slots: int = 64  # completions sampled at once [>= 1]
    minibatch_prompts: int = 256  # prompts per optimizer step [>= 1]
    row_tokens: int = 16_384  # tokens per packed row; a prompt and its completion must fit [>= 1]
    advantage_scale: str = "group-std"  # divisor of the advantages; none: Dr. GRPO [group-std | none]
    normaliser: str = "tokens"  # mean of the loss over tokens (verl) or sequences (GRPO) [tokens | sequences]
    ratio: str = "token"  # ratio of probabilities; sequence: GSPO, clip ranges near 4e-4 [token | sequence]
    clip_low: float = 0.2  # the ratio is clipped at 1 - clip_low; from verl [0..1]
    clip_high: float = 0.2  # and at 1 + clip_high; from verl; DAPO's clip-higher: 0.28 [>= 0]
    dual_clip: float = 3.0  # a wrong answer's tokens have no gradient above this ratio; 0 = off [0 | > 1]
    kl_coef: float = 1e-4  # of the KL loss (k3) against the model that training starts from; 0 = no KL [>= 0]
    mask_truncated: bool = False  # learn nothing from completions that were cut off
    undecided_is_wrong: bool = True  # reward 0 for what cannot be graded, from SimpleRL-Zoo; off: left out
    seed: int = 0  # of the prompts' order and the samples [>= 0]

    def check_prompts(self, encoded: Sequence[Sequence[int]]) -> None:
        """Raise ValueError if a row does not hold the longest of the encoded prompts and its completion."""
        longest = max(map(len, encoded), default=0) + self.max_new_tokens
        if longest > self.row_tokens:
            raise ValueError(
                f"row_tokens is {self.row_tokens} but the longest prompt and max_new_tokens are {longest} "
                f"tokens; pass --row_tokens {longest}"
            )

    def check_reference(self, *, adapters_are_trained: bool) -> None:
        """Raise ValueError if the reference would not be the model that training starts from."""
        if self.uses_reference and adapters_are_trained:
            raise ValueError(
                f"kl_coef is {self.kl_coef:g} but the adapters have been trained already: the reference "
                "would be their base, not the model that this training starts from; pass --kl_coef 0, or "
                "start from what recipes/export.py writes"
            )

    @property
    def uses_reference(self) -> bool:
        return self.kl_coef > 0


def check_savings(savings: Savings) -> None:
    """Raise ValueError for savings that need one row per step, or cross-entropy as the loss."""
    if savings.update_in_backward:
        raise ValueError(
            "update_in_backward is on but a mini-batch has several rows, whose gradients must be added up "
            "first; pass --no_update_in_backward (and --qlora_rank 16 if memory is short)"
        )
    if savings.head_update == "blocked":
        raise ValueError(WHOLE_ONLY)
