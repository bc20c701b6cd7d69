"""The grader's command line: `python -m kit.grade GOLD PREDICTION`, and `regrade LOG`."""

from __future__ import annotations

from dataclasses import asdict

from kit.command import guard
from kit.command_line import started_as
from kit.config import Parser
from kit.grade.verdict import DEADLINE, grade_both


def main(arguments: list[str]) -> None:
    """Print the verdict, its rule, both normal forms and the paper's verdict on a pair; or run `regrade`."""
    if arguments[:1] == ["regrade"]:
        from kit.grade import regrade

        regrade.main(arguments[1:])
        return

    parser = Parser(
        prog=started_as(),
        description=f"Is this answer right? For a log of answers: {started_as()} regrade LOG",
    )
    parser.hint += "; put -- before an answer that begins with -"
    parser.add_argument("gold", help="the reference answer")
    parser.add_argument("prediction", help="a whole response or a bare answer")
    seconds = "seconds for both verdicts, after which they are `unknown`"
    parser.add_argument("--deadline", type=float, default=DEADLINE, help=seconds)
    parser.add_argument("--percent", default="either", choices=("either", "value"))
    parser.add_argument("--units", default="known", choices=("known", "ignore", "required"))
    parser.add_argument("--order", default="free", choices=("free", "strict"))
    digits = "significant digits from which a decimal may stand for a rounded value; 0: never"
    parser.add_argument("--rounding", type=int, default=4, help=digits)

    settings = vars(parser.parse_args(arguments))
    settings["rounding"] = settings["rounding"] or None

    verdict, paper = grade_both(**settings)
    rows = {
        **asdict(verdict),
        "paper": f"{paper.verdict} ({paper.rule}: {paper.gold} against {paper.prediction})",
    }
    for name, value in rows.items():
        print(f"{name:<11}", str(value).encode("utf-8", "backslashreplace").decode())


if __name__ == "__main__":
    guard(main)
