"""No card is here: its name is pretended, and check_card's results are written by hand or by a rehearsal."""

import copy
import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.attention.varlen
from test_attention import varlen_attn

from kit import card_checks
from kit.config import parse
from kit.journal import Journal
from kit.models.attention import varlen_extra_bytes
from kit.models.families import head_dim
from kit.models.loading import load_config
from kit.models.pick_attention import pick_attention
from kit.recipes import evaluate, gemma3_1b_8k, valley_sweep
from kit.recipes.card import speed_attention, truth_attention
from kit.recipes.card.results import FAIL, PASS, Card, Results
from kit.recipes.card.timing import Limits
from kit.run import RunFolder

HERE = "this card"
GEMMA, QWEN = "google/gemma-3-1b-it", "Qwen/Qwen2.5-0.5B-Instruct"  # heads 256 wide, some windows; 64, none


@pytest.fixture(autouse=True)
def card(monkeypatch, tmp_path):
    """A card is here, and a folder without results."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(card_checks, "card_name", lambda: HERE)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)


def write(*rows, number="001"):
    for row in rows:
        Journal(Path("runs/check_card", number, "results.jsonl")).append(row)


def truth(head_dim=256, window=None, status=PASS, **changes):
    what = {"section": "truth", "status": status, "attention": "varlen"}
    return what | {"head_dim": head_dim, "window": window, "gpu": HERE, "torch": torch.__version__} | changes


def times(varlen, ours=(1.0, 2.0), head_dim=256, window=None, **changes):
    found = {"ours": ours, "SDPA flash": (0.1, 0.1)} | ({"torch varlen": varlen} if varlen else {})
    row = {"section": "speed", "milliseconds": found, "head_dim": head_dim, "window": window}
    return row | {"gpu": HERE, "torch": torch.__version__} | changes


FASTER, SLOWER = (1.5, 1.4), (0.5, 2.6)  # than ours, forward and backward together
GOOD = [truth(), truth(window=512), times(FASTER), times(FASTER, window=512)]


def without(row, key):
    return {name: value for name, value in row.items() if name != key}


def test_varlen_is_picked_where_it_was_right_and_faster_and_one_line_says_so(capsys):
    assert pick_attention([GEMMA], "cuda") == "auto" and capsys.readouterr().out == ""
    write(*GOOD)
    assert pick_attention([GEMMA], "cuda") == "varlen"
    said = (
        "attention   varlen: right, and faster than kit's with heads 256 wide (measured: runs/check_card/001)"
    )
    assert capsys.readouterr().out.splitlines() == [said]


NOT_ENOUGH = {
    "another card": [row | {"gpu": "another card"} for row in GOOD],
    "another torch": [row | {"torch": "2.12.0"} for row in GOOD],
    "rows of before, without a torch": [without(row, "torch") for row in GOOD],
    "rows of before, without a window": [without(row, "window") for row in GOOD],
    "another head size": [row | {"head_dim": 128} for row in GOOD],
    "wrong": [truth(status=FAIL), *GOOD[1:]],
    "wrong with a window": [*GOOD, truth(window=512, status=FAIL)],
    "slower": [*GOOD[:2], times(SLOWER), GOOD[3]],
    "slower with a window": [*GOOD[:3], times(SLOWER, window=512)],
    "slower for some lengths": [*GOOD, times(SLOWER)],
    "did not run": [*GOOD[:2], times(None), GOOD[3]],
    "no truth with a window": [GOOD[0], *GOOD[2:]],
    "no time with a window": GOOD[:3],
    "no truth": GOOD[2:],
    "no time": GOOD[:2],
}


@pytest.mark.parametrize("rows", NOT_ENOUGH.values(), ids=NOT_ENOUGH)
def test_anything_less_leaves_the_kits_and_nothing_is_said(rows, capsys):
    write(*rows)
    assert pick_attention([GEMMA], "cuda") == "auto" and capsys.readouterr().out == ""


def test_a_model_without_windows_needs_no_measurement_with_one():
    write(truth(64), times(FASTER, head_dim=64))
    assert pick_attention([QWEN], "cuda") == "varlen"


def test_several_models_have_one_attention_which_must_be_better_for_each():
    write(truth(64), times(FASTER, head_dim=64))
    assert pick_attention([QWEN, GEMMA], "cuda") == "auto"
    write(*GOOD)
    assert pick_attention([QWEN, GEMMA], "cuda") == "varlen"


def test_where_varlen_cannot_run_it_is_not_picked(monkeypatch):
    write(*GOOD)
    assert pick_attention([GEMMA], "cpu") == "auto"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert pick_attention([GEMMA], "cuda") == "auto"


@pytest.mark.parametrize(
    "newer",
    [[truth(status=FAIL)], [times(SLOWER)], [times(None, window=512)]],
    ids=["wrong", "slower", "fails"],
)
def test_the_newest_results_that_tell_are_decisive(newer, capsys):
    write(*GOOD, number="999")
    write({"section": "sampler", "gpu": HERE, "tokens_per_second": 1.0}, number="1000")
    assert pick_attention([GEMMA], "cuda") == "varlen" and "runs/check_card/999)" in capsys.readouterr().out
    write(*newer, number="1001")
    assert pick_attention([GEMMA], "cuda") == "auto"
    write(*GOOD, number="1002")
    assert pick_attention([GEMMA], "cuda") == "varlen"


def begin(recipe, *flags):
    """Begin a run and stop at once. Return its attention."""
    config = parse(recipe.Config, flags).with_attention(GEMMA)
    RunFolder.open(config).unlock()
    return config.attention


RECIPES = pytest.mark.parametrize("recipe", [gemma3_1b_8k, evaluate])


@RECIPES
def test_a_run_that_began_with_the_kits_goes_on_with_it_after_a_check(recipe):
    assert begin(recipe, "--out", "run") == "auto"
    write(*GOOD)
    assert begin(recipe, "--out", "run", "--resume") == "auto"
    assert begin(recipe, "--out", "run", "--resume", "--attention", "kit") == "kit"
    assert begin(recipe, "--out", "run", "--resume") == "kit"
    with pytest.raises(ValueError, match=r"attention was 'kit', is 'varlen'; pass the same"):
        begin(recipe, "--out", "run", "--resume", "--attention", "varlen")
    assert begin(recipe, "--out", "another") == "varlen"


@RECIPES
def test_a_run_that_began_with_varlen_goes_on_with_it_whatever_is_measured_later(recipe):
    write(*GOOD)
    assert begin(recipe, "--out", "run") == "varlen"
    write(times(SLOWER), number="002")
    assert begin(recipe, "--out", "run", "--resume") == "varlen"
    assert begin(recipe, "--out", "another") == "auto"
    for other in ("auto", "kit"):  # in a run that has begun, the same
        with pytest.raises(ValueError, match=f"attention was 'varlen', is '{other}'; pass the same"):
            begin(recipe, "--out", "run", "--resume", "--attention", other)


def test_an_attention_that_was_asked_for_is_never_replaced():
    write(*GOOD)
    assert begin(gemma3_1b_8k, "--attention", "kit") == "kit"


def join(*flags):
    """Work on a study as one of several processes. Return the attention of its runs."""
    config = parse(valley_sweep.Config, ["--models", GEMMA, "--out", "study", *flags]).with_attention(GEMMA)
    RunFolder.open(config, join=True).unlock()
    return valley_sweep.recipes_of(config, {}).evaluate["attention"]


def test_whoever_joins_a_study_takes_the_attention_that_it_began_with():
    assert join() == "kit"
    write(*GOOD)
    assert join() == join("--resume") == "kit"
    Path("study").rename("before")
    assert join() == "varlen"
    write(times(SLOWER), number="002")
    assert join() == join("--resume") == "varlen"


def test_a_card_that_cannot_run_the_varlen_of_a_study_is_refused_before_a_run_fails_there(monkeypatch):
    config = valley_sweep.Config(models=f"{QWEN},{GEMMA}", attention="varlen")
    study = valley_sweep.study_of(config)
    valley_sweep.check_attention(config, study)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"attention is varlen but it needs compute capability 8.0"):
        valley_sweep.check_attention(config, study)


@pytest.mark.parametrize("name", ["gemma3_1b_8k", "grpo_qwen2_5_0_5b", "valley_sweep"])
def test_the_plan_counts_what_varlen_holds_and_starts_with_it(name, capsys):
    recipe, tiny = import_module(f"kit.recipes.{name}"), load_config("tiny")
    small = ["--models" if name == "valley_sweep" else "--model", "tiny", "--max_new_tokens", "64"]
    peaks = {}
    for picked in ("auto", "varlen"):
        config = parse(recipe.Config, ["--plan", *small, "--row_tokens", "256", "--json", f"{picked}.json"])
        recipe.main(config)
        printed = capsys.readouterr().out
        assert ("--attention varlen" in printed) == (picked == "varlen")
        plan = json.loads(Path(f"{picked}.json").read_text())
        peaks[picked] = (plan[0]["memory"] if name == "valley_sweep" else plan)["update"]["peak"]
        write(*(row | {"head_dim": head_dim(tiny)} for row in GOOD))
    assert peaks["varlen"] - peaks["auto"] == varlen_extra_bytes(tiny, 256) > 0


def test_varlen_holds_what_its_docstring_says():
    assert varlen_extra_bytes(load_config(GEMMA), 16_384) == (64 + 32 + 32) * 2**20
    own_keys = copy.deepcopy(load_config(GEMMA))
    own_keys.num_key_value_heads = own_keys.num_attention_heads
    assert varlen_extra_bytes(own_keys, 16_384) == 64 * 2**20


def test_what_check_card_writes_is_what_is_read(monkeypatch):
    """A rehearsal in which a function with varlen's documented meaning stands in for it."""
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(Card, "name", HERE)
    for module in (speed_attention, truth_attention):
        monkeypatch.setattr(module, "varlen_obstacle", lambda *where: "")

    def check(number, arch=""):
        rehearsal = Card(torch.device("cpu"), quick=False, arch=arch)
        results = Results(rehearsal, Path("runs/check_card", number, "results.jsonl"))
        for window in (None, 8):
            shape = torch.bfloat16, 256, 4, 1
            truth_attention.check_varlen(results, rehearsal, "truth", shape, [9, 1, 23, 4], window)
            speed_attention.time_case(results, rehearsal, Limits(), (46, 4, 1, 256), 23, window, [])
        assert [row["status"] for row in results.rows] == [PASS, "figure"] * 2

    def set_times(number, ours):
        file = Path("runs/check_card", number, "results.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            if "milliseconds" in row:
                row["milliseconds"] |= {"ours": ours, "torch varlen": FASTER}
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    check("001")
    set_times("001", (1.0, 2.0))
    assert pick_attention([GEMMA], "cuda") == "varlen"
    check("002", arch="sm89")  # the code of another card
    set_times("002", (1.0, 1.0))
    assert pick_attention([GEMMA], "cuda") == "varlen"
    check("003")
    set_times("003", (1.0, 1.0))
    assert pick_attention([GEMMA], "cuda") == "auto"


def test_a_varlen_that_raises_has_failed_its_check(monkeypatch):
    monkeypatch.setattr(truth_attention, "varlen_obstacle", lambda *where: "")
    monkeypatch.setattr(Card, "name", HERE)

    def raises(*arguments, **options):
        raise RuntimeError("no such kernel")

    rehearsal = Card(torch.device("cpu"), quick=True)
    results = Results(rehearsal)
    shape = torch.bfloat16, 256, 4, 1
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.attention.varlen, "varlen_attn", raises)
        truth_attention.check_varlen(results, rehearsal, "truth", shape, [9, 1, 23, 4], None)
    assert results.rows[0]["text"] == "RuntimeError: no such kernel"
    write(*GOOD)
    assert pick_attention([GEMMA], "cuda") == "varlen"
    write(results.rows[0], number="002")
    assert pick_attention([GEMMA], "cuda") == "auto"
