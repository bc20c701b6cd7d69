"""What stands out in an answer, also while it is written: equations, reflection phrases, boxed answers."""

from __future__ import annotations

from kit.data.equations import Equation, stated_equations
from kit.evaluate.reflection_and_loops import REFLECTION, boxes
from kit.grade import grade
from kit.terminal import RIGHT, WRONG, Mark

# Characters behind an equation, by which it is known to be whole: 7+5=1 may become 7+5=12, and 7/2 = 3 may be
# followed by "remainder 1"
SETTLED = 12
SHOWN = 40  # characters of an equation or an answer in a summary


def equations_of(text: str, *, is_whole: bool) -> list[Equation]:
    """Return the equations of a text, without those that may go on if it is not whole yet."""
    end = len(text) if is_whole else len(text) - SETTLED
    return [found for found in stated_equations(text) if found.span[1] <= end]


def marks_of(text: str, *, is_whole: bool) -> list[Mark]:
    """Return the marks of an answer."""
    signs = {True: ("right", RIGHT), False: ("wrong", WRONG)}
    marks = [Mark(*found.span, *signs[found.is_right]) for found in equations_of(text, is_whole=is_whole)]
    marks += [Mark(*match.span(), "reflection") for match in REFLECTION.finditer(text)]
    return marks + [Mark(start, end, "box") for start, end in boxes(text)]


def summary(text: str, num_tokens: int, gold: str, ending: str = "") -> str:
    """Return what an answer shows, in a few words.

    gold: the right answer; "" = not known. ending: how the answer ended if it did not end by itself.
    """
    equations = equations_of(text, is_whole=True)
    wrong = [found for found in equations if not found.is_right]
    parts = [f"{num_tokens:,} tokens" + (f", {ending}" if ending else "")]
    if gold:
        parts.append(graded(text, gold))
    if equations:
        counts = f"{len(equations) - len(wrong)} of {len(equations)} equations right"
        parts.append(counts + (f"; the first wrong one: {_short(wrong[0].text)}" if wrong else ""))
        if wrong:
            parts[-1] += f" (it is {_short(str(wrong[0].true))})"
    if phrases := len(REFLECTION.findall(text)):
        parts.append(f"{phrases} reflection phrase{'s' * (phrases > 1)}")
    return "; ".join(parts)


def graded(text: str, gold: str) -> str:
    """Return the verdict on an answer, as kit.grade gives it. gold: the right answer."""
    found = grade(gold, text)
    if found.extracted is None:
        return f"wrong: no answer (right: {_short(gold)})"
    right = "" if found.verdict == "correct" else f" (right: {_short(gold)})"
    return f"{found.verdict}: {_short(found.extracted)}{right}"


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
