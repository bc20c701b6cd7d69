"""Where reinforcement learning starts, which runs fail before they begin, and what is refused."""

import json
from pathlib import Path

import pytest

from kit.evaluate.results import Result
from kit.valley.finished import Finished, StudyResults
from kit.valley.runs import LOWEST, MOST, Recipes, check_steps, jobs_of, rl_jobs, rl_starts
from kit.valley.study import Cell, Study

STUDY = Study(
    (("tiny", ("full",)), ("other", ("full",))),
    (16, 64, 256),
    seeds=2,
    arms=("long", "short"),
    control_models=1,
)
ACCURACIES = {("long", 16): 0.5, ("long", 64): 0.1, ("long", 256): 0.7, ("short", 64): 0.0}


def measured(accuracies, model="tiny"):
    """Cells with ten answers each, of which such a share is right."""
    found = []
    for cell in STUDY.cells():
        if cell.model == model and (cell.arm, cell.num_traces) in accuracies:
            right = round(10 * accuracies[cell.arm, cell.num_traces])
            rows = tuple(
                {"question": str(i), "verdict": "correct" if i < right else "wrong"} for i in range(10)
            )
            found.append(Finished(cell, {"toy": Result("toy", rows)}, []))
    return found


def results(finished):
    return StudyResults(STUDY.cells(), [], {}, finished, [])


def starts(words, finished, models=("tiny",)):
    return [(cell.arm, cell.num_traces, cell.seed) for cell in rl_starts(results(finished), words, models)]


def test_the_starts_are_the_base_model_the_lowest_point_and_the_largest_size_of_the_first_arm():
    finished = [*measured(ACCURACIES), *measured({("long", 16): 0.0}, "other")]
    both = [(arm, size, seed) for arm, size in (("base", 0), ("long", 64), ("long", 256)) for seed in (0, 1)]
    assert starts(("0", LOWEST, MOST), finished) == both
    assert starts((LOWEST, MOST), measured({("long", 64): 0.1})) == both[2:4]  # one size is both
    assert starts((LOWEST, "64", "256"), finished) == both[2:]
    assert starts(("0", LOWEST), finished, ["tiny", "other"]) == [
        *both[:4],
        *both[:2],
        ("long", 16, 0),
        ("long", 16, 1),
    ]


def test_what_is_not_finished_is_no_lowest_point_and_a_number_is_a_start_even_so():
    assert starts(("0", LOWEST, MOST), []) == [("base", 0, 0), ("base", 0, 1)]
    assert starts(("64",), []) == [("long", 64, 0), ("long", 64, 1)]  # its run then fails: it needs that cell


def recipes(**options):
    def finetune(cell):
        if cell.num_traces == 64:
            raise ValueError("it needs 99 GiB")
        return {"lr": 1.0}

    return Recipes({}, finetune, lambda start: {"steps": 3}, **options)


def test_a_cell_that_cannot_be_run_is_a_job_with_a_problem_and_the_others_have_none():
    jobs = {job.name: job for job in jobs_of(STUDY.cells(), recipes(), Path("runs"))}
    assert len(jobs) == len(STUDY.cells()) + 4  # base models: two, twice
    assert {name for name, job in jobs.items() if job.problem} == {
        cell.name for cell in STUDY.cells() if cell.num_traces == 64
    }
    assert jobs["tiny-full-64-seed0"].obstacle({}) == "it needs 99 GiB"


def test_reinforcement_learning_for_another_number_of_steps_is_refused(tmp_path):
    jobs = rl_jobs([Cell.of_base("tiny", 0)], recipes(), tmp_path)
    check_steps(jobs)
    jobs[0].folder.mkdir(parents=True)
    for steps in (3, 4):
        (jobs[0].folder / "config.json").write_text(json.dumps({"steps": steps}))
        if steps == 3:
            check_steps(jobs)
    with pytest.raises(ValueError, match=r"rl_steps is 3 but .* was trained for 4; pass that"):
        check_steps(jobs)
