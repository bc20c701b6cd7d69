import json
from dataclasses import dataclass

import pytest
from test_closed_form import small_heads  # noqa: F401  a fixture
from test_simulate import SMALL

from kit.config import as_flags, parse
from kit.generate.sampling import SamplingParams
from kit.machine import GIB
from kit.memory import phases
from kit.memory import run_plan as fitting
from kit.memory.phases import MeasuredRun, RunPlan
from kit.memory.run_plan import as_savings, choose, entries_for, for_less, held_by
from kit.memory.settings import TrainingPlanSettings
from kit.memory.simulate import Plan, plan
from kit.models.loading import load_config
from kit.train.savings import Savings

T = 1024


def fine_tuning(model, row_tokens=T, rows=1, **others) -> MeasuredRun:
    """Return a run whose sampling needs little."""
    params = SamplingParams(max_new_tokens=1)
    return MeasuredRun(model=model, params=params, num_slots=1, row_tokens=row_tokens, rows=rows, **others)


def choose_for(gpu_gb, run, **others) -> RunPlan:
    return choose(run, TrainingPlanSettings(**{"gpu_gb": str(gpu_gb), "desktop_gb": 0.0, **others}))


@dataclass(frozen=True)
class Typed(Savings, TrainingPlanSettings):
    max_grad_norm: float = 1.0
    batch_traces: int = 8


def typed(gpu_gb, *flags) -> Typed:
    return parse(Typed, ["--gpu_gb", f"{gpu_gb + 1e-8:.9f}", "--desktop_gb", "0", *flags])


def ladder_steps(model, qlora_rank=0, *, faster=False) -> list[Savings]:
    """Return the settings after each entry of the ladder."""
    entries = entries_for(load_config(model), qlora_rank, faster=faster)
    return [as_savings(entries[:count]) for count in range(1, len(entries) + 1)]


def make_model(folder, **settings) -> str:
    """Return a folder that holds a config and nothing else."""
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL, **settings}))
    return str(folder)


@pytest.fixture
def small_model(tmp_path):
    return make_model(tmp_path, num_hidden_layers=2)


def total(model, savings, rows=1):
    return fine_tuning(model, rows=rows).simulate(savings).update.total / GIB


@pytest.mark.parametrize("rows", [1, 2])
def test_a_card_with_room_for_the_first_settings_gets_them(small_model, rows):
    first = ladder_steps(small_model)[0]
    found = choose_for(total(small_model, first, rows) + 1e-6, fine_tuning(small_model, rows=rows))
    assert found.update.savings == first and found.update.rows == rows
    assert found.switches() == vars(first) | {"num_slots": 1}


@pytest.mark.slow
def test_no_switch_that_was_chosen_can_be_left_out(small_model):
    """Tried with a card that the middle of the ladder fits, and with one that only its end fits."""
    ladder = ladder_steps(small_model)
    for place in (4, len(ladder) - 1):
        gpu_gb = total(small_model, ladder[place], 2) + 1e-6
        found = choose_for(gpu_gb, fine_tuning(small_model, rows=2)).update
        assert found.fits(gpu_gb)
        for name, off in vars(Savings()).items():
            without = {**vars(found.savings), name: off}
            if name in ("optimizer", "recompute") or vars(found.savings)[name] == off:
                continue
            if name == "offload_gradients" and found.savings.head_update == "blocked":
                continue
            assert total(small_model, Savings(**without), 2) > gpu_gb, (gpu_gb, found.savings, name)


@pytest.mark.parametrize(
    ("flags", "has_it"),
    [
        ("", True),
        ("--batch_traces 1", True),
        ("--batch_traces 8", False),
        ("--max_grad_norm 1", False),
        ("--offload_gradients", False),
        ("--batch_traces 8 --update_in_backward", True),
    ],
)
def test_faster_leaves_the_batch_the_norm_and_the_gradients_that_were_typed(flags, has_it):
    held = held_by(typed(8, "--faster", *flags.split()))
    assert as_savings(entries_for(load_config("tiny"), faster=True, held=held)).update_in_backward == has_it


SAVED_GIB = {"tile_tokens": 2, "logit_rows": 2, "offload_inputs": 2, "offload_optimizer": 8}


def gib_without(gib_to_save: float) -> float:
    """Return the size of a card for which a step of 20 GiB must save so many."""
    return Plan("", 0, 0, Savings(), round((20 - gib_to_save) * GIB), "", {}, 0).total / GIB


@pytest.fixture
def pretended(monkeypatch):
    """Pretend that a step holds 20 GiB less what SAVED_GIB says."""

    def fake_plan(model, *, savings, **sizes):
        peak = 20 - sum(SAVED_GIB.get(name, 0) for name in savings.switched_on)
        return Plan(model, savings=savings, peak=peak * GIB, when="", owners={}, host=0, **sizes)

    monkeypatch.setattr(phases, "plan", fake_plan)


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize(
    ("gib_to_save", "chosen"),
    [
        (0, {}),
        (3, {"tile_tokens": 8192, "logit_rows": 512}),
        (5, {"tile_tokens": 8192, "logit_rows": 512, "offload_inputs": True}),
        (9, {"tile_tokens": 8192, "offload_optimizer": True}),
    ],
)
def test_what_turns_out_not_to_be_needed_is_switched_off_the_last_one_first(gib_to_save, chosen):
    found = choose_for(gib_without(gib_to_save), fine_tuning("google/gemma-3-1b-it", rows=2))
    assert found.update.savings.switched_on == {"optimizer": "adamw8bit"} | chosen


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize(
    ("gib_to_save", "flags", "chosen"),
    [
        (9, "--tile_tokens 64", {"tile_tokens": 64, "offload_optimizer": True}),
        (6, "--no_offload_inputs", {"offload_optimizer": True}),
        (1, "--tile_tokens 0 --optimizer auto", {"optimizer": "auto", "logit_rows": 512}),
        (1, "--no_recompute", {"recompute": False, "logit_rows": 512}),
        (0, "--logit_rows 7", {"logit_rows": 7}),
    ],
)
def test_what_was_typed_stays_and_the_ladder_adds_only_what_was_left_open(gib_to_save, flags, chosen):
    card = typed(gib_without(gib_to_save), *flags.split())
    found = choose(fine_tuning("google/gemma-3-1b-it", rows=2), card).update.savings
    assert found == Savings(**{"optimizer": "adamw8bit", **chosen})


@pytest.mark.usefixtures("pretended")
def test_a_typed_setting_that_keeps_a_run_from_fitting_is_named_with_what_the_run_needs_without_it():
    size = gib_without(sum(SAVED_GIB.values()))
    with pytest.raises(ValueError) as refused:
        choose(fine_tuning("google/gemma-3-1b-it"), typed(size, "--logit_rows", "9", "--tile_tokens", "0"))
    said = str(refused.value)
    assert f"gpu_gb is {size:g} but " in said and f"needs {gib_without(12):.2f} GiB even with --" in said
    assert f"; leave out --tile_tokens 0 (then {size:.2f} GiB), or pass " in said


@pytest.mark.usefixtures("pretended")
def test_a_run_that_fits_with_nothing_names_the_settings_with_which_it_needs_least(monkeypatch):
    """The end of the ladder may need more than an earlier step: tiles of a short row, for example."""
    monkeypatch.setitem(SAVED_GIB, "head_update", -1)
    with pytest.raises(ValueError, match=rf"needs {gib_without(14):.2f} GiB even with (?!.*head_update)"):
        choose_for(1, fine_tuning("google/gemma-3-1b-it"))


@pytest.fixture
def model_with_head(tmp_path, small_heads):  # noqa: F811
    return make_model(tmp_path, vocab_size=20_000, num_hidden_layers=3)


def test_adapters_that_a_typed_setting_excludes_are_no_way_out(model_with_head):
    typed_head = typed(0.5, "--head_update", "blocked", "--offload_gradients")
    with pytest.raises(ValueError, match=r"gpu_gb is 0.5 but .* even with .*head_update blocked") as refused:
        choose(fine_tuning(model_with_head, row_tokens=1_000), typed_head)
    assert "--qlora_rank" not in str(refused.value)


def test_nothing_on_the_ladder_changes_the_update_and_its_end_is_as_lean_as_what_would(model_with_head):
    ladder, faster = ladder_steps(model_with_head), ladder_steps(model_with_head, faster=True)
    assert all(savings.exact_weights and not savings.update_in_backward for savings in ladder)
    assert ladder[-1].offload_gradients and ladder[-1].offload_optimizer
    assert not faster[-1].exact_weights and faster[-1].update_in_backward
    leanest, changed = total(model_with_head, ladder[-1], 2), total(model_with_head, faster[-1])
    one_layer = 2 * 4 * 256 * (256 + 768) / GIB  # at most, of gradients that are on their way
    assert changed < leanest < changed + one_layer


@pytest.mark.slow
def test_faster_changes_the_update_where_states_would_cross_the_bus_and_tells_the_price(
    model_with_head, capsys
):
    ladder = ladder_steps(model_with_head, faster=True)
    rounded, in_backward = (savings for savings in ladder if savings.offload_inputs and not (
        savings.exact_weights or savings.offload_optimizer))  # fmt: skip
    assert not rounded.update_in_backward and in_backward.update_in_backward
    for savings, rows, price in (
        (rounded, 2, "bf16 weights are rounded stochastically"),
        (in_backward, 1, "bf16 weights are rounded stochastically; one row per step, and no clipping"),
    ):
        gpu_gb, run = total(model_with_head, savings, rows) + 1e-6, fine_tuning(model_with_head, rows=2)
        found = choose_for(gpu_gb, run, faster=True)
        chosen = found.update.savings
        assert not chosen.exact_weights and not chosen.offload_optimizer and found.update.rows == rows
        assert capsys.readouterr().out.endswith(f"  faster, at this price: {price}\n")
        chosen.check_clipping(found.switches().get("max_grad_norm", 1.0))
        chosen.check_rows(found.switches().get("batch_traces", 2))

        faithful = choose_for(gpu_gb, run).update
        assert faithful.savings.offload_optimizer and faithful.savings.exact_weights and faithful.rows == 2
        assert "price" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_card_that_only_faster_settings_fit_is_told_their_price(model_with_head):
    leanest, faster = ladder_steps(model_with_head)[-1], ladder_steps(model_with_head, faster=True)[-1]
    gpu_gb = total(model_with_head, leanest, 2) - 5e-4
    assert total(model_with_head, faster) < gpu_gb
    price = r"pass --faster \(bf16 .* stochastically; one row per step, and no clipping\), or --qlora_rank 16"
    with pytest.raises(ValueError, match=price):
        choose_for(gpu_gb, fine_tuning(model_with_head, rows=2))
    with pytest.raises(ValueError, match=r"faster is on but gpu_gb is not set.*--gpu_gb auto, or leave"):
        TrainingPlanSettings(faster=True)


@pytest.mark.slow
def test_tiles_are_the_widest_that_fit(tmp_path, monkeypatch):
    """A narrow tile launches many small kernels."""
    small_model = make_model(tmp_path, num_hidden_layers=1, intermediate_size=4_096, vocab_size=300)
    tiles = (("tile_tokens", 512), ("tile_tokens", 256), ("tile_tokens", 64))
    monkeypatch.setattr(fitting, "LADDER", (("optimizer", "adamw8bit"), *tiles))
    for tile_tokens in (64, 256, 512):
        gpu_gb = total(small_model, Savings(optimizer="adamw8bit", tile_tokens=tile_tokens)) + 1e-6
        assert choose_for(gpu_gb, fine_tuning(small_model)).update.savings.tile_tokens == tile_tokens


@pytest.mark.slow
@pytest.mark.usefixtures("small_heads")
def test_the_blocked_head_is_chosen_if_it_decides_whether_a_model_fits(tmp_path):
    model = make_model(tmp_path, vocab_size=60_000, num_hidden_layers=2)  # mostly head
    whole, blocked = (total(model, savings, 2) for savings in ladder_steps(model)[-2:])
    found = choose_for((whole + blocked) / 2, fine_tuning(model, rows=2)).update
    assert blocked < whole and found.savings.head_update == "blocked"
    assert found.savings.offload_gradients and found.rows == 2


@pytest.mark.slow
def test_a_head_of_its_own_has_no_blocks_to_choose(tmp_path):
    model = make_model(tmp_path, tie_word_embeddings=False, num_hidden_layers=2)
    ladder = ladder_steps(model)
    assert all(savings.head_update == "whole" for savings in ladder) and ladder[-1].offload_optimizer
    gpu_gb = total(model, ladder[-1]) + 1e-6
    assert choose_for(gpu_gb, fine_tuning(model)).fits(gpu_gb)


def test_adapters_choose_among_what_saves_them_something(small_model):
    ladder = ladder_steps(small_model, 16)
    assert len(ladder) > 2
    assert not any(savings.switched_on.keys() & fitting.FULL_ONLY for savings in ladder)


@pytest.mark.slow
@pytest.mark.usefixtures("small_heads")
def test_what_would_save_more_is_listed_in_the_ladders_order_until_nothing_is_left(tmp_path):
    model = make_model(tmp_path, vocab_size=30_000, num_hidden_layers=4)  # a good part of it head
    found = fine_tuning(model, rows=2).simulate(Savings(recompute=False))
    lines = for_less(found)
    flags, sizes = zip(*(line.removesuffix(" GiB").rsplit(maxsplit=1) for line in lines), strict=True)
    flags, sizes = [flag.strip() for flag in flags], [float(size) for size in sizes]
    assert flags[0] == "--recompute" and flags[-1] == "--head_update blocked"
    ladder = [as_flags({name: value}) for name, value in fitting.LADDER]
    places = [ladder.index(flag) for flag in flags[1:]]
    assert places == sorted(places)
    assert [found.update.total / GIB, *sizes] == sorted([found.update.total / GIB, *sizes], reverse=True)

    changes = {}
    for flag in flags:
        name, _, value = flag.removeprefix("--").partition(" ")
        changes[name] = value if name == "head_update" else int(value) if value else True
    assert f"{total(model, Savings(**changes), 2):.2f}" == f"{sizes[-1]:.2f}"  # each is with those before it
    assert list(for_less(fine_tuning(model).simulate(ladder_steps(model)[-1]))) == []


def test_the_first_settings_that_fit_are_found_even_if_later_ones_need_more(small_model, monkeypatch):
    """Tiles of so short a row need more memory than the whole: their weight gradients are summed in fp32."""
    monkeypatch.setattr(fitting, "LADDER", (("optimizer", "adamw8bit"), ("tile_tokens", 100)))
    ladder = ladder_steps(small_model)
    whole, tiled = (plan(small_model, row_tokens=256, savings=savings).total / GIB for savings in ladder)
    assert whole < tiled
    found = choose_for((whole + tiled) / 2, fine_tuning(small_model, 256))
    assert found.update.savings.tile_tokens == 0
