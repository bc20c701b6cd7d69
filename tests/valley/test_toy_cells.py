"""Cells: what they are made of, and that a killed study ends with the rows and samples of an unbroken one."""

import json
import time
from dataclasses import replace

import pytest
from children import call, wait

from kit.data.toy import make_traces
from kit.evaluate.benchmarks import BENCHMARKS
from kit.evaluate.reflection_and_loops import reflects
from kit.generate.sampling import SamplingParams
from kit.grade.verdict import grade
from kit.report.valley import write_report
from kit.valley.study import ARMS, BASE, Cell, Study
from kit.valley.toy_cells import Valley, curves, plan_of, read_cells

STUDY = Study(models=("tiny", "tinier"), arms=("long", "short"), sizes=(8, 24), control_sizes=(24,), seeds=1, epochs=2,
              batch_traces=4, num_samples=1, params=SamplingParams(max_new_tokens=48), checkpoint_every=3)  # fmt: skip
BENCHMARK = BENCHMARKS["toy"].read(limit=6)


def test_the_arms_have_the_same_problems_and_the_sizes_are_nested():
    made = {name: make_traces(arm.long_share, 40, 0, set()) for name, arm in ARMS.items()}
    problems = [trace.problem for trace in made["long"]]
    assert all([trace.problem for trace in traces] == problems for traces in made.values())
    assert len(set(problems)) == 40
    assert make_traces(ARMS["mixed"].long_share, 20, 0, set()) == made["mixed"][:20]
    assert [trace.problem for trace in make_traces(ARMS["long"].long_share, 40, 1, set())] != problems
    assert not {
        trace.problem for trace in make_traces(ARMS["long"].long_share, 40, 0, set(problems[:9]))
    } & set(problems[:9])


def test_an_arm_has_the_share_of_long_traces_it_says():
    for name, num_long in (
        ("long", 40),
        ("short", 0),
        ("quarter", 10),
        ("mixed", 20),
        ("most", 30),
        ("growing", 40),
    ):
        traces = make_traces(ARMS[name].long_share, 40, 0, set())
        assert sum(trace.response.startswith("<think>") for trace in traces) == num_long
        assert any(reflects(trace.response) for trace in traces) == bool(num_long)
    half = [
        trace.response.startswith("<think>") for trace in make_traces(ARMS["mixed"].long_share, 40, 0, set())
    ]
    assert half[:6] == [False, True] * 3  # spread, so that every subset has its share


def test_every_trace_is_right_and_none_of_its_problems_is_measured():
    held_out = {question.problem for question in BENCHMARKS["toy"].read().questions}
    for trace in make_traces(ARMS["mixed"].long_share, 200, 3, held_out):
        assert trace.problem not in held_out
        expression = trace.problem.rstrip("?")
        total = sum(int(word) for word in expression.replace("-", "+-").split("+"))
        assert grade(str(total), trace.response).verdict == "correct"


def test_the_batch_is_the_same_at_every_size_or_grows_with_the_data_so_that_the_steps_stay():
    study = Study(sizes=(16, 64, 256, 1_024, 4_096, 16_384))
    assert {study.batch_of("long", size) for size in study.sizes} == {16}
    assert [study.batch_of("growing", size) for size in study.sizes] == [4, 4, 4, 4, 16, 64]
    for size in (1_024, 4_096, 16_384):
        cell = Cell("tiny", "growing", size, 0, study.batch_of("growing", size))
        steps = len(plan_of(study, cell, [100 + i % 41 for i in range(size)]).steps)
        assert abs(steps - 4 * 256) < 40


def test_the_growing_batch_repeats_no_cell_of_the_long_arm():
    cells = Study(seeds=2).cells()
    growing = [cell for cell in cells if cell.arm == "growing" and cell.seed == 1]
    assert [(cell.num_traces, cell.batch_traces) for cell in growing] == [(64, 4), (1_024, 4)]
    assert len({cell.name for cell in cells}) == len(cells)
    assert [(cell.model, cell.arm) for cell in cells[:4]] == [("tiny", BASE), ("tinier", BASE)] * 2
    assert [cell.seed for cell in cells[4:]] == sorted(
        cell.seed for cell in cells[4:]
    )  # one seed's picture is whole first
    assert [cell.num_traces for cell in cells if (cell.arm, cell.seed) == ("short", 0)] == [64, 1_024, 4_096]
    assert {cell.arm for cell in cells if cell.model == "tinier"} == {
        BASE,
        "long",
    }  # other models: the first arm alone


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"arms": ("long", "shrot")}, "there is no arm 'shrot'; the arms are long, short"),
        ({"arms": ()}, "arms is .* one or more"),
        ({"models": ("tiny", "elsewhere/tiny")}, "models is .* each with a name of its own"),
        ({"sizes": (64, 16)}, "sizes is .* larger than the one before"),
        ({"sizes": ()}, "sizes"),
        ({"control_sizes": (0, 16)}, "control_sizes"),
        ({"seeds": 0}, "seeds is 0"),
    ],
)
def test_a_study_that_cannot_be_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        replace(STUDY, **changed)


def test_a_folder_without_a_finished_cell_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no finished cell"):
        write_report(tmp_path)


def measure(out, workers):
    for _ in Valley(STUDY, BENCHMARK, out).run(num_workers=workers):
        pass


def rows(path):
    """Everything that does not tell the time."""
    untimed = [{k: v for k, v in row.items() if not k.endswith("_seconds")} for row in
               map(json.loads, (path / "cells.jsonl").read_text().splitlines())]  # fmt: skip
    untimed.sort(key=lambda row: row["place"])  # two at a time end in any order
    samples = {cell.cell.name: sorted((row["question"], row["sample"], row["text"], row["verdict"]) for row in cell.result.rows)
               for cell in read_cells(path)}  # fmt: skip
    return untimed, samples


@pytest.mark.slow
def test_killed_in_training_and_in_sampling_and_resumed_two_at_a_time_it_ends_as_an_unbroken_run(tmp_path):
    wait(call(__file__, "measure", tmp_path / "whole", workers=1))
    broken = tmp_path / "broken"
    for where in ("cells/tiny-long-24-seed0/metrics.jsonl", "cells/tiny-short-24-seed0/samples/toy.jsonl"):
        process = call(__file__, "measure", broken, workers=1)
        while process.poll() is None and not (
            (broken / where).exists() and (broken / where).read_text().count("\n") >= 4
        ):
            time.sleep(0.001)
        process.kill()
        time.sleep(1.0)  # in which the process that makes the cell sees it
        finished = (broken / "cells.jsonl").read_text().splitlines()
        assert where.split("/")[1] not in "".join(finished), "killed too late to test anything"
        written = (broken / where).read_text()
        time.sleep(1.0)
        assert (
            broken / where
        ).read_text() == written  # the process that made the cell ended with the one that was killed
    before = (broken / "cells.jsonl").read_text()
    wait(call(__file__, "measure", broken, workers=2))
    assert (broken / "cells.jsonl").read_text().startswith(before)  # finished cells are kept, their times too
    assert rows(broken) == rows(tmp_path / "whole")
    untimed, samples = rows(broken)
    long, short, base, smaller = (
        "tiny-long-24-seed0",
        "tiny-short-24-seed0",
        "tiny-base-0-seed0",
        "tinier-long-24-seed0",
    )
    assert [row["cell"] for row in untimed] == [
        base, "tinier-base-0-seed0", "tiny-long-8-seed0", long, short, "tinier-long-8-seed0", smaller,
    ]  # fmt: skip
    assert samples[long] not in (samples[short], samples[base], samples[smaller])

    found = read_cells(broken)
    drawn = curves(found)
    size = f"{found[1].row['parameters'] / 1_000:,.0f}k"
    assert found[1].row["parameters"] < found[0].row["parameters"]
    assert [(curve.name, [point.num_traces for point in curve.points]) for curve in drawn] == [
        ("long traces", [8, 24]), ("short traces", [24]), (f"long traces, model of {size} parameters", [8, 24]),
    ]  # fmt: skip
    assert [curve.base.accuracy.mean for curve in drawn] == [found[i].row["accuracy"] for i in (0, 0, 1)]
    assert (
        drawn[0].base is drawn[1].base is not drawn[2].base
    )  # a line for each model's untouched self, and one only
    page = write_report(broken).read_text()
    assert page.count("<img ") == 3 and "http" not in page
    for text in (
        "Long traces: accuracy ",
        "Short traces: accuracy ",
        f"Long traces, model of {size} parameters: accuracy ",
        "one seed, so the intervals do not cover",
        "long traces, 24:",
    ):
        assert text in page
