"""Whatever stands in a file of a run, no report passes it on as HTML: every field of every log, all kinds."""

import json
import re

import pytest
from test_first_screen import RIGHT, evaluation, fine_tuning, reinforcement, study

from kit.report import figures
from kit.report.__main__ import write_report
from kit.run import Journal

HOSTILE = "\"'><script>x</script><img src=x onerror=x>`<b>`"
TAGS = re.compile("<script|<img src=x|\"'")  # the last would end an attribute


def tuning_on_arithmetic(path):
    """A run of fine-tuning that shows all it can: steps of arithmetic, limits on length, dropped traces."""
    fine_tuning(path, "arithmetic", problem="Evaluate: 7 + 5 - 3", text="7+5=13;13-3=10.\\boxed{10}")
    for file in path.glob("*/arithmetic.jsonl"):
        header, *rows = map(json.loads, file.read_text().splitlines())
        rows = [row | {"cuts": {"16": 3}, "paper_verdict": "wrong"} for row in rows]
        file.write_text("".join(json.dumps(row) + "\n" for row in [header, *rows]))
    (path / "drop_counts.json").write_text(json.dumps({"text": "9 traces kept", "kept": 9, "bad_rows": []}))
    Journal(path / "metrics.jsonl").append({"step": 1, "loss": 2.5, "tokens": 10, "seconds": 1.0})


def reinforcement_with_rollouts(path):
    reinforcement(path)
    for reward in (0.0, 1.0):
        row = {"step": 1, "question": "q", "reward": reward, "tokens": 7, "finished": True, "text": RIGHT}
        Journal(path / "rollouts.jsonl").append(row)


def study_with_a_failure(path):
    study(path)
    failed = {"status": "failed", "seconds": 1.0, "error": "no", "tail": ["line"], "log": "log.txt"}
    cells = json.loads((path / "study.json").read_text())
    cells["deviations"] = ["something"]
    cells["cells"].append(cells["cells"][0] | {"seed": 5})
    (path / "study.json").write_text(json.dumps(cells))
    Journal(path / "jobs.jsonl").append({"job": "tiny-full-16-seed5", **failed})


SAMPLE = {"answer", "text", "verdict"}
MORE = {"model", "prediction", "gold", "rule"}
ALL_KINDS = {  # kind -> fields that its report shows; a problem of arithmetic or the toy must be one
    evaluation: SAMPLE | MORE | {"problem"},
    tuning_on_arithmetic: SAMPLE | MORE,
    reinforcement_with_rollouts: SAMPLE | MORE | {"problem", "group_size", "text"},
    study_with_a_failure: SAMPLE | {"quick", "error", "[]", "log"},
}


def fields_of(value, field=()):
    """Yield the way to every value in JSON, and to every name of one; all entries of a list are one."""
    if isinstance(value, dict):
        for name in value:
            yield (*field, name, "name")
            yield from fields_of(value[name], (*field, name))
    elif isinstance(value, list):
        for entry in value:
            yield from fields_of(entry, (*field, "[]"))
    else:
        yield (*field, "value")


def planted(value, field):
    """Return JSON with HOSTILE in one field, or as its name."""
    name, *rest = field
    if name == "value":
        return HOSTILE
    if isinstance(value, list):
        return [planted(entry, rest) for entry in value]
    if not isinstance(value, dict) or name not in value:
        return value
    if rest == ["name"]:
        return {HOSTILE if key == name else key: entry for key, entry in value.items()}
    return value | {name: planted(value[name], rest)}


def read(file):
    lines = file.read_text().splitlines()
    return [*map(json.loads, lines)] if file.suffix == ".jsonl" else [json.loads("".join(lines))]


@pytest.mark.slow
@pytest.mark.parametrize("write", ALL_KINDS, ids=lambda write: write.__name__)
def test_no_field_of_any_file_of_a_run_reaches_its_report_as_html(write, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "_png", lambda figure: b"")  # a picture takes seconds and holds no HTML
    write(tmp_path)
    assert not TAGS.search(write_report(tmp_path).read_text())

    groups = {}  # name -> the files of that name, such as toy.jsonl before and after: they change together
    for file in (*tmp_path.rglob("*.json"), *tmp_path.rglob("*.jsonl")):
        groups.setdefault(file.name, []).append(file)
    shown = set()
    for name, files in groups.items():
        contents = {file: (file.read_text(), read(file)) for file in files}
        for field in dict.fromkeys(
            f for _, rows in contents.values() for row in rows for f in fields_of(row)
        ):
            for file, (_, rows) in contents.items():
                file.write_text("".join(json.dumps(planted(row, field)) + "\n" for row in rows))
            (tmp_path / "report.html").unlink()
            try:
                page = write_report(tmp_path).read_text()
            except Exception:  # a field that is no number, or has another name: refused before it is shown
                assert not (tmp_path / "report.html").exists()
                (tmp_path / "report.html").touch()
            else:
                assert not TAGS.search(page), f"{name}: {field}"
                shown |= {(name, *field)} if "&lt;script&gt;" in page else set()
            for file, (content, _) in contents.items():
                file.write_text(content)
    assert {found[-2] for found in shown} >= ALL_KINDS[write], sorted(shown)
