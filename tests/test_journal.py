import json

import pytest

from kit.run import Journal


def test_rows_are_read_back_in_order(tmp_path):
    journal = Journal(tmp_path / "deep" / "rows.jsonl")
    assert journal.read() == []
    journal.append({"step": 1, "text": "π \u2028 \n"})
    journal.append({"step": 2, "loss": float("nan")})
    assert journal.read() == [{"step": 1, "text": "π \u2028 \n"}, {"step": 2, "loss": "nan"}]


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
