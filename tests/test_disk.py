"""Files and folders are written whole or not at all, through no link, and flushed before they are named."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from children import ROOT

from kit import models
from kit.disk import SCRATCH, publish, remove_scratch, scratch_beside, write_whole
from kit.models.folder import save_model
from kit.run import write_json


def test_links_with_guessable_names_are_not_followed(tmp_path):
    precious, target = tmp_path / "precious", tmp_path / "config.json"
    precious.write_text("mine")
    for name in ("config.json", "config.json.tmp", ".config.json.tmp"):
        (tmp_path / name).symlink_to(precious)
    write_json(target, {"lr": 1})
    assert precious.read_text() == "mine"
    assert not target.is_symlink() and '"lr": 1' in target.read_text()
    assert len({scratch_beside(target) for _ in range(100)}) == 100


def test_a_model_is_saved_beside_folders_of_the_user_with_similar_names(tmp_path):
    model, tokenizer = models.load("tiny", device="cpu")
    mine = tmp_path / "old-model", tmp_path / "elsewhere"
    for folder in mine:
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    (tmp_path / "model.tmp").symlink_to(mine[1])
    for _ in range(2):  # the second replaces the first
        save_model(tmp_path / "model", model, tokenizer)
    assert [sorted(path.name for path in folder.iterdir()) for folder in mine] == [["notes.txt"]] * 2
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_is_written_has_the_permissions_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "file", b"x")
        scratch = scratch_beside(tmp_path / "folder")
        scratch.mkdir()
        publish(scratch, tmp_path / "folder")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("file", "folder")] == [0o640, 0o750]


def test_a_write_that_fails_leaves_the_old_content_and_no_scratch(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        write_whole(tmp_path / "taken", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


WRITE = """
import sys
from pathlib import Path
from kit.disk import write_whole
while True:
    for letter in (b'a', b'b'):
        write_whole(Path('file'), letter * 3_000_000)
        print('written', flush=True)
"""


def test_kills_leave_a_whole_file_and_what_they_left_besides_is_removed(tmp_path):
    rng, left = random.Random(0), 0
    (tmp_path / ".notes.tmp").write_text("mine")
    for _ in range(8):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        options = {"cwd": tmp_path, "env": environment, "stdout": subprocess.PIPE}
        with subprocess.Popen([sys.executable, "-c", WRITE], **options) as process:
            process.stdout.readline()
            time.sleep(rng.uniform(0, 0.05))
            process.kill()
        content = (tmp_path / "file").read_bytes()
        assert content in (b"a" * 3_000_000, b"b" * 3_000_000)
        left += sum(bool(SCRATCH.fullmatch(path.name)) for path in tmp_path.iterdir())
    assert left, "no kill came in the middle of a write"
    remove_scratch(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".notes.tmp", "file"]


def test_scratch_of_a_folder_is_removed_and_a_link_in_its_place_is_not_followed(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "notes.txt").touch()
    (tmp_path / "checkpoints").mkdir()
    scratch_beside(tmp_path / "checkpoints" / "step_0000001").mkdir()
    scratch_beside(tmp_path / "model").symlink_to(tmp_path / "precious")
    remove_scratch(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checkpoints", "notes.txt", "precious"]


@pytest.fixture
def synced(monkeypatch):
    """Record inode -> whether the final name existed, of all that is flushed to the disk."""
    found, fsync = {}, os.fsync

    def record(descriptor):
        found.setdefault(os.fstat(descriptor).st_ino, (record.final.exists(), os.fstat(descriptor).st_size))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    record.found = found
    return record


def test_a_file_is_on_the_disk_before_it_has_its_name_and_so_is_the_name_afterwards(tmp_path, synced):
    synced.final = tmp_path / "file"
    write_whole(synced.final, b"twelve bytes")
    assert synced.found[synced.final.stat().st_ino] == (False, 12)
    assert synced.found[tmp_path.stat().st_ino][0] is True


def test_all_of_a_model_is_on_the_disk_before_it_has_its_name(tmp_path, synced):
    model, tokenizer = models.load("tiny", device="cpu")
    synced.final = tmp_path / "model"
    save_model(synced.final, model, tokenizer)
    inside = [synced.final, *synced.final.rglob("*")]
    assert len(inside) > 4
    for path in inside:
        existed, size = synced.found[path.stat().st_ino]
        assert not existed and (path.is_dir() or size == path.stat().st_size)
    assert synced.found[Path(tmp_path).stat().st_ino][0] is True
