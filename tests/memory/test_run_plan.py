"""The plan of a run: the cache beside training, a desktop's share, what needs less, hours and disk."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from test_choose import choose_for, fine_tuning, make_model, small_model  # noqa: F401  a fixture
from test_simulate import SMALL
from transformers import AutoModelForCausalLM

from kit.evaluate.settings import ModelSettings
from kit.generate.kv_cache import SlotCache
from kit.generate.sampling import SamplingParams
from kit.generate.slots import USUAL_SLOTS
from kit.machine import GIB
from kit.memory import live_bytes
from kit.memory.hours import SAMPLES, TOKENS, Work, estimate_run
from kit.memory.phases import CACHE, SAMPLER, MeasuredRun, RunPlan, most_slots
from kit.memory.run_plan import for_less, plan_run
from kit.memory.settings import PlanSettings, TrainingPlanSettings
from kit.memory.simulate import Plan, plan
from kit.models.loading import load_config
from kit.train.savings import Savings

PARAMS = SamplingParams(max_new_tokens=300)
LEAN = Savings(optimizer="adamw8bit")
ALONE = PlanSettings(desktop_gb=0.0)


@dataclass(frozen=True)
class WithSlots(PlanSettings):
    num_slots: int = 0


def measured(model, num_slots=1, params=PARAMS, **others) -> MeasuredRun:
    return MeasuredRun(model=model, params=params, num_slots=num_slots, **others)


def of_size(gib: float) -> Plan:
    return Plan("any", 64, 0, LEAN, round(gib * GIB), "then", {"all": round(gib * GIB)}, 0)


def with_slots(slots: int) -> Plan:
    """Pretend that an answer holds a GiB."""
    return of_size(slots)


@pytest.mark.parametrize("qlora_rank", [0, 4])
def test_the_plan_of_sampling_holds_the_cache_that_the_sampler_allocates(tmp_path, qlora_rank):
    gemma = {"head_dim": 64, "sliding_window": 100, "pad_token_id": 0, "num_key_value_heads": 1}
    folder = make_model(tmp_path, model_type="gemma3_text", **gemma)
    found = measured(folder, qlora_rank=qlora_rank, prompt_tokens=50).at(3)
    real = SlotCache(AutoModelForCausalLM.from_config(load_config(folder), dtype=torch.bfloat16), 3, 350)
    assert any(keys.shape[2] == 100 for keys in real.keys)  # a sliding layer keeps its window alone
    held = sum(x.untyped_storage().nbytes() for x in (*real.keys, *real.values))
    assert found.owners[CACHE] == held
    assert found.peak == sum(found.owners.values()) and live_bytes.WEIGHTS in found.owners
    assert live_bytes.OPTIMIZER not in found.owners  # nothing is trained meanwhile


def test_no_row_of_the_cache_is_longer_than_the_models_context(small_model):  # noqa: F811
    bytes_of = [
        measured(small_model, params=SamplingParams(max_new_tokens=n)).at(2).owners[CACHE]
        for n in (10**6, 10**7)
    ]
    assert bytes_of == [2 * 2 * 2 * 2 * 64 * 2 * SMALL["max_position_embeddings"]] * 2


def test_a_nucleus_is_counted_as_if_it_held_the_whole_vocabulary(small_model):  # noqa: F811
    drawn = measured(small_model, prompt_tokens=1).at(64).owners[SAMPLER]
    assert drawn >= 64 * SMALL["vocab_size"] * (4 + 8)  # sorted logits in fp32 and their ids


def test_a_card_needs_the_larger_of_training_and_sampling_and_the_plan_says_which(small_model):  # noqa: F811
    few, many = (plan_run(measured(small_model, n, row_tokens=256), ALONE, LEAN) for n in (1, 512))
    assert few.larger is few.update and "for training" in few.describe(0.0)
    assert many.larger is many.sampling and "for sampling" in many.describe(0.0)
    assert few.update == many.update == plan(small_model, row_tokens=256, savings=LEAN)
    found = many.as_json(0.0)
    assert found["total"] == many.sampling.total == found["sampling"]["total"] > found["update"]["total"]
    assert plan_run(measured(small_model), ALONE).update is None


def test_a_plan_that_sampling_keeps_from_fitting_names_the_slots_that_do_fit():
    told = RunPlan(of_size(6.0), with_slots, 16).describe(0.0)
    for gb in (8, 12, 16):
        slots = most_slots(with_slots, gb)
        assert f"with --num_slots {slots} sampling fits {gb} GB, too" in told
        assert with_slots(slots).fits(gb) and not with_slots(slots + 1).fits(gb)
    assert "fits 6 GB, too" not in told and "fits 24 GB, too" not in told  # training does not; all does


def test_for_a_card_as_many_slots_are_chosen_as_fit_and_no_more_than_there_are_samples(small_model):  # noqa: F811
    sampling = measured(small_model).at
    card = PlanSettings(gpu_gb=f"{sampling(40).total / GIB + 0.1 + 1e-6:.9f}", desktop_gb=0.1)
    found = plan_run(measured(small_model, row_tokens=256), card)
    assert found.num_slots == 40 and found.fits(card.room) and not sampling(41).fits(card.room)
    assert found.switches()["num_slots"] == 40
    assert plan_run(measured(small_model, num_samples=7), card).num_slots == 7
    with pytest.raises(ValueError, match=r"gpu_gb is 0\.5 .* 1 answer .* needs 0\..* pass a smaller --model"):
        plan_run(measured(small_model), replace(ALONE, gpu_gb="0.5"))


def test_as_many_answers_at_once_as_were_typed_are_planned_or_refused_with_how_many_fit(small_model):  # noqa: F811
    room = measured(small_model).at(40).total / GIB + 1e-6
    for num_slots, row_tokens in ((7, 0), (7, 256), (0, 256)):
        card = WithSlots(gpu_gb=f"{room:.9f}", desktop_gb=0.0, num_slots=num_slots, typed=("num_slots",))
        found = plan_run(measured(small_model, num_slots, row_tokens=row_tokens), card)
        assert found.num_slots == (num_slots or 40) and not found.is_flexible
    with pytest.raises(
        ValueError, match=r"41 answers of .* needs 0\..* pass --num_slots 40, or a larger card"
    ):
        plan_run(measured(small_model, 41), replace(card, num_slots=41))


@pytest.mark.slow
def test_what_a_desktop_uses_is_taken_from_the_card_and_said(small_model, capsys):  # noqa: F811
    found = RunPlan(None, lambda slots: of_size(6.9), 1)
    alone, shared = (PlanSettings(gpu_gb="8", desktop_gb=desktop_gb) for desktop_gb in (0.0, 0.7))
    assert found.fits(alone.room) and not found.fits(shared.room)
    assert "8 GB: no" in found.fits_text(0.7)
    assert found.fits_text(0.7).endswith("0.7 GB of each is left to a desktop")
    assert "8 GB: yes" in found.fits_text(0.0) and "desktop" not in found.fits_text(0.0)
    assert found.as_json(0.7)["fits_gb"] == found.as_json(0.7)["sampling"]["fits_gb"] == [12, 16, 24]
    assert found.as_json(0.0)["fits_gb"] == [8, 12, 16, 24]

    step = fine_tuning(small_model)
    needed = plan(small_model, row_tokens=1024, savings=LEAN).total / GIB + 1e-6
    assert choose_for(needed, step).update.savings == LEAN
    assert choose_for(needed + 0.2, step, desktop_gb=0.2).update.savings == LEAN
    assert " GiB with --optimizer adamw8bit\n" in capsys.readouterr().out  # a line per setting tried
    with pytest.raises(ValueError, match=r"gpu_gb is .* and desktop_gb 0\.2 but "):
        choose_for(needed, step, desktop_gb=0.2)


@pytest.mark.slow
def test_what_is_listed_for_less_needs_less_than_the_plan_and_than_the_line_above(small_model):  # noqa: F811
    found = plan_run(measured(small_model, row_tokens=1024, rows=2), ALONE, Savings(recompute=False))
    lines = list(for_less(found))
    needs = [float(line.split(" GiB")[0].split()[-1]) for line in lines]
    assert needs == sorted(needs, reverse=True) and needs[0] <= found.larger.total / GIB
    assert lines[0].startswith("    --recompute") and len(lines) > 3
    between = replace(found.sampling, peak=found.update.peak - 1)  # sampling is the larger after one saving
    assert list(for_less(replace(found, at=lambda slots: between))) == lines[:1]
    many = replace(found, num_slots=64, at=lambda slots: replace(between, peak=slots * between.peak))
    assert list(for_less(replace(many, is_flexible=True))) == lines[:1]  # it may sample one answer at a time
    assert list(for_less(replace(many, is_flexible=False))) == []


def test_auto_reads_the_card_and_what_is_not_a_size_is_refused(monkeypatch):
    assert (PlanSettings().gpu_gib, PlanSettings(gpu_gb="12").gpu_gib) == (0.0, 12.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2 * GIB, 11 * GIB))
    assert PlanSettings(gpu_gb="auto").gpu_gib == 11.0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="gpu_gb is auto but no NVIDIA GPU is here; pass a card's size"):
        PlanSettings(gpu_gb="auto").gpu_gib  # noqa: B018
    with pytest.raises(ValueError, match="gpu_gb is '12GB' but must be auto or a number in "):
        PlanSettings(gpu_gb="12GB").gpu_gib  # noqa: B018


def test_an_unknown_card_is_refused_before_anything_is_simulated(monkeypatch):
    monkeypatch.setattr(MeasuredRun, "simulate", None)
    with pytest.raises(ValueError, match=r"card is 'Voodoo' but the table of rates has 3060, .*4090.*; pass"):
        plan_run(measured("tiny"), PlanSettings(card="Voodoo"))


def test_the_settings_of_the_plan_itself_are_not_those_that_start_the_run():
    given = TrainingPlanSettings(
        plan=True, gpu_gb="auto", desktop_gb=0.0, card="3060", trace_tokens=1, json="x"
    )
    assert given.to_start() == TrainingPlanSettings()


def test_the_estimate_counts_both_evaluations_tokens_on_disk_and_what_offloading_pins():
    update, sampling = (replace(of_size(gib), model="tiny") for gib in (2.0, 1.0))
    found = RunPlan(update, lambda slots: sampling, 4)
    work = Work(10, 100, num_traces=50, epochs=2, batch_traces=5, trace_tokens=32)
    estimate = estimate_run(found, work, card="3060")
    assert estimate.num_steps == 20 and estimate.disk[TOKENS] == 4 * 50 * 32
    longer = estimate_run(found, replace(work, trace_tokens=10_000), card="3060")
    assert longer.disk[TOKENS] == 4 * 50 * 64  # rows have 64 tokens, and longer traces are dropped
    assert (
        estimate.disk[SAMPLES]
        == 2 * estimate_run(found, replace(work, evaluations=1), card="3060").disk[SAMPLES]
    )
    told = estimate.describe(3 * GIB)
    for said in (
        "20 optimizer steps: 2 x 50 traces",
        ", 2 x ",
        "10 answers of 100 tokens (assumed)",
        "3.00 GiB, pinned",
    ):
        assert said in told
    assert told.count("estimate: 40% of the datasheet's rates of an NVIDIA GeForce RTX 3060") == 1
    assert json.dumps(found.as_json(0.0))


def test_shorter_answers_are_no_way_out_for_a_card_that_the_weights_alone_fill():
    for gpu_gb, way_out in (("0.6", "a smaller --model"), ("0.616", "a smaller --max_new_tokens")):
        card = PlanSettings(gpu_gb=gpu_gb, desktop_gb=0.0)
        with pytest.raises(ValueError, match=f"pass {way_out}, or a larger card"):
            plan_run(measured("tiny", params=SamplingParams(max_new_tokens=100_000)), card)


def test_slots_that_a_run_will_choose_are_planned_as_the_usual_number(small_model):  # noqa: F811
    assert plan_run(measured(small_model, num_slots=0), ALONE).num_slots == USUAL_SLOTS
    assert plan_run(measured(small_model, num_slots=0, num_samples=7), ALONE).num_slots == 7


def test_a_run_that_chooses_its_slots_fits_where_one_answer_fits():
    update = of_size(6.0)
    asked, flexible = (RunPlan(update, with_slots, 16, is_flexible=on) for on in (False, True))
    assert not asked.fits(7.0) and flexible.fits(7.0) and flexible.larger is update
    assert "8 GB: 7 answers at once" in flexible.describe(0.0) and "--num_slots" not in flexible.describe(0.0)


def test_graphs_keep_a_steps_memory_beside_that_of_reading_prompts(small_model):  # noqa: F811
    wide, long = {"prompt_tokens": 1}, {"prompt_tokens": 256}
    with_graphs, eager = (
        [measured(small_model, cuda_graphs=on, **size).at(64).owners[SAMPLER] for size in (wide, long)]
        for on in (True, False)
    )
    drawing = eager[0]  # the larger part if prompts are short
    assert drawing < with_graphs[0] < 1.1 * drawing  # reading 64 tokens is little
    assert eager[1] < with_graphs[1] <= drawing + eager[1]


def test_a_plan_counts_graphs_for_a_card_that_may_replay_its_steps():
    settings = {"device": "cuda"}, {"device": "cuda", "cuda_graphs": False}, {"device": "cpu"}
    assert [ModelSettings(**how).plans_graphs for how in settings] == [True, False, False]
