import json
import re

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from kit.data.problems import read_own, read_prompts
from kit.data.rows import BadRows, read_rows, text_of
from kit.data.traces import read_traces


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


FOLDERS = ("simplelr_qwen_level1to4", "simplelr_qwen_level3to5")


@pytest.fixture
def data_set(tmp_path, monkeypatch):
    """A copy of SimpleRL-Zoo-Data's layout: a README with a licence alone, and folders with parquet files."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "SimpleRL-Zoo-Data"
    for folder in FOLDERS:
        (root / folder).mkdir(parents=True)
        for split in ("train", "test"):
            rows = [{"question": f"{folder} {split} {i}", "gt_answer": "1"} for i in range(3)]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / folder / f"{split}.parquet")
    (root / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return root


def add_config(root, name, folder):
    files = {"config_name": name, "data_files": [{"split": "train", "path": f"{folder}/train*"}]}
    (root / "README.md").write_text(f"---\nconfigs: {json.dumps([files])}\n---\n")


def questions(source):
    return [row["question"] for _, row in read_rows(source, BadRows(0))]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_data_set_without_configs_is_read_folder_by_folder(data_set, folder):
    assert questions(f"{data_set}:{folder}") == [f"{folder} train {i}" for i in range(3)]
    assert questions(f"{data_set}:{folder}@test") == [f"{folder} test {i}" for i in range(3)]
    assert questions(f"{data_set}:{folder}/") == questions(f"{data_set}:{folder}")
    (where, _), *_ = read_rows(f"{data_set}:{folder}", BadRows(0))
    assert where == f"{data_set}:{folder}[0]"


def test_a_config_goes_before_a_folder_of_the_same_name(data_set):
    add_config(data_set, FOLDERS[0], FOLDERS[1])
    assert questions(f"{data_set}:{FOLDERS[0]}") == [f"{FOLDERS[1]} train {i}" for i in range(3)]
    assert questions(f"{data_set}:{FOLDERS[1]}") == [f"{FOLDERS[1]} train {i}" for i in range(3)]


def test_a_config_or_folder_that_a_data_set_lacks_is_refused_with_what_it_has(data_set):
    folders = f"folders with data are {FOLDERS[0]}, {FOLDERS[1]}$"
    (data_set / "pictures").mkdir()  # has no rows
    (data_set / "pictures" / "figure.png").write_bytes(b"x")
    for part in ("simplelr_qwen_level1to5", "simplelr_qwen", "pictures", "../SimpleRL-Zoo-Data"):
        with pytest.raises(ValueError, match=f"neither a config nor a folder '{part}'; .* {folders}"):
            questions(f"{data_set}:{part}")
    add_config(data_set, "all", "*")
    with pytest.raises(ValueError, match=f"folder 'al'; its configs are all and its {folders}"):
        questions(f"{data_set}:al")


def test_a_split_that_a_config_or_folder_lacks_is_not_taken_for_a_missing_folder(data_set):
    with pytest.raises(ValueError, match=r"Unknown split \"dev\". Should be one of \['train', 'test'\]"):
        questions(f"{data_set}:{FOLDERS[0]}@dev")
    add_config(data_set, "all", "*")
    with pytest.raises(ValueError, match=r"Unknown split \"dev\". Should be one of \['train'\]"):
        questions(f"{data_set}:all@dev")


def test_a_hub_id_that_gives_nothing_says_what_to_check():
    with pytest.raises(ValueError, match="nor a data set the hub gave us"):
        list(read_rows("no-such-owner/no-such-data:config@test", BadRows(0)))


def test_a_folder_of_files_that_are_no_data_set_asks_for_one_of_them(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"problem": "1+1?"}\n')
    (tmp_path / "b.jsonl").write_text('{"question": 2}\n')
    with pytest.raises(ValueError, match=r"cannot be read as one data set .*; pass one of its .jsonl, .json"):
        list(read_rows(str(tmp_path), BadRows(0)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
@pytest.mark.parametrize("rows", [None, []])
def test_a_file_without_rows_is_said_to_be_empty(tmp_path, name, rows):
    """rows: None = the file has no bytes."""
    contents = {"a.jsonl": "\n \n", "a.json": "[]"}
    if rows is None:
        (tmp_path / name).touch()
    elif name in contents:
        (tmp_path / name).write_text(contents[name])
    else:
        pyarrow.parquet.write_table(pyarrow.table({"problem": pyarrow.array([], "string")}), tmp_path / name)
    for read in (read_traces, read_own, lambda source: read_prompts(source, BadRows(0))):
        with pytest.raises(ValueError, match=rf"{name} is empty; write one object per row, such as {{"):
            read(str(tmp_path / name))


def test_a_file_of_broken_rows_alone_is_not_called_empty(tmp_path):
    (tmp_path / "a.jsonl").write_text("x\n{\n")
    bad = BadRows(2)
    assert list(read_rows(str(tmp_path / "a.jsonl"), bad)) == [] and len(bad.found) == 2
    (tmp_path / "b.jsonl").touch()  # the bad rows of another file say nothing about this one
    with pytest.raises(ValueError, match=r"b\.jsonl is empty"):
        list(read_rows(str(tmp_path / "b.jsonl"), bad))


def test_a_parquet_file_that_is_cut_off_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"problem": ["x"] * 9}), path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"a\.parquet is not a whole \.parquet file: row 0 cannot be read"):
        list(read_rows(str(path), BadRows(0)))


@pytest.mark.parametrize(("name", "place"), [("a.jsonl", ":2"), ("a.json", "[1]")])
@pytest.mark.parametrize("number", ["1" * 5_000, "-" + "1" * 5_000])
def test_a_number_too_long_to_read_costs_its_row_only_and_is_named(tmp_path, name, place, number):
    rows = [f'{{"problem": "{i}?", "trace": "\\\\boxed{{2}}", "answer": 2}}' for i in range(3)]
    rows[1] = rows[1].replace(": 2", f": {number}")
    text = "\n".join(rows) if name == "a.jsonl" else f"[{','.join(rows)}]"
    (tmp_path / name).write_text(text)
    bad = BadRows(1)
    assert [question.problem for question in read_prompts(str(tmp_path / name), bad)] == ["0?", "2?"]
    message = f"{name}{place}: field answer is a number of 5,000 digits and at most 4,000 are read"
    assert len(bad.found) == 1 and message in bad.found[0]
    with pytest.raises(ValueError, match=re.escape(message)):
        read_traces(str(tmp_path / name))
    (tmp_path / name).write_text(text.replace(number, f'"{number}"'))  # the remedy that is named
    assert len(read_prompts(str(tmp_path / name), BadRows(0))) == 3


def test_a_number_too_long_to_read_in_a_field_that_nobody_needs_does_no_harm(tmp_path):
    (tmp_path / "a.jsonl").write_text(f'{{"problem": "1?", "answer": 2, "id": {"1" * 5_000}}}')
    assert len(read_prompts(str(tmp_path / "a.jsonl"), BadRows(0))) == 1


@pytest.mark.parametrize("number", [10**4_999, -(10**5_000) + 1], ids=["fewest", "most"])  # of 5,000 digits
def test_a_number_of_python_too_long_to_write_is_named_by_its_field_and_digits(number):
    with pytest.raises(
        ValueError, match="field answer is a number of 5,000 digits and at most 4,000 are read"
    ):
        text_of({"answer": number}, ["answer"])


def test_a_whole_number_of_400_digits_is_an_answer_like_any_other():
    assert text_of({"answer": 10**400}, ["answer"]) == "1" + "0" * 400
