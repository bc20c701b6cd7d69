"""Grade the samples of an evaluation again from their text, without generating anything.

    python -m kit.grade regrade runs/gemma3_1b_8k/001/before/math500.jsonl    show what would change
    python -m kit.grade regrade math500.jsonl --out regraded.jsonl            write a new file
    python -m kit.grade regrade math500.jsonl --in_place                      replace the file
    python -m kit.grade regrade math500.jsonl --compare math-verify           list where a peer disagrees

A file is replaced whole or not at all, only with `--in_place`, and not while its run is going. Without it,
the samples that a run has written so far are graded.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from kit.command_line import started_as
from kit.config import Parser
from kit.grade.verdict import DEADLINE, verdict_fields
from kit.journal import Journal, Kind, run_of, write_rows
from kit.lock import held

PEERS = ("math-verify",)
SHOWN = 160  # characters of an answer in a line of the list


class _Gradable(Kind):
    def problem(self, row: object) -> str:
        return super().problem(row) or ("" if _reference(row) else "it has no `answer`")


GRADABLE = _Gradable("sample", {"text": str}, key=("question", "sample"))


def _reference(row: dict) -> str:
    """Return the gold answer as the benchmark has it, or its normal form if the row has only that."""
    return str(row.get("answer") or row.get("gold") or "")


def regrade_row(row: dict, *, deadline: float = DEADLINE) -> dict:
    """Return the row with new verdicts; the other fields and the order of all fields stay."""
    return {**row, **verdict_fields(_reference(row), row["text"], deadline=deadline)}


def compare(rows: list[dict], peer: Callable[[str, str], bool]) -> list[dict]:
    """Return the rows on which a peer's verdict is not ours.

    Either it is correct by the peer and wrong or unknown by us, or the other way round.
    """
    return [row for row in rows if peer(_reference(row), row["text"]) != (row["verdict"] == "correct")]


def load_peer(name: str) -> Callable[[str, str], bool]:
    """Return a function of (reference answer, response) that says whether the peer calls it correct.

    Raises ValueError for an unknown peer, or for one that is not installed.
    """
    if name not in PEERS:
        raise ValueError(f"there is no peer {name!r} to compare with; the kit knows {', '.join(PEERS)}")
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ValueError(
            f"--compare {name} needs a package that is not installed ({error}): "
            "pip install 'math-verify[antlr4_13_2]', or the kit's extra `peers`"
        ) from error

    def judge(gold: str, text: str) -> bool:
        # its time limits work in the main thread only
        return bool(verify(parse(rf"\boxed{{{gold}}}"), parse(text)))

    return judge


def main(arguments: list[str] | None = None) -> dict:
    """Regrade a file as the command line asks, print what changed, and return the counts."""
    parser = Parser(
        prog=f"{started_as()} regrade",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="samples that kit/evaluate/measure.py wrote")
    parser.add_argument("--out", type=Path, help="a new file for the rows with the new verdicts")
    parser.add_argument("--in_place", action="store_true", help="replace the file itself")
    parser.add_argument("--compare", default="", help=f"list where a peer disagrees: {', '.join(PEERS)}")
    seconds = "seconds for both verdicts of a sample, after which they are `unknown`"
    parser.add_argument("--deadline", type=float, default=DEADLINE, help=seconds)
    config = parser.parse_args(arguments)
    if config.out and config.in_place:
        raise ValueError(f"--out {config.out} and --in_place exclude each other; leave one out")
    if config.out and config.out.exists():
        raise ValueError(
            f"--out {config.out} exists; pass the name of a new file, or --in_place to replace {config.file}"
        )
    if not config.file.is_file():
        raise ValueError(
            f"no file {config.file} here (working directory {Path.cwd()}); pass a file that an evaluation "
            "wrote"
        )
    peer = load_peer(config.compare) if config.compare else None
    with held(run_of(config.file)) if config.in_place else nullcontext():
        return _regrade(config, peer)


def _regrade(config: argparse.Namespace, peer: Callable[[str, str], bool] | None) -> dict:
    content = config.file.read_bytes() if config.in_place else b""
    if content and not content.endswith(b"\n"):
        number = content.count(b"\n") + 1
        raise ValueError(f"{config.file}:{number} is half a line: the run was killed; resume it first")

    before = Journal(config.file, GRADABLE).read()
    after = [row if "header" in row else regrade_row(row, deadline=config.deadline) for row in before]
    samples = [(old, new) for old, new in zip(before, after, strict=True) if "header" not in old]
    changed = sum(old.get("verdict") != new["verdict"] for old, new in samples)
    paper_changed = sum(old.get("paper_verdict") != new["paper_verdict"] for old, new in samples)
    print(
        f"{config.file}: {len(samples)} samples, {changed} verdicts changed, {paper_changed} of the paper's"
    )
    for old, new in samples:
        if (old.get("verdict"), old.get("paper_verdict")) != (new["verdict"], new["paper_verdict"]):
            ours = f"{old.get('verdict')} -> {new['verdict']}"
            _show(new, f"{ours}, paper {old.get('paper_verdict')} -> {new['paper_verdict']}")
    bare = sum("answer" not in old for old, _ in samples)
    if bare:
        print(
            f"{bare} rows have no `answer`: they were graded against their `gold`, which is its normal form"
        )

    result = {"samples": len(samples), "changed": changed, "paper_changed": paper_changed}
    if peer:
        disagreements = compare([new for _, new in samples], peer)
        print(f"{config.compare} disagrees on {len(disagreements)} of {len(samples)}")
        for row in disagreements:
            _show(row, f"ours {row['verdict']} ({row['rule']}), {config.compare} disagrees")
        result["disagreements"] = len(disagreements)

    target = config.file if config.in_place else config.out
    if target:
        write_rows(target, after)
        print(f"wrote {target}")
    else:
        print(f"{config.file} is unchanged; --out FILE writes the new verdicts, --in_place replaces the file")
    return result


def _show(row: dict, what: str) -> None:
    place = f"{row.get('question', '?')}/{row.get('sample', '?')}"
    answers = f"gold {_reference(row)[:SHOWN]!r}, prediction {(row['prediction'] or '')[:SHOWN]!r}"
    print(f"  {place}: {what}; {answers}".encode("utf-8", "backslashreplace").decode())
