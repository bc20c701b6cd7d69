r"""Is this answer right? Correct, wrong or unknown, with the tier and the rule that decided, and both answers as they were read.

    from kit.grade import grade
    grade(r"\frac{1}{2}", r"... so the answer is $\boxed{0.5}$.")    # Verdict(verdict="correct", tier=0, rule="number", ...)

Tier 0 normalises both texts and compares strings and exact fractions, in microseconds. Tier 1 parses both and compares their
exact values (kit/grading); nothing is executed and every operation is capped. Tier 2 is sympy in a worker process, for the few
that tier 1 leaves open. A response without an answer is wrong; `unknown` is only what could not be decided: the deadline passed,
a cap was met, or sympy could not tell.

    python -m kit.grade "gold" "prediction"
    python -m kit.grade regrade samples.jsonl          kit/regrade.py
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from dataclasses import asdict, dataclass
from functools import lru_cache

from kit.grading.answers import parse
from kit.grading.choices import bare_choice
from kit.grading.comparison import Judge
from kit.grading.extraction import extract_answer
from kit.grading.limits import Budget, NotNumeric, ParseError, TooLarge, Undecided, Undefined
from kit.grading.notation import clean, group_ends
from kit.grading.paper import grade_as_paper
from kit.grading.prose import is_bare
from kit.grading.scalars import Options
from kit.grading.vocabulary import FONT_COMMANDS, TEXT_COMMANDS
from kit.grading.workers import prove

__all__ = ["Options", "Verdict", "equal", "extract_answer", "grade", "normal"]

DEADLINE = 5.0
DEFAULTS = Options()


@dataclass(frozen=True)
class Verdict:
    """What was decided about one prediction, and why; `dataclasses.asdict` of it is JSON."""

    verdict: str  # "correct", "wrong" or "unknown"
    tier: int  # 0: normalised text and fractions; 1: parsed values; 2: sympy in a worker
    rule: str  # the rule that decided
    gold: str  # the reference answer, normalised
    prediction: str | None  # the predicted answer, normalised; None where there is none
    extracted: str | None  # the predicted answer as it stood in the response
    extraction: str  # where in the response it was found


_INTEGER = re.compile(r"-?[0-9]{1,18}")
_UNWRAP = re.compile(r"\\(?:" + "|".join(sorted(TEXT_COMMANDS | FONT_COMMANDS | {"boxed", "fbox"})) + r")\s*\{([^{}]*)\}")
_NOISE = re.compile(r"\\(?:(?:left|right|[bB]igg?[lr]?|displaystyle|limits|q?quad)(?![A-Za-z])|[,!;:> ()\[\]$])|\$|`|\"")
_SPACES = re.compile(r" (?![A-Za-z0-9])|(?<![A-Za-z0-9]) ")
_NOT_BETWEEN_DIGITS = re.compile(r" (?![0-9])|(?<![0-9]) ")
_GROUPED = re.compile(r"(?<![0-9.,])([0-9]{1,3})((?:(?:,|\{,\}|(?:\\!)?,\\!\s*|\\,)[0-9]{3})+)(?![0-9]|,[0-9])")
_FRACTION = re.compile(r"(-?)\\[dtc]?frac\s*(?:\{\s*(-?[0-9]+)\s*\}|([0-9]))\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))")
_WORD = re.compile("[A-Za-z][a-z]+")  # "Yes" and "yes", but not "AB" and "ab"
_PLAIN = re.compile(r"([+-]?)([0-9]*)(?:\.([0-9]*)|/([0-9]+))?")


def normal(text: str) -> str:
    """The text as tier 0 compares it: without delimiters, spacing, font commands, thousands separators and final full stops."""
    if _INTEGER.fullmatch(text):
        return str(int(text))
    text = clean(text).strip()
    if "\\" in text or "$" in text:
        for _ in range(4):
            unwrapped = _UNWRAP.sub(r"\1", text)
            if unwrapped == text:
                break
            text = unwrapped
        if "," in text or "\\," in text:
            text = _ungroup(text)
        text = _NOISE.sub(" ", text).replace("\\%", "%")
        if "frac" in text:
            text = text.replace("dfrac", "frac").replace("tfrac", "frac").replace("cfrac", "frac")
    elif "," in text:
        text = _ungroup(text)
    text = " ".join(text.split())  # one space a run: what is left of 1  1/2 must not be 11/2
    if " " in text:
        text = _SPACES.sub("", text)
    while text[-1:] in (".", ",", ";"):
        text = text[:-1]
    return text


def _ungroup(text: str) -> str:
    """1,234 and 1{,}234 as 1234, but a comma inside brackets separates."""
    if not any(sign in text for sign in "([") and "\\{" not in text:
        return _GROUPED.sub(lambda match: match[1] + re.sub("[^0-9]", "", match[2]), text)
    return text


def _number(text: str) -> tuple[int, int, bool] | None:
    """(numerator, denominator, whether it is a decimal) of a plain integer, decimal or fraction."""
    if len(text) > 400:
        return None
    match = _FRACTION.fullmatch(text)
    if match:
        numerator, denominator = int(match[2] or match[3]), int(match[4] or match[5])
        return (-numerator if match[1] else numerator, denominator, False) if denominator else None
    match = _PLAIN.fullmatch(text)
    if not match or not (match[2] or match[3]):
        return None
    sign = -1 if match[1] == "-" else 1
    if match[4]:
        return (sign * int(match[2]), int(match[4]), False) if match[2] and int(match[4]) else None
    decimals = match[3] or ""
    return sign * int((match[2] or "0") + decimals), 10 ** len(decimals), bool(decimals)


@lru_cache(maxsize=4096)
def _prepare(answer: str) -> tuple[str, tuple | None, tuple]:
    text = normal(answer)
    return text, _number(text), bare_choice(text)


@lru_cache(maxsize=4096)
def _tree(answer: str):
    return parse(answer)


_BOX_OPENING = re.compile(r"\\{1,4}(?:boxed|fbox)\s*\{")
_BOX_LIST = re.compile(r"(?:\\[()\[\]]|[\s$,;.&]|\band\b|\bor\b|\\text\s*\{\s*(?:and|or)\s*\})*")


@lru_cache(maxsize=4096)
def gold_answer(gold: str) -> str:
    """The reference answer in a gold that may be an answer, several boxed answers, or a whole reference solution."""
    if not isinstance(gold, str) or not gold.strip():
        raise ValueError(f"gold={gold!r}: the reference answer must be a text that is not empty; pass str(answer)")
    if _BOX_OPENING.search(gold):
        if gold.lstrip().startswith("\\") and gold.count("boxed") == 1 and gold.count("{") > gold.count("}"):
            return _BOX_OPENING.sub("", gold)  # a reference answer cut off before its closing brace
        listed = _boxes_listed(gold)
        return listed if listed is not None else extract_answer(gold)[0] or gold
    if "####" in gold or (len(gold) > 120 and not is_bare(gold)):
        return extract_answer(gold)[0] or gold
    return gold


def _boxes_listed(gold: str) -> str | None:
    r"""A gold that is only boxes and connectives, \(\boxed{1}\) and \(\boxed{-2}\), as a list. Predictions are never read so."""
    contents, position, ends = [], 0, group_ends(gold)
    for match in _BOX_OPENING.finditer(gold):
        if match.start() < position:
            continue
        if not _BOX_LIST.fullmatch(gold[position : match.start()]):
            return None
        end = ends.get(match.end() - 1)
        if end is None:
            return None
        contents.append(gold[match.end() : end])
        position = end + 1
    return ", ".join(contents) if len(contents) > 1 and _BOX_LIST.fullmatch(gold[position:]) else None


def grade(
    gold: str,
    prediction: str,
    *,
    deadline: float = DEADLINE,
    percent: str = "either",
    units: str = "known",
    order: str = "free",
    rounding: int | None = 4,
) -> Verdict:
    """Grade a prediction (a whole response, or a bare answer) against a reference answer. Never raises for what a model wrote.

    `deadline` is in seconds, for everything together; a pair that needs longer is `unknown`.
    `percent`: "either" (10 % is 10 or 0.1) or "value" (10 % is 0.1 only).
    `units`: "known" (two different known units differ, a missing unit is forgiven), "ignore", or "required" (both or neither).
    `order`: "free" (a bare list is a set) or "strict" (its order counts). Tuples are ordered, sets are not, whatever it says.
    `rounding`: significant digits from which a decimal stands for the exact value that rounds to it (4), or None for never.
    """
    if not isinstance(prediction, str):
        raise ValueError(f"gold={gold!r}, prediction={prediction!r}: a prediction must be a text; pass str(prediction)")
    options = DEFAULTS
    if not (percent == "either" and units == "known" and order == "free" and rounding == 4):
        options = Options(percent, units, order, rounding)
    reference = gold_answer(gold)
    gold_text, gold_number, gold_choice = _prepare(reference)
    answer, place = (
        (prediction, "whole text")
        if _INTEGER.fullmatch(prediction)
        else extract_answer(prediction, choice=gold_choice[0] is not None)
    )
    if answer is None:
        return Verdict("wrong", 0, place, gold_text, None, None, place)
    bare = answer  # without its dollar signs it often is the reference, which is prepared already
    if answer.startswith("$") and answer.find("$", 1) == len(answer) - 1 and answer[-2] != "\\":
        bare = answer[1:-1]
    prepared = _prepare(bare) if len(bare) < 200 else _prepare.__wrapped__(bare)
    verdict, tier, rule = _decide(reference, bare, (gold_text, gold_number, gold_choice), prepared, options, deadline)
    return Verdict(verdict, tier, rule, gold_text, prepared[0], answer, place)


def equal(a: str, b: str, *, options: Options = DEFAULTS, deadline: float = DEADLINE) -> tuple[str, int, str]:
    """(verdict, tier, rule) for two bare answers; equal(a, b) and equal(b, a) are the same."""
    return _decide(a, b, _prepare(a), _prepare(b), options, deadline)


def _decide(a: str, b: str, prepared_a: tuple, prepared_b: tuple, options: Options, deadline: float) -> tuple[str, int, str]:
    (text_a, number_a, choice_a), (text_b, number_b, choice_b) = prepared_a, prepared_b
    if text_a == text_b:
        return "correct", 0, "same text"
    if number_a and number_b:
        if number_a[0] * number_b[1] == number_b[0] * number_a[1]:
            return "correct", 0, "number"
        if number_a[2] == number_b[2] and max(len(text_a), len(text_b)) < 15:  # else one may be the other, rounded
            return "wrong", 0, "number"
    if text_a.casefold() == text_b.casefold() and _WORD.fullmatch(text_a) and _WORD.fullmatch(text_b):
        return "correct", 0, "same text"
    if choice_a[0] and choice_b[0]:
        return ("correct" if choice_a[0] == choice_b[0] else "wrong"), 0, "choice"
    for (letter, content), other in ((choice_a, text_b), (choice_b, text_a)):
        if letter and content and normal(content) == other:
            return "correct", 0, "text of the choice"
    return _decide_by_value(a, b, text_a, text_b, options, time.monotonic() + deadline)


def _decide_by_value(a: str, b: str, text_a: str, text_b: str, options: Options, deadline_at: float) -> tuple[str, int, str]:
    tier = 1

    def prove_in_worker(left, right) -> bool:
        nonlocal tier
        tier = 2
        return prove(left, right, deadline_at)

    trees = []
    for text in (a, b):
        try:
            trees.append(_tree(text) if len(text) < 400 else parse(text, deadline_at))
        except ParseError:
            trees.append(None)
        except TooLarge as error:
            return "unknown", 1, f"too large: {error}"
        except Undecided as error:
            return "unknown", 1, str(error)
    if trees[0] is None or trees[1] is None:
        same = _letters(text_a) == _letters(text_b)
        return ("correct" if same else "wrong"), 0, "same text" if same else "text differs"
    judge = Judge(options, Budget(deadline_at), prove_in_worker)
    try:
        verdict = "correct" if judge.same(*trees) else "wrong"
    except (NotNumeric, Undefined) as error:
        return "wrong", tier, f"not comparable: {error}"
    except TooLarge as error:
        return "unknown", tier, f"too large: {error}"
    except Undecided as error:
        return "unknown", tier, str(error)
    except RecursionError:
        return "unknown", tier, "too large: nested too deeply"
    return verdict, tier, judge.rule


def _letters(text: str) -> str:
    """A normal text that is no mathematics, whatever its case and spaces; but 1 2 is not 12."""
    return _NOT_BETWEEN_DIGITS.sub("", text.casefold())


def main(arguments: list[str] | None = None) -> None:
    """The command line: verdict, tier, rule and both normal forms, and what the paper's rules say; or `regrade`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["regrade"]:
        from kit import regrade

        regrade.main(arguments[1:])
        return
    parser = argparse.ArgumentParser(prog="python -m kit.grade", description="Is this answer right?")
    parser.add_argument("gold", help="the reference answer")
    parser.add_argument("prediction", help="a whole response or a bare answer")
    parser.add_argument("--deadline", type=float, default=DEADLINE, help="seconds after which the verdict is `unknown`")
    parser.add_argument("--percent", default="either", choices=("either", "value"))
    parser.add_argument("--units", default="known", choices=("known", "ignore", "required"))
    parser.add_argument("--order", default="free", choices=("free", "strict"))
    parser.add_argument(
        "--rounding", type=int, default=4, help="significant digits from which a decimal may be rounded; 0: never"
    )
    settings = vars(parser.parse_args(arguments))
    settings["rounding"] = settings["rounding"] or None
    paper = grade_as_paper(settings["gold"], settings["prediction"], deadline=settings["deadline"])
    rows = {**asdict(grade(**settings)), "paper": f"{paper.verdict} ({paper.rule}: {paper.gold} against {paper.prediction})"}
    for name, value in rows.items():
        print(f"{name:<11}", str(value).encode("utf-8", "backslashreplace").decode())


if __name__ == "__main__":
    try:
        main()
    except ValueError as mistake:
        sys.exit(f"error: {mistake}")
