"""The turns of a conversation, as text: which tokens end one, and what a model thinks before it answers."""

from __future__ import annotations

import re

# of Qwen, Llama 3, Gemma, DeepSeek and Llama 2. A model that is asked in another template than its own may
# write any of them, as a token or as words.
END_TOKENS = (
    "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>",
    "<end_of_turn>", "<eos>", "<｜end▁of▁sentence｜>", "</s>",
)  # fmt: skip
THOUGHT, THOUGHT_END = "<think>", "</think>"

_END = re.compile("|".join(map(re.escape, END_TOKENS)))


def first_turn(text: str) -> str:
    """Return a response up to the first token that ends a turn: what follows it is an invented next turn."""
    return text[: end.start()] if "<" in text and (end := _END.search(text)) else text


def never_closes(text: str) -> bool:
    """Return whether the last thought that a text opens does not end."""
    return text.rfind(THOUGHT) > text.rfind(THOUGHT_END)
