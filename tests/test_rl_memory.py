import json
from dataclasses import replace

import pytest
from test_memory import SMALL

from kit import ledger
from kit.machine import GIB
from kit.memory import plan
from kit.rl_memory import CACHE, REFERENCE, SAMPLER, plan_rl
from kit.rl_settings import Settings
from kit.savings import Savings

SETTINGS = Settings(max_new_tokens=100, row_tokens=512, num_slots=16, minibatch_prompts=4, group_size=4)
LEAN = Savings(optimizer="adamw8bit")


@pytest.fixture
def small_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL}))
    return str(tmp_path)


def test_the_plan_holds_both_phases_and_a_card_needs_the_larger(small_model):
    found = plan_rl(small_model, settings=SETTINGS, savings=LEAN, prompt_tokens=50)
    weights = found.update.owners[ledger.WEIGHTS]
    for phase in (found.sampling, found.update):
        assert phase.owners[ledger.WEIGHTS] == weights
        assert phase.owners[REFERENCE] == pytest.approx(weights, rel=0.001)  # the rotary frequencies are not copied
        assert phase.owners[ledger.OPTIMIZER] == pytest.approx(weights / 2 * (2 + 8 / 256), rel=0.01)
        assert sum(phase.owners.values()) == phase.peak
    # 4 layers, keys and values, 2 heads of 64 numbers of 2 bytes; 16 rows of 150 positions
    assert found.sampling.owners[CACHE] == 4 * 2 * 2 * 64 * 2 * 16 * 150
    assert found.sampling.owners[SAMPLER] >= 16 * 4_000 * 8  # the noise of a draw, in float64
    assert CACHE not in found.update.owners  # freed before the update
    assert found.larger.peak == max(found.sampling.peak, found.update.peak)
    text = str(found)
    assert "sampling, 16 answers of up to 100 tokens at once" in text and "(simulated)" in text and "8 GB: yes" in text
    assert found.as_json()["fits_gb"] == [6, 8, 12, 16, 24]


def test_without_a_kl_no_reference_is_held_and_the_update_costs_a_training_step_and_the_gradients_that_wait(small_model):
    without = plan_rl(small_model, settings=replace(SETTINGS, kl="none"), savings=LEAN)
    with_reference = plan_rl(small_model, settings=SETTINGS, savings=LEAN)
    assert REFERENCE not in without.update.owners
    assert with_reference.update.peak - without.update.peak == pytest.approx(with_reference.update.owners[REFERENCE], rel=0.01)
    one_row = plan(small_model, row_tokens=512, savings=LEAN).peak
    gradients = without.update.owners[ledger.WEIGHTS]
    assert one_row <= without.update.peak <= one_row + gradients


def test_adapters_need_no_reference(small_model):
    found = plan_rl(small_model, settings=SETTINGS, savings=LEAN, qlora_rank=4)
    assert REFERENCE not in found.update.owners and REFERENCE not in found.sampling.owners


def test_more_answers_at_once_need_more_and_the_table_says_how_many_fit(small_model):
    few, many = (plan_rl(small_model, settings=replace(SETTINGS, num_slots=n), savings=LEAN) for n in (1, 64))
    assert few.sampling.peak < many.sampling.peak and few.update.peak == many.update.peak
    assert few.slots == many.slots and list(few.slots) == [8, 12, 16, 24]
    assert list(few.slots.values()) == sorted(few.slots.values())
    long = plan_rl(small_model, settings=replace(SETTINGS, max_new_tokens=10**9), savings=LEAN)
    assert set(long.slots.values()) == {0} and "not even one answer at once" in str(long)


def test_completions_of_8k_tokens_never_hold_a_row_of_logits_a_token(tmp_path):
    """8,192 tokens of a vocabulary of 100,000 are 1.5 GiB in bf16: the whole update stays below."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL, "vocab_size": 100_000}))
    settings = replace(SETTINGS, max_new_tokens=8_192, row_tokens=8_704, kl="none")
    found = plan_rl(str(tmp_path), settings=settings, savings=LEAN)
    assert found.update.peak < 8_704 * 100_000 * 2
    assert found.update.owners.get(ledger.LOGITS, 0) <= 0.51 * GIB
