"""What goes wrong in an answer: its steps compared with the problem's, and the first thing that is wrong.

The steps of a toy answer stand between semicolons. The equation in force of a step is the one it ends up
with: the first, or, if the step takes it back (", no: "), the one that follows. Checks, and what was taken
back, are counted but are no steps of the chain. An arithmetic answer is free text: every equation in it
counts as a step.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from kit.data.equations import Equation, stated_equations
from kit.data.expressions import solve
from kit.data.toy import read_chain, steps_of
from kit.evaluate.reflection_and_loops import boxes, ends_in_loop

# the first thing wrong in an answer, in the order in which it is looked for; "" = nothing
CAUSES = {
    "a sum is wrong": "an equation in force is false",
    "another step": "an equation in force is true, but not the problem's next: a number is miscopied, "
    "a step is left out or repeated",
    "no steps": "no equation at all",
    "cut off": "all steps right so far, but the limit on tokens came first",
    "stops early": "all steps right, but some are missing",
    "no box": "all steps right, but no boxed answer",
    "box differs": "all steps right, but the box holds another number",
}
STEPS_END = re.compile(r"</think>|\\boxed")


@dataclass(frozen=True)
class Anatomy:
    """What one answer shows, step by step."""

    cause: str  # of CAUSES, or "" if nothing is wrong
    right_steps: int  # before the first wrong one
    num_steps: int  # of the problem
    looping: bool
    equations: Sequence[Equation]  # all of them, also checks and what was taken back
    right: Sequence[Equation]  # in force, and the problem's step at their place
    wrong: Sequence[Equation]  # in force, but not that step
    taken_back: Sequence[Equation] = ()  # false, and the answer itself takes them back
    num_checks: int = 0
    num_corrections: int = 0

    @property
    def num_operations(self) -> int:
        """Operations that the answer performs."""
        return sum(equation.num_operations for equation in self.equations)

    @property
    def num_right(self) -> int:
        """Equations that are true."""
        return sum(equation.is_right for equation in self.equations)


def dissect(problem: str, text: str, *, finished: bool) -> Anatomy:
    """Check the steps of a toy answer. finished: whether it ended by itself."""
    chain = read_chain(problem)
    wanted = steps_of(chain)
    end = match.start() if (match := STEPS_END.search(text)) else len(text)
    equations = stated_equations(text)
    in_force, taken_back, checks, corrections = [], [], 0, 0
    start = 0
    for part in text[:end].split(";"):
        stop = start + len(part)
        inside = [equation for equation in equations if start <= equation.position < stop]
        no = part.rfind("no:")
        after = [equation for equation in inside if no >= 0 and equation.position > start + no]
        chosen = (after or inside)[:1]
        in_force += chosen
        corrections += bool(after)
        checks += max(0, len(inside) - len(chosen) - bool(after))
        taken_back += [e for e in inside if after and e.position < start + no and not e.is_right]
        start = stop + 1

    right = 0
    while right < min(len(in_force), len(wanted)) and _plain(in_force[right]) == wanted[right]:
        right += 1

    first_wrong = in_force[right] if right < len(in_force) else None
    box = boxes(text)
    boxed = text[box[-1][0] : box[-1][1]].partition("{")[2].rstrip("}") if box else None
    if first_wrong is not None:
        cause = "another step" if first_wrong.is_right else "a sum is wrong"
    elif not in_force and finished:
        cause = "no steps"
    elif not finished:
        cause = "cut off"
    elif right < len(wanted):
        cause = "stops early"
    else:
        cause = "no box" if boxed is None else "" if boxed == chain.answer else "box differs"

    fits = [i < len(wanted) and _plain(e) == wanted[i] for i, e in enumerate(in_force)]
    return Anatomy(
        cause=cause,
        right_steps=right,
        num_steps=len(wanted),
        looping=ends_in_loop(text),
        equations=equations,
        right=[e for e, fit in zip(in_force, fits, strict=True) if fit],
        wrong=[e for e, fit in zip(in_force, fits, strict=True) if not fit],
        taken_back=taken_back,
        num_checks=checks,
        num_corrections=corrections,
    )


def dissect_arithmetic(problem: str, text: str, *, finished: bool) -> Anatomy:
    """Check the equations of an answer to a problem of kit.data.arithmetic, as `dissect` does for the toy.

    In free text checks and corrections look like steps, so none are counted. Each equation is checked by
    itself: a right computation with a number miscopied from the problem is right. A step is an operation.
    Raises ValueError for any other kind of problem.
    """
    equations = stated_equations(text)
    wrong = [equation for equation in equations if not equation.is_right]
    cause = "a sum is wrong" if wrong else "no steps" if not equations else ""
    before_wrong = takewhile(lambda equation: equation.is_right, equations)
    return Anatomy(
        cause=cause if finished or wrong else "cut off",
        right_steps=sum(equation.num_operations for equation in before_wrong),
        num_steps=solve(problem).num_operations,
        looping=ends_in_loop(text),
        equations=equations,
        right=[equation for equation in equations if equation.is_right],
        wrong=wrong,
    )


STEPWISE = {"toy": dissect, "arithmetic": dissect_arithmetic}  # benchmarks whose answers have steps to check
READERS = {"toy": read_chain, "arithmetic": solve}  # of their problems


def has_steps(benchmark: str, rows: Iterable[dict]) -> bool:
    """Return whether the samples answer the benchmark's own kind of problem.

    A file of other problems may have its name.
    """
    try:
        for problem in {row["problem"] for row in rows}:
            READERS[benchmark](problem)
    except ValueError:
        return False
    return True


def _plain(equation: Equation) -> str:
    return equation.text.replace(" ", "")
