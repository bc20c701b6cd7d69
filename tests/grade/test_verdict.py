"""Grading end to end: answers and responses with their verdicts, hostile input from every side, real data where it is at hand."""

import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest

from kit.grade.plain_text import normal
from kit.grade.verdict import Verdict, equal, grade

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

# (reference answer, response or bare answer, whether it is right)
CASES = [
    ("1000.99", "1 000,99", True),
    ("1000.99", "1 000.99", True),
    ("1000.99", "1.000,99", True),
    ("1000.99", "$1,000.99$", True),
    ("1000.99", "1,000.99$", True),
    ("1000.99", "1000.99€", True),
    ("-2.5", "it is -2.5", True),
    ("$1/3$", r"$\frac1{3} $", True),
    ("$1/3$", r"$\frac{1}3 $", True),
    ("$1/3$", r"$\dfrac{1}{3}$ meters", True),
    (r"$28\%$", "28%", True),
    (r"$28\%$", r"$\boxed{28}\%$", True),
    (r"$28\%$", "0.28", True),
    ("28", "28 percentage points", True),
    ("$7 = 11a+c$", "$11a+c=7$", True),
    ("$a > b$", "$b < a$", True),
    ("$x+z=1$", "$1$", False),
    ("$a=1$", "$b=1$", False),
    (r"$\{1,2,3\}$", r"$\{3,2,1\}$", True),
    ("$[0,2]$", r"$[0,1)\cup[1,2]$", True),
    (r"$\{1,2,3\}$", r"$\{1,2\}\cup\{3\}$", True),
    (r"$\{1\}$", r"$\{1,2\}\setminus\{2\}$", True),
    ("$[1,2]$", r"$[0,2]\cap[1,3]$", True),
    (r"$\emptyset$", r"$\{\}$", True),
    (r"$\alpha$", r"$\alpha$", True),
    ("$π$", r"$\pi$", True),
    ("$-7$", "$1-2+3-4-5$", True),
    ("A,B,D", r"$\boxed{A, B, D}$", True),
    ("ABD", r"$\boxed{A, B, D}$", False),
    ("[[1,2],[3,4]]", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", True),
    ("0.5", r"\sin 30^\circ", True),
    (r"\arcsin x", r"\sin^{-1} x", True),
    ("10%", "0.1", True),
    ("427", "4.27 × 10^2", True),
    (r"2\pi", "6.2832", True),
    (r"2\pi", "6.28", False),
    ("-1.5", "-3/2", True),
    (r"\infty", "oo", False),
    ("1,000", "1000", True),
    (r"\$5", "5", True),
    (r"5 \text{ cm}", "5", True),
    ("k = 2", "2", True),
    ("(1,2,3)", "(3,2,1)", False),
    ("[1,2]", "(1,2)", False),
    ("E", "E*2", False),
    ("5", "five", False),
    ("C", "the answer is (C)", True),
    ("C", "答案是C", True),
    ("C", "The correct option is **C**.", True),
    ("B", r"\boxed{B}", True),
    ("B", r"\boxed{\text{B) } 42}", True),
    ("42", r"\boxed{\text{(B) } 42}", True),
    ("x^2+2x+1", "(x+1)^2", True),
    (r"\sqrt{x^2}", "|x|", True),
    (r"\sqrt{x^2}", "x", False),
    ("|x|", "x", False),
    (r"\sin^2 x+\cos^2 x", "1", True),
    (r"e^{i\pi}", "-1", True),
    (r"\tan x", r"\frac{\sin x}{\cos x}", True),
    (r"2\cos^2 x-1", r"\cos 2x", True),
    (r"\ln 8", r"3\ln 2", True),
    (r"\log_2 8", "3", True),
    (r"\frac{a^2-b^2}{a-b}", "a+b", True),
    (r"\int_0^1 x^2 dx", r"\frac13", True),
    (r"\int_0^1 x^2 dx", r"\frac14", False),
    (r"\sum_{k=1}^{n} k", r"\frac{n(n+1)}{2}", True),
    (r"\sum_{k=1}^{n} k", r"\frac{n(n+2)}{2}", False),
    (r"\sum_{k=1}^{\infty} \frac{1}{k^2}", r"\frac{\pi^2}{6}", True),
    (r"\sum_{k=1}^{10} k", "55", True),
    ("5050", r"\sum_{k=1}^{100} k", True),
    ("x=2, y=3", "(2,3)", True),
    ("x=2, y=3", "x=3, y=2", False),
    ("x=2,y=3", "y=3, x=2", True),
    ("(x,y)=(2,3)", "x=2, y=3", True),
    ("(2,3)", "2,3", True),
    ("(2,3)", "3,2", False),
    ("p=2, n=0", "$(p,n)=(2,0)$", True),
    ("p=2,n=0", "(0,2)", False),
    (r"x \in (1,2)", "1<x<2", True),
    (r"x>1 \text{ or } x<-1", r"(-\infty,-1)\cup(1,\infty)", True),
    (r"\mathbb{R}\setminus\{0\}", r"(-\infty,0)\cup(0,\infty)", True),
    (r"x\ne 0", r"(-\infty,0)\cup(0,\infty)", True),
    (r"(-\infty,\infty)", r"\mathbb{R}", True),
    ("2x+y<3", "y<3-2x", True),
    ("2x+y<3", "y>3-2x", False),
    ("y=2x+3", "y-2x=3", True),
    ("y=2x+3", "2x-y+3=0", True),
    ("x^2+y^2=1", "y^2=1-x^2", True),
    ("5 cm", "5 m", False),
    ("5 cm", "5 centimeters", True),
    (r"864\mbox{ inches}^2", "864 square inches", True),
    (r"5.4 \text{ cents}", "5.4", True),
    (r"\$32,\!348", "32348 dollars", True),
    (r"15\mbox{ cm}^2", r"15 \text{ square centimeters}", True),
    (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}^\circ", True),
    (r"30^\circ", r"\frac{\pi}{6}", True),
    ("10,080", "10{,}080", True),
    ("2516_8", "1358", True),
    ("2516_8", "2516", False),
    ("52_8", "52_{8}", True),
    ("4343_6", r"4343_{\text{six}}", True),
    (r"0.\overline{3}", r"\frac13", True),
    (r"\frac13", "0.333", False),
    (r"\frac13", "0.3333", True),
    ("0.3333", r"\frac13", True),
    ("3", "2.9999", False),
    ("3", "3.0000", True),
    ("6-5i", "-5i+6", True),
    (r"1\frac45", r"\frac{9}{5}", True),
    (r"1\frac45", r"\frac{14}{5}", False),
    ("1 4/5", "1.8", True),
    ("11/2", "1 1/2", False),
    (r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}", r"(-\frac13, \frac23, \frac53)", True),
    (r"\begin{pmatrix} 1&2\end{pmatrix}", r"\begin{pmatrix} 1\\2\end{pmatrix}", True),
    (r"3 \pm 2\sqrt 2", r"3+2\sqrt2, 3-2\sqrt2", True),
    (r"3 \pm 2\sqrt 2", r"3+2\sqrt2", False),
    (r"1 \pm \sqrt{19}", r"x=1\pm\sqrt{19}", True),
    (r"\text{even}", "Even", True),
    (r"\text{ellipse}", "an ellipse", False),
    ("yes", r"\boxed{\text{Yes}}", True),
    ("No", r"\boxed{\text{No.}}", True),
    (r"\text{(C)}", "C", True),
    (r"\text{(C)}", r"\boxed{c}", False),
    (r"\text{C}", "(C) 12", True),
    ("A", "A or B", False),
    ("A", "A and B", False),
    ("18", "Janet makes 9 * 2 = $<<9*2=18>>18 every day", True),
    ("#### 18", "18", True),
    ("Some text\n#### 1,800", "1800", True),
    ("27.0", r"\boxed{27}", True),
    ("-1.0", r"\boxed{-1}", True),
    ("025", r"\boxed{25}", True),
    ("073", "73", True),
    (r"\cot x", r"\frac{1}{\tan x}", True),
    ("f(x)=x^2", "f(t)=t^2", True),
    ("f(x)=x^2", "x^2", True),
    ("f(x)=x+1", "f(x)=1+x", True),
    ("f(x)=x+1", "g(x)=x+1", False),
    ("f(x) = 2", "2", True),
    ("P(x)=x^3-x", "x^3-x", True),
    ("7:32", r"\frac{7}{32}", True),
    ("14:64", "7:32", True),
    ("2:30", "1:15", False),
    ("1:2:3", "2:4:6", True),
    ("10^{10}", "10000000000", True),
    ("2^{100}", "1267650600228229401496703205376", True),
    ("100!", r"\frac{101!}{101}", True),
    (r"\binom{10}{3}", "120", True),
    (r"10 \choose 3", "120", True),
    (r"\lfloor 3.7 \rfloor", "3", True),
    ("|{-5}|", "5", True),
    (r"\sqrt[3]{-8}", "-2", True),
    ("(-8)^{1/3}", "-2", True),
    (r"\gcd(12, 18)", "6", True),
    (r"\max(3,5)", "5", True),
    ("x^2 + 2x", "x^2 - 2x", False),
    (r"4x^2 -2x + \frac{3}{2}", r"\frac{8x^2-4x+3}{2}", True),
    ("-330,90", "90, -330", True),
    (r"-12 \text{ or } -30", "-30 and -12", True),
    (r"\left( 10 \sqrt{2}, \frac{19 \pi}{44} \right)", r"(10\sqrt2, 19\pi/44)", True),
    ("1:4", "1/4", True),
    ("6p", "6*p", True),
    ("6p", "6q", False),
    ("0.15", r"15\%", True),
    ("15", "0.15", False),
    (r"15\%", "1500", False),
    ("9", "\\boxed{9}\n\nThe final answer is \\boxed{9}.", True),
    ("9", r"\boxed{8} wait, \boxed{9}", True),
    ("8", r"\boxed{8} wait, \boxed{9}", False),
    ("5", r"<think> \boxed{5} </think> The answer is \boxed{6}", False),
    ("5", r"<think> \boxed{5} </think>", True),
    ("5", "<think> so x is 5", False),
    ("5", r"\boxed{5} and then \boxed{6", True),
    ("5", r"\boxed 5", True),
    ("5", r"\boxed {5}", True),
    ("5", r"\fbox{5}", True),
    ("5", r"\boxed{}", False),
    (r"\frac12", r"\boxed\frac12", False),
    ("11", r"x \approx 11", True),
    (r"\sqrt{2}", r"\sqrt{2} \approx 1.41", True),
    ("12.5", r"12.5\ldots", True),
    ("0", r"0^\circ", True),
    ("1.23456789", "1.2345679", False),
    (r"10\sqrt{2}", r"\sqrt{200}", True),
    (r"10\sqrt{2}", "14.142", True),
    (r"\frac{\sqrt{6}-\sqrt{2}}{4}", r"\sin 15^\circ", True),
    (r"2+\sqrt{3}", r"\frac{1}{2-\sqrt{3}}", True),
    (r"\frac{1+\sqrt5}{2}", r"2\cos 36^\circ", True),
    ("W(n) = 1", "W(x)=1", True),
    ("x_1 = 2, x_2 = 3", "2, 3", True),
    ("x_1=2,x_2=3", "3,2", True),
    ("(3,4),(5,6)", "(5,6), (3,4)", True),
    ("(3,4),(5,6)", r"\{(5,6),(3,4)\}", True),
    (r"\text{Monday}", "Tuesday", False),
    (r"2 \text{ hours}", "2 hrs", True),
    ("120", r"2 \text{ hours}", False),
    ("3+4i", "(3,4)", False),
    (r"\dfrac{\pi}{2}+k\pi", r"\frac{\pi}{2}+\pi k", True),
    (r"k\pi, k \in \mathbb{Z}", r"\pi k", False),
]

# Labels of the public cases that this grader does not follow, each with the reason. Everything else there must agree.
JOINED = "the label joins several boxes of a response; the last box is the answer, since self-corrections are what is studied"
CONTESTED = {
    (r"$1 - \frac{1}{\mathrm{e}}$", r"$1 + \frac{1}{\mathrm{e}}$"): "the label calls 0.632 and 1.368 equal",
    (
        r"[2^{\frac{1}{2^{1000}}}, \infty)",
        r"[1,+\infty)",
    ): "2^(2^-1000) exceeds 1 by 6.9e-302: equal only in double precision",
    ("$f(x)$", "$f(y)$"): "labelled right and wrong, by the option `strict`; f(x) is not f(y)",
    ("$${1,2,3}$$", r"\boxed{1},\boxed{2},\boxed{3}"): JOINED,
    ("$${1,2,3}$$", r"\boxed{1} and \boxed{2} and \boxed{3}"): JOINED,
    ("$$(3, 3), (1, 1)$$", r"$$\boxed{(3, 3)} \text{ for part (a) and } \boxed{(1, 1)}$$"): JOINED,
    (
        r"$x_{1}=10^{\frac{-5+\sqrt{13}}{6}},\quadx_{2}=10^{\frac{-5-\sqrt{13}}{6}}$",
        r"$\boxed{10^{\frac{\sqrt{13} - 5}{6}}} \quad \text{and} \quad \boxed{10^{-\frac{5 + \sqrt{13}}{6}}}$",
    ): JOINED,
    (
        r"$x_{1}=\frac{1}{2}+\frac{31\sqrt{5}}{216},\quadx_{2}=\frac{1}{2}-\frac{31\sqrt{5}}{216}$",
        r"$\boxed{\dfrac{108 + 31\sqrt{5}}{216}} \quad \text{and} \quad \boxed{\dfrac{108 - 31\sqrt{5}}{216}}$",
    ): JOINED,
    (
        "$y_{1}=-2 x^{2}+4 x+3, y_{2}=3 x^{2}+12 x+10$",
        r"\($y_1 = \boxed{-2(x - 1)^2 + 5} \) and \( y_2 = \boxed{3(x + 2)^2 - 2} \) ",
    ): JOINED,
}

# (reference answer, prediction): no verdict is asked for but the deadline is, and RIGHT lists those that may be correct
HOSTILE = [
    ("5", "9^9^9^9"),
    ("9^{9^{9^9}}", "9^{9^{9^8}}"),
    ("1", "10^{10^{10^{10}}}"),
    ("2", "2^{2^{2^{2^{2^{2^2}}}}}"),
    ("5", "^".join(["9"] * 500)),
    ("5", "9^{" * 500 + "9" + "}" * 500),
    ("0", "9^{-9^{9^9}}"),
    ("1", "(1+10^{-9})^{10^{12}}"),
    ("5", "99999999!"),
    ("5", "(10^{10})!"),
    ("5", "(((9!)!)!)!"),
    ("5", "5" + "!" * 3000),
    ("1", "\\frac{2006!}{2004!}"),
    ("\\frac{1}{2004!}", "\\frac{1}{2006!}"),
    ("5", "\\frac{100000!}{99999!}"),
    ("5", "(9^9)!/(9^9)!"),
    ("5", "\\binom{10^9}{5\\cdot 10^8}"),
    ("5", "\\binom{999999}{500000}"),
    ("5", "\\binom{10^{100}}{10^{50}}"),
    ("5", "\\binom{\\binom{100}{50}}{\\binom{50}{25}}"),
    ("5", "\\sum_{k=1}^{10^9} k^k"),
    ("5", "\\sum_{k=1}^{2000} k!"),
    ("5", "\\sum_{a=1}^{1000}\\sum_{b=1}^{1000}\\sum_{c=1}^{1000} abc"),
    ("5", "\\prod_{k=1}^{1999} k^{k}"),
    ("5", "\\sum_{n=1}^{\\infty} \\frac{\\sin(n^3)}{n^{1.01}}"),
    ("x", "\\prod_{k=1}^{n} \\sum_{j=1}^{k} \\frac{x^j}{j!}"),
    ("5", "\\int_0^1 x^{x^{x^x}} dx"),
    ("5", "\\int_0^{\\infty} \\sin(x^x) \\cos(e^{x^2}) dx"),
    ("\\frac{\\pi}{2}", "\\int_0^1 \\frac{\\ln(1+x^{2+\\sqrt{3}})}{1+x} dx"),
    ("5", "\\int_0^1 \\int_0^1 \\frac{\\arctan(xy)^{y}}{\\ln(2+x+y)^{x}} dx dy"),
    ("5", "\\int_0^{10} e^{\\sin(\\cos(\\tan(x^2)))} dx"),
    ("5", "{" * 3000 + "5" + "}" * 3000),
    ("5", "\\boxed" + "{" * 3000 + "5" + "}" * 3000),
    ("5", "(" * 3000 + "5" + ")" * 3000),
    ("5", "\\boxed{" * 3000),
    ("5", "\\boxed{" * 3000 + "5" + "}" * 3000),
    ("5", "[" * 5000),
    ("5", "\\frac{" * 5000),
    ("5", "\\frac" * 20000),
    ("5", "\\sqrt" * 5000 + "5"),
    ("5", "\\left(" * 5000),
    ("5", "|" * 5000),
    ("5", "-" * 60000 + "5"),
    ("5", "+-" * 30000 + "5"),
    ("7", "Wait, let me reconsider. " * 2600),
    ("7", "the answer is " * 4700),
    ("7", "final answer: " * 4700),
    ("7", "x = $" * 13000),
    ("7", "\\( " * 22000),
    ("7", "\\[ " * 22000),
    ("7", "$ a $ " * 11000),
    ("7", "1,234" * 13000),
    ("7", "3.14 " * 13000),
    ("7", "\\" * 64000),
    ("7", "a" * 64000),
    ("7", "0" * 64000 + "7"),
    ("7", "9" * 64000),
    ("7", "." * 64000),
    ("7", "1/" * 32000 + "1"),
    ("7", "1+" * 25000 + "1"),
    ("7", "x" * 300 + "+" + "y" * 300),
    ("7", " ".join(f"\\boxed{{{k}}}" for k in range(5000))),
    ("7", "\\boxed{7} \\boxed{" * 4000),
    ("7", "\\text{" * 8000),
    ("7", "\\text{\\text{" * 3000 + "7" + "}}" * 3000),
    (",".join(map(str, range(3000))), ",".join(map(str, range(3000, 0, -1)))),
    (",".join(f"\\sqrt{{{k}}}" for k in range(3000)), ",".join(f"\\sqrt{{{k + 1}}}" for k in range(3000))),
    (
        "\\{" + ",".join(f"{k}.5" for k in range(3000)) + "\\}",
        "\\{" + ",".join(f"\\frac{{{2 * k + 1}}}{{2}}" for k in range(3000)) + "\\}",
    ),
    ("(" + ",".join(["x"] * 3000) + ")", "(" + ",".join(["y"] * 3000) + ")"),
    ("5", "1 \\pm " * 40 + "1"),
    ("5", "\\{" * 30 + "1 \\pm 2" + "\\}" * 30),
    ("5", "5\x00"),
    ("\x005", "5"),
    ("5", "\ud800"),
    ("\udfff", "\udfff5"),
    ("5", "\x00" * 64000),
    ("5", "\u202e5\u202c \U0001f600"),
    ("5", "\ufdfa" * 10000),
    ("x", "\ud83dx+\udc00"),
    ("5", "__import__('os').system('echo hacked > /tmp/hacked')"),
    ("5", "eval('2+3')"),
    ("5", 'exec("import os; os._exit(3)")'),
    ("5", "().__class__.__bases__[0].__subclasses__()"),
    ("5", "open('/etc/passwd').read()"),
    ("5", "\\input{/etc/passwd}"),
    ("5", "\\write18{rm -rf /}"),
    ("5", "lambda: (yield)"),
    ("x", "Symbol('x', commutative=eval('0'))"),
    ("\\sin(10^{10^{10}})", "\\sin(10^{10^{9}})"),
    ("1", "\\tan(9^{9^9})"),
    ("5", "e^{e^{e^{e^{e}}}}"),
    ("0", "\\ln(\\ln(\\ln(\\ln(2))))"),
    ("5", "0^{-1}"),
    ("5", "\\frac{1}{0}"),
    ("5", "0/0"),
    ("5", "\\log_1 5"),
    ("5", "\\infty-\\infty"),
    ("x^{10^9}+1", "(x+1)^{10^9}"),
    ("(x+y+z)^{500}", "(x+y+z)^{499}(x+y+z+1)"),
    ("x^{x^{x^{x}}}", "x^{x^{x^{x+1}}}"),
    ("5", "1e999999"),
    ("5", "1e-999999"),
    ("5", "1E400000000000"),
    ("5", "\\sqrt[999999999]{7}"),
    ("5", "\\sqrt[0]{7}"),
    ("5", "\\gcd(10^{4000}, 3^{9000})"),
    ("5", "5_{99}"),
    ("5", "\\begin{pmatrix}" + "1 & " * 5000 + "1 \\end{pmatrix}"),
    ("5", "\\begin{pmatrix}" * 2000),
    ("5", ""),
    ("5", " " * 64000),
    ("5", "\\"),
    ("\\sqrt{2}+\\sqrt{3}", "\\sqrt{5+2\\sqrt{6}}"),
    ("2^{2^{-1000}}", "1"),
    ("5", "a \\cap " * 3000 + "b"),
    ("5", "1 \\setminus " * 3000 + "b"),
    ("5", "1:" * 3000 + "1"),
    ("5", "5 < " * 3000 + "6"),
    ("5", "x'" * 3000),
    ("5", "x_" * 3000),
    ("5", "5\\%" * 3000),
    ("5", "\\overline{" * 3000),
    ("5", "f(" * 3000 + "x" + ")" * 3000),
    ("5", "*".join(["1000000"] * 900)),
    ("5", "5 million " * 900),
    ("5", "9" * 4000 + "e4000 + x"),
    ("f(10^{5000})", "f(10^{5001})"),
    ("5", "{}_" * 9000),
    ("5", "{}_5C_" * 9000),
    ("5", "]0,1[" * 3000),
    ("5", "0.(" * 15000),
    ("1, 2", "the solutions are 1, " * 3000),
    ("B", "I choose option A or B " * 2700),
    ("B", "not option A or B " * 3000),
    ("6", "is " * 20000 + "5"),
    ("5", "5 " + " " * 60000 + "m"),
    ("5", "\\{x | " * 3000 + "\\}" * 3000),
    ("6", "5 \\mathrm{~m}" + " / \\mathrm{s}" * 4000),
]
RIGHT = {  # how the only ones begin that are right
    "5\x00",
    "5",
    r"\boxed{7} \boxed{\boxed{7} \boxed{"[:20],
    r"\{\frac{1}{2},\frac{3}{2}"[:20],
    r"\sqrt{5+2\sqrt{6}}"[:20],
}

SLACK = 3.0  # seconds beyond its deadline that a call may take on a busy machine; under half a second on an idle one


def read(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is absent: this test needs the real data that lies beside the checkout")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("gold", "prediction", "right"), CASES)
def test_case(gold, prediction, right):
    verdict = grade(gold, prediction)
    assert verdict.verdict == ("correct" if right else "wrong"), verdict


def test_verdict_does_not_depend_on_the_side():
    answers = sorted({gold for gold, _, _ in CASES if len(gold) < 60})
    pairs = [
        (gold, prediction)
        for gold, prediction, _ in CASES
        if "boxed" not in prediction and "think" not in prediction
    ]
    for a, b in [*pairs, *pairwise(answers), *zip(answers, answers[7:], strict=False)]:
        assert equal(a, b) == equal(b, a), (a, b)


def test_every_answer_equals_itself():
    for gold, prediction, _ in CASES:
        for answer in (gold, prediction):
            assert equal(answer, answer)[0] == "correct"


def test_verdict_is_complete_frozen_and_json():
    verdict = grade("033", r"so $\boxed{ 33 }$.")
    expected = Verdict(
        "correct", 0, "same text", gold="33", prediction="33", extracted="33", extraction="boxed"
    )
    assert verdict == expected
    assert json.loads(json.dumps(asdict(verdict)))["rule"] == "same text"
    with pytest.raises(AttributeError):
        verdict.verdict = "wrong"


@pytest.mark.parametrize(
    ("gold", "prediction", "tier"),
    [
        ("42", "42", 0),
        ("27.0", "27", 0),
        (r"\frac12", "0.5", 0),
        (r"\text{(C)}", "C", 0),
        (r"\sqrt{8}", r"2\sqrt{2}", 1),
        ("x^2+2x+1", "(x+1)^2", 1),
        (r"\int_0^1 x^2 dx", "1/3", 2),
        (r"\sum_{k=1}^{n} k", "n(n+1)/2", 2),
    ],
)
def test_tier(gold, prediction, tier):
    verdict = grade(gold, prediction, deadline=60)
    assert (verdict.verdict, verdict.tier) == ("correct", tier)


@pytest.mark.parametrize(
    ("gold", "prediction", "options", "right"),
    [
        ("10", r"10\%", {"percent": "value"}, False),
        ("0.1", r"10\%", {"percent": "value"}, True),
        ("5 cm", "5 km", {"units": "ignore"}, True),
        ("5 cm", "5", {"units": "required"}, False),
        ("5 cm", "5 centimeters", {"units": "required"}, True),
        ("1, 2", "2, 1", {"order": "strict"}, False),
        (r"\{1, 2\}", r"\{2, 1\}", {"order": "strict"}, True),
        (r"\frac13", "0.3333", {"rounding": None}, False),
        (r"\frac13", "0.33", {"rounding": 2}, True),
        (r"\frac12", "0.5", {"rounding": None}, True),
    ],
)
def test_options(gold, prediction, options, right):
    assert grade(gold, prediction, **options).verdict == ("correct" if right else "wrong")


def test_mistakes_of_the_caller_are_named():
    with pytest.raises(ValueError, match=r"gold=27\.0.*str"):
        grade(27.0, "27")
    with pytest.raises(ValueError, match="gold=' '"):
        grade(" ", "27")
    with pytest.raises(ValueError, match=r"gold='27', prediction=None.*str"):
        grade("27", None)
    with pytest.raises(ValueError, match="percent='maybe': pass one of 'either', 'value'"):
        grade("27", "27%", percent="maybe")
    with pytest.raises(ValueError, match="rounding=0: pass"):
        grade("27", "27.1", rounding=0)


def test_no_answer_is_wrong_and_unknown_is_not_wrong():
    nothing = grade("5", "I do not know what to say about it, sorry.")
    assert (nothing.verdict, nothing.prediction, nothing.extracted) == ("wrong", None, None)
    assert nothing.rule.startswith("no answer")
    assert grade("5", "9^{9^{9^9}}").verdict == "unknown"
    hard = grade("5", r"\int_0^{\infty} \sin(x^x) \cos(e^{x^2}) dx", deadline=0.2)
    assert (hard.verdict, hard.tier) == ("unknown", 2)
    assert "deadline" in hard.rule


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("033", "33"),
        (r"$10,\!080$.", "10080"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"\left( 3, \dfrac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"\$32,\!348", "32348"),
        ("(1,234)", "(1,234)"),
        ("1 1/2", "1 1/2"),
        (r"15\%", "15%"),
    ],
)
def test_normal(text, expected):
    assert normal(text) == expected
    assert normal(expected) == expected


def run_hostile(deadline):
    """(seconds over the deadline, verdict) of every hostile pair."""
    results = []
    for gold, prediction in HOSTILE:
        start = time.monotonic()
        verdict = grade(gold, prediction, deadline=deadline)
        results.append((time.monotonic() - start - deadline, verdict.verdict))
        json.dumps(asdict(verdict))
    return results


def assert_bounded(results):
    late = [
        (HOSTILE[index][1][:60], seconds) for index, (seconds, _) in enumerate(results) if seconds > SLACK
    ]
    assert not late
    assert {verdict for _, verdict in results} <= {"correct", "wrong", "unknown"}


def test_hostile_input_from_the_main_thread():
    assert len(HOSTILE) >= 60
    results = run_hostile(0.25)
    assert_bounded(results)
    assert {
        HOSTILE[index][1][:20] for index, (_, verdict) in enumerate(results) if verdict == "correct"
    } <= RIGHT


def test_hostile_input_from_a_worker_thread():
    results = []
    thread = threading.Thread(target=lambda: results.extend(run_hostile(0.1)))
    thread.start()
    thread.join(timeout=120)
    assert not thread.is_alive()
    assert len(results) == len(HOSTILE)
    assert_bounded(results)


def test_hostile_input_from_a_subprocess_stays_within_its_memory():
    """The script has no __main__ guard; it reports its lateness and the largest memory of it and of its workers."""
    script = """
import json, sys, time
from kit.grade.verdict import grade
worst = 0.0
for gold, prediction in json.loads(sys.stdin.read()):
    start = time.monotonic()
    grade(gold, prediction, deadline=0.1)
    worst = max(worst, time.monotonic() - start - 0.1)
memory = 0
if sys.platform == "linux":
    import resource
    from kit.grade.deciding.sympy_workers import pool
    pool().close()
    memory = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(json.dumps([worst, memory]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(HOSTILE), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    worst, kilobytes = json.loads(done.stdout)
    assert worst <= SLACK
    assert kilobytes < 2 * 2**20


def test_nothing_that_a_model_writes_is_executed(tmp_path):
    mark = tmp_path / "executed"
    for prediction in (
        f"open({str(mark)!r}, 'w')",
        f"\\int_0^1 open({str(mark)!r}, 'w') dx",
        f"__import__('os').mkdir({str(mark)!r})",
    ):
        grade(r"\int_0^1 x^2 dx", prediction)
        grade(prediction, r"\boxed{" + prediction + "}")
    assert not mark.exists()


def test_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "kit.grade", r"\frac{1}{2}", r"so it is $\boxed{\tfrac12}$"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert (lines["verdict"], lines["tier"], lines["rule"]) == ("correct", "0", "number")
    assert lines["gold"] == r"\frac{1}{2}"
    assert lines["prediction"] == r"\frac12"


def test_importing_the_grader_is_light():
    heavy = ("torch", "transformers", "sympy", "mpmath")
    script = f"import sys, kit.grade.verdict; print([name for name in {heavy} if name in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
        ).stdout.strip()
        == "[]"
    )


def test_public_cases_agree_except_the_contested():
    disagreed = set()
    for case in read("grader_cases.jsonl"):
        verdict = grade(case["gold"], case["pred"])
        assert verdict.verdict != "unknown", case
        if (verdict.verdict == "correct") != bool(case["expected"]):
            disagreed.add((case["gold"], case["pred"]))
    assert disagreed == set(CONTESTED)


def test_reference_solutions_of_math500_are_right():
    for row in read("math500.jsonl"):
        assert grade(row["answer"], row["solution"]).verdict == "correct", row["answer"]
        assert grade(row["answer"], rf"\boxed{{{row['answer']}}}").verdict == "correct", row["answer"]


def test_golds_as_published():
    for row in read("aime24.jsonl"):
        assert grade(row["answer"], rf"\boxed{{{int(row['answer'])}}}").verdict == "correct"
    for row in read("amc23.jsonl"):
        assert grade(str(row["answer"]), rf"\boxed{{{round(row['answer'])}}}").verdict == "correct"
    for row in read("gsm8k_test.jsonl")[:200]:
        assert (
            grade(row["answer"], row["answer"].rpartition("#### ")[2].replace(",", "")).verdict == "correct"
        )


def test_neighbouring_answers_of_math500_differ():
    answers = sorted({row["answer"] for row in read("math500.jsonl")})
    same = {pair for pair in pairwise(answers) if equal(*pair)[0] == "correct"}
    assert same == {
        ("120", r"120^\circ"),
        ("15", r"15\mbox{ cm}^2"),
        ("30", r"30^\circ"),
        ("36", r"36^\circ"),
    }
    assert all(equal(a, b) == equal(b, a) for a, b in pairwise(answers))


def test_traces_judged_right_by_others_are_right():
    """Their flags compare the last boxed number alone: what else is called right here has its answer outside a box, or a unit."""
    for name in ("openr1_gsm8k.jsonl", "openr1_aime.jsonl"):
        for row in read(name):
            for trace, flag in zip(row["generations"], row["correctness_math_verify"], strict=True):
                verdict = grade(row["answer"], trace)
                if flag:
                    assert verdict.verdict == "correct", (row["uuid"], verdict)
                elif verdict.verdict == "correct":
                    assert (
                        verdict.extraction in ("answer statement", "last number")
                        or "Mb/h" in verdict.extracted
                    ), verdict
