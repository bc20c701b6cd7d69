"""Rewards for recipes/grpo_qwen2_5_0_5b.py, and how to write your own.

    --reward exact_answer                the default, as in the paper
    --reward exact_answer,well_formed    several add up; each is logged by its name
    --reward my_rewards.py:short         the function `short` of a file of yours

A reward gets a question and all the answers to it of one step. It returns a list with one number per answer,
in their order, or None for an answer that it cannot judge: --undecided_is_wrong says what becomes of those.

    question.problem, question.answer    the problem and the gold answer, as text
    completion.text                      what the model wrote
    completion.ids                       its tokens
    completion.finished                  False if the answer was cut off at --max_new_tokens

GRPO compares the answers to one question, so only their differences matter: if all of them earn the same,
nothing is learned from them. Before the run begins, every function is tried on two made-up answers. Keep it
in one file: a resumed run is refused if that file has changed.
"""

from __future__ import annotations

from collections.abc import Sequence

from kit.data.problems import Question
from kit.generate.sampler import Completion
from kit.rl.rewards import correctness


def exact_answer(question: Question, completions: Sequence[Completion]) -> list[float | None]:
    """Return 1 for a right answer, 0 for a wrong one or none, None if the grader cannot decide."""
    return correctness(question, completions)


def length_aware(question: Question, completions: Sequence[Completion]) -> list[float | None]:
    """Return 1 for the shortest right answer, 0.5 for the longest, and 0 for a wrong one.

    Shortness never pays for a mistake: a wrong answer earns less than any right one.
    """
    correct = correctness(question, completions)
    pairs = list(zip(completions, correct, strict=True))
    lengths = [len(completion.ids) for completion, reward in pairs if reward]
    if not lengths:
        return correct

    shortest, spread = min(lengths), max(lengths) - min(lengths)
    if spread == 0:
        return correct
    return [
        1 - 0.5 * (len(completion.ids) - shortest) / spread if reward else reward
        for completion, reward in pairs
    ]


def well_formed(question: Question, completions: Sequence[Completion]) -> list[float | None]:
    """Return 0.1 for an answer that ends by itself and has one box, else 0: a help for models that write
    none. It says nothing about the box's content, so add it to another reward.
    """
    return [0.1 * (c.finished and c.text.count("\\boxed{") == 1) for c in completions]
