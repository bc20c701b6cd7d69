"""Reinforcement learning from three starts of a valley: the untouched model, the one at its lowest point, the best fed one.

The algorithm is kit/rl.py, the task and the questions are the valley's own. Every start is a run folder under rl/ that resumes,
with its metrics and its samples; a line of rl.jsonl says that it is finished.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from kit import models
from kit.benchmarks import Question
from kit.chat import ChatFormat
from kit.evaluate import evaluate
from kit.journal import Journal
from kit.results import Result
from kit.rl import Policy
from kit.rl_loop import train
from kit.rl_settings import Settings
from kit.run import RunFolder
from kit.savings import Savings
from kit.toy import make_rows
from kit.valley import ARMS, BASE, SAMPLES, Cell, Finished, Valley
from kit.valley_curves import ByQuestion, difference, estimate, percent

MAX_NEW_TOKENS = 256  # of a rollout: most long traces fit, and a loop costs half of what it does in the evaluation
BATCH_PROMPTS = 32  # a step, 8 answers each
LR, KL_COEF = 1e-4, 1e-3  # those of recipes/grpo_qwen2_5_0_5b.py --smoke, which learns on this toy


@dataclass(frozen=True)
class Climb:
    """One start and what reinforcement learning made of it."""

    cell: Cell
    rewards: Sequence[float]  # a step
    before: Result
    after: Result


def starts(found: Sequence[Finished]) -> list[Cell]:
    """For every finished seed: the untouched model and, of the first arm, the size where accuracy is lowest and the largest."""
    arm = next((name for name in ARMS if any(done.cell.arm == name for done in found)), None)
    sizes = sorted({done.cell.num_traces for done in found if done.cell.arm == arm})
    if not sizes:
        raise ValueError("no model of any arm is finished, so there is no start to compare; finish the demo first")
    means = {size: fmean(done.row["accuracy"] for done in found if (done.cell.arm, done.cell.num_traces) == (arm, size))
             for size in sizes}  # fmt: skip
    wanted = [(BASE, 0), *((arm, size) for size in sorted({min(sizes, key=means.get), sizes[-1]}))]
    return [done.cell for key in wanted for done in found if (done.cell.arm, done.cell.num_traces) == key]


def run_rl(valley: Valley, found: Sequence[Finished], *, steps: int) -> Iterator[Climb]:
    """Train every start for `steps` steps and measure it; gives each as it is finished. Finished ones are kept."""
    journal = Journal(valley.path / "rl.jsonl")
    done = {row["cell"] for row in journal.read()}
    for cell in starts(found):
        if cell.name in done:
            continue
        run, study = RunFolder(valley.path / "rl" / cell.name), valley.study
        where = study.model if cell.arm == BASE else str(valley.path / "cells" / cell.name / "model")
        model, tokenizer = models.load(where, device="cpu")
        chat = ChatFormat(tokenizer, instruction="")
        settings = Settings(max_new_tokens=MAX_NEW_TOKENS, num_slots=256, minibatch_prompts=8, row_tokens=4_096, kl_coef=KL_COEF,
                            seed=cell.seed)  # fmt: skip
        policy = Policy(model, chat, settings, lr=LR, savings=Savings(recompute=False))
        rows = make_rows("short", 2_000, seed=1_000 + cell.seed, exclude=valley.held_out)
        prompts = [Question(str(i), row["problem"], row["answer"]) for i, row in enumerate(rows)]
        trained = train(policy, prompts, run, steps=steps, batch_prompts=BATCH_PROMPTS, checkpoint_every=10)
        policy.close()
        model, _ = models.load(str(trained), device="cpu")
        result = evaluate(model, chat, valley.benchmark, study.params, run.path / SAMPLES, num_samples=study.num_samples,
                          num_slots=study.num_slots, seed=cell.seed)  # fmt: skip
        journal.append({"cell": cell.name, "arm": cell.arm, "num_traces": cell.num_traces, "seed": cell.seed, "steps": steps,
                        "accuracy": result.accuracy})  # fmt: skip
        yield _read(valley.path, cell)


def read_climbs(path: Path) -> list[Climb]:
    """The finished starts of the valley in `path`; none where reinforcement learning was not asked for."""
    if not (path / "rl.jsonl").is_file():
        return []
    return [_read(path, Cell(row["arm"], row["num_traces"], row["seed"])) for row in Journal(path / "rl.jsonl").read()]


def _read(path: Path, cell: Cell) -> Climb:
    samples = [next((path / part / cell.name / SAMPLES).glob("*.jsonl")) for part in ("cells", "rl")]
    metrics = Journal(path / "rl" / cell.name / "metrics.jsonl").read()
    return Climb(cell, [row["reward_mean"] for row in metrics], *map(Result.read, samples))


def title(cell: Cell) -> str:
    return "untouched model" if cell.arm == BASE else f"{ARMS[cell.arm].title}, {cell.num_traces:,}"


def by_start(climbs: Sequence[Climb]) -> dict[str, list[Climb]]:
    groups: dict[str, list[Climb]] = {}
    for climb in climbs:
        groups.setdefault(title(climb.cell), []).append(climb)
    return groups


def rl_findings(climbs: Sequence[Climb]) -> list[str]:
    """What became of every start, and whether it ends below or above the untouched one."""
    groups = {name: (_shares(of_start, "before"), _shares(of_start, "after")) for name, of_start in by_start(climbs).items()}
    reference = groups.get("untouched model")
    sentences = []
    for name, (before, after) in groups.items():
        gain = difference(after, before)
        change = "rises" if gain.above_zero() else "falls" if gain.below_zero() else "does not change beyond chance"
        said = f"Reinforcement learning from {name}: accuracy {change}, {percent(_mean(before))} to {percent(_mean(after))}"
        if reference and after is not reference[1] and set(after) & set(reference[1]):
            gap = difference(after, reference[1])
            side = "above" if gap.above_zero(len(groups) - 1) else "below" if gap.below_zero(len(groups) - 1) else "level with"
            said += f"; it ends {side} the untouched start ({100 * gap.mean:+.1f} points ± {100 * gap.half:.1f})"
        sentences.append(f"{said}.")
    return sentences


def _shares(climbs: Sequence[Climb], stage: str) -> Mapping[int, ByQuestion]:
    return {climb.cell.seed: getattr(climb, stage).by_question() for climb in climbs}


def _mean(shares: Mapping[int, ByQuestion]):
    return estimate(shares, (0.0, 0.0, 1.0, 1.0))
