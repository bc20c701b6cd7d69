r"""Grade an answer: correct, wrong or unknown, with the tier and the rule that decided, and both answers.

    from kit.grade import grade
    grade(r"\frac{1}{2}", r"... so the answer is $\boxed{0.5}$.")
    # Verdict(verdict="correct", tier=0, rule="number", ...)

The steps, in order; the first that decides ends it:

    extract.py              find the answer in the response; a response without one is wrong
    tier 0  plain_text.py   normalise both texts; compare strings, choices and fractions, in microseconds
    tier 1  reading/        parse both texts to trees (trees.py); what cannot be read stays a text
            deciding/       compare the trees by their kinds (judge.py), in the end as numbers (scalars.py)
    tier 2  deciding/       ask sympy in a worker process about the few pairs that are still open

Nothing is executed, and every operation is capped. `unknown` means undecided: the deadline passed, a cap was
exceeded, or sympy could not tell.

    python -m kit.grade "gold" "prediction"
    python -m kit.grade regrade samples.jsonl          kit/grade/regrade.py
"""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass
from functools import lru_cache

from kit.grade.choices import bare_choice
from kit.grade.deciding import Judge, Options, prove
from kit.grade.extract import extract_answer
from kit.grade.limits import Budget, NotNumeric, ParseError, TooLarge, Undecided, Undefined
from kit.grade.paper import PaperVerdict, grade_as_paper
from kit.grade.plain_text import normal, only_letters, plain_number
from kit.grade.prose import is_bare
from kit.grade.reading import parse
from kit.grade.rules import Rule

DEADLINE = 5.0
DEFAULTS = Options()


@dataclass(frozen=True)
class Verdict:
    """The verdict on one prediction, and the reason for it. `dataclasses.asdict` turns it into JSON."""

    verdict: str  # "correct", "wrong" or "unknown"
    tier: int  # 0: normalised text and fractions; 1: parsed values; 2: sympy in a worker
    rule: str  # the rule that decided (kit/grade/rules.py), or the reason why none did
    gold: str  # the reference answer, normalised
    prediction: str | None  # the predicted answer, normalised; None if there is none
    extracted: str | None  # the predicted answer as the response has it
    extraction: str  # where in the response it was found


_WORD = re.compile("[A-Za-z][a-z]+")  # "Yes" and "yes", but not "AB" and "ab"


@lru_cache(maxsize=4096)
def _prepare(answer: str) -> tuple[str, tuple | None, tuple]:
    """Return what tier 0 compares: the normal text, the plain number, the letter and text of a choice."""
    text = normal(answer)
    return text, plain_number(text), bare_choice(text)


_tree = lru_cache(maxsize=4096)(parse)
_BOX_OPENING = re.compile(r"\\{1,4}(?:boxed|fbox)\s*\{")


@lru_cache(maxsize=4096)
def gold_answer(gold: str) -> str:
    """Return the reference answer in a gold: an answer, several boxed answers, or a whole solution."""
    if not isinstance(gold, str) or not gold.strip():
        raise ValueError(
            f"gold={gold!r}: the reference answer must be a text that is not empty; pass str(answer)"
        )
    if _BOX_OPENING.search(gold):
        if gold.lstrip().startswith("\\") and gold.count("boxed") == 1 and gold.count("{") > gold.count("}"):
            return _BOX_OPENING.sub("", gold)  # a reference answer cut off before its closing brace
        return extract_answer(gold)[0] or gold
    if "####" in gold or (len(gold) > 120 and not is_bare(gold)):
        return extract_answer(gold)[0] or gold
    return gold


def grade(gold: str, prediction: str, *, deadline: float = DEADLINE, **options) -> Verdict:
    """Grade a prediction (a whole response, or a bare answer) against a reference answer.

    deadline: seconds for everything together; a pair that needs longer is `unknown`. options: what counts as
    the same answer: percent="either", units="known", order="free" and rounding=4 if you pass none.
    kit.grade.deciding.Options explains them, and what else they may be.

    Raises ValueError for a gold that is empty or no text, a prediction that is no text, or an unknown value
    of an option.
    Nothing that a model wrote raises.
    """
    if not isinstance(prediction, str):
        raise ValueError(
            f"gold={gold!r}, prediction={prediction!r}: a prediction must be a text; pass str(prediction)"
        )
    options = Options(**options) if options else DEFAULTS

    reference = gold_answer(gold)
    prepared_gold = _prepare(reference)
    gold_text, _, (gold_letter, _) = prepared_gold

    answer, place = extract_answer(prediction, choice=gold_letter is not None)
    if answer is None:
        return Verdict("wrong", 0, place, gold_text, None, None, place)

    bare = answer  # without its dollar signs it is often the reference, which is already prepared
    if answer.startswith("$") and answer.find("$", 1) == len(answer) - 1 and answer[-2] != "\\":
        bare = answer[1:-1]
    prepared = _prepare(bare) if len(bare) < 200 else _prepare.__wrapped__(bare)  # long texts stay uncached
    verdict, tier, rule = _decide(reference, bare, prepared_gold, prepared, options, deadline)
    return Verdict(verdict, tier, rule, gold_text, prepared[0], answer, place)


def equal(a: str, b: str, *, options: Options = DEFAULTS, deadline: float = DEADLINE) -> tuple[str, int, str]:
    """Return (verdict, tier, rule) for two bare answers. equal(a, b) and equal(b, a) are the same."""
    return _decide(a, b, _prepare(a), _prepare(b), options, deadline)


def _decide(
    a: str, b: str, prepared_a: tuple, prepared_b: tuple, options: Options, deadline: float
) -> tuple[str, int, str]:
    """Return (verdict, tier, rule) by tier 0, and by the other tiers if it leaves the pair open."""
    (text_a, number_a, choice_a), (text_b, number_b, choice_b) = prepared_a, prepared_b
    if text_a == text_b:
        return "correct", 0, Rule.SAME_TEXT.value

    if number_a and number_b:
        if number_a[0] * number_b[1] == number_b[0] * number_a[1]:
            return "correct", 0, Rule.NUMBER.value
        alike = number_a[2] == number_b[2]  # both decimals or neither: else one may be the other, rounded
        if alike and max(len(text_a), len(text_b)) < 15:
            return "wrong", 0, Rule.NUMBER.value

    if text_a.casefold() == text_b.casefold() and _WORD.fullmatch(text_a) and _WORD.fullmatch(text_b):
        return "correct", 0, Rule.SAME_TEXT.value

    if choice_a[0] and choice_b[0]:
        return ("correct" if choice_a[0] == choice_b[0] else "wrong"), 0, Rule.CHOICE.value
    for (letter, content), other in ((choice_a, text_b), (choice_b, text_a)):
        if letter and content and normal(content) == other:
            return "correct", 0, Rule.TEXT_OF_CHOICE.value

    return _decide_by_value(a, b, text_a, text_b, options, time.monotonic() + deadline)


def _decide_by_value(
    a: str, b: str, text_a: str, text_b: str, options: Options, deadline_at: float
) -> tuple[str, int, str]:
    """Return (verdict, tier, rule) by the values of both answers."""
    judge = Judge(options, Budget(deadline_at), lambda left, right: prove(left, right, deadline_at))
    try:
        trees = [_tree_or_none(text, deadline_at) for text in (a, b)]
        if None in trees:
            same = only_letters(text_a) == only_letters(text_b)
            return ("correct", 0, Rule.SAME_TEXT.value) if same else ("wrong", 0, Rule.TEXT_DIFFERS.value)
        verdict = "correct" if judge.same(*trees) else "wrong"
    except (NotNumeric, Undefined) as error:
        return "wrong", judge.tier, f"{Rule.NOT_COMPARABLE.value}: {error}"
    except TooLarge as error:
        return "unknown", judge.tier, f"{Rule.TOO_LARGE.value}: {error}"
    except Undecided as error:
        return "unknown", judge.tier, str(error)
    except RecursionError:
        return "unknown", judge.tier, f"{Rule.TOO_LARGE.value}: nested too deeply"
    return verdict, judge.tier, judge.rule


def _tree_or_none(answer: str, deadline_at: float):
    """Return the tree of an answer, or None if its notation is not known."""
    try:
        return _tree(answer) if len(answer) < 400 else parse(answer, deadline_at)
    except ParseError:
        return None


def grade_both(
    gold: str, prediction: str, *, deadline: float = DEADLINE, **options
) -> tuple[Verdict, PaperVerdict]:
    """Return our verdict and the paper's, which has the time that ours leaves of `deadline`, in seconds.

    With none left, the paper's grader still decides what needs no formulas. options: as for grade.
    """
    deadline_at = time.monotonic() + deadline
    verdict = grade(gold, prediction, deadline=deadline, **options)
    return verdict, grade_as_paper(gold, prediction, deadline=max(0.0, deadline_at - time.monotonic()))


def verdict_fields(answer: str, text: str, *, deadline: float = DEADLINE) -> dict:
    """Return the fields of a sample's row about its answer, with both verdicts: ours and the paper's.

    deadline: seconds for both together.
    """
    verdict, paper = grade_both(answer, text, deadline=deadline)
    return {"verdict": verdict.verdict, "paper_verdict": paper.verdict, **asdict(verdict)}
