r"""The second verdict against the first: every rule of the paper's grader that makes a difference, and what both agree on."""

import json
import time

import pytest
from conftest import real_data
from test_verdict import HOSTILE, SLACK

from kit.grade.paper import grade_as_paper
from kit.grade.paper_text import extract, normalise
from kit.grade.verdict import grade

# (reference answer, response, the paper's verdict, why it is not the strict one)
DIFFERENT = [
    ("5", r"\boxed{500}", True, "a factor of 100 is forgiven even without a percent sign"),
    ("500", r"\boxed{5}", True, "the same the other way round"),
    ("12345", r"\boxed{12346}", True, "numbers are equal within 0.01 %"),
    ("12", r"\boxed{1,2}", True, "a comma in a number does not count"),
    ("1,-2", r"\boxed{1,3}", True, "of a bare list the first element counts"),
    ("1,-2", r"\boxed{-2,1}", False, "so its order matters"),
    (r"2516_8", r"\boxed{2516}", True, "the base is dropped"),
    (r"1\frac12", r"\boxed{\frac12}", True, "a mixed number is a product"),
    (r"1\frac12", r"\boxed{1.5}", False, "and so it is not its value"),
    ("[1,2)", r"\boxed{(1,2]}", True, "an interval's brackets do not count"),
    (r"\frac{1}{23}", r"\boxed{\frac{12}{3}}", True, "curly brackets are taken out of both texts"),
    ("2(3+4)", r"\boxed{23+4}", True, "round ones as well"),
    (r"5\text{ cm}", r"\boxed{5\text{ km}}", True, "units are dropped"),
    ("a+2", r"\boxed{c+2}", True, "a lone letter that is a unit somewhere is dropped"),
    (r"\text{east}", r"\boxed{\text{west}}", True, "a direction is dropped as if it were a unit"),
    ("11", r"\boxed{11)+5}", True, "a formula is read as far as it goes"),
    ("6", r"\boxed{5} or rather \boxed{6", True, "a box that is left open counts"),
    ("6", r"<think> maybe \boxed{6}, no </think> It is 7.", True, "a box in the thought counts before the reply"),
    ("7", r"\boxed{8}. The final answer is $7$.", False, "nothing after the box is looked at"),
    ("3", r"\boxed{3}, that is \boxed{}", False, "the last box counts though it is empty"),
    (r"2\pi", r"\boxed{6.28318}", False, "pi is a symbol without a value"),
    ("2", r"\boxed{(1+i)(1-i)}", False, "i is one too"),
    ("x^2=4", r"\boxed{2x^2=8}", False, "sides must differ by the same, not by a factor"),
    (r"\{3,4\}", r"\boxed{4 \text{ and } 3}", False, "a set is not a bare list"),
    ("y=2x+3", r"\boxed{y-3=2x}", False, "a name and its equals sign are dropped, so this is 2x+3 against an equation"),
    ("C", "A 12, B 13, C", True, "without a statement the last letter is the choice"),
    ("42", r"\boxed{forty-two}", True, "number words are numbers"),
]  # fmt: skip

# (reference answer, response, the verdict of both)
ALIKE = [
    ("025", r"\boxed{25}", True),
    ("27.0", "it is 27", True),
    (r"\frac12", r"\boxed{0.5}", True),
    (r"\frac{3}{4}", r"The answer is 3/4.", True),
    (r"\dfrac34", r"\boxed{\tfrac{3}{4}}", True),
    ("10,080", r"\boxed{10080}", True),
    (r"30^\circ", r"\boxed{30}", True),
    (r"10\%", r"\boxed{0.1}", True),
    ("x=2", r"\boxed{2}", True),
    ("k = 2", r"\boxed{2}", True),
    ("(1,2)", r"\boxed{(2,1)}", False),
    ("(1,2)", r"\boxed{(1,2,3)}", False),
    (r"(3,\frac{\pi}{2})", r"\boxed{\left(3, \dfrac{\pi}{2}\right)}", True),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{bmatrix} 1 \\ 2.0 \end{bmatrix}}", True),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{pmatrix} 1 \\ 3 \end{pmatrix}}", False),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}}", False),
    (r"\sqrt{8}", r"\boxed{2\sqrt2}", True),
    (r"\sqrt{8}", r"\boxed{3\sqrt2}", False),
    ("x^2+2x+1", r"\boxed{(x+1)^2}", True),
    ("x^2+2x+1", r"\boxed{(x+2)^2}", False),
    ("2p+q=3", r"\boxed{2p-3=-q}", True),
    ("2p+q=3", r"\boxed{p+q=3}", False),
    ("q+2p=3+p", r"\boxed{3+p=q+2p}", True),
    ("x>3", r"\boxed{3<x}", True),
    ("x>3", r"\boxed{3 \le x}", False),
    ("6-5i", r"\boxed{-5i+6}", True),
    (r"\text{Evelyn}", r"\boxed{\text{evelyn}}", True),
    ("C", "The answer is (C).", True),
    ("C", "The answer is (D).", False),
    (r"\int_0^1 x dx", r"\boxed{\frac12}", True),
    ("7", "no number is here", False),
    ("6", r"\boxed{7} wait, \boxed{6}", True),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "response", "right", "why"), DIFFERENT)
def test_where_the_paper_decides_otherwise(gold, response, right, why):
    paper, strict = grade_as_paper(gold, response, deadline=60), grade(gold, response)
    assert (paper.verdict, strict.verdict) == (("correct", "wrong") if right else ("wrong", "correct")), (
        why,
        paper,
        strict,
    )


@pytest.mark.parametrize(("gold", "response", "right"), ALIKE)
def test_where_both_agree(gold, response, right):
    paper = grade_as_paper(gold, response, deadline=60)
    assert paper.verdict == grade(gold, response).verdict == ("correct" if right else "wrong"), paper


def test_a_number_one_percent_off_is_wrong_and_one_at_the_tolerance_is_right():
    assert grade_as_paper("100", r"\boxed{101}").verdict == "wrong"
    assert grade_as_paper("10000", r"\boxed{10001}").verdict == "correct"
    assert grade_as_paper("10000", r"\boxed{10002}").verdict == "wrong"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{\frac{1}{2}}, done", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed 5 $ and more", "5"),
        ("The final answer is $7$. I hope it is correct.", "7"),
        ("Hence the answer is 12.", "12"),
        ("the final answer is: 12", " 12"),
        ("between 1,000 and 2,500.75 of them", "2500.75"),
        ("nothing", ""),
    ],
)
def test_where_the_answer_is_found(response, answer):
    assert extract(response) == answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\left( 3, \dfrac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"\frac12", r"\frac{1}{2}"),
        (r"\frac1{72}", r"\frac{1}{72}"),
        (r"\sqrt3 + 3.00", r"\sqrt{3}+3"),
        ("3.05", "3.05"),
        (".5", "0.5"),
        ("-3/4", r"\frac{-3}{4}"),
        (r"\$ 32,\!348", "32,348"),
        (r"x \in [1, 2]", r"[1,2]"),
        ("three hundred and twenty-five", "325"),
        ("12 square feet", "12"),
        (r"15\%", "15"),
    ],
)
def test_normal_form(text, expected):
    assert normalise(normalise(text)) == expected


def test_hostile_input_is_bounded_and_nothing_long_is_called_wrong():
    boxed = [
        (gold, rf"\boxed{{{prediction}}}") for gold, prediction in HOSTILE
    ]  # else the last number is all that is graded
    for index, (gold, prediction) in enumerate([*HOSTILE, *boxed]):
        start = time.monotonic()
        verdict = grade_as_paper(gold, prediction, deadline=0.25)
        assert time.monotonic() - start < 0.25 + SLACK, index
        assert verdict.verdict in ("correct", "wrong", "unknown")
    assert grade_as_paper("7", "the answer is " + "7, as we see, " * 2_000).verdict == "unknown"
    assert grade_as_paper("5", r"\boxed{9^{9^{9^9}}}").verdict == "unknown"


def test_golds_as_published_are_right_against_themselves():
    for name in ("math500.jsonl", "aime24.jsonl", "amc23.jsonl"):
        for line in real_data(name).read_text(encoding="utf-8").splitlines():
            answer = str(json.loads(line)["answer"])
            assert grade_as_paper(answer, rf"so $\boxed{{{answer}}}$.").verdict == "correct", answer
