"""Rehearse check_card on a CPU as a user would run it. On a card, `pytest -m gpu` runs the same checks."""

import json
import math
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from children import run_recipe

from kit.kernels import packed_attention_tiles
from kit.kernels.backend import HAS_TRITON
from kit.kernels.gumbel import draw_reference
from kit.kernels.packed_attention import packed_attention
from kit.machine import GIB
from kit.recipes.card import flex, memory, resume, sampler, tiles, truth_draw
from kit.recipes.card.bars import BARS, report
from kit.recipes.card.flex import FLEX
from kit.recipes.card.memory import measured, median_seconds
from kit.recipes.card.models import build_to_sample
from kit.recipes.card.profile import Profile
from kit.recipes.card.results import FAIL, FIGURE, NOT_RUN, PASS, Card, CardLost, Results, Skip
from kit.recipes.card.sampler import EAGER, EVEN, GRAPH, UNEVEN, USUAL
from kit.recipes.card.speed import MATMULS
from kit.recipes.check_card import QUICK, SECTIONS, Config, main, sentence

CPU = Card(torch.device("cpu"), quick=True)
BARS_OF_A_CARD = {  # which a rehearsal in its quick form does not measure
    "loss, time over Liger's and CCE's",
    "loss, memory over Liger's and CCE's",
    "attention forward, share of flash's speed",
    "attention backward, share of flash's speed",
    "Qwen2.5-1.5B, MFU",
    "Gemma-3-1B, MFU",
    "share of a step that the card is busy",
    "times generate_batch's speed",
    "attention with a window, D = 256, times flex_attention's speed",
}


@pytest.mark.slow
@pytest.mark.parametrize("sections", ["truth,speed", "steps,fits", "sampler,rl,resume,tiles,flex"])
def test_every_section_runs_on_a_cpu_and_each_result_is_on_disk(tmp_path, sections):
    flags = ["--device", "cpu", "--quick", "--seconds", "0", "--only", sections]
    done = run_recipe("check_card", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = tmp_path / "runs/check_card/001"
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert {row["section"] for row in rows} == set(sections.split(","))
    bars = [bar for bar in BARS if bar.section in sections and bar.name not in BARS_OF_A_CARD]
    assert all(0 < bar.value(rows) < math.inf for bar in bars)
    assert not [row for row in rows if row["status"] == FAIL]
    assert {row["section"] for row in rows if row["status"] == PASS} >= set(sections.split(",")) - {
        "speed",
        "tiles",
        "flex",
    }
    result, what_next = done.stdout.rstrip().splitlines()[-2:]
    assert result.startswith("CPU rehearsal, tiny shapes: ") and what_next.startswith("next   ")
    assert json.loads((folder / "config.json").read_text())["machine"]["torch"] == torch.__version__


def test_on_a_card_the_median_of_three_short_calls_counts_and_a_long_one_runs_once(monkeypatch):
    card = SimpleNamespace(is_cuda=True)
    for where, times, first, expected in (
        (card, [1.0, 1.8, 0.5], None, 1.0),
        (card, [1.8, 0.5], 1.0, 1.0),
        (card, [9.0], None, 9.0),
        (card, [], 9.0, 9.0),
        (CPU, [1.0], None, 1.0),
    ):
        left = iter(times)
        monkeypatch.setattr(memory, "timed", lambda *_, left=left: (None, next(left)))
        assert median_seconds(where, print, first=first) == expected
        assert not list(left)


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
    assert "PTX of sm89: mma.sync, no wgmma" in done.stdout
    assert (tmp_path / "check" / "triton_sm89").is_dir()


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed (macOS)")
def test_a_tile_is_launched_instead_of_the_one_in_use_until_it_was_timed():
    in_use = {D: packed_attention_tiles.tiles(D, 2) for D in (64, 256)}
    for kernel, D in (("forward", 64), ("dkdv", 256)):
        with tiles.instead(CPU, kernel, D, (16, 48, 2, 5)):
            found = packed_attention_tiles.tiles(D, 2)
            assert found.pop(kernel) == {
                "BLOCK_D": D,
                "BLOCK_M": 16,
                "BLOCK_N": 48,
                "num_warps": 2,
                "num_stages": 5,
            }
            assert found.items() <= in_use[D].items()
    assert in_use == {D: packed_attention_tiles.tiles(D, 2) for D in (64, 256)}
    for (kernel, D), candidates in tiles.CANDIDATES.items():
        assert tiles.tile_in_use(CPU, kernel, D) not in candidates


def test_beside_flex_attention_its_mask_is_right_and_what_a_cpu_lacks_is_named(tmp_path):
    found = main(Config(only="flex", device="cpu", out=str(tmp_path)))
    mask, both = found.rows
    assert (mask["name"], mask["status"]) == ("the mask of flex_attention", PASS)
    assert both["status"] == NOT_RUN and "flex_attention: NotImplementedError" in both["text"]


def test_a_flex_attention_that_runs_is_timed_beside_ours(monkeypatch):
    """A CPU has no backward pass of it, so ours stands in."""

    def stand_in(q, k, v, cu_seqlens, window, *, compiled):
        assert not compiled
        return lambda: packed_attention(q, k, v, cu_seqlens, 16, window=window)

    monkeypatch.setattr(flex, "flex", stand_in)
    results = Results(CPU)
    flex.time_both(results, CPU, "both", 64, 8)
    (row,) = results.rows
    assert row["status"] == FIGURE and set(row["milliseconds"]) == {"ours", FLEX} and row["window"] == 8
    assert row["text"].endswith("their outputs are 0.0e+00 apart") and not {"gpu", "torch"} & row.keys()


NO_GPU = "recipes/check_card.py --device cpu    a rehearsal of every check"
NO_SECTION = (
    "'sped' in it must be truth, speed, steps, fits, sampler, rl, resume, tiles or flex; did you mean speed?"
)
REFUSED = {
    "no GPU": ([], NO_GPU),
    "an unknown section": (["--only", "truth,sped"], NO_SECTION),
    "an unknown model": (["--models", "gemma", "--device", "cpu"], "google/gemma-3-1b-it"),
}


@pytest.mark.parametrize(("flags", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_checked_is_refused_with_what_to_do(flags, words, tmp_path):
    done = run_recipe("check_card", *flags, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_case_that_fails_ends_alone_and_its_reason_is_kept(tmp_path, capsys):
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


def test_where_every_drawn_token_is_wrong_the_tokens_fail_and_no_log_prob_is_judged(monkeypatch):
    def draw_neighbours(logits, *streams, **settings):
        tokens, logprobs = draw_reference(logits, *streams, **settings)
        return (tokens + 1) % logits.shape[1], logprobs

    monkeypatch.setattr(truth_draw, "draw", draw_neighbours)
    results = Results(CPU)
    results.run("draw", truth_draw.check_draw, torch.float32, 77, {"temperature": 0.0}, seconds=0)
    assert [(row["name"], row["status"]) for row in results.rows[1:]] == [
        ("draw: tokens", FAIL), ("draw", NOT_RUN),
    ]  # fmt: skip
    assert results.rows[-1]["text"].startswith("no token is the same")


@pytest.mark.parametrize(
    ("launches", "status"), [((0, 0), PASS), ((20, 4), PASS), ((20, 20), FAIL), ((0, 4), FAIL)]
)
def test_a_graph_has_fewer_launches_if_the_profiler_sees_any(monkeypatch, launches, status):
    left = iter(launches)
    monkeypatch.setattr(sampler, "copy_gbs", lambda card: 1.0)
    monkeypatch.setattr(sampler, "profiled", lambda *_: Profile(1.0, 1.0, 0, next(left), 0, []))
    model, results = build_to_sample(CPU, sampler.SPREAD), Results(CPU)
    monkeypatch.setattr(Card, "small", False)
    with torch.inference_mode():
        sampler.profile_decoding(results, CPU, "a step", model, [20] * 3, USUAL)
    assert results.rows[-1]["status"] == status


def test_what_is_read_too_early_may_be_nan_and_shows_that_a_wait_is_missing(monkeypatch):
    """A CPU has no streams, so NaN is put where a card would read memory that no copy has reached yet."""

    def uncopied(host, target, source):
        target.fill_(math.nan)

    monkeypatch.setattr(resume.LateInputs, "_copy", uncopied)
    monkeypatch.setattr(resume.LateGradients, "norm", lambda self, loss: loss * math.nan)
    results = Results(CPU)
    resume.check_missing_wait(results, CPU, resume.random_rows(CPU, 32, 1))
    assert [row["status"] for row in results.rows] == [NOT_RUN] * 2


def test_a_lost_card_ends_the_run_with_the_table_of_what_is_known(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Card, "is_lost", lambda self: True)

    def broken(results, card):
        results.check("before", True)
        with results.case("kernel"):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("kit.recipes.card.truth.run", broken)
    monkeypatch.setattr("kit.recipes.card.speed.run", lambda results, card: pytest.fail("the card is gone"))
    found = main(Config(only="truth,speed", device="cpu", out=str(tmp_path)))
    assert found.count(FAIL) == 2 and "the checks after it did not run" in capsys.readouterr().out
    with pytest.raises(CardLost), found.case("again"):
        raise RuntimeError("CUDA error")


def test_ctrl_c_ends_in_the_table_of_what_is_known(tmp_path, monkeypatch, capsys):
    def stopped(results, card):
        results.figure("copy bandwidth", "1 GB/s")
        raise KeyboardInterrupt

    monkeypatch.setattr("kit.recipes.card.speed.run", stopped)
    found = main(Config(only="speed", device="cpu", out=str(tmp_path)))
    assert found.count(FIGURE) == 1 and found.count(NOT_RUN) == 1
    assert "not run speed the rest: stopped with Ctrl-C" in capsys.readouterr().out


def test_a_case_that_does_not_fit_the_time_or_the_card_is_named_not_failed(monkeypatch):
    monkeypatch.setattr(Card, "gib", 8.0)
    monkeypatch.setattr(Card, "synchronize", lambda self: None)
    results = Results(Card(torch.device("cuda"), quick=True), seconds=5.0)
    for name, seconds, gib in (("short", 1, 0), ("long", 60, 0), ("large", 1, 8.25)):
        results.run(name, lambda results, card, name: results.check(name, True), seconds=seconds, gib=gib)
    assert [(row["name"], row["status"]) for row in results.rows] == [
        ("short", PASS), ("long", NOT_RUN), ("large", NOT_RUN),
    ]  # fmt: skip
    assert results.rows[1]["text"] == "5 s left, about 60 s needed; pass --seconds 0 for no limit"
    assert results.rows[2]["text"] == "about 8.25 GiB are needed and the card has 8.00"


def test_a_call_gets_its_cap_above_what_is_held_and_its_peaks_are_less_that(monkeypatch):
    """No card is here. A stand-in has 16 GiB, of which 5 are allocated and 6 reserved at most."""
    shares, returned = [], {"max_memory_allocated": 5 * GIB, "max_memory_reserved": 6 * GIB}
    for name in ("synchronize", "reset_peak_memory_stats", "current_device", "empty_cache", *returned):
        monkeypatch.setattr(torch.cuda, name, Mock(return_value=returned.get(name)))
    whole = SimpleNamespace(total_memory=16 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: whole)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    card = Card(torch.device("cuda"), quick=True)

    usage = measured(card, lambda: len(shares), held=1.0, cap=7.0)
    assert (usage.result, usage.allocated, usage.reserved) == (1, 4.0, 5.0) and shares == [0.5, 1.0]
    with pytest.raises(torch.OutOfMemoryError):
        measured(card, Mock(side_effect=torch.OutOfMemoryError), cap=0.5)
    assert shares[2:] == [0.5 / 16, 1.0]
    assert card.gib == 16 and Card(card.device, quick=True, cap_gb=8).gib == 8


def test_a_rehearsal_runs_whatever_a_card_would_need_and_ends_with_its_time():
    Results(CPU, seconds=5.0).need(seconds=60.0, gib=100.0)
    with pytest.raises(Skip, match="0 s left"):
        Results(CPU, seconds=-1.0).need()


H100_ROWS = [  # what every bar is judged by, each just good enough
    {"draw_ms": 0.2},
    {"draw_ms": 0.3},
    {"milliseconds_and_gib": {"ours": (12.0, 1.0), MATMULS: (10.0, 1.0), "Liger": (12.0, 2.0)}},
    {"milliseconds_and_gib": {"ours": (11.0, 1.0), MATMULS: (10.0, 1.0), "CCE exact": (15.0, 1.0)}},
    {
        "head_dim": 64,
        "milliseconds": {"ours": (1.0, 2.0), "SDPA flash": (0.9, 1.0), "torch varlen": (0.6, 0.9)},
    },
    {"head_dim": 128, "milliseconds": {"ours": (1.0, 2.0), "SDPA flash": (0.6, 0.9)}},
    {"head_dim": 256, "milliseconds": {"ours": (9.0, 9.0), "SDPA flash": (0.1, 0.1)}},
    {"head_dim": 256, "milliseconds": {"ours": (1.0, 2.0), FLEX: (0.5, 2.5)}},
    {"mfu": 0.1, "model": "Qwen/Qwen2.5-1.5B-Instruct"},
    {"mfu": 0.4, "model": "Qwen/Qwen2.5-1.5B-Instruct"},
    {"mfu": 0.3, "model": "google/gemma-3-1b-it"},
    {"busy": 0.9},
    {"lengths": USUAL, "way": GRAPH, "seconds_per_decode_step": 0.0025, "floor_seconds": 0.00076},
    {"lengths": USUAL, "way": EAGER, "seconds_per_decode_step": 0.0010, "floor_seconds": 0.00076},
    {"lengths": EVEN, "way": GRAPH, "seconds_per_decode_step": 0.002},
    {"lengths": UNEVEN, "way": GRAPH, "seconds_per_decode_step": 0.0032},
    {"ratio": 6.0, "peer": "generate"},
    {"ratio": 4.0, "peer": "generate_batch"},
    {"ratio": 1.0},  # of graphs beside eager steps
]


def judged(rows, monkeypatch, card=CPU, name="NVIDIA H100 80GB HBM3"):
    """Return by bar whether it was reached; None if it was not measured."""
    monkeypatch.setattr(Card, "name", name)
    results = Results(card)
    results.rows = [dict(row) for row in rows]
    report(results, card, SECTIONS)
    assert {row["status"] for row in results.rows[len(rows) :]} <= {FIGURE, NOT_RUN}
    return {row["name"]: row.get("reached") for row in results.rows[len(rows) :]}


def test_on_an_h100_every_bar_is_reached_at_its_bound_and_missed_behind_it(monkeypatch):
    assert judged(H100_ROWS, monkeypatch) == dict.fromkeys([bar.name for bar in BARS], True)
    worse = {"draw_ms": 0.31, "mfu": 0.0, "busy": 0.89, "ratio": 3.9, "floor_seconds": 0.00074}
    slower = [{key: worse.get(key, value) for key, value in row.items()} for row in H100_ROWS]
    for row in slower:
        if "seconds_per_decode_step" in row and row["lengths"] != EVEN:
            row["seconds_per_decode_step"] *= 1.03
        for times in (row.get("milliseconds"), row.get("milliseconds_and_gib")):
            if times:
                times["ours"] = tuple(1.03 * value for value in times["ours"])
    found = judged(slower, monkeypatch)
    assert found == dict.fromkeys([bar.name for bar in BARS], False)


def test_bars_of_an_h100_need_what_they_are_judged_by_and_that_card(monkeypatch):
    assert set(judged([{"name": "row kernel"}], monkeypatch).values()) == {None}
    assert judged(H100_ROWS, monkeypatch, name="NVIDIA GeForce RTX 3060") == {}
    other_code = Card(torch.device("cpu"), quick=True, arch="sm89")
    assert judged(H100_ROWS, monkeypatch, card=other_code) == {}


@pytest.mark.gpu
@pytest.mark.parametrize("section", SECTIONS)
def test_the_checks_pass_on_this_card(section, tmp_path):
    leaves_out = section in ("tiles", "flex")  # with --quick
    found = main(Config(only=section, quick=not leaves_out, seconds=0.0, out=str(tmp_path)))
    assert found.count(PASS) + found.count(FIGURE) > 0
    assert not [(row["name"], row["text"]) for row in found.rows if row["status"] == FAIL]


def test_quick_is_ninety_seconds():
    assert QUICK == {"seconds": 90.0}
