"""What every report opens with, for each of the four kinds; how the pair of answers is chosen."""

import json
import re

import pytest
import sample_rows

from kit.evaluate.results import Result
from kit.evaluate.uncertainty import in_percent
from kit.report import rl
from kit.report.__main__ import write_report
from kit.report.answers import KEPT, answer
from kit.report.curve_figures import valley_figure
from kit.report.figures import NARROW
from kit.report.first_screen import SAMPLES_OF_ONE, choose
from kit.run import Journal
from kit.valley.curves import Curve, Estimate, Point, percent, points
from kit.valley.finished import StudyResults, write_study
from kit.valley.sentences import sentences
from kit.valley.study import Study

HOSTILE = "<img src=x onerror=alert(1)> & \\boxed{<s>9</s>}"
RIGHT, WRONG = "7+5=12;12-3=9.\\boxed{9}", "7+5=13;13-3=10.\\boxed{10}"  # of the toy's 7+5-3?
FELL, ROSE, SAME = Estimate(-0.5, 0.1), Estimate(0.5, 0.1), Estimate(-0.05, 0.1)


def sample(question, correct, *, number=0, text="", problem="7+5-3?"):
    verdict, text = "correct" if correct else "wrong", text or (RIGHT if correct else WRONG)
    nine = dict.fromkeys(("answer", "gold", "prediction"), "9")
    return sample_rows.sample(question, verdict, sample=number, problem=problem, text=text, **nine)


def write_samples(folder, rows, benchmark="toy"):
    sample_rows.write_samples(folder / f"{benchmark}.jsonl", rows)


def write_all(folder, right, benchmark="toy", **options):
    """Write twenty questions, all right or none."""
    write_samples(folder, [sample(f"q{i:02}", right, **options) for i in range(20)], benchmark)


def fine_tuning(path, benchmark="toy", **options):
    (path / "config.json").write_text(json.dumps({"model": "m", "num_traces": 8_000}))
    write_all(path / "before", True, benchmark, **options)
    write_all(path / "after", False, benchmark, **options)


def evaluation(path, benchmark="toy", **options):
    (path / "config.json").write_text(json.dumps({"model": "m"}))
    write_samples(path / "samples", [sample("q", i > 0, number=i, **options) for i in range(2)], benchmark)


def reinforcement(path, benchmark="toy", **options):
    (path / "config.json").write_text(json.dumps({"model": "m", "group_size": 8}))
    Journal(path / "metrics.jsonl").append(
        {"step": 1, "reward_mean": 0.5, "length": 9.0, "rollout_seconds": 1.0, "update_seconds": 1.0}
    )
    write_all(path / "before", False, benchmark, **options)
    write_all(path / "after", True, benchmark, **options)


def study(path, benchmark="toy", *, settings=(), **options):
    (path / "config.json").write_text(json.dumps({"quick": False, **dict(settings)}))
    cells = Study((("tiny", ("full",)),), (16, 64)).cells()
    for cell in (cells[0].baseline, *(cell.name for cell in cells)):
        base = cell == cells[0].baseline
        write_all(path / "cells" / cell / ("samples" if base else "after"), base, benchmark, **options)
        Journal(path / "jobs.jsonl").append(sample_rows.outcome(cell))
    for cell in cells:
        Journal(path / "cells" / cell.name / "metrics.jsonl").append({"step": 1, "seconds": 1.0})
    write_study(path, cells, [])


KINDS = (fine_tuning, evaluation, reinforcement, study)
OUTCOMES = ("Accuracy fell: 100.0 %", "50.0 % (", "Accuracy rose: 0.0 %", "accuracy falls from 100.0 %")


def parts_of(page):
    """Return the first screen's HTML, and where its parts begin: sentences, problem, answers, figure."""
    screen = page.partition("<section id=first-screen>")[2].partition("</section>")[0]
    marks = ("<p class=finding>", "<p class=problem>", "<div class=pair>", "<picture>")
    return screen, [screen.index(mark) for mark in marks]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The report of a run of each kind."""
    found = {}
    for write in KINDS:
        path = tmp_path_factory.mktemp(write.__name__)
        write(path)
        found[write] = write_report(path).read_text()
    return found


@pytest.mark.parametrize(("write", "outcome"), [*zip(KINDS, OUTCOMES, strict=True)])
def test_every_report_opens_with_two_sentences_then_the_pair_then_the_figure(write, outcome, pages):
    page = pages[write]
    screen, places = parts_of(page)
    assert page.index("</h1>") < page.index("<section id=first-screen>") < page.index("</section>")
    assert "<table" not in page.partition("</section>")[0]
    assert places == sorted(places)
    done, out = re.findall("<p class=finding>(.*?)</p>", screen)
    assert "answer" in done and outcome in out
    assert "95 % interval" in screen  # in words, where the first one stands
    assert screen.count("<h4>") == 2 and ">correct</span>" in screen and ">wrong</span>" in screen
    assert "<mark class=right>7+5=12</mark>" in screen and "<mark class=wrong>7+5=13</mark>" in screen
    assert "a sum is wrong" in screen and "no wrong step" in screen
    assert screen.count("<picture>") == 1


@pytest.mark.parametrize("write", KINDS)
def test_what_models_and_files_hold_is_escaped_and_the_page_needs_no_other_file(write, tmp_path):
    escaped = "&lt;img src=x onerror=alert(1)&gt; &amp; <b class=box>\\boxed{&lt;s&gt;9&lt;/s&gt;}</b>"
    for benchmark, problem in (("toy", "7+5-3?"), ("<u>", "<i>7</i>?")):
        path = tmp_path / str(len(problem))
        path.mkdir()
        write(path, benchmark, text=HOSTILE, problem=problem)
        page = write_report(path).read_text()
        assert not re.search("<img src=x|<i>|<s>|<u>|<script|http", page)
        assert escaped in parts_of(page)[0] and escaped in page.partition("</section>")[2]
        sources = re.findall('src(?:set)?="(.*?)"', page)
        assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_figures_have_a_version_for_a_phone_and_tables_scroll_in_their_own_box(pages):
    for page in pages.values():
        source = f'<source media="(max-width: {NARROW}px)" srcset="data:'
        assert page.count("<img ") == page.count(source) > 0
        assert page.count("<table>") == page.count("<div class=wide><table>") > 0


@pytest.mark.parametrize("write", KINDS)
def test_a_report_of_a_run_that_has_only_begun_says_so_on_its_first_screen(write, tmp_path):
    write(tmp_path)
    for file in tmp_path.glob("**/*.jsonl"):
        file.unlink()
    screen = write_report(tmp_path).read_text().partition("</section>")[0]
    assert screen.count("<p class=finding>") == 2 and "yet." in screen and "was fine-tuned" not in screen
    assert "<div class=pair>" not in screen


def results(*rows, name="toy"):
    return {name: Result(name, rows)}


def test_the_pair_shows_the_change_and_says_how_often_it_happens():
    before = results(sample("a", False), sample("b", True), sample("c", True), sample("d", True))
    after = results(sample("a", True), sample("b", True), sample("c", False), sample("d", False))
    pair = choose(before, after, FELL)
    assert [row["question"] for row in pair.answers.values()] == ["c", "c"]
    assert [row["verdict"] for row in pair.answers.values()] == ["correct", "wrong"]
    assert "with a right answer (before) and a wrong one (after), 2 of 4, the first" in pair.chosen
    rose = choose(before, after, ROSE)
    assert rose.answers["before"]["question"] == "a"
    assert "with a wrong answer (before) and a right one (after), 1 of 4" in rose.chosen
    unchanged = choose(before, after, SAME)  # chance: neither a fall nor a rise is picked
    assert unchanged.answers["after"]["question"] == "a"
    assert unchanged.chosen == "Chosen: the first of 4 by its id."


def test_the_pair_does_not_depend_on_the_order_in_which_answers_ended():
    rows = [sample(name, True, number=i) for name in "cab" for i in (1, 0)]
    wrong = [sample(name, False, number=i) for name in "bac" for i in (1, 0)]
    pair = choose(results(*rows), results(*wrong), FELL)
    assert {(row["question"], row["sample"]) for row in pair.answers.values()} == {("a", 0)}


def test_one_measurement_shows_a_right_and_a_wrong_answer_to_one_problem_or_else_one_answer():
    mixed = results(sample("a", True), sample("b", True), sample("b", False, number=1))
    pair = choose(mixed, mixed, None, SAMPLES_OF_ONE)
    assert {row["question"] for row in pair.answers.values()} == {"b"} and len(pair.answers) == 2
    sure = results(sample("a", True))
    assert len(choose(sure, sure, None, SAMPLES_OF_ONE).answers) == 1
    assert choose(results(sample("a", True)), results(sample("b", True)), FELL) is None
    assert choose(results(sample("a", True)), results(sample("a", True), name="other"), FELL) is None


def test_the_pair_is_of_a_benchmark_with_steps_or_else_of_the_one_with_most_questions():
    few, many = [sample("a", True)], [sample(name, True) for name in "ab"]
    found = results(*many, name="math500") | results(*few, name="aime24")
    assert choose(found, found, SAME).benchmark == "math500"
    assert choose(found | results(*few), found | results(*few), SAME).benchmark == "toy"


def test_an_answer_without_steps_is_shortened_around_its_final_box_and_nothing_is_said_of_steps():
    text = "start " + "word " * 2_000 + "so \\boxed{41}, no: \\boxed{42} " + "end " * 2_000
    shown = answer("after", "math500", sample("q", True, text=text), shorten=True)
    assert "<b class=box>\\boxed{42}</b> end" in shown and "start" not in shown and "step" not in shown
    assert len(shown) < 2 * KEPT + 200
    left_out = sum(int(count.replace(",", "")) for count in re.findall(r"\[([\d,]+) characters", shown))
    body = re.sub("<.*?>", "", shown.partition("<pre>")[2])
    assert left_out + len(re.sub(r"\[.*?left out\]| … ", "", body)) == len(text)
    assert "start word" in answer("after", "math500", sample("q", True, text=text))  # whole, further down
    assert "[" not in answer("after", "math500", sample("q", True, text="\\boxed{1}"), shorten=True)


def test_intervals_end_where_shares_do():
    assert percent(Estimate(0.99, 0.05)) == "99.0 % (94.0 to 100.0)"
    assert percent(Estimate(0.01, 0.05)) == "1.0 % (0.0 to 6.0)"
    assert points(Estimate(-0.97, 0.08)) == "-97.0 points, -100.0 to -89.0"
    assert in_percent(0.97, 0.08, "", "+") == "+97.0 (+89.0 to +100.0)"
    assert in_percent(-0.5, 0.6, "", "+") == "-50.0 (-100.0 to +10.0)"  # a difference may be below 0
    assert str(Result("toy", (sample("a", True),))).startswith("toy: 100.0 % (")
    assert " to 100.0) of 1 questions" in str(Result("toy", (sample("a", True),)))


def test_no_interval_on_the_page_leaves_0_to_100_percent(pages):
    for page in pages.values():
        page = page.replace("&nbsp;", " ")
        ranges = re.findall(r"([+-]?\d+\.\d) to ([+-]?\d+\.\d)", page)
        assert ranges and all(-100 <= float(low) <= float(high) <= 100 for low, high in ranges)
        assert not re.search(r"\d % ±", page)


def curve(*shares):
    made = [
        Point(size, {0: {f"q{i}": share for i in range(9)}}, {0: dict.fromkeys("ab", 40.0)})
        for size, share in zip((0, 8_000, 32_000), shares, strict=True)
    ]
    return Curve("tiny, long traces", made[0], made[1:])


@pytest.mark.parametrize("narrow", [False, True])
def test_curves_begin_at_the_base_model_and_bands_stay_within_0_and_100(narrow):
    figure = valley_figure([curve(1.0, 0.0, 1.0)], "toy", {0: 24.0, 32_000: 15.0}, narrow)
    left = figure.axes[0]
    line = left.get_lines()[0]
    assert list(line.get_xdata()) == [0, 8_000, 32_000] and list(line.get_ydata()) == [100, 0, 100]
    heights = left.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (0, 100)
    places = left.transData.transform([(0, 0), (8_000, 0), (32_000, 0)])[:, 0]
    assert places[0] < places[1] < places[2]  # 0 has a place of its own on the axis
    assert [text.get_text() for text in left.get_xticklabels()] == ["0", "8,000", "32,000"]
    stars = next(line for line in left.get_lines() if line.get_label() == "the paper")
    assert list(stars.get_xdata()) == [0, 32_000]


@pytest.mark.slow
def test_after_smoke_the_sentence_says_that_quick_shows_the_climb(tmp_path):
    hint = "recipes/valley_demo.py --quick"
    for name, settings, told in (
        ("smoke", {"smoke": True}, True),
        ("whole", {"smoke": False}, False),
        ("begun", {"smoke": True}, False),  # nothing measured: no valley to climb out of
    ):
        path = tmp_path / name
        path.mkdir()
        study(path, settings=settings)
        if name == "begun":
            (path / "jobs.jsonl").unlink()
        screen = parts_of(write_report(path).read_text())[0] if name != "begun" else ""
        assert (f"{hint}</code> tries more traces and shows the climb" in screen) is told
        assert any(hint in line for line in sentences(StudyResults.read(path))) is told


def test_verdicts_and_rewards_of_a_log_are_escaped_like_its_texts():
    row = {
        "problem": "p",
        "text": "t",
        "finished": True,
        "tokens": 3,
        "verdict": '"><script>x',
        "reward": 1.0,
        "rewards": {"<b>": 1.0, "other": 0.0},
    }
    for shown in (answer("before", "mine", row), rl._answer(row)):
        assert "<script>" not in shown and "<b>" not in shown
