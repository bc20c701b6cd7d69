"""Estimates of a sweep: what is counted, what is counted once, and what a card's size changes."""

import json
import re
from dataclasses import replace

import pytest

from kit.generate.sampling import SamplingParams
from kit.memory.flops import Sizes
from kit.memory.hours import CHECKPOINTS, EFFICIENCY, REFERENCE, Estimate, Work
from kit.memory.phases import RunPlan
from kit.memory.settings import PlanSettings
from kit.memory.simulate import Plan
from kit.models.loading import load_config
from kit.train.savings import Savings
from kit.valley.estimate import (
    as_json,
    choose_settings,
    describe,
    estimate_cells,
    hours_on,
    plan_memory,
    settings_of,
    with_settings,
)
from kit.valley.study import FIXED_BATCH, TABLE, Cell, Study

GEMMA, QWEN = "google/gemma-3-1b-it", "Qwen/Qwen2.5-0.5B-Instruct"
WORK = Work(num_samples=500 * 4 + 30 * 8 + 40 * 8, response_tokens=3_000, trace_tokens=4_096)
LEAN = Savings(optimizer="adamw8bit")


def planned(rank=0, savings=LEAN):
    update = Plan(GEMMA, 16_384, rank, savings, 2**30, "the loss", {}, 0)
    return RunPlan(update, lambda slots: update, 16)


def cell_plan(cell, memory=None, max_steps=0):
    memory = {(cell.model, cell.method): memory or planned()}
    return estimate_cells([cell], memory, replace(WORK, max_steps=max_steps))[cell]


@pytest.fixture(autouse=True)
def no_card(monkeypatch, tmp_path):
    """No card is here and none was measured: the reference card's datasheet counts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def test_training_is_rows_times_the_flops_of_a_row():
    found = cell_plan(Cell(GEMMA, "full", 8_000, 0, epochs=4, batch_traces=8))
    rows = 4 * 8_000 / 4  # four traces of 4,096 tokens per row
    flops = rows * Sizes.of(load_config(GEMMA)).row_flops(16_384, LEAN)
    assert found.training_hours == pytest.approx(flops / (REFERENCE.teraflops * 1e12 * EFFICIENCY) / 3_600)
    adapters = cell_plan(Cell(GEMMA, "qlora", 8_000, 0, epochs=4, batch_traces=8), planned(rank=16))
    assert adapters.training_hours < found.training_hours
    assert adapters.sampling_hours > adapters.baseline_hours == found.baseline_hours == found.sampling_hours


def test_a_step_takes_the_batch_of_table_2_but_never_more_than_there_are_rows():
    assert cell_plan(Cell(GEMMA, "full", 8_000, 0, epochs=4, batch_traces=8)).num_steps == 4_000
    for row in TABLE:
        cell = Cell(GEMMA, "full", row.traces, 0, row.epochs, row.batch_traces)
        assert int(cell_plan(cell).num_steps) == row.steps
    small = cell_plan(Cell(GEMMA, "full", 500, 0, epochs=4, batch_traces=1))
    assert small.num_steps == 500  # a row holds four traces, more than a step asks for
    in_backward = planned(savings=replace(LEAN, update_in_backward=True))
    single = cell_plan(Cell(GEMMA, "full", 8_000, 0, epochs=4, batch_traces=8), in_backward)
    assert single.num_steps == 8_000


def test_a_schedule_that_is_stopped_trains_on_fewer_rows():
    cell = Cell(GEMMA, "full", 8_000, 0, epochs=4, batch_traces=8)
    whole, stopped, longer = (cell_plan(cell, max_steps=n) for n in (0, 1_000, 5_000))
    assert stopped.num_steps == 1_000
    assert stopped.training_hours == pytest.approx(whole.training_hours / 4)
    assert longer == replace(whole, work=longer.work)


def test_disk_is_weights_and_samples_and_adapters_are_small():
    full, adapters = (
        cell_plan(Cell(GEMMA, "full", 500, 0, 4, 1)),
        cell_plan(Cell(GEMMA, "qlora", 500, 0, 4, 1), planned(rank=16)),
    )
    samples = 2 * WORK.num_samples * 3_000 * 5
    for found, trained in ((full, 1.0e9), (adapters, 13.0e6)):  # Gemma-3-1B has 1.00 billion parameters
        assert found.disk_kept - samples == pytest.approx(2 * trained, rel=0.05)
        assert found.disk[CHECKPOINTS] == pytest.approx(3 * trained * (2 + 4 + 8 / 256), rel=0.05)


def test_the_sum_counts_a_baseline_once_per_model_and_seed_and_says_what_is_assumed(tmp_path):
    cells = Study(((GEMMA, ("full", "qlora")),), (8_000, 16_000), seeds=2).cells()
    memory = {(GEMMA, "full"): planned(), (GEMMA, "qlora"): "gpu_gb is 1 but it needs 9 GiB"}
    estimates = estimate_cells(cells, memory, WORK)
    text = describe(cells, memory, estimates, num_cards=2)
    assert "gemma-3-1b-it-full-8000 x 2 seeds" in text and "4 of 8 cells can be planned; 2 baselines" in text
    assert "gemma-3-1b-it-qlora-8000 x 2 seeds" in text and text.count("no plan: see above") == 2
    found = list(estimates.values())
    hours = sum(p.training_hours + p.sampling_hours for p in found) + 2 * found[0].baseline_hours
    assert f"{hours:,.1f} h on one card" in text
    for said in ("estimate: 40%", "RTX 3090", "4,096 tokens", "3,000 tokens", "Launch overhead"):
        assert said in text
    rows = json.loads(json.dumps(as_json(cells, memory, estimates, 0.0)))
    assert [row["why_not"] for row in rows] == ["", "", memory[GEMMA, "qlora"], memory[GEMMA, "qlora"]] * 2
    assert rows[0]["training_hours"] == found[0].training_hours and rows[0]["memory"]["simulated"] is True
    assert describe(cells[2:3], memory, {}).endswith("no cell can be planned")


def test_several_cards_take_the_longest_runs_first_and_wait_for_the_baseline():
    hours = {("a", 8_000): 2.0, ("a", 16_000): 3.0, ("b", 16_000): 4.0}
    estimates = {
        Cell(model, "full", size, 0): Estimate(WORK, training_hours=each - 0.5, sampling_hours=0.5)
        for (model, size), each in hours.items()
    }
    baselines = {cell.baseline: 1.0 for cell in estimates}
    # two baselines until 1, a's 16,000 until 4, b's until 5, a's 8,000 from 4 on
    assert hours_on(2, baselines, estimates) == 6.0
    assert hours_on(4, baselines, estimates) == 5.0  # no cell starts before its baseline is done
    assert hours_on(1, baselines, estimates) == 11.0


def test_each_model_and_method_is_simulated_once_and_one_that_cannot_be_planned_says_so(
    monkeypatch, tmp_path, capsys
):
    cells = Study((("tiny", ("full",)), ("no/such-model", ("full",))), (8, 16), seeds=2).cells()
    what = {"params": SamplingParams(max_new_tokens=16), "num_slots": 4, "row_tokens": 64, "qlora_rank": 16}
    found = plan_memory(cells, card=PlanSettings(), **what)
    assert list(found) == [("tiny", "full"), ("no/such-model", "full")]
    printed = capsys.readouterr().out.splitlines()
    tiny, unknown = (line for line in printed if line.startswith("  "))
    assert "tiny, full: training 0." in tiny and "(simulated); fits 6 GB" in tiny
    assert unknown.startswith("  such-model, full: NO: model is no/such-model and no config")
    chosen = settings_of(found)
    assert chosen["no/such-model", "full"] == ({}, found["no/such-model", "full"])
    assert chosen["tiny", "full"][0]["recompute"] is True

    cells = [cell for cell in cells if cell.model == "tiny"]
    small = PlanSettings(gpu_gb="6", desktop_gb=0.0)
    chosen = choose_settings(cells, tmp_path, card=small, **what)
    assert chosen["tiny", "full"][0]["optimizer"] == "adamw8bit"
    assert chosen["tiny", "full"][0]["num_slots"] > what["num_slots"]
    monkeypatch.setattr("kit.valley.estimate.plan_memory", None)  # a resumed sweep has it on disk
    assert choose_settings(cells, tmp_path, card=small, **what) == chosen
    assert choose_settings(cells, tmp_path / "none", card=PlanSettings(), **what) == {
        ("tiny", "full"): ({}, "")
    }


def test_cpu_memory_that_runs_at_once_would_not_have_is_refused_before_the_first_of_them(
    monkeypatch, tmp_path
):
    cells = Study(((GEMMA, ("full",)),), (8_000,)).cells()
    plan = planned(savings=replace(LEAN, offload_optimizer=True))
    plan = replace(plan, update=replace(plan.update, host=2 * 2**30))
    monkeypatch.setattr("kit.valley.estimate.plan_memory", lambda cells, card: {(GEMMA, "full"): plan})
    monkeypatch.setattr("kit.memory.measured.free_memory", lambda: 3 * 2**30)
    card = PlanSettings(gpu_gb="6")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    refused = choose_settings(cells, tmp_path / "two", card=card, at_once=2)[GEMMA, "full"][1]
    assert re.search(r"keeps 4\.00 GiB .* for 2 runs at once .* 3\.00 GiB are free.*fewer .* --gpus", refused)
    assert choose_settings(cells, tmp_path / "one", card=card)[GEMMA, "full"][1] == ""


def test_one_row_per_step_is_what_the_cell_says_and_leaves_no_control_arm():
    models = ((GEMMA, ("full",)), (QWEN, ("full",)))
    cells = Study(models, (8_000, 16_000), arms=("long", FIXED_BATCH), batch_traces=8).cells()
    chosen = {
        **settings_of({(GEMMA, "full"): planned(savings=replace(LEAN, update_in_backward=True))}),
        (QWEN, "full"): ({}, ""),
    }
    found, told = with_settings(cells, chosen)
    assert [(cell.num_traces, cell.batch_traces) for cell in found if cell.model == GEMMA] == [
        (8_000, 1),
        (16_000, 1),
    ]
    assert [cell for cell in found if cell.model == QWEN] == [cell for cell in cells if cell.model == QWEN]
    assert any(cell.arm == FIXED_BATCH for cell in found)
    price = "one row per step, and no clipping, as --faster chose"
    assert told == [f"gemma-3-1b-it, full: {price}"]
    assert with_settings(found[2:], {(QWEN, "full"): ({}, "")})[1] == []
    rounded = settings_of({(QWEN, "full"): planned(savings=replace(LEAN, exact_weights=False))})
    same, told = with_settings(found[2:], rounded)  # which changes no batch
    assert same == found[2:] and len(told) == 1 and "rounded stochastically" in told[0]
