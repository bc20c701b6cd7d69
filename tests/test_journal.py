import json
import math
import os
import subprocess
import sys

import pytest
from children import ROOT

from kit.journal import ROLLOUT, Journal, Kind, run_of

STEPS = Kind("step", {"step": int, "loss": float, "done": bool}, key=("step",))
GOOD = b'{"step": 1, "loss": 0.5, "done": true}\n'
SECOND = b'{"step": 2, "loss": 0.5, "done": true}\n'


def test_rows_are_read_back_in_order(tmp_path):
    journal = Journal(tmp_path / "deep" / "rows.jsonl")
    assert journal.read() == []
    journal.append({"step": 1, "text": "π \u2028 \n"})
    journal.append({"step": 2, "loss": float("nan")})
    journal.append({"step": 3, "losses": [1.0, math.inf], "dq": {"error": math.nan, "size": 2.0}})
    assert journal.read() == [
        {"step": 1, "text": "π \u2028 \n"},
        {"step": 2, "loss": "nan"},
        {"step": 3, "losses": [1.0, "inf"], "dq": {"error": "nan", "size": 2.0}},
    ]


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b'{"step": 2}', b"\xff\xfe"])
def test_a_line_a_kill_left_half_written_is_cut_off_before_the_next_is_written(tmp_path, torn):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step": 1}\n' + torn)
    journal = Journal(path)
    journal.append({"step": 2})
    assert journal.read() == [{"step": 1}, {"step": 2}]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:2 is not JSON"):
        Journal(path).read()


def test_keep_drops_the_rows_after_a_checkpoint(tmp_path):
    journal = Journal(tmp_path / "rows.jsonl")
    for step in range(5):
        journal.append({"step": step})
    journal.keep(lambda row: row["step"] <= 2)
    assert [json.loads(line)["step"] for line in journal.path.read_text().splitlines()] == [0, 1, 2]


def test_half_a_surrogate_pair_from_a_model_does_not_stop_a_run(tmp_path):
    journal = Journal(tmp_path / "rows.jsonl")
    journal.append({"text": "\ud83d"})
    assert len(Journal(journal.path).read()) == 1


def content_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_who_only_reads_writes_nothing_and_leaves_out_a_half_written_last_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + SECOND[:20])
    before = content_of(tmp_path)
    assert [row["step"] for row in Journal(path, STEPS).read()] == [1]
    assert content_of(tmp_path) == before
    with path.open("ab") as file:  # the run, which is still going, ends its line
        file.write(SECOND[20:])
    assert [row["step"] for row in Journal(path, STEPS).read()] == [1, 2]


def test_who_only_reads_creates_no_folder(tmp_path):
    assert Journal(tmp_path / "no" / "such" / "rows.jsonl").read() == []
    assert list(tmp_path.iterdir()) == []


READ = "import sys; from kit.run import Journal\nwhile True: Journal(sys.argv[1]).read()"
APPEND = """
import sys
from kit.run import Journal
for i in range(150): Journal(sys.argv[1]).append({'step': i, 'text': 'x' * 500_000})
"""


def start(code, path):
    return subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
    )


def test_a_log_that_others_read_while_it_is_written_loses_no_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    readers = [start(READ, path) for _ in range(2)]
    with start(APPEND, path) as writer:
        said = writer.stderr.read()
    assert [reader.poll() for reader in readers] == [None, None]
    for reader in readers:
        reader.kill()
        reader.communicate()
    assert writer.returncode == 0, said
    assert [row["step"] for row in Journal(path).read()] == list(range(150))


HOLD = """
import sys
from kit.run import Journal
Journal(sys.argv[1]).append({'step': 1})
print('ready', flush=True)
sys.stdin.read()
"""


def test_no_other_process_writes_in_the_folder_of_a_run_or_mends_its_logs(tmp_path):
    (tmp_path / "config.json").touch()
    path = tmp_path / "samples" / "rows.jsonl"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "metrics.jsonl")],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout.readline() == b"ready\n"
    path.parent.mkdir()
    path.write_bytes(GOOD + SECOND[:20])
    for write in (lambda: Journal(path).append({"step": 3}), lambda: Journal(path).keep(lambda row: False)):
        with pytest.raises(ValueError, match=f"is in use by process {holder.pid} "):
            write()
    assert path.read_bytes() == GOOD + SECOND[:20]
    holder.kill()
    holder.communicate()
    Journal(path).append({"step": 3})
    assert [row["step"] for row in Journal(path).read()] == [1, 3]


def test_the_lock_of_a_log_is_that_of_its_run_or_of_its_folder_if_there_is_no_run(tmp_path):
    (tmp_path / "run" / "cells" / "a" / "after").mkdir(parents=True)
    for run in (tmp_path / "run", tmp_path / "run" / "cells" / "a"):
        (run / "config.json").touch()
        assert run_of(run / "metrics.jsonl") == run_of(run / "after" / "toy.jsonl") == run
    assert run_of(tmp_path / "x.jsonl") == tmp_path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[1]\n", r":2 is not a step: it is a list, not an object with fields; delete that line"),
        (b"7\n", r":2 is not a step: it is a number, not an object"),
        (b'{"step": 2, "done": true}\n', r":2 is not a step: it has no `loss`; delete that line"),
        (b'{"step": "2", "loss": 0.5, "done": true}\n', r":2 is not a step: its `step` is text"),
        (b'{"step": 2, "loss": null, "done": true}\n', r":2 is not a step: its `loss` is null"),
        (b'{"step": 2, "loss": 0.5, "done": 1}\n', r":2 is not a step: its `done` is a number"),
        (b'{"step": "\xff\xfe"}\n', r":2 is not UTF-8 \(invalid start byte at byte 10\); delete that line"),
        (b'{"step": 2, "lo{"step": 3}\n', r":2 is not JSON \(.*\); delete that line"),
        (b"\0\0\0\n", r":2 is not JSON"),
        (b"[" * 100_000 + b"\n", r":2 is not JSON"),
        (b'{"step": ' + b"9" * 5_000 + b"}\n", r":2 is not JSON"),
        (
            b'{"header": {}}\n',
            r":2 is a second header: two logs are mixed here; delete that line .* move its steps",
        ),
        (b'{"header": 1}\n', r":2 is a second header"),
    ],
)
def test_a_line_that_is_no_row_is_named_with_its_file_and_what_to_do(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + line + SECOND)
    with pytest.raises(ValueError, match="rows.jsonl" + message) as error:
        Journal(path, STEPS).read()
    assert len(str(error.value)) < 1_000
    assert path.read_bytes() == GOOD + line + SECOND


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"\xef\xbb\xbf" + GOOD,
            r"rows.jsonl:1 begins with a byte order mark \(BOM\); save the file as UTF-8 without",
        ),
        (GOOD.decode().encode("utf-16"), r"rows.jsonl:1 is not UTF-8"),
        (b'{"header": 1}\n' + GOOD, r"rows.jsonl:1 is not a header: its `header` is a number"),
    ],
)
def test_a_first_line_that_an_editor_has_spoilt_is_named(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Journal(path, STEPS).read()


def test_line_ends_of_windows_and_blank_lines_do_no_harm(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n" + GOOD.replace(b"\n", b"\r\n") + b" \r\n" + SECOND)
    assert [row["step"] for row in Journal(path, STEPS).read()] == [1, 2]


def test_doubled_rows_are_counted_once_and_named_once(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"header": {}}\n' + (GOOD + SECOND) * 3 + GOOD.replace(b"1", b"3"))
    for _ in range(2):
        assert [row.get("step") for row in Journal(path, STEPS).read()] == [None, 1, 2, 3]
    said = capsys.readouterr().err
    assert said == (
        f"{path}: 4 of its rows (the first: line 4) have the step of an earlier one, so they are not "
        "counted\n"
    )


def test_rows_that_lack_a_part_of_the_key_are_all_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step": 1, "text": "a"}\n{"step": 1, "text": "b"}\n')
    kind = Kind("rollout", {"step": int}, key=("step", "sample"))
    assert len(Journal(path, kind).read()) == 2


def test_a_rollout_whose_answer_cannot_be_graded_has_no_reward_and_is_read(tmp_path):
    row = {
        "step": 1,
        "question": "q",
        "reward": None,
        "tokens": 3,
        "finished": True,
        "text": "?",
        "sample": 0,
    }
    journal = Journal(tmp_path / "rollouts.jsonl", ROLLOUT)
    journal.append(row)
    assert journal.read() == [row]
    journal.append(row | {"reward": "much", "sample": 1})
    with pytest.raises(ValueError, match=r":2 is not a rollout: its `reward` is text"):
        journal.read()
