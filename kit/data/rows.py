"""Rows of a data set, each with the place it came from: a local .jsonl, .json or .parquet file, a hub id, or
a local copy of what the hub has under one.

A row that cannot be read is named by file and line and counted; more than `max_bad_rows` of them stop the
run.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from kit.extras import require
from kit.grade.limits import MAX_DIGITS

SUFFIXES = (".jsonl", ".json", ".parquet")
# the fields in which data sets keep a problem and its gold answer, in the order in which they are looked for
PROBLEM = ("problem", "question", "extra_info.question")  # the last one is verl's, and so is that of ANSWER
ANSWER = ("answer", "gt_answer", "reward_model.ground_truth")
EXAMPLE = '{"problem": "What is 2+3?", "answer": "5"}'
SHOWN = 5  # bad rows printed in an error; the report counts the others
UNSEEN = dict.fromkeys(map(ord, "\u00ad\u200b\u2060\ufeff"))  # characters without width, by code -> None


@dataclass
class BadRows:
    """Rows that could not be used, by place and reason. More than `limit` of them raise ValueError."""

    limit: int  # rows; 0 = the first bad row stops the run
    found: list[str] = field(default_factory=list)

    def add(self, where: str, reason: str) -> None:
        self.found.append(f"{where}: {reason}")
        if len(self.found) > self.limit:
            shown = "\n  ".join(self.found[-SHOWN:])
            raise ValueError(
                f"{len(self.found)} bad rows but max_bad_rows is {self.limit}; mend the rows or raise "
                "--max_bad_rows:\n"
                f"  {shown}"
            )


class LongNumber(NamedTuple):
    """Stands for a whole number of more than MAX_DIGITS digits, which Python may refuse to read or write."""

    num_digits: int

    @classmethod
    def of(cls, number: int) -> LongNumber:
        at_least = int((number.bit_length() - 1) * math.log10(2)) + 1
        return cls(at_least + (abs(number) >= 10**at_least))


def _whole_number(digits: str) -> int | LongNumber:
    return int(digits) if len(digits) <= MAX_DIGITS else LongNumber(len(digits.lstrip("-")))


def same_space(text: str) -> str:
    """Return text with one space wherever it has white space, so that it is the same in any line width."""
    return " ".join(text.translate(UNSEEN).split())


def text_of(row: dict, names: Sequence[str]) -> str:
    """Return the first of these fields that a row has, as text; "a.b" is field b of field a.

    A number becomes text. Raises ValueError that names the field if there is none, or if it holds no usable
    text.
    """
    fields = ((name, field_of(row, name)) for name in names)
    name, value = next(((name, value) for name, value in fields if value is not None), ("", None))
    if value is None:
        if null := [name for name in names if name in row]:
            raise ValueError(f"field {null[0]} is null")
        raise ValueError(f"no field {' or '.join(names)} (fields: {', '.join(map(str, row)) or 'none'})")
    if isinstance(value, int) and value.bit_length() > MAX_DIGITS * math.log2(10):
        value = LongNumber.of(value)
    if isinstance(value, LongNumber):
        raise ValueError(
            f"field {name} is a number of {value.num_digits:,} digits and at most {MAX_DIGITS:,} are read; "
            "write it as text"
        )
    if isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"field {name} is {value}, which is not a number")
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"field {name} is a {type(value).__name__}, not text or a number")
    if not value.strip():
        raise ValueError(f"field {name} is empty")
    if "\0" in value:
        raise ValueError(f"field {name} contains a NUL byte")
    if re.search("[\ud800-\udfff]", value):
        raise ValueError(f"field {name} contains half a surrogate pair")
    return value


def field_of(row: dict, name: str) -> object:
    """Return a field of a row, None if there is none; "a.b" is field b of field a."""
    value = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def check_sources(*sources: str) -> None:
    """Raise ValueError if one names a local file that is missing or of an unknown kind. Read nothing."""
    for source in sources:
        path = Path(source)
        if path.suffix in SUFFIXES and not path.is_file():
            raise ValueError(
                f"no file {source} here (working directory {Path.cwd()}); pass an existing file or a hub id"
            )
        if path.suffix not in SUFFIXES and path.is_file():
            raise ValueError(f"{source} is not a {', '.join(SUFFIXES)} file; pass one of these or a hub id")


def read_rows(source: str, bad: BadRows) -> Iterator[tuple[str, dict]]:
    """Yield (where, row) for every readable row of `source`, and add the others to `bad`.

    source: a local file, known by its suffix, or a data set, `owner/name[:part][@split]`, where the part is a
    config or, if the data set has no such config, a folder of it. The split is "train" if none is named. A
    local copy of a data set is named by its folder in place of owner/name.
    where: file:line (jsonl) or file[index] (json, parquet, data set).
    Raises ValueError for a missing or empty file, for a part that the data set lacks, and for too many bad
    rows.
    """
    check_sources(source)
    path = Path(source)
    if path.suffix in SUFFIXES:
        reader = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}[path.suffix]
        rows = reader(path, bad)
    else:
        rows = _read_data_set(source)

    num_bad, where = len(bad.found), ""
    for where, row in rows:
        if isinstance(row, dict):
            yield where, row
        else:
            bad.add(where, f"a row is an object with fields, this is a {type(row).__name__}")
    if not where and len(bad.found) == num_bad:
        raise ValueError(
            f"{source} is empty; write one object per row, such as {EXAMPLE}, and for training its trace, too"
        )


def _read_jsonl(path: Path, bad: BadRows) -> Iterator[tuple[str, object]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line.rstrip(), parse_int=_whole_number)
            except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
                column = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                bad.add(where, f"not JSON: {getattr(error, 'msg', error)}{column}")
                continue
            yield where, row


def _read_json(path: Path, bad: BadRows) -> Iterator[tuple[str, object]]:
    content = path.read_bytes()
    if not content.strip():
        return
    try:
        rows = json.loads(content, parse_int=_whole_number)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON: {error}; a file with one object per line is a .jsonl file"
        ) from error
    if not isinstance(rows, list):
        raise ValueError(
            f"{path} holds a {type(rows).__name__} but a list of rows is needed; "
            "a file with one object per line is a .jsonl file"
        )
    for index, row in enumerate(rows):
        yield f"{path}[{index}]", row


def _read_parquet(path: Path, bad: BadRows) -> Iterator[tuple[str, object]]:
    require(f"{path}, a .parquet file,", "pyarrow")
    import pyarrow.parquet

    if not path.stat().st_size:
        return
    index = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                yield f"{path}[{index}]", row
                index += 1
    except pyarrow.ArrowException as error:
        raise ValueError(
            f"{path} is not a whole .parquet file: row {index} cannot be read ({error}); copy it again"
        ) from error


class NoSuchPart(ValueError):
    """A data set has neither a config nor a folder of this name."""


def _read_data_set(source: str) -> Iterator[tuple[str, object]]:
    require(f"{source}, a data set on the hub,", "datasets")
    path, _, split = source.partition("@")
    name, _, part = path.partition(":")
    part = part.rstrip("/") or part  # a shell completes a folder with a slash
    # no narrower error: the hub client has no base class for "not found", "no network" and "no such split"
    try:
        rows = _load(name, part, split or "train")
    except NoSuchPart:
        raise
    except Exception as error:
        if Path(name).is_dir():
            raise ValueError(
                f"{name} is a folder that cannot be read as one data set ({type(error).__name__}: {error}); "
                f"pass one of its {', '.join(SUFFIXES)} files"
            ) from error
        raise ValueError(
            f"{source} is neither a local {', '.join(SUFFIXES)} file nor a data set the hub gave us "
            f"({type(error).__name__}: {error}); check name, split and network, or pass a local copy"
        ) from error
    for index, row in enumerate(rows):
        yield f"{source}[{index}]", row


def _load(name: str, part: str, split: str):
    """Load a config of a data set or, if it has none of this name, a folder. Raises NoSuchPart."""
    from datasets import get_dataset_config_names, load_dataset

    if not part:
        return load_dataset(name, split=split, trust_remote_code=False)
    try:
        return load_dataset(name, part, split=split, trust_remote_code=False)
    except ValueError:  # which an unknown split is, too
        if part in (configs := get_dataset_config_names(name)):
            raise
    folders = _folders(name)
    if part not in folders:
        raise NoSuchPart(
            f"{name} has neither a config nor a folder {part!r}; its configs are {', '.join(configs)} and "
            f"its folders with data are {', '.join(folders) or 'none'}"
        )
    return load_dataset(name, data_dir=part, split=split, trust_remote_code=False)


def _folders(name: str) -> list[str]:
    """Return the folders of a data set that hold files of rows."""
    from fsspec.core import url_to_fs

    files, root = url_to_fs(name if Path(name).is_dir() else f"hf://datasets/{name}")
    paths = [PurePosixPath(path).relative_to(PurePosixPath(root)) for path in files.find(root)]
    return sorted({str(path.parent) for path in paths if path.suffix in (*SUFFIXES, ".csv")} - {"."})
