"""The answer is found in the right place of a response, in linear time."""

import random
import time

import pytest

from kit.grade.extract import _boxes, extract_answer, last_box
from kit.grade.paper import grade_as_paper
from kit.turns import END_TOKENS


@pytest.mark.parametrize(
    ("text", "answer", "place"),
    [
        (r"so \boxed{5}.", "5", "boxed"),
        (r"\boxed {x+1}", "x+1", "boxed"),
        (r"\fbox{7}", "7", "boxed"),
        (r"\boxed 5 and done", "5", "boxed"),
        (r"\boxed\pi", r"\pi", "boxed"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}", "boxed"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}", "boxed"),
        (r"first \boxed{1}, no, \boxed{2}", "2", "boxed"),
        (r"\boxed{1} and \boxed{2", "1", "boxed"),
        (r"\boxed{1} and \boxed{}", "1", "boxed"),
        (r"\boxed{\boxed{3}}", r"\boxed{3}", "boxed"),
        (r"\\boxed{004} is it", "004", "boxed"),
        (r"a stray } and \boxed{9} }", "9", "boxed"),
        (
            r"\boxed{200} ... Final Answer: The final answer is $10,455$. I hope it is correct.",
            "$10,455$",
            "final answer after the box",
        ),
        (r"The final answer is \boxed{8}.", "8", "boxed"),
        (r"\boxed{8} is my final answer: I am sure of it", "8", "boxed"),
        ("\\boxed{8} is a side.\n\n**Answer:** 16", "16", "answer after the box"),
        (r"\boxed{1}, \boxed{2} and $\boxed{3}$", "1, 2, 3", "boxes of one sentence"),
        (r"\boxed{1}. \boxed{2} and \boxed{\boxed{3}}", r"2, \boxed{3}", "boxes of one sentence"),
        ("9 * 2 = 18\n#### 18", "18", "####"),
        ("The answer is 18.", "18", "answer statement"),
        ("**Answer:** Anne is 8 years old, not 9 apples tall.", "9", "answer statement"),
        ("Final Answer:\n\n\\[\n x = 5\n\\]", "x = 5", "answer statement"),
        ("**Final Answer**\n\n$x = 5$", "$x = 5$", "answer statement"),
        ("The answer is $18$, that is 9 + 9.", "$18$", "answer statement"),
        ("My counteranswer is 3, that is 4 or 9", "9", "last number"),
        ("The answer is Evelyn.", "Evelyn", "answer statement"),
        ("réponse est (35 + 70 = 105).", "(35 + 70 = 105)", "answer statement"),
        ("答案是 13/28。", "13/28", "answer statement"),
        (r"\frac{1}{2}", r"\frac{1}{2}", "whole text"),
        ("10 weeks", "10 weeks", "whole text"),
        (r"Therefore $x < 5$ is the solution.", "$x < 5$", "last mathematics"),
        (r"We get \(a+b\), as in \(x\).", r"\(a+b\)", "last mathematics"),
        ("She pays $5 in all, and then $7 more", "$7", "last number"),
        ("It is 1,000.99m² large", "1,000.99", "last number"),
        ("la probabilité est donc de **25%**.", "25%", "last number"),
        ("Soucis : 2,74 $ a..", "2,74", "last number"),
        ("the difference is then -5 degrees there", "-5", "last number"),
        ("the sum 3-5 has them", "5", "last number"),
        ("no idea at all", "no idea at all", "short text"),
    ],
)
def test_places_in_order(text, answer, place):
    assert extract_answer(text) == (answer, place)


@pytest.mark.parametrize(
    ("text", "answer", "place"),
    [
        (r"<think>\boxed{1}</think>it is \boxed{2}", "2", "boxed"),
        (r"<think>\boxed{1}</think>", "1", "boxed, before </think>"),
        (r"a</think>\boxed{1}</think>\boxed{2}", "2", "boxed"),
        ("<think>it may be 7</think>", "7", "last number, before </think>"),
        ("<think>it may be 7, or rather", None, "no answer: the thought does not end"),
        ("<think>it may be 6</think>so there are 7 of them", "7", "last number"),
        (r"<think>so \boxed{7}, but let me check", "7", "boxed"),
        ("<think>a</think>one more: <think>it may be 7, or", None, "no answer: the thought does not end"),
        ("<think>it may be 7<|im_end|></think>", None, "no answer: the thought does not end"),
        ("", None, "no answer: nothing is there"),
        ("   \n", None, "no answer: nothing is there"),
        (
            "I have thought about this for a long time without any result.",
            None,
            "no answer: no value is named",
        ),
    ],
)
def test_thoughts_and_silence(text, answer, place):
    assert extract_answer(text) == (answer, place)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("C", "C"),
        ("D. it can't be A or B", "D"),
        ("B。不是 A", "B"),
        ("The answer: D, it doesn't make sense", "D"),
        ("thinking about it I think the correct answer is (C)", "C"),
        ("The correct option is **B**.", "B"),
        ("A car drives 5 miles in all", "5"),
        ("A or B", "A or B"),
        ("E*2", "E*2"),
    ],
)
def test_choices(text, answer):
    assert extract_answer(text, choice=True)[0] == answer


@pytest.mark.parametrize("end", END_TOKENS)
def test_an_invented_next_turn_is_not_graded(end):
    text = rf"So \boxed{{4}}.{end}\nuser\nAnd 4 + 5?{end}assistant\nIt is \boxed{{9}}"
    assert extract_answer(text) == ("4", "boxed")
    assert grade_as_paper("4", text).verdict == "correct"
    assert grade_as_paper("9", text).verdict == "wrong"
    assert extract_answer(f"7{end}") == ("7", "whole text")
    assert extract_answer(rf"{end}user\nAnd 4 + 5? \boxed{{9}}") == (None, "no answer: nothing is there")


def test_special_tokens_are_no_part_of_an_answer():
    assert extract_answer("The answer is 19. <|im_start|>user") == ("19", "answer statement")
    assert extract_answer("7<|im_end|>") == ("7", "whole text")


@pytest.mark.parametrize(
    "unit",
    [
        r"\boxed{", r"\boxed{1}", r"\boxed", "{", "}", "$", "$ a ", r"\( ", r"\) ", r"\[ ", "the answer is ",
        r"\boxed{1}, ", r"\boxed{\{\}} and ",
        "final answer: ", "####", "1,234", "3.14 ", "\\", "</think>", "<think>", "-", "a", " ", "\n", "<|",
        "is 5. ", r"\text{", "A or ", "1/", "$5 in ", "。",
    ],
)  # fmt: skip
def test_time_is_linear_in_the_text(unit):
    """200,000 characters take well under two seconds; quadratic time would take far longer."""
    text = unit * (200_000 // len(unit))
    start = time.process_time()
    extract_answer(text)
    extract_answer(text, choice=True)
    assert time.process_time() - start < 2


def test_the_quick_way_to_the_last_box_finds_what_counting_every_brace_finds():
    rng = random.Random(0)
    pieces = ["\\boxed", "\\fbox", "{", "}", "5", " ", "\\\\", "\\{", "\\}", "x", "\\boxed{7}", "$"]
    for _ in range(20_000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 10)))
        assert [last_box(text)] == (_boxes(text)[-1:] or [None]), text
