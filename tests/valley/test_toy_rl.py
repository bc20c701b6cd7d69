"""Which models are started from, and that the sentences follow from the samples; the run itself is in test_recipes.py."""

import random

import pytest

from kit.evaluate.results import Result
from kit.valley.study import BASE, Cell
from kit.valley.toy_cells import Finished
from kit.valley.toy_rl import RLRun, rl_findings, starts


def result(accuracy, seed, tokens):
    rng = random.Random(f"{accuracy} {seed}")
    return Result("toy", tuple({"question": str(q), "sample": i, "tokens": tokens + 2 * i - 3,
                                "verdict": "correct" if rng.random() < accuracy else "wrong"}
                               for q in range(80) for i in range(4)))  # fmt: skip


def rl_runs(cell, before, after):
    return [
        RLRun(
            Cell("tiny", *cell, seed),
            [0.1, 0.2],
            result(before, seed, 40),
            result(after, f"after {seed}", 70 + seed),
        )
        for seed in range(4)
    ]


def test_the_starts_are_the_untouched_model_the_lowest_point_and_the_largest_size_of_the_first_arm():
    accuracies = {
        (BASE, 0): 0.9,
        ("long", 16): 0.5,
        ("long", 64): 0.1,
        ("long", 256): 0.7,
        ("short", 64): 0.0,
    }
    found = [
        Finished(Cell("tiny", *key, seed), {"accuracy": accuracy}, None)
        for key, accuracy in accuracies.items()
        for seed in (0, 1)
    ]
    found.append(Finished(Cell("other", "long", 64, 0), {"accuracy": 0.0}, None))  # of another model
    assert [(cell.arm, cell.num_traces, cell.seed) for cell in starts(found)] == [
        (BASE, 0, 0), (BASE, 0, 1), ("long", 64, 0), ("long", 64, 1), ("long", 256, 0), ("long", 256, 1),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no start to compare"):
        starts(found[:2])


def test_what_is_said_of_the_starts_follows_from_their_samples():
    made = [
        *rl_runs((BASE, 0), 0.6, 0.8),
        *rl_runs(("long", 64), 0.1, 0.4),
        *rl_runs(("long", 256), 0.8, 0.95),
    ]
    untouched, low, fed = rl_findings(made)
    assert (
        untouched.startswith("Reinforcement learning from base model: accuracy rises")
        and "ends" not in untouched
    )
    assert "mean length of answers goes from 40 to 72 tokens" in untouched
    assert "from long traces, 64: accuracy rises" in low and "ends below the base model" in low
    assert "ends above the base model" in fed
    made = [*rl_runs((BASE, 0), 0.6, 0.6), *rl_runs(("long", 64), 0.6, 0.6)]
    untouched, low = rl_findings(made)
    assert (
        "does not change beyond chance" in untouched and "above or below the base model is not known" in low
    )
    assert "falls" in rl_findings(rl_runs((BASE, 0), 0.8, 0.2))[0]
