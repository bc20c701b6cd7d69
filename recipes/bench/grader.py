"""Compare our grader with Math-Verify on the same pairs: microseconds, ratios, and where the two disagree.

    python recipes/bench/grader.py                              pairs from the answers below
    python recipes/bench/grader.py --problems math500.jsonl     pairs from the answers of a benchmark's file
    python recipes/bench/grader.py --json grader.json           write the figures to a file

Every answer gives several predictions: right ones (itself and the same value written otherwise, in a box and
in a sentence) and wrong ones (a number changed, another answer of the list). Both graders get the same
response texts. Ours is asked for a verdict; Math-Verify runs parse(gold), parse(response) and verify, as one
verdict needs. Both are warmed up on other pairs.

`first` is the time of the first call on a pair, as for real responses. `again` is the fastest of `--repeats`
more, with every cache warm. On a few pairs ours waits for sympy in a worker process; its time includes that
wait. The hardest are the pairs that take the slower grader longest, among those that both decide. A run
takes about two minutes for 500 answers on one core. Hostile input is excluded, because Math-Verify's time
limit works in the main thread only (tests/grade/test_verdict.py grades such input).
"""

import importlib.util
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from contest import save, timed

from kit.config import Checked, parse
from kit.evaluate import BENCHMARKS
from kit.grade import grade
from kit.grade.deciding import start_worker
from kit.machine import describe_machine

# answers of the kinds that MATH has, written for this file
ANSWERS = r"""
    7 | -12 | 125 | 4096 | 10,080 | 0.35 | 2.5 | -0.75 | 18\% | \$42 | \frac{3}{4} | -\frac{7}{12}
    \dfrac{22}{7} | 3\frac{1}{2} | \frac{\pi}{6} | 2\pi | 12\pi | \sqrt{2} | 3\sqrt{5} | \frac{\sqrt{3}}{2}
    5+2\sqrt{6} | \frac{1+\sqrt{5}}{2} | 2\sqrt[3]{4} | 3+4i | -2i | 60^\circ | 45 \text{ cm}
    36\text{ square feet} | (3,4) | (2,-1,5) | \left(3,\frac{\pi}{2}\right) | [0,5) | (-\infty,2]
    (-\infty,-1)\cup(3,\infty) | \{1,2,3\} | 1,-2 | 3 \pm \sqrt{7} | x=5 | y=2x+3 | x^2-3x+2 | (x+1)(x-4)
    6x^2+11x-35 | \frac{x+2}{x-3} | 2^{10} | 10! | \binom{8}{3} | 1011_2 | 243_5 | 3:4 | 7:30 | \text{Tuesday}
    \text{(B)} | \text{even} | C | \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}
    \begin{pmatrix} -1 \\ 0 \\ 2 \end{pmatrix} | |x-2| | \log_2 32 | e^2 | \ln 3 | \sin 30^\circ
    \frac{a^2-b^2}{a+b} | 1.5 \times 10^6 | 0.\overline{3} | 2x^3-x | \frac{n(n+1)}{2} | \sum_{k=1}^{10} k
    \int_0^1 x^2 dx | 1 < x < 5
"""

WARM_UP = [
    ("17", r"so $\boxed{18}$"),
    (r"\sqrt{12}", r"$\boxed{2\sqrt{3}}$"),
    (r"\int_0^1 x^4 dx", r"$\boxed{\frac{1}{5}}$"),
]


@dataclass(frozen=True)
class Config(Checked):
    # pairs
    problems: str = ""  # .jsonl file or benchmark folder whose answers are used; "" = the list in this file
    num_answers: int = 0  # of them; 0 = all [>= 0]
    seed: int = 0  # of the wrong predictions [>= 0]
    # timing
    repeats: int = 3  # times each pair is graded; the fastest counts [>= 1]
    hardest: float = 0.05  # share of the pairs that are reported separately [0..1]
    # output
    json: str = ""  # file for the figures; "" = none
    num_shown: int = 20  # disagreements printed [>= 0]
    smoke: bool = False  # small sizes, in seconds


SMOKE = {"num_answers": 12, "repeats": 1}


@dataclass
class Pair:
    """A reference answer and a response, with both verdicts and times."""

    gold: str
    response: str
    kind: str  # how the prediction was made
    ours: str = ""  # verdict
    theirs: str = ""
    our_first: float = 0.0  # seconds
    our_again: float = 0.0
    their_first: float = 0.0
    their_again: float = 0.0


def main(config: Config) -> dict:
    """Time both graders on all pairs, print the figures, and return them."""
    print("\n".join(f"{key:<10} {value}" for key, value in describe_machine().items()))
    pairs = make_pairs(read_answers(config), random.Random(config.seed))
    start_worker()  # importing sympy takes seconds, which must not count for the first hard pair
    time_all(pairs, "our", lambda gold, response: grade(gold, response).verdict, config.repeats)
    peer = importlib.util.find_spec("math_verify") is not None
    if peer:
        time_all(pairs, "their", _math_verify(), config.repeats)
    else:
        print("Math-Verify is not installed (pip install 'math-verify[antlr4_13_2]'): ours alone")
    result = {"num_pairs": len(pairs), **summarise(pairs, config.hardest, peer=peer)}
    show(result, pairs, config.num_shown, peer=peer)
    save(config, **result, pairs=[asdict(pair) for pair in pairs])
    return result


def read_answers(config: Config) -> list[str]:
    """Return the reference answers: those of a benchmark's file, or the list in this file."""
    if config.problems:
        path = Path(config.problems)
        benchmark = next((b for b in BENCHMARKS.values() if b.file == path.name), BENCHMARKS["math500"])
        questions = benchmark.read(str(path), limit=config.num_answers).questions
        return [question.answer for question in questions][: config.num_answers or None]
    answers = re.split(r" \| |\n", ANSWERS.strip())
    return [answer.strip() for answer in answers][: config.num_answers or None]


def make_pairs(answers: list[str], rng: random.Random) -> list[Pair]:
    """Return right and wrong responses to every answer."""
    pairs = []
    for answer in answers:
        variants = {"the same": answer, "another's": rng.choice(answers)}
        number = re.search(r"[0-9]+", answer)
        if number:
            before, after = answer[: number.start()], answer[number.end() :]
            variants["a number changed"] = f"{before}{int(number[0]) + 1}{after}"
        for kind, rewrite in REWRITES.items():
            rewritten = rewrite(answer)
            if rewritten != answer:
                variants[kind] = rewritten
        for kind, prediction in variants.items():
            pairs.append(Pair(answer, rf"Adding up, we get $\boxed{{{prediction}}}$.", kind))
        pairs.append(Pair(answer, f"Adding up, the final answer is ${answer}$.", "in a sentence"))
    return pairs


REWRITES: dict[str, Callable[[str], str]] = {
    "other commands": lambda text: re.sub(
        r"(?<!left)\(", r"\\left(", re.sub(r"(?<!right)\)", r"\\right)", text)
    ).replace("\\frac", "\\dfrac"),
    "spaced": lambda text: re.sub(r"([+=])|,(?![0-9]{3})", r" \g<0> ", text),
    "as a decimal": lambda text: f"{int(text)}.0" if re.fullmatch(r"-?[0-9]{1,9}", text) else text,
    "a plain quotient": lambda text: re.sub(r"^(-?)\\d?frac\{([0-9]+)\}\{([0-9]+)\}$", r"\1\2/\3", text),
    "scaled by 2/2": lambda text: re.sub(
        r"\\d?frac\{([0-9]+)\}\{([0-9]+)\}", lambda m: rf"\frac{{{2 * int(m[1])}}}{{{2 * int(m[2])}}}", text
    ),
    "plus zero": lambda text: (
        f"{text}+0" if re.fullmatch(r"[-0-9a-z^+ ]+|.*\\sqrt\{[0-9]+\}", text) else text
    ),
    "without the unit": lambda text: (
        re.sub(r"\s*\\(?:text|mbox)\{[^}]*\}(?:\^[0-9])?$|\^\\circ$", "", text) or text
    ),
}


def time_all(pairs: list[Pair], side: str, judge: Callable[[str, str], str], repeats: int) -> None:
    """Store one grader's verdicts and times in the pairs. side: "our" or "their"."""
    for gold, response in WARM_UP:
        judge(gold, response)
    for pair in pairs:
        verdict, first, _ = timed(judge, pair.gold, pair.response)
        setattr(pair, f"{side}_first", first)
        setattr(pair, f"{side}s", verdict)
    for pair in pairs:
        again = (timed(judge, pair.gold, pair.response)[1] for _ in range(repeats))
        setattr(pair, f"{side}_again", min(again))


def _math_verify() -> Callable[[str, str], str]:
    from math_verify import parse, verify

    def judge(gold: str, response: str) -> str:
        try:
            read = parse(rf"\boxed{{{gold}}}", raise_on_error=True), parse(response, raise_on_error=True)
            return "correct" if verify(*read, raise_on_error=True) else "wrong"
        except Exception as error:  # it raises many kinds; a time-out is one of them
            return f"failed: {type(error).__name__}"

    return judge


def summarise(pairs: list[Pair], hardest: float, *, peer: bool) -> dict:
    """Return microseconds and ratios, for the first call on each pair and for later ones."""
    kinds = ("the same", "a number changed")
    simple = [pair for pair in pairs if re.fullmatch(r"-?[0-9]+", pair.gold) and pair.kind in kinds]
    decided = [pair for pair in pairs if {pair.ours, pair.theirs} <= {"correct", "wrong"}]
    result: dict = {"num_simple": len(simple)}
    for when in ("first", "again"):

        def micros(side: str, chosen: list[Pair] = pairs, when: str = when) -> list[float]:
            return [1e6 * getattr(pair, f"{side}_{when}") for pair in chosen]

        figures = result[when] = {"our_median_us": median(micros("our")), "our_worst_us": max(micros("our"))}
        if simple:
            figures["our_median_us_on_simple"] = median(micros("our", simple))
        if peer:
            times = zip(micros("our", decided), micros("their", decided), strict=True)
            hard = sorted(times, key=max)[-max(1, round(hardest * len(decided))) :]
            ours, theirs = zip(*hard, strict=True)
            figures |= {
                "their_median_us": median(micros("their")),
                "their_worst_us": max(micros("their")),
                "ratio_of_medians": median(micros("their")) / median(micros("our")),
                "ratio_of_medians_on_hardest": median(theirs) / median(ours),
                "ratio_of_totals_on_hardest": sum(theirs) / sum(ours),
            }
    verdicts = Counter(f"{pair.ours}, {pair.theirs}" for pair in pairs)
    return result | {"verdicts": dict(verdicts.most_common())}


def show(result: dict, pairs: list[Pair], num_shown: int, *, peer: bool) -> None:
    """Print the figures, the counts of verdicts, and the first disagreements."""
    head = f"{result['num_pairs']} pairs, {result['num_simple']} of them two integers"
    print(f"\n{head}{'first':>20}{'again':>14}")
    for name in result["first"]:
        print(f"  {name:<40}{result['first'][name]:14,.1f}{result['again'][name]:14,.1f}")
    print("verdicts, ours and theirs:" if peer else "verdicts:")
    for verdicts, number in result["verdicts"].items():
        print(f"  {verdicts:<40}{number:6}")
    if not peer:
        return
    for pair in [pair for pair in pairs if pair.ours != pair.theirs][:num_shown]:
        answers = json.dumps([pair.gold, pair.response])
        print(f"  ours {pair.ours}, theirs {pair.theirs} ({pair.kind}): {answers}")


if __name__ == "__main__":
    main(parse(Config, smoke=SMOKE))
