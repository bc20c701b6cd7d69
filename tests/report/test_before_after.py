import json
import re
import struct

import pytest
from sample_rows import sample, write_samples

from kit.evaluate.results import Result
from kit.report.answers import SHOWN, browser, marked
from kit.report.before_after import findings, write_report
from kit.report.figures import steps_figure
from kit.report.page import figures_table
from kit.run import AFTER, BEFORE, SAMPLES, Journal


def rows(shares, tokens=10, text="so \\boxed{1}"):
    """Ten samples per question, of which a share is correct."""
    made = []
    for i, share in enumerate(shares):
        for k in range(10):
            verdict = "correct" if k < 10 * share else "wrong"
            made.append(sample(f"q{i}", verdict, sample=k, problem=f"{i} < 1?", tokens=tokens, text=text))
    return made


def results(before, after, **options):
    return {
        BEFORE: {"toy": Result("toy", tuple(rows(before)))},
        AFTER: {"toy": Result("toy", tuple(rows(after, **options)))},
    }


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ([0.9] * 8, [0.2] * 6 + [0.3] * 2, "toy: accuracy fell: 90.0 % ("),
        ([0.2] * 8, [0.9] * 6 + [0.8] * 2, "toy: accuracy rose: 20.0 % ("),
        ([0.5, 0.9, 0.1, 0.5], [0.9, 0.5, 0.5, 0.2], "toy: accuracy did not change beyond chance: "),
        ([0.5], [0.1], "toy: accuracy did not change beyond chance: "),  # one question shows nothing
    ],
)
def test_the_finding_follows_the_data_and_calls_no_difference_inside_its_interval_one(
    before, after, sentence
):
    (finding,) = findings(results(before, after, tokens=25))
    assert sentence in finding
    assert "2.50 times as long" in finding


def make_run(path, *, before=None, after=None, metrics=()):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model": "google/gemma-3-1b-it", "lr": 1e-3}))
    (path / "drop_counts.json").write_text(json.dumps({"text": "8 traces kept, 2 dropped"}))
    for stage, found in ((BEFORE, before), (AFTER, after)):
        if found:
            write_samples(path / stage / "toy.jsonl", found)
    for step, loss in enumerate(metrics, 1):
        Journal(path / "metrics.jsonl").append({"step": step, "loss": loss, "tokens": 10, "seconds": 1.0})
    return path


def test_the_page_is_self_contained_and_escapes_what_models_write(tmp_path):
    hostile = "<script>alert(1)</script> let me recheck \ud800"
    path = make_run(
        tmp_path / "run",
        before=rows([0.9, 0.8] * 3),
        after=rows([0.1, 0.2] * 3, text=hostile),
        metrics=[2.0, 1.0],
    )
    page = write_report(path).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; let me <mark>recheck</mark>" in page
    assert page.count("<img ") == 3
    assert "http" not in page.replace("http-equiv", "")
    assert "Accuracy fell: " in page
    assert "<summary>0 &lt; 1? <small>(before: 9 of 10 right; after: 1 of 10 right)</small></summary>" in page
    assert "24 % before" in page  # the paper's number for this model
    assert "<h2>What differs from the paper</h2><ul><li>lr 0.001 (paper: 5e-05)</ul>" in page
    assert "8 traces kept, 2 dropped" in page
    assert "loss 2.000 at the first step, 1.000 at the last" in page


def test_tokens_per_second_leave_out_the_steps_that_compiled_kernels(tmp_path):
    path = make_run(tmp_path / "run", metrics=[2.0, 1.0])
    compiling = {"step": 3, "loss": 1.0, "tokens": 10, "seconds": 90.0, "compiles": True}
    Journal(path / "metrics.jsonl").append(compiling)
    page = write_report(path).read_text()
    assert "30 tokens in 92 s (10 tokens/s, without steps that compiled kernels)" in page


def test_plots_are_pngs_of_a_readable_size(tmp_path):
    path = make_run(tmp_path / "run", before=rows([0.5]), after=rows([0.5]), metrics=[1.0])
    write_report(path)
    for name in ("loss.png", "accuracy.png", "length.png"):
        content = (path / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert struct.unpack(">I", content[16:20])[0] >= 700


def test_an_unfinished_run_has_a_report_of_what_there_is(tmp_path):
    assert "Nothing has been measured yet" in write_report(make_run(tmp_path / "new")).read_text()
    page = write_report(make_run(tmp_path / "half", before=rows([0.5]))).read_text()
    assert "before" in page
    assert page.count("<img ") == 2


@pytest.mark.slow
def test_a_report_of_a_run_that_goes_on_loads_itself_anew_and_draws_what_was_measured(tmp_path):
    path = make_run(tmp_path / "run", metrics=[2.0, 1.0])
    assert "http-equiv" not in write_report(path).read_text() and not (path / "steps.png").exists()
    figures = {"accuracy": 0.5, "interval": 0.1, "mean_tokens": 9.0, "truncated": 0.0, "reflection": 0.2}
    for step, loss in ((0, 2.5), (2, None)):
        row = {"step": step, "held_out_loss": loss, "benchmarks": {"toy": figures, "math500": figures}}
        Journal(path / "during.jsonl").append(row)
    page = write_report(path, goes_on=True).read_text()
    assert "<meta http-equiv=refresh content=60>" in page.split("<title>")[0]
    assert (path / "steps.png").exists() and "accuracy, loss, length, reflection by step" in page
    assert "http-equiv" not in write_report(path).read_text()


@pytest.mark.parametrize("narrow", [False, True])
def test_the_figure_over_the_steps_has_a_line_per_benchmark_and_the_loss_of_both_kinds(narrow):
    def figures(accuracy):
        return {"accuracy": accuracy, "interval": 0.3, "mean_tokens": 9.0, "reflection": 0.25}

    measured = [
        {"step": 0, "held_out_loss": 2.0, "benchmarks": {"toy": figures(0.9), "mine": figures(0.1)}},
        {"step": 5, "held_out_loss": 1.5, "benchmarks": {"toy": figures(0.4), "mine": figures(0.2)}},
    ]
    figure = steps_figure(measured, [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}], narrow)
    accuracy, length, reflection, loss = figure.axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in accuracy.get_lines()}
    assert drawn == {"toy": pytest.approx([90, 40]), "mine": pytest.approx([10, 20])}
    assert [list(line.get_xdata()) for line in accuracy.get_lines()] == [[0, 5], [0, 5]]
    band = accuracy.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(10) and band.max() == pytest.approx(100)
    assert list(length.get_lines()[0].get_ydata()) == [9.0, 9.0]
    assert list(reflection.get_lines()[0].get_ydata()) == [25.0, 25.0]
    assert [list(line.get_ydata()) for line in loss.get_lines()] == [[3.0, 2.5], [2.0, 1.5]]


def test_beside_the_papers_numbers_ours_are_graded_as_the_paper_did_and_of_its_benchmarks_alone(tmp_path):
    def graded(share):  # strictly a tenth is right
        return [row | {"paper_verdict": "correct"} if row["sample"] < 10 * share else row for row in strict]

    strict = [row | {"paper_verdict": "wrong"} for row in rows([0.1] * 4)]
    path = make_run(tmp_path / "run", before=rows([1.0] * 4), after=rows([1.0] * 4))  # of the toy
    for stage, share in ((BEFORE, 0.5), (AFTER, 0.2)):
        journal = Journal(path / stage / "math500.jsonl")
        journal.append({"header": {}})
        for row in graded(share):
            journal.append(row)
    page = write_report(path).read_text()
    beside = (
        "Here, graded as the paper graded: 50.0 % before (strictly: 10.0 %; mean of math500); 20.0 % after"
    )
    assert beside in page
    assert "Accuracy did not change beyond chance: 10.0 % (" in page  # without the toy's
    assert "toy: accuracy did not change beyond chance: 100.0 %" in page


def test_no_run_is_an_error_that_says_what_to_pass(tmp_path):
    with pytest.raises(ValueError, match="pass a run folder"):
        write_report(tmp_path)


def test_a_report_of_one_evaluation_shows_right_and_wrong_answers_with_their_marks(tmp_path):
    text = "so <b> let me Double-check: \\boxed{\\frac{1}{2}} " + "again and " * 40
    found = rows([0.3, 1.0, 0.0], tokens=40, text=text)
    for row in found:
        row |= {"answer": "1/2", "cuts": {"16": 3, "32": 60}}
    path = make_run(tmp_path / "run")
    journal = Journal(path / SAMPLES / "toy.jsonl")
    journal.append({"header": {"max_new_tokens": 64}})
    for row in found:
        journal.append(row)
    page = write_report(path).read_text()
    assert "google/gemma-3-1b-it, an evaluation" in page
    marks = "so &lt;b&gt; let me <mark>Double-check</mark>: <b class=box>\\boxed{\\frac{1}{2}}</b> again"
    assert marks in page
    summaries = re.findall(r"<summary>(.*?) <small>\((.*?)\)</small></summary>", page)
    assert summaries == [
        ("0 &lt; 1?", "3 of 10 right"),
        ("1 &lt; 1?", "10 of 10 right"),
        ("2 &lt; 1?", "0 of 10 right"),
    ]
    listed = page.partition("<h2>Answers</h2>")[2]
    shown = [listed.count(f'<span class="{verdict}">') for verdict in ("correct", "wrong")]
    assert shown == [2, 2]  # one of each per question, if there is one
    assert "40 tokens, ends in a loop" in page
    assert page.count("<img ") == 3  # accuracy, length, accuracy against length
    assert "<td>43.3 %<br>(" in page


def test_a_cell_for_every_figure_is_what_the_result_says():
    found = Result("toy", tuple(rows([0.5, 1.0])), {"max_new_tokens": 20})
    table = figures_table({SAMPLES: {"toy": found}})
    cells = dict(re.findall(r"<tr><td>(.*?)<td>(.*?)(?=<tr>|</table>)", table))
    assert cells["accuracy"] == f"75.0 %<br>({75 - 100 * found.interval:.1f}&nbsp;to&nbsp;100.0)"
    assert cells["pass@k ¹"].startswith("k = 10: 100.0 %<br>(")
    assert cells["questions x samples"] == "2 x 10"
    assert cells["accuracy per 1,000 tokens"] == "7500.0 %"
    assert "accuracy as the paper graded" not in cells
    graded = Result("toy", tuple(row | {"paper_verdict": "correct"} for row in found.rows))
    assert "accuracy as the paper graded<td>100.0 %" in figures_table({SAMPLES: {"toy": graded}})


def test_stages_with_other_settings_are_not_called_a_difference():
    stages = results([0.9] * 8, [0.2] * 8)
    before, after = stages[BEFORE]["toy"], stages[AFTER]["toy"]
    stages[AFTER]["toy"] = Result("toy", after.rows, {"temperature": 1.0})
    (finding,) = findings(stages)
    assert "temperature None and 1.0" in finding and "fell" not in finding
    assert before.accuracy > after.accuracy


def test_an_after_that_is_only_half_measured_is_not_called_a_difference(tmp_path):
    page = write_report(make_run(tmp_path / "half", before=rows([0.5, 0.9]), after=rows([0.5]))).read_text()
    assert "2 questions before and 1 after" in page and "did not change" not in page and "fell" not in page


def test_marks_at_the_start_side_by_side_and_inside_a_box_lose_and_repeat_nothing():
    assert marked("Recheck\\boxed{1<2}rethink & go") == (
        "<mark>Recheck</mark><b class=box>\\boxed{1&lt;2}</b><mark>rethink</mark> &amp; go"
    )
    assert marked("\\boxed{recheck} on") == "<b class=box>\\boxed{recheck}</b> on"
    assert marked("") == ""


def test_the_browser_shows_questions_with_right_answers_however_few_there_are(tmp_path):
    page = browser({SAMPLES: {"toy": Result("toy", tuple(rows([0.0] * 60 + [0.1, 0.2])))}})
    assert page.count("<details>") == SHOWN
    assert "61 &lt; 1?" in page and "60 &lt; 1?" in page
    assert "5 &lt; 1?" in page and "40 &lt; 1?" not in page
