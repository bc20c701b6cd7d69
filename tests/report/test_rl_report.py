import json

import pytest
from sample_rows import sample, write_samples

from kit.report import valley
from kit.report.curve_figures import rl_figure
from kit.report.rl import write_report
from kit.run import Journal
from kit.valley.finished import RLRun, write_study
from kit.valley.study import Cell

HOSTILE = "<script>alert(1)</script> let me recheck \ud800 \\boxed{2}"
STEP = {
    "reward_mean": 0.25, "no_signal": 0.5, "length": 9.0, "entropy": 1.0,
    "ratio_mean": 1.0, "ratio_min": 0.9, "ratio_max": 1.1, "rollout_seconds": 2.0, "update_seconds": 1.0,
}  # fmt: skip


def make_run(path, *, steps=0, shares=None):
    """Write a run. shares: stage -> share of right answers, of six questions with ten samples each."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model": "some <model>", "lr": 1e-6, "group_size": 8}))
    for stage, share in (shares or {}).items():
        verdicts = ["correct" if k < 10 * share else "wrong" for k in range(10)]
        rows = [
            sample(f"q{question}", verdict, sample=k, text=HOSTILE)
            for question in range(6)
            for k, verdict in enumerate(verdicts)
        ]
        write_samples(path / stage / "toy.jsonl", rows)
    for step in range(1, steps + 1):
        row = {"step": step, **STEP, "kl": 1e-3, "rejected: undecided": 2, "undecided": 0.125}
        Journal(path / "metrics.jsonl").append(row)
        for reward, finished in ((0.0, False), (1.0, True)):
            answer = {"tokens": 7, "finished": finished, "text": HOSTILE}
            row = {"step": step, "question": "1+1?", "reward": reward, **answer}
            Journal(path / "rollouts.jsonl").append(row)
    return path


def test_the_page_says_what_changed_with_its_interval_and_escapes_what_models_write(tmp_path):
    run = make_run(tmp_path / "run", steps=20, shares={"before": 0.1, "after": 0.9})
    page = write_report(run).read_text()
    assert "Accuracy rose: 10.0 % (" in page and "after (+80.0 points, " in page
    assert "20 steps: mean reward 0.250 in the first tenth, 0.250 in the last; 40 s of sampling" in page
    assert "20 s of updates; the grader could not decide 12.5 % of the answers, and 40 were left out" in page
    assert "<h2>What differs from the paper</h2><ul>" in page and "<li>lr 1e-06 (paper: 5e-07)" in page
    assert "<td>90.0 %<br>(" in page and "some &lt;model&gt;, reinforcement learning" in page
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "<mark>recheck</mark>" in page and page.count("<img ") == 2
    shown = [step for step in range(1, 21) if f">step {step}, mean reward 0.5: 1+1?" in page]
    assert len(shown) == 6 and shown[0] == 1 and shown[-1] == 20  # evenly spaced
    assert page.count("reward 0, 7 tokens (cut off)") == page.count("reward 1, 7 tokens<") == 6


@pytest.mark.slow
def test_an_unfinished_run_has_a_report_and_a_folder_without_a_run_none(tmp_path):
    assert "No step is finished yet." in write_report(make_run(tmp_path / "empty")).read_text()
    assert (
        "3 steps" in write_report(make_run(tmp_path / "begun", steps=3, shares={"before": 0.5})).read_text()
    )
    with pytest.raises(ValueError, match="holds no run"):
        write_report(tmp_path)


@pytest.mark.slow
def test_pages_of_runs_that_go_on_load_themselves_again_and_finished_ones_do_not(tmp_path):
    rl, study = make_run(tmp_path / "rl", steps=3), tmp_path / "study"
    study.mkdir()
    write_study(study, [Cell("tiny", "full", 16, 0)], [])
    for write, run in ((write_report, rl), (valley.write_report, study)):
        refresh = "http-equiv=refresh content=60>"
        assert refresh in write(run, goes_on=True).read_text().split("<title>")[0]
        assert "http-equiv" not in write(run).read_text()


def test_rewards_that_are_not_right_or_wrong_are_not_drawn_as_a_share_of_right_answers():
    exact = RLRun(None, {}, [0.25, 0.5])
    (axes,) = rl_figure({"the base model": [exact]}, narrow=False).axes
    assert axes.get_ylabel() == "right answers, %"
    assert list(axes.lines[0].get_ydata()) == [25, 50]
    short = RLRun(None, {}, [-1.5, -0.5], "mine.py:short")
    (axes,) = rl_figure({"the base model": [short]}, narrow=True).axes
    assert axes.get_ylabel() == "reward: mine.py:short"
    assert list(axes.lines[0].get_ydata()) == [-1.5, -0.5]
    assert axes.get_ylim()[0] < -1.5
