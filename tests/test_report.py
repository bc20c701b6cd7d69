import json
import struct

import pytest

from kit.results import Result
from kit.journal import Journal
from kit.report import AFTER, BEFORE, findings, write_report


def rows(shares, tokens=10, text="so \\boxed{1}"):
    """Ten samples a question, of which a share is correct."""
    return [
        {"question": f"q{i}", "problem": f"{i} < 1?", "sample": s, "tokens": tokens,
         "verdict": "correct" if s < 10 * share else "wrong",
         "finished": True, "text": text, "prediction": "1", "gold": "1", "rule": "text"}
        for i, share in enumerate(shares) for s in range(10)
    ]  # fmt: skip


def results(before, after, **options):
    return {BEFORE: {"toy": Result("toy", tuple(rows(before)))}, AFTER: {"toy": Result("toy", tuple(rows(after, **options)))}}


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ([0.9] * 8, [0.2] * 6 + [0.3] * 2, "accuracy fell, 90.0 % to 22.5 %"),
        ([0.2] * 8, [0.9] * 6 + [0.8] * 2, "accuracy rose, 20.0 % to 87.5 %"),
        ([0.5, 0.9, 0.1, 0.5], [0.9, 0.5, 0.5, 0.2], "accuracy did not change beyond chance"),
        ([0.5], [0.1], "accuracy did not change beyond chance"),  # one question shows nothing
    ],
)
def test_the_finding_follows_the_data_and_calls_no_difference_inside_its_interval_one(before, after, sentence):
    (finding,) = findings(results(before, after, tokens=25))
    assert sentence in finding
    assert "2.50 times as long" in finding


def make_run(path, *, before=None, after=None, metrics=()):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model": "google/gemma-3-1b-it", "lr": 5e-5}))
    (path / "census.json").write_text(json.dumps({"text": "8 traces kept, 2 dropped"}))
    for stage, found in ((BEFORE, before), (AFTER, after)):
        if found:
            journal = Journal(path / stage / "toy.jsonl")
            journal.append({"header": {}})
            for row in found:
                journal.append(row)
    for step, loss in enumerate(metrics, 1):
        Journal(path / "metrics.jsonl").append({"step": step, "loss": loss, "tokens": 10, "seconds": 1.0})
    return path


def test_the_page_is_self_contained_and_escapes_what_models_write(tmp_path):
    hostile = "<script>alert(1)</script> let me recheck \ud800"
    path = make_run(tmp_path / "run", before=rows([0.9, 0.8] * 3), after=rows([0.1, 0.2] * 3, text=hostile), metrics=[2.0, 1.0])
    page = write_report(path).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; let me <mark>recheck</mark>" in page
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page.replace("http-equiv", "")
    assert "accuracy fell" in page
    assert "<summary>toy: 0 &lt; 1?</summary>" in page
    assert "24 % before" in page  # the paper's number for this model
    assert "8 traces kept, 2 dropped" in page
    assert "loss 2.000 at the first step, 1.000 at the last" in page


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
    assert page.count("data:image/png") == 2


def test_no_run_is_an_error_that_says_what_to_pass(tmp_path):
    with pytest.raises(ValueError, match="pass a run folder"):
        write_report(tmp_path)
