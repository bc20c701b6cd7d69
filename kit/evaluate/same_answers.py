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


@dataclass(frozen=True)
class Agreement:
    """How the answers of a copy agree with those of the original. All are numbers of problems."""

    problems: int
    same: int  # the same answer was found in both texts, or none in either
    same_text: int
    same_prompt: int  # that both tokenisers and templates make the same ids of
    right: tuple[int, int]  # of the original, of the copy
    cut: tuple[int, int]  # answers that were cut off

    @classmethod
    def of(cls, original: Sequence[Answer], copy: Sequence[Answer]) -> Agreement:
        pairs = list(zip(original, copy, strict=True))
        return cls(
            len(pairs),
            sum(a.found == b.found for a, b in pairs),
            sum(a.text == b.text for a, b in pairs),
            sum(a.prompt == b.prompt for a, b in pairs),
            tuple(sum(one.is_right for one in answers) for answers in (original, copy)),
            tuple(sum(not one.is_finished for one in answers) for answers in (original, copy)),
        )

    def __str__(self) -> str:
        text = (
            f"{self.same} of {self.problems} the same ({self.same_text} word for word); "
            f"right {self.right[0]} before and {self.right[1]} after"
        )
        if any(self.cut):
            text += f"; cut off {self.cut[0]} before and {self.cut[1]} after"
        if self.same_prompt < self.problems:
            text += f"; {self.problems - self.same_prompt} prompts have other tokens, a fault of the copy"
        return text
