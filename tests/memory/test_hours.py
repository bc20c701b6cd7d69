from dataclasses import asdict

import pytest
import torch

from kit.memory.flops import Sizes
from kit.memory.hours import CARDS, EFFICIENCY, sampling_hours, sampling_time, training_hours, training_time
from kit.models.loading import load_config
from kit.run import Journal
from kit.train.savings import Savings

GEMMA, TILED = "google/gemma-3-1b-it", Savings(tile_tokens=2048)


@pytest.fixture
def put_in(monkeypatch):
    """A function that pretends a card of this name is here."""

    def put_in(name):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)

    return put_in


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
    def speed(savings, rank=0, model=GEMMA):
        found = training_hours(model, savings, rank, tokens=3_600, row_tokens=16_384, checks=checks)
        return found and (round(1 / found.hours, 6), found.how.split(" (")[1])

    assert speed(Savings()) == (1_000.0, f"measured here, {checks / '002'})")
    assert speed(TILED)[0] == 800.0
    assert speed(Savings(), rank=8)[0] == 700.0
    near = speed(Savings(tile_tokens=4096, offload_inputs=True))
    assert near == (1_000.0, f"measured here with --tile_tokens 0 --no_offload_inputs, {checks / '002'})")
    assert speed(Savings(), model="meta-llama/Llama-3.2-1B-Instruct") is None


def test_hours_follow_from_what_was_measured_and_say_from_what(checks):
    assert training_time(GEMMA, Savings(), 0, 36_000_000, 16_384, checks=checks) == (
        f"10.0 hours at 1,000 tokens/s (measured here, {checks / '002'})"
    )
    assert sampling_time(GEMMA, 10, 4_000, 32, checks=checks) == (
        "at most 2.2 minutes, if every response takes all of 4,000 tokens, "
        f"at 300 tokens/s (measured here with --num_slots 16, {checks / '001'})"
    )


def test_a_card_that_is_in_the_table_but_was_not_measured_gets_an_estimate(tmp_path, put_in):
    card = CARDS["NVIDIA GeForce RTX 4070"]
    put_in(card.name)
    sizes = Sizes.of(load_config(GEMMA))

    training = training_hours(GEMMA, TILED, 0, tokens=10 * 16_384, row_tokens=16_384, checks=tmp_path)
    seconds = 10 * sizes.row_flops(16_384, TILED) / (card.teraflops * 1e12 * EFFICIENCY)
    assert training.hours == pytest.approx(seconds / 3_600)
    said = training_time(GEMMA, TILED, 0, 1, 16_384, checks=tmp_path)
    assert said.endswith(" (estimate: 40% of the datasheet's rates of an NVIDIA GeForce RTX 4070)")

    few = sampling_hours(GEMMA, 30, 500, 3, checks=tmp_path)  # bound by memory
    seconds = 30 / 3 * 500 * sizes.token_step(3, 500)[1] / (card.bandwidth * 1e9 * EFFICIENCY)
    assert few.hours == pytest.approx(seconds / 3_600)
    many = sampling_hours(GEMMA, 10_000, 8, 10_000, checks=tmp_path)  # bound by arithmetic
    seconds = 8 * sizes.token_step(10_000, 8)[0] / (card.teraflops * 1e12 * EFFICIENCY)
    assert many.hours == pytest.approx(seconds / 3_600)
    assert "(estimate: 40%" in sampling_time(GEMMA, 1, 1, 1, checks=tmp_path)


@pytest.mark.parametrize(
    "name", ["NVIDIA GeForce RTX 3060 Ti", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 PCIe"]
)
def test_another_card_of_nearly_the_same_name_is_not_taken_for_it(name, tmp_path, put_in):
    put_in(name)
    assert training_hours(GEMMA, TILED, 0, tokens=1, row_tokens=1, checks=tmp_path) is None


def test_a_card_that_is_neither_in_the_table_nor_measured_gets_the_command_that_measures_it(checks, put_in):
    put_in("a third card")
    command = f"python recipes/check_card.py --only sampler --models {GEMMA}"
    assert sampling_time(GEMMA, 1, 1, 1, checks=checks) == f"not known: measure this card with {command}"


def test_without_a_card_a_rehearsal_of_check_card_is_no_measurement(tmp_path):
    row = {"model": GEMMA, "gpu": "", "tokens_per_second": 1e6, "qlora_rank": 0, "savings": asdict(Savings())}
    Journal(tmp_path / "001" / "results.jsonl").append(row)
    said = training_time(GEMMA, Savings(), 0, 1, 16_384, checks=tmp_path)
    assert said == "not known: no card is here to measure"
