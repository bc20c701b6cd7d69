"""Does a copy of a model still give the same answers? Greedy answers to a few problems, graded and compared.

For a model that was merged, converted or quantised: the weights are no longer the same bits, so texts part
after some tokens. What counts is whether the answers to the problems are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kit.data.chat import ChatFormat
from kit.data.problems import Question
from kit.generate.sampler import generate
from kit.generate.sampling import SamplingParams
from kit.grade.verdict import verdict_fields


@dataclass(frozen=True)
class Answer:
    """A model's greedy answer to a problem."""

    prompt: tuple[int, ...]  # token ids
    text: str
    found: str | None  # the answer in the text, normalised; None = there is none
    is_right: bool
    is_finished: bool  # False: it was cut off


def answer(
    model, chat: ChatFormat, questions: Sequence[Question], *, max_new_tokens: int, description: str
) -> list[Answer]:
    """Answer each question once, greedily, and grade it. max_new_tokens: per answer."""
    prompts = chat.encode([chat.prompt(question.problem) for question in questions])
    completions = generate(
        model,
        prompts,
        SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens),
        num_slots=len(prompts),
        seed=0,
        eos_token_id=chat.eos_token_ids,
        decode=chat.decode,
        description=description,
    )
    answers = []
    for prompt, question, done in zip(prompts, questions, completions, strict=True):
        graded = verdict_fields(question.answer, done.text)
        is_right = graded["verdict"] == "correct"
        answers.append(Answer(tuple(prompt), done.text, graded["prediction"], is_right, done.finished))
    return answers


def agreement(original: Sequence[Answer], copy: Sequence[Answer]) -> str:
    """Say how the answers of a copy agree with those of the original.

    The same are two in which the same answer was found, or none. Prompts with other token ids are a fault of
    the copy's tokeniser or template.
    """
    pairs = list(zip(original, copy, strict=True))
    same = sum(a.found == b.found for a, b in pairs)
    same_text = sum(a.text == b.text for a, b in pairs)
    other_prompts = sum(a.prompt != b.prompt for a, b in pairs)
    right, right_after = (sum(one.is_right for one in answers) for answers in (original, copy))
    cut, cut_after = (sum(not one.is_finished for one in answers) for answers in (original, copy))
    return (
        f"{same} of {len(pairs)} the same ({same_text} word for word); "
        f"right {right} before and {right_after} after"
        + (f"; cut off {cut} before and {cut_after} after" if cut or cut_after else "")
        + (f"; {other_prompts} prompts have other tokens, a fault of the copy" if other_prompts else "")
    )
