"""Rewards of one's own: what they get, what they may return, and what is said if they cannot be used."""

import json
import math
import re
import sys
from pathlib import Path

import pytest

from kit.data.problems import Question
from kit.generate.sampler import Completion
from kit.rl.rewards import correctness, judge, load_rewards, total, try_out

SHIPPED = Path(__file__).resolve().parents[2] / "recipes" / "rewards.py"
QUESTION = Question("q", "2+3?", "5")


def write(text, length, finished=True):
    return Completion([7] * length, [-0.5] * length, finished, text)


ANSWERS = [
    write("so \\boxed{5}", 4),
    write("let me recheck: \\boxed{5}", 11),
    write("\\boxed{6}, no, \\boxed{5}", 7),
    write("\\boxed{6}", 1),
    write("hmm", 30, finished=False),
    write("\\boxed{9^{9^{9^9}}}", 2),
]


def test_the_three_shipped_rewards_give_what_they_say():
    rewards, files = load_rewards("exact_answer,length_aware, well_formed", SHIPPED)
    assert files == [SHIPPED]
    assert [rewards["exact_answer"](QUESTION, ANSWERS)] == [[1, 1, 1, 0, 0, None]]
    assert rewards["length_aware"](QUESTION, ANSWERS) == [1, 0.5, pytest.approx(1 - 1.5 / 7), 0, 0, None]
    assert rewards["well_formed"](QUESTION, ANSWERS) == [0.1, 0.1, 0, 0.1, 0, 0.1]


@pytest.mark.parametrize("answers", [ANSWERS[3:5], ANSWERS[:1], [ANSWERS[0], ANSWERS[0], ANSWERS[3]]])
def test_without_two_right_answers_of_different_length_length_says_nothing(answers):
    length_aware = load_rewards("length_aware", SHIPPED)[0]["length_aware"]
    assert length_aware(QUESTION, answers) == correctness(QUESTION, answers)


def test_every_public_function_of_the_shipped_file_can_be_named_and_tried():
    rewards, _ = load_rewards("exact_answer,well_formed", SHIPPED)
    assert try_out(rewards, QUESTION) == "1, 0.1 for a right answer, 0, 0 for an empty one"
    assert try_out({"undecided": lambda question, answers: [None, -2]}, QUESTION) == (
        "none for a right answer, -2 for an empty one"
    )


def test_a_file_of_ones_own_is_run_once_and_may_define_what_it_needs(tmp_path):
    mine = tmp_path / "my rewards.py"
    mine.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "print('runs')\n"
        "@dataclass\n"
        "class Price:\n"
        "    per_token: float = 0.25\n"
        "def short(question, completions):\n"
        "    return [-Price().per_token * len(completion.ids) for completion in completions]\n"
        "def gold(question, completions):\n"
        "    return tuple(question.answer in completion.text for completion in completions)\n"
    )
    rewards, files = load_rewards(f"{mine}:short,exact_answer,{mine}:gold", SHIPPED)
    assert files == [mine, SHIPPED]
    judged = judge(rewards, QUESTION, ANSWERS[:4])
    assert judged[0] == {"short": -1.0, "exact_answer": 1.0, "gold": 1.0}
    assert judged[3] == {"short": -0.25, "exact_answer": 0.0, "gold": 0.0}
    assert total(judged[0]) == 1.0
    assert total({"short": -1.0, "exact_answer": None}) is None


def test_two_files_of_the_same_name_do_not_mix_and_take_no_modules_place(tmp_path):
    for folder, value in (("one", 1), ("two", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "json.py").write_text(f"def give_{folder}(q, c): return [{value}] * len(c)\n")
    names = f"{tmp_path}/one/json.py:give_one,{tmp_path}/two/json.py:give_two"
    rewards, _ = load_rewards(names, SHIPPED)
    assert judge(rewards, QUESTION, ANSWERS[:1]) == [{"give_one": 1.0, "give_two": 2.0}]
    assert sys.modules["json"] is json


FILE = """
from math import sqrt
HALF = 0.5
def length_aware(question, completions):
    return [1] * len(completions)
def _hidden():
    pass
"""


@pytest.mark.parametrize(
    ("source", "words", "message"),
    [
        (None, "mine.py:f", "reward is 'mine.py:f' but there is no file mine.py; pass FILE.py:F"),
        (FILE, "mine.py:lenght_aware", r"no function 'lenght_aware'; did you mean length_aware\?$"),
        (FILE, "mine.py:f", "but mine.py has no function 'f'; it has length_aware$"),
        (FILE, "mine.py:HALF", "but mine.py has no function 'HALF'; it has length_aware$"),
        (FILE, "mine.py", r"rewards.py has no function 'mine.py'; it has .* \(for a function of your own"),
        (FILE, "", r"rewards.py has no function ''; it has exact_answer, length_aware, well_formed"),
        (FILE, "length_aware,mine.py:length_aware", "names length_aware twice; give each a name"),
        ("def f(:\n", "mine.py:f", r"mine.py cannot be run: SyntaxError: .*\(mine.py, line 1\); correct it"),
        ("\n1 / 0\n", "mine.py:f", r"run: ZeroDivisionError: division by zero \(mine.py, line 2\)"),
        ("import nobodys_module\n", "mine.py:f", r"ModuleNotFoundError: .* \(mine.py, line 1\); correct it"),
        (FILE, "mine.txt:f", "mine.txt is not a Python file; for a function of your own, pass FILE"),
    ],
)  # fmt: skip
def test_a_reward_that_cannot_be_loaded_is_refused_in_one_line_that_says_why(
    source, words, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    if source:
        for name in ("mine.py", "mine.txt"):
            Path(name).write_text(source)
    with pytest.raises(ValueError, match=message) as refused:
        load_rewards(words, SHIPPED)
    assert "\n" not in str(refused.value)


def fails_at_a_line(question, completions):
    return [1 / len(completion.text.split("none", 1)[1]) for completion in completions]


def takes_one(completions):
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (fails_at_a_line, r"on '2\+3\?': IndexError: list index out of range \(test_rewards.py, line \d"),
        (takes_one, r"failed on '2\+3\?': TypeError: takes_one\(\) takes 1 positional .* were given"),
        (lambda q, c: 0.5, "returned 0.5, but it must return a list of 2 numbers, one per answer"),
        (lambda q, c: "01", "returned '01', but it must return a list of 2 numbers"),
        (lambda q, c: None, "returned None, but it must return a list of 2 numbers"),
        (lambda q, c: [1.0], "returned a list of 1, but it must return a list of 2 numbers, one per answer"),
        (lambda q, c: [1, 2, 3], "returned a list of 3, but it must return a list of 2 numbers"),
        (lambda q, c: [1.0, math.nan], "returned nan for an answer, but it must be a finite number, or None"),
        (lambda q, c: [-math.inf, 0], "returned -inf for an answer"),
        (lambda q, c: ["1", 0], "returned '1' for an answer, but it must be a finite number"),
        (lambda q, c: [[0.5], 0], r"returned \[0.5\] for an answer"),
    ],
)  # fmt: skip
def test_a_reward_that_fails_or_returns_something_else_is_refused_with_what_it_must_return(reward, message):
    with pytest.raises(ValueError, match=message) as refused:
        judge({"mine": reward}, QUESTION, ANSWERS[:2])
    assert re.match("reward mine (failed|returned) ", str(refused.value))
    assert "\n" not in str(refused.value)
