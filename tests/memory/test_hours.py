import sys
from dataclasses import asdict

import pytest
import torch

from kit import card_checks
from kit.memory.flops import Sizes
from kit.memory.hours import (
    CARDS,
    EFFICIENCY,
    card_named,
    sampling_speed,
    sampling_time,
    training_speed,
    training_time,
)
from kit.models.loading import load_config
from kit.run import Journal
from kit.train.adapters import Adapters
from kit.train.savings import Savings

T = 16_384
GEMMA, TILED = "google/gemma-3-1b-it", Savings(tile_tokens=2048)


@pytest.fixture
def put_in(monkeypatch):
    """A function that pretends a card of this name is here."""

    def put_in(name):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)

    return put_in


@pytest.fixture(autouse=True)
def no_checks(monkeypatch, tmp_path):
    """Nothing was measured."""
    monkeypatch.setattr(card_checks, "CHECKS", tmp_path)


@pytest.fixture
def checks(tmp_path, put_in):
    """Two runs of check_card on this card, and figures of another card and another model."""
    put_in("this card")

    def write(number, speed, *, model=GEMMA, gpu="this card", savings=None, qlora_rank=0, **more):
        row = {"model": model, "gpu": gpu, "tokens_per_second": speed, "qlora_rank": qlora_rank, **more}
        Journal(tmp_path / number / "results.jsonl").append(
            row | ({"savings": asdict(savings)} if savings else {})
        )

    write("001", 900.0, savings=Savings())
    write("002", 1_000.0, savings=Savings())
    write("002", 800.0, savings=TILED)
    write("002", 5_000.0, savings=Savings(), gpu="another card")
    write("002", 6_000.0, savings=Savings(), model="Qwen/Qwen2.5-0.5B-Instruct")
    write("002", 700.0, savings=Savings(), qlora_rank=16)
    write("001", 300.0, num_slots=16)
    write("002", 400.0, num_slots=64)
    Journal(tmp_path / "002" / "results.jsonl").append({"section": "truth", "status": "pass"})
    return tmp_path


def test_the_newest_figure_of_this_card_and_model_with_the_nearest_settings_counts(checks):
    found = training_speed(GEMMA, Savings(), 0, T)
    assert (found.tokens_per_second, found.source) == (1_000.0, f"measured here, {checks / '002'}")
    assert training_speed(GEMMA, TILED, 0, T).tokens_per_second == 800.0
    assert training_speed(GEMMA, Savings(), 8, T).tokens_per_second == 700.0
    near = training_speed(GEMMA, Savings(tile_tokens=4096, offload_inputs=True), 0, T)
    assert near.tokens_per_second == 1_000.0
    assert near.source == f"measured here with --tile_tokens 0 --no_offload_inputs, {checks / '002'}"
    assert "with --num_slots 16" in sampling_speed(GEMMA, 20, 1).source
    assert training_speed("meta-llama/Llama-3.2-1B-Instruct", Savings(), 0, T).source.startswith("estimate")


def test_hours_follow_from_what_was_measured_and_say_from_what(checks):
    said = training_time(GEMMA, Savings(), Adapters().ranks, 36_000_000, T)
    assert said == f"10.0 hours at 1,000 tokens/s (measured here, {checks / '002'})"
    assert sampling_time(GEMMA, 10, 4_000, 32) == (
        f"at most 2.2 minutes at 300 tokens/s (measured here with --num_slots 16, {checks / '001'}), "
        "if every response takes all of 4,000 tokens"
    )


def test_asking_for_another_card_gives_its_estimate_though_this_one_was_measured(checks):
    for speed in (
        training_speed(GEMMA, Savings(), 0, T, card="3060"),
        sampling_speed(GEMMA, 9, 1, card="3060"),
    ):
        assert speed.source == "estimate: 40% of the datasheet's rates of an NVIDIA GeForce RTX 3060"


def test_a_card_is_asked_for_by_its_short_name_and_an_unknown_one_is_refused_with_the_list():
    assert card_named("") is None
    assert all(card_named(card.short_name) is card for card in CARDS.values())
    assert card_named("RTX 4060 Ti").name == "NVIDIA GeForce RTX 4060 Ti" != card_named("4060").name
    with pytest.raises(
        ValueError, match=r"card is '3050' but the table of rates has 3060, 3090, .*h100; pass"
    ):
        training_speed(GEMMA, Savings(), 0, T, card="3050")


def test_nf4_has_no_measured_sampler(checks):
    assert sampling_speed(GEMMA, 16, 1, nf4=True).source.startswith("estimate: 40%")


def test_a_card_that_is_in_the_table_but_was_not_measured_gets_an_estimate(put_in):
    card = CARDS["NVIDIA GeForce RTX 4070"]
    put_in(card.name)
    sizes = Sizes.of(load_config(GEMMA))

    training = training_speed(GEMMA, TILED, 0, T)
    seconds = sizes.row_flops(T, TILED) / (card.teraflops * 1e12 * EFFICIENCY)
    assert training.tokens_per_second == pytest.approx(T / seconds)
    assert training.source == "estimate: 40% of the datasheet's rates of an NVIDIA GeForce RTX 4070"

    few = sampling_speed(GEMMA, 3, 500)  # bound by memory
    seconds = sizes.token_step(3, 500)[1] / (card.bandwidth * 1e9 * EFFICIENCY)
    assert few.tokens_per_second == pytest.approx(3 / seconds)
    many = sampling_speed(GEMMA, 10_000, 8)  # bound by arithmetic
    seconds = sizes.token_step(10_000, 8)[0] / (card.teraflops * 1e12 * EFFICIENCY)
    assert many.tokens_per_second == pytest.approx(10_000 / seconds)


@pytest.mark.parametrize(
    "name", ["NVIDIA GeForce RTX 3060 Ti", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 PCIe"]
)
def test_another_card_of_nearly_the_same_name_is_not_taken_for_it(name, put_in):
    put_in(name)
    assert "RTX 3090; measure this card with " in training_speed(GEMMA, TILED, 0, T).source


def test_a_card_that_is_neither_in_the_table_nor_measured_gets_the_command_that_measures_it(checks, put_in):
    put_in("a third card")
    command = f"{sys.orig_argv[0]} recipes/check_card.py --only sampler --models {GEMMA}"
    assert sampling_speed(GEMMA, 1, 1).source.endswith(f"; measure this card with {command}")


def test_without_a_card_a_rehearsal_of_check_card_is_no_measurement(tmp_path):
    row = {"model": GEMMA, "gpu": "", "tokens_per_second": 1e6, "qlora_rank": 0, "savings": asdict(Savings())}
    Journal(tmp_path / "001" / "results.jsonl").append(row)
    assert training_speed(GEMMA, Savings(), 0, T).source.endswith("GeForce RTX 3090; --card names another")
