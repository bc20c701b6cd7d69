import json

import pyarrow
import pyarrow.parquet
import pytest

from kit.data.rows import BadRows, read_rows


def test_the_three_file_formats_give_the_same_rows_with_their_places(tmp_path):
    rows = [{"problem": "1+1?", "answer": "2"}, {"problem": "π?", "answer": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name, places in (
        ("a.jsonl", (":1", ":2")),
        ("a.json", ("[0]", "[1]")),
        ("a.parquet", ("[0]", "[1]")),
    ):
        found = list(read_rows(str(tmp_path / name), BadRows(0)))
        assert [row for _, row in found] == rows
        assert [where for where, _ in found] == [f"{tmp_path / name}{place}" for place in places]


def test_broken_lines_are_named_by_file_and_line_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"problem": "x"}\n{"problem": \n[1]\n\xff\n{"problem": "y"}\n')
    bad = BadRows(3)
    assert [row["problem"] for _, row in read_rows(str(path), bad)] == ["x", "y"]
    assert [entry.split(": ")[0] for entry in bad.found] == [f"{path}:{number}" for number in (2, 3, 4)]
    assert bad.found[0] == f"{path}:2: not JSON: Expecting value, column 12"
    with pytest.raises(ValueError, match=r"3 bad rows but max_bad_rows is 2[\s\S]*a.jsonl:4"):
        list(read_rows(str(path), BadRows(2)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "no file"),
        ("a.json", '{"rows": []}', "holds a dict but a list of rows is needed"),
        ("a.json", "[1,", "is not JSON"),
        ("a.csv", "x", "is not a .jsonl, .json, .parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        list(read_rows(str(tmp_path / name), BadRows(0)))


def test_a_hub_id_that_gives_nothing_says_what_to_check():
    with pytest.raises(ValueError, match="nor a data set the hub gave us"):
        list(read_rows("no-such-owner/no-such-data:config@test", BadRows(0)))
