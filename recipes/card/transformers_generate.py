"""Transformers' two ways of answering many prompts, to compare the sampler with.

Both draw at temperature 0.6 and top-p 0.95, as the paper does, and return the new token ids of each prompt.
"""

from __future__ import annotations

import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig

PAD = 1  # recipes/bench/sampler.py: an answer that starts above it counts down past it; no prompt holds it
PAGE_TOKENS = 32  # of generate_batch's cache
Answers = list[list[int]]  # the new token ids of each


def _settings(new_tokens: int, eos: int) -> GenerationConfig:
    drawing = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 0}
    return GenerationConfig(**drawing, max_new_tokens=new_tokens, eos_token_id=eos, pad_token_id=PAD)


@torch.no_grad()
def padded_generate(model, prompts: list[list[int]], *, num_rows: int, new_tokens: int, eos: int) -> Answers:
    """Answer with model.generate, num_rows prompts at a time, padded on the left."""
    model.set_attn_implementation("sdpa")  # its default
    answers = []
    for first in range(0, len(prompts), num_rows):
        batch = prompts[first : first + num_rows]
        L = max(map(len, batch))
        padded = [[PAD] * (L - len(prompt)) + prompt for prompt in batch]
        seen = [[0] * (L - len(prompt)) + [1] * len(prompt) for prompt in batch]
        ids, mask = (torch.tensor(rows, device=model.device) for rows in (padded, seen))  # (rows, L)
        written = model.generate(ids, attention_mask=mask, generation_config=_settings(new_tokens, eos))
        for answer in written[:, L:].tolist():
            answers.append(answer[: answer.index(eos) + 1] if eos in answer else answer)
    return answers


def generate_batch(model, prompts: list[list[int]], *, num_rows: int, new_tokens: int, eos: int) -> Answers:
    """Answer with transformers' continuous batching, num_rows prompts at a time."""
    model.set_attn_implementation("sdpa")
    transformers.logging.set_verbosity_error()
    pages = -(-(new_tokens + max(map(len, prompts))) // PAGE_TOKENS) + 1  # of a row
    batching = ContinuousBatchingConfig(
        max_requests_per_batch=num_rows,
        page_size=PAGE_TOKENS,
        num_blocks=num_rows * pages,
        max_batch_tokens=512,
    )
    outputs = model.generate_batch(prompts, _settings(new_tokens, eos), batching, progress_bar=False)
    by_number = sorted(outputs.values(), key=lambda output: int(output.request_id.rsplit("_", 1)[-1]))
    return [output.generated_tokens for output in by_number]
