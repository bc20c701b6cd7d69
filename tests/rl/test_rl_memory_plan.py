import json
import re
from dataclasses import replace

import pytest
from test_simulate import SMALL, load_small
from transformers import AutoModelForCausalLM

from kit.generate.kv_cache import cache_bytes
from kit.generate.sampler import PREFILL_TOKENS
from kit.machine import GIB
from kit.memory import live_bytes
from kit.memory.live_bytes import REFERENCE
from kit.memory.phases import CACHE, SAMPLER, RunPlan
from kit.memory.run_plan import as_savings, entries_of, plan_run
from kit.memory.settings import PlanSettings
from kit.memory.simulate import plan
from kit.models.folder import ADAPTER_CONFIG, adapter_ranks
from kit.models.loading import load_config
from kit.rl.memory_plan import SCORING, RLRun, eval_slots
from kit.rl.settings import Settings
from kit.train.savings import Savings

SETTINGS = Settings(max_new_tokens=100, row_tokens=512, num_slots=16, minibatch_prompts=4, group_size=4)
LEAN = Savings(optimizer="adamw8bit")


def simulate(model, *, savings, **sizes) -> RunPlan:
    return RLRun(model=model, **sizes).simulate(savings)


def choose_for(gpu_gb, model, settings, **sizes) -> RunPlan:
    run = RLRun(model=model, settings=settings, **sizes, **PROMPT)
    return plan_run(run, PlanSettings(gpu_gb=str(gpu_gb), desktop_gb=0.0))


def ladder_steps(model, qlora_rank=0) -> list[Savings]:
    entries = entries_of(RLRun(model=model, settings=SETTINGS, qlora_rank=qlora_rank))
    return [as_savings(entries[:count]) for count in range(1, len(entries) + 1)]


@pytest.fixture
def small_model(tmp_path):
    """A folder that holds a config and nothing else."""
    config = {"model_type": "llama", **SMALL, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def test_the_plan_holds_both_phases_and_a_card_needs_the_larger(small_model):
    found = simulate(small_model, settings=SETTINGS, savings=LEAN, prompt_tokens=50)
    weights = found.update.owners[live_bytes.WEIGHTS]
    for phase in (found.sampling, found.update):
        assert phase.owners[live_bytes.WEIGHTS] == weights
        # the rotary frequencies are not copied
        assert phase.owners[REFERENCE] == pytest.approx(weights, rel=0.001)
        assert phase.owners[live_bytes.OPTIMIZER] == pytest.approx(weights / 2 * (4 + 8 / 256), rel=0.01)
        assert sum(phase.owners.values()) == phase.peak
    # 2 layers, keys and values, 2 heads of 64 numbers of 2 bytes; 16 rows of 150 positions
    assert found.sampling.owners[CACHE] == 2 * 2 * 2 * 64 * 2 * 16 * 150
    assert found.sampling.owners[SAMPLER] >= 16 * 4_000 * 8  # the noise of a draw, in float64
    assert CACHE not in found.update.owners  # freed before the update
    assert found.larger.peak == max(found.sampling.peak, found.update.peak)
    for said in (", 16 answers of up to 100 tokens at once: ", "(simulated)", "8 GB: yes"):
        assert said in found.describe(0.0)
    assert found.as_json(0.0)["fits_gb"] == [6, 8, 12, 16, 24]


def test_without_a_kl_there_is_no_reference_and_an_update_is_a_training_step_with_an_earlier_rows_gradients(
    small_model,
):
    without = simulate(small_model, settings=replace(SETTINGS, kl_coef=0.0), savings=LEAN)
    with_reference = simulate(small_model, settings=SETTINGS, savings=LEAN)
    assert REFERENCE not in without.update.owners
    assert with_reference.update.peak - without.update.peak == pytest.approx(
        with_reference.update.owners[REFERENCE], rel=0.01
    )
    two_rows = plan(small_model, row_tokens=512, savings=LEAN, rows=2)
    assert without.update.when == two_rows.when == "loss"
    assert 0 <= without.update.peak - two_rows.peak <= without.update.owners[live_bytes.REST]


@pytest.mark.slow
def test_scoring_for_the_kl_counts_if_it_needs_more_than_the_training_step(small_model):
    """Scoring recomputes nothing and has no tiles: with every saving on, adapters train in less."""
    lean = Savings(optimizer="adamw8bit", tile_tokens=16, logit_rows=8, offload_inputs=True)
    options = {"savings": lean, "qlora_rank": 4, "prompt_tokens": 50}
    without = simulate(small_model, settings=replace(SETTINGS, kl_coef=0.0), **options).update
    found = simulate(small_model, settings=SETTINGS, **options).update
    assert found.when == "scoring" and found.peak == sum(found.owners.values()) > without.peak
    assert found.owners[SCORING] > without.peak - without.owners[live_bytes.WEIGHTS]


def test_an_update_finds_the_gradients_of_an_earlier_row(tmp_path):
    config = {"model_type": "llama", **SMALL, "num_hidden_layers": 2, "vocab_size": 20_000}  # mostly head
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, settings = str(tmp_path), replace(SETTINGS, row_tokens=200, kl_coef=0.0)
    one_row, two_rows = (plan(model, row_tokens=200, savings=LEAN, rows=rows).peak for rows in (1, 2))
    assert simulate(model, settings=settings, savings=LEAN).update.peak >= two_rows > 1.1 * one_row


def test_adapters_need_no_reference(small_model):
    found = simulate(small_model, settings=SETTINGS, savings=LEAN, qlora_rank=4)
    assert REFERENCE not in found.update.owners and REFERENCE not in found.sampling.owners


def test_more_answers_at_once_need_more_when_sampling_and_the_same_when_updating(small_model):
    few, many = (
        simulate(small_model, settings=replace(SETTINGS, num_slots=n), savings=LEAN) for n in (1, 64)
    )
    assert few.sampling.peak < many.sampling.peak and few.update.peak == many.update.peak


def test_the_sampler_needs_what_drawing_or_reading_prompts_takes_whichever_is_more(small_model):
    owned = {}
    for prompt_tokens in (1, 100, 200, 400):
        settings = replace(SETTINGS, num_slots=64)
        found = simulate(small_model, settings=settings, savings=LEAN, prompt_tokens=prompt_tokens)
        owned[prompt_tokens] = found.sampling.owners[SAMPLER]
    assert owned[1] < owned[100] < owned[200] == owned[400]  # prompts are read 8,192 tokens at once, at most
    assert owned[200] >= PREFILL_TOKENS * 2 * SMALL["intermediate_size"] * 2  # gate and up, in bf16


def test_no_row_of_the_cache_is_longer_than_what_a_rollout_takes(small_model):
    found = simulate(small_model, settings=replace(SETTINGS, row_tokens=130), savings=LEAN, prompt_tokens=50)
    assert found.sampling.owners[CACHE] == 2 * 2 * 2 * 64 * 2 * 16 * 130


@pytest.mark.slow
def test_completions_of_8k_tokens_never_need_a_row_of_logits_per_token(tmp_path):
    """8,192 tokens of a vocabulary of 100,000 are 1.5 GiB in bf16: the whole update stays below."""
    config = {"model_type": "llama", **SMALL, "vocab_size": 100_000, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = replace(SETTINGS, max_new_tokens=8_192, row_tokens=8_704, kl_coef=0.0)
    found = simulate(str(tmp_path), settings=settings, savings=LEAN)
    assert found.update.peak < 8_704 * 100_000 * 2
    assert found.update.owners.get(live_bytes.LOGITS, 0) <= 0.51 * GIB


SHORT = replace(SETTINGS, row_tokens=512)
PROMPT = {"prompt_tokens": 50}


def gib(found):
    return found.total / GIB


@pytest.mark.slow
def test_a_large_card_gets_the_fastest_settings_and_exactly_as_many_answers_as_fit(small_model):
    fastest = ladder_steps(small_model)[0]
    many = simulate(small_model, settings=replace(SHORT, num_slots=300), savings=fastest, **PROMPT)
    assert many.sampling.peak > many.update.peak
    for num_slots, card in ((300, gib(many.larger)), (299, gib(many.larger) - 1e-7)):
        found = choose_for(card, small_model, SHORT)
        assert (found.update.savings, found.num_slots) == (fastest, num_slots)
        assert found.fits(card)
        more = replace(SHORT, num_slots=num_slots + 1)
        assert not simulate(small_model, settings=more, savings=fastest, **PROMPT).fits(card)
    assert choose_for(24, small_model, SHORT, num_samples=16).num_slots == 16


@pytest.mark.slow
def test_a_smaller_card_gets_more_savings_and_what_is_chosen_fits_it_when_planned_again(small_model):
    settings = replace(SHORT, max_new_tokens=20, row_tokens=4_096)  # so that the update decides what fits
    ladder = ladder_steps(small_model)
    updates = [simulate(small_model, settings=settings, savings=s, **PROMPT).update for s in ladder]
    card = max(gib(update) for update in updates if update.peak < updates[0].peak) + 1e-7

    found = choose_for(card, small_model, settings)
    first = next(s for s, update in zip(ladder, updates, strict=True) if update.fits(card))
    assert found.update.savings == first != ladder[0]
    settings = replace(settings, num_slots=found.num_slots)
    again = simulate(small_model, settings=settings, savings=found.update.savings, **PROMPT)
    assert again.fits(card) and again.as_json(0.0) == found.as_json(0.0)


def test_savings_that_a_step_of_several_rows_cannot_have_are_not_chosen(small_model):
    for rank in (0, 16):
        ladder = ladder_steps(small_model, rank)
        assert len(set(ladder)) == len(ladder) > 3
        assert not any(s.update_in_backward or s.head_update == "blocked" for s in ladder)
        assert ladder[-1].offload_optimizer == (rank == 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "--row_tokens 150"),
        ({"row_tokens": 150}, "--kl_coef 0.0 --row_tokens 150"),
        ({"row_tokens": 150, "kl_coef": 0.0}, "--qlora_rank 16"),
        (
            {"row_tokens": 1_074, "max_new_tokens": 1_024, "kl_coef": 0.0},
            "--max_new_tokens 512 --row_tokens 562",
        ),
    ],
)
def test_a_card_too_small_is_refused_with_the_largest_owners_and_the_nearest_setting_that_fits(
    changes, expected, small_model
):
    settings = replace(SHORT, **changes)
    leanest = simulate(
        small_model,
        settings=replace(settings, num_slots=1),
        savings=ladder_steps(small_model)[-1],
        **PROMPT,
    ).larger
    card = gib(leanest) - 1e-7
    with pytest.raises(ValueError) as refused:
        choose_for(card, small_model, settings)
    pattern = r"needs ([\d.]+) GiB even with --\S.*; its largest owners are (.*); pass (.*)$"
    needed, owners, ways = re.search(pattern, str(refused.value)).groups()
    flags, *_, larger = ways.split(", or ")
    assert larger == "a card of 6 GB"
    assert needed == f"{gib(leanest):.2f}"
    assert owners == leanest.largest_owners() and owners.count(" GiB") == 3
    assert flags == expected
    flags = dict(zip(*[iter(expected.split())] * 2, strict=True))
    rank = int(flags.pop("--qlora_rank", 0))
    changed = replace(
        settings,
        **{name[2:]: float(value) if name == "--kl_coef" else int(value) for name, value in flags.items()},
    )
    assert choose_for(card, small_model, changed, qlora_rank=rank).fits(card)


@pytest.mark.slow
def test_what_does_not_fit_either_is_not_proposed(small_model):
    closest = replace(SHORT, row_tokens=150, kl_coef=0.0, num_slots=1)
    leanest = simulate(small_model, settings=closest, savings=ladder_steps(small_model)[-1], **PROMPT)
    with pytest.raises(ValueError, match=r"; pass --qlora_rank 16, or a card of 6 GB$"):
        choose_for(gib(leanest.larger) - 1e-7, small_model, SHORT)


@pytest.mark.slow
def test_where_nothing_that_is_tried_fits_only_a_larger_card_is_named(small_model):
    with pytest.raises(ValueError, match=r"gpu_gb is 0.5 but .*; pass a card of 6 GB$"):
        choose_for(0.5, small_model, SHORT)


@pytest.mark.parametrize("eval_tokens", [20, 100, 101, 1_000, 10**6])
@pytest.mark.parametrize("num_slots", [1, 7, 64])
def test_the_evaluations_cache_is_no_larger_than_the_rollouts(num_slots, eval_tokens):
    settings, model = (
        replace(SETTINGS, num_slots=num_slots),
        AutoModelForCausalLM.from_config(load_small("llama")),
    )
    slots = eval_slots(settings, eval_tokens, prompt_tokens=50)
    assert 1 <= slots <= num_slots
    allowed = cache_bytes(model, num_slots, 150)  # prompts of 50 and answers of 100 tokens
    assert slots == 1 or cache_bytes(model, slots, 50 + eval_tokens) <= allowed
    assert slots == num_slots or cache_bytes(model, slots + 1, 50 + eval_tokens) > allowed


def test_a_folder_of_adapters_is_planned_by_its_base(small_model, tmp_path):
    folder = tmp_path / "adapters"
    folder.mkdir()
    (folder / ADAPTER_CONFIG).write_text(json.dumps({"base_model_name_or_path": small_model, "r": 4}))
    assert adapter_ranks(str(folder)) == {"qlora_rank": 0, "lora_rank": 4}  # nothing says that it is in NF4
    assert not any({**adapter_ranks(small_model), **adapter_ranks("tiny")}.values())
    assert load_config(str(folder)).to_dict() == load_config(small_model).to_dict()


def test_the_sampler_of_a_rollout_holds_its_graphs_unless_they_are_off(small_model):
    sizes = {"settings": SETTINGS, "savings": LEAN, "prompt_tokens": 50}
    on, off = (
        simulate(small_model, cuda_graphs=on, **sizes).sampling.owners[SAMPLER] for on in (True, False)
    )
    assert off < on <= 2 * off
