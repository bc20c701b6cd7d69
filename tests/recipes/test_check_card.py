"""check_card rehearsed on a CPU as a user would run it; on a machine with a card, `pytest -m gpu` runs the same checks there."""

import json
import sys

import pytest
import torch
from children import ROOT, run_recipe

sys.path.insert(0, str(ROOT / "recipes"))
from card.results import FAIL, FIGURE, NOT_RUN, PASS, Card, CardLost, Results
from check_card import QUICK, SECTIONS, Config, main, sentence

CPU = Card(torch.device("cpu"), small=True, quick=True)


@pytest.mark.slow
@pytest.mark.parametrize("sections", ["truth,speed", "steps,fits", "sampler,rl,resume"])
def test_every_section_runs_on_a_cpu_and_each_result_is_on_disk(tmp_path, sections):
    done = run_recipe(
        "check_card", "--device", "cpu", "--quick", "--seconds", "0", "--only", sections, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [
        json.loads(line) for line in (tmp_path / "runs/check_card/001/results.jsonl").read_text().splitlines()
    ]
    assert {row["section"] for row in rows} == set(sections.split(","))
    assert not [row for row in rows if row["status"] == FAIL]
    assert {row["section"] for row in rows if row["status"] == PASS} >= set(sections.split(",")) - {"speed"}
    assert done.stdout.rstrip().splitlines()[-1].startswith("CPU rehearsal, tiny shapes: ")
    machine = json.loads((tmp_path / "runs/check_card/001/config.json").read_text())["machine"]
    assert machine["torch"] == torch.__version__


@pytest.mark.slow
def test_another_cards_code_is_compiled_into_a_cache_of_its_own_and_read_there(tmp_path):
    flags = [
        "--device",
        "cpu",
        "--quick",
        "--only",
        "truth",
        "--as",
        "sm89",
        "--out",
        str(tmp_path / "check"),
    ]
    done = run_recipe("check_card", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "PTX of sm89: mma.sync, no wgmma" in done.stdout and (tmp_path / "check" / "triton_sm89").is_dir()


def test_what_cannot_be_checked_is_refused_in_one_line_that_says_what_to_do(tmp_path):
    for flags, words in (
        (
            [],
            "check_card needs an NVIDIA GPU and none is here. What works here:\n  python recipes/check_card.py --device cpu",
        ),
        (
            ["--only", "truth,sped"],
            "there is no section 'sped'; the sections are truth, speed, steps, fits, sampler, rl, resume",
        ),
        (["--models", "gemma", "--device", "cpu"], "google/gemma-3-1b-it"),
    ):
        done = run_recipe("check_card", *flags, cwd=tmp_path)
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert not (tmp_path / "runs").exists()


def test_a_case_that_fails_costs_itself_and_its_reason_is_kept(tmp_path, capsys):
    results = Results(CPU, tmp_path / "results.jsonl")
    results.section = "truth"
    with results.case("first"):
        raise RuntimeError("no such\nkernel")
    with results.case("second"):
        results.check("second", True, "1.0x", error=float("nan"))
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["name"], row["status"], row["text"]) for row in rows] == [
        ("first", FAIL, "RuntimeError: no such kernel"), ("second", PASS, "1.0x"),
    ]  # fmt: skip
    assert rows[0]["where"][-1].startswith("test_check_card.py:")
    assert "FAIL    truth   first: RuntimeError: no such kernel" in capsys.readouterr().out
    assert "1 of 2 kernel checks right; 1 checks FAILED" in sentence(results, {"gpu": "none"})


def test_a_lost_card_ends_the_run_with_the_table_of_what_is_known(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Card, "is_lost", lambda self: True)

    def broken(results, card):
        results.check("before", True)
        with results.case("kernel"):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(SECTIONS, "truth", broken)
    monkeypatch.setitem(SECTIONS, "speed", lambda results, card: pytest.fail("the card is gone"))
    found = main(Config(only="truth,speed", device="cpu", out=str(tmp_path)))
    assert found.count(FAIL) == 2 and "the checks after it did not run" in capsys.readouterr().out
    with pytest.raises(CardLost), found.case("again"):
        raise RuntimeError("CUDA error")


def test_ctrl_c_ends_in_the_table_of_what_is_known(tmp_path, monkeypatch, capsys):
    def stopped(results, card):
        results.figure("copy bandwidth", "1 GB/s")
        raise KeyboardInterrupt

    monkeypatch.setitem(SECTIONS, "speed", stopped)
    found = main(Config(only="speed", device="cpu", out=str(tmp_path)))
    assert found.count(FIGURE) == 1 and found.count(NOT_RUN) == 1
    assert "not run speed the rest: stopped with Ctrl-C" in capsys.readouterr().out


def test_a_check_that_does_not_fit_the_time_is_named_not_failed(tmp_path):
    results = Results(CPU, seconds=5.0)
    assert results.has_time("short", 1.0) and not results.has_time("long", 60.0)
    assert results.count(NOT_RUN) == 1 and "pass --seconds 0" in results.rows[0]["text"]


@pytest.mark.gpu
@pytest.mark.parametrize("section", SECTIONS)
def test_the_checks_pass_on_this_card(section, tmp_path):
    found = main(Config(only=section, quick=True, seconds=0.0, out=str(tmp_path)))
    assert found.count(PASS) + found.count(FIGURE) > 0
    assert not [(row["name"], row["text"]) for row in found.rows if row["status"] == FAIL]


def test_quick_is_ninety_seconds():
    assert QUICK == {"seconds": 90.0}
