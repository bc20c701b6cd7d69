"""Estimates: the formulas against sums made token by token, what is counted once, and what a card's size changes."""

import json
from dataclasses import replace

import pytest

from kit.memory.seconds import BANDWIDTH, FLOPS, Sizes
from kit.memory.simulate import Plan
from kit.models.loading import load_config
from kit.train.savings import Savings
from kit.valley.estimate import (
    Assumed,
    CellPlan,
    Evaluation,
    choose_settings,
    describe,
    plan_cells,
    plan_memory,
    sampling_seconds,
    settings_of,
    with_settings,
    write_plan,
)
from kit.valley.study import FIXED_BATCH, TABLE, Cell, Study

GEMMA, QWEN = "google/gemma-3-1b-it", "Qwen/Qwen2.5-0.5B-Instruct"
PAPERS = Evaluation.of("math500,aime24,amc23", num_questions=0, num_samples=0, num_slots=16)
ASSUMED = Assumed(trace_tokens=4_096, response_tokens=3_000)
SECONDS = {"step": 10.0, "recompute": 3.0, "offload_optimizer": 5.0}


def planned(rank=0, seconds=SECONDS, **savings):
    return Plan(GEMMA, 16_384, rank, Savings(**savings), 2**30, "the loss", {}, 0, dict(seconds))


def cell_plan(cell, memory=None, max_steps=0):
    return CellPlan(cell, memory or planned(), "", load_config(cell.model), PAPERS, ASSUMED, max_steps)


def test_the_papers_evaluation_is_its_questions_times_its_samples():
    assert PAPERS.num_samples == 500 * 4 + 30 * 8 + 40 * 8
    few = Evaluation.of("math500=math500.jsonl, aime24", num_questions=100, num_samples=2, num_slots=4)
    assert few == Evaluation(100 * 2 + 30 * 2, 4)


@pytest.mark.parametrize("model", [GEMMA, QWEN])
@pytest.mark.parametrize("tokens", [100, 3_000])
def test_sampling_moves_the_weights_and_every_rows_cache_as_far_as_the_longest_response(model, tokens):
    config, evaluation = load_config(model), Evaluation(num_samples=30, num_slots=3)
    sizes = Sizes.of(config)
    windows = [*sizes.windows, *[tokens] * (sizes.L - len(sizes.windows))]
    places = sum(min(tokens, window) for window in windows)
    bytes_moved = 10 * tokens * (2 * (sizes.linears + sizes.V * sizes.H) + 3 * 2 * 2 * sizes.kv * places)
    assert sampling_seconds(config, evaluation, tokens) == pytest.approx(bytes_moved / BANDWIDTH)


def test_sampling_with_many_slots_is_bound_by_flops_and_nf4_moves_more_than_bf16():
    config = load_config(QWEN)
    sizes = Sizes.of(config)
    many = sampling_seconds(config, Evaluation(10_000, 10_000), 8)
    assert many == pytest.approx(10_000 * 8 * 2 * (sizes.linears + sizes.V * sizes.H) / FLOPS)
    few = Evaluation(4, 4)
    assert sampling_seconds(config, few, 100, quantised=True) > sampling_seconds(config, few, 100)


def test_training_is_rows_times_seconds_and_what_is_of_a_step_is_counted_once_a_step():
    found = cell_plan(Cell(GEMMA, "full", 8_000, 0, epochs=4, batch_traces=8))
    assert found.num_rows == 4 * 8_000 / 4  # four traces of 4,096 tokens per row
    assert found.num_steps == 4_000
    assert found.training_hours == pytest.approx((8_000 * 13.0 + 4_000 * 5.0) / 3_600)
    for row in TABLE:
        cell = Cell(GEMMA, "full", row.traces, 0, row.epochs, row.batch_traces)
        assert int(cell_plan(cell).num_steps) == row.steps
    small = cell_plan(Cell(GEMMA, "full", 500, 0, epochs=4, batch_traces=1))
    assert small.num_steps == small.num_rows == 500  # a row holds four traces, more than a step asks for
    single = cell_plan(
        Cell(GEMMA, "full", 8_000, 0, epochs=4, batch_traces=1), planned(update_in_backward=True)
    )
    assert single.num_steps == single.num_rows == 8_000
    stopped = cell_plan(Cell(GEMMA, "full", 8_000, 0, epochs=4, batch_traces=8), max_steps=1_000)
    assert (stopped.num_steps, stopped.num_rows) == (1_000, 2_000)


def test_disk_is_weights_and_samples_and_adapters_are_small():
    full, adapters = (
        cell_plan(Cell(GEMMA, "full", 500, 0, 4, 1)),
        cell_plan(Cell(GEMMA, "qlora", 500, 0, 4, 1), planned(rank=16)),
    )
    assert full.trained == pytest.approx(1.0e9, rel=0.01)  # Gemma-3-1B has 1.00 billion parameters
    assert adapters.trained == pytest.approx(13.0e6, rel=0.05)
    samples = 2 * PAPERS.num_samples * 3_000 * 5
    assert full.disk_kept == 2 * full.trained + samples
    assert full.disk_while_training == pytest.approx(2 * full.trained * (2 + 2 + 8 / 256))


def test_the_sum_counts_a_baseline_once_a_model_and_seed_and_says_what_is_assumed(tmp_path):
    cells = Study(((GEMMA, ("full", "qlora")),), (8_000, 16_000), seeds=2).cells()
    memory = {(GEMMA, "full"): planned(), (GEMMA, "qlora"): "gpu_gb is 1 but it needs 9 GiB"}
    plans = plan_cells(cells, memory, evaluation=PAPERS, assumed=ASSUMED)
    text = describe(plans, num_cards=2)
    assert "gemma-3-1b-it-full-8000 x 2 seeds" in text and "4 of 8 cells can be planned; 2 baselines" in text
    assert "gemma-3-1b-it-qlora-8000 x 2 seeds" in text and text.count("no plan: see above") == 2
    hours = sum(p.training_hours + p.sampling_hours for p in plans if p.memory) + 2 * plans[0].baseline_hours
    assert f"{hours:,.1f} h on one card, {hours / 2:,.1f} h on 2" in text
    for said in ("Estimates, not timings", "40 TFLOP/s", "4,096 tokens", "3,000 tokens", "launches left out"):
        assert said in text
    write_plan(tmp_path / "plan.json", plans)
    rows = json.loads((tmp_path / "plan.json").read_text())
    assert [row["why_not"] for row in rows] == ["", "", memory[GEMMA, "qlora"], memory[GEMMA, "qlora"]] * 2
    assert rows[0]["training_hours"] == plans[0].training_hours and rows[0]["memory"]["simulated"] is True
    assert describe([replace(plans[2])]).endswith("no cell can be planned")


def test_each_model_and_method_is_simulated_once_and_one_that_cannot_be_planned_says_so(
    monkeypatch, tmp_path
):
    cells, told = Study((("tiny", ("full",)), ("no/such-model", ("full",))), (8, 16), seeds=2).cells(), []
    found = plan_memory(cells, row_tokens=64, gpu_gb=0, qlora_rank=16, report=told.append)
    assert list(found) == [("tiny", "full"), ("no/such-model", "full")]
    assert "tiny, full: " in told[0] and "(simulated); fits 6 GB" in told[0]
    assert (
        told[1].startswith("  such-model, full: NO: model is no/such-model and no config") and len(told) == 2
    )
    assert settings_of(found["no/such-model", "full"], 1.0) == ({}, found["no/such-model", "full"])
    assert settings_of(found["tiny", "full"], 1.0)[0]["recompute"] is True

    cells = [cell for cell in cells if cell.model == "tiny"]
    chosen = choose_settings(cells, tmp_path, max_grad_norm=1.0, row_tokens=64, gpu_gb=6.0, qlora_rank=16)
    assert chosen["tiny", "full"][0]["optimizer"] == "adamw8bit"
    monkeypatch.setattr("kit.valley.estimate.plan_memory", None)  # a resumed sweep has it on disk
    assert (
        choose_settings(cells, tmp_path, max_grad_norm=1.0, row_tokens=64, gpu_gb=6.0, qlora_rank=16)
        == chosen
    )
    assert choose_settings(
        cells, tmp_path / "none", max_grad_norm=1.0, row_tokens=64, gpu_gb=0.0, qlora_rank=16
    ) == {("tiny", "full"): ({}, "")}


def test_one_row_a_step_is_what_the_cell_says_and_leaves_no_control_arm():
    cells = Study(
        ((GEMMA, ("full",)), (QWEN, ("full",))), (8_000, 16_000), arms=("long", FIXED_BATCH), batch_traces=8
    ).cells()
    chosen = {
        (GEMMA, "full"): settings_of(planned(update_in_backward=True, optimizer="adamw8bit"), 1.0),
        (QWEN, "full"): ({}, ""),
    }
    found, told = with_settings(cells, chosen)
    assert [(cell.batch_traces, cell.arm) for cell in found if cell.model == GEMMA] == [
        (1, "long"),
        (1, "long"),
    ]
    assert [cell for cell in found if cell.model == QWEN] == [cell for cell in cells if cell.model == QWEN]
    assert any(cell.arm == FIXED_BATCH for cell in found)
    assert told == [
        "one row of packed traces per step at every size, to fit the card, for gemma-3-1b-it, full"
    ]
    assert with_settings(found[2:], {(QWEN, "full"): ({}, "")})[1] == []
