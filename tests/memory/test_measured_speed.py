from dataclasses import asdict

import pytest
import torch

from kit.memory.measured_speed import sampling_speed, sampling_time, training_speed, training_time
from kit.run import Journal
from kit.train.savings import Savings

GEMMA, TILED = "google/gemma-3-1b-it", Savings(tile_tokens=2048)


@pytest.fixture
def checks(tmp_path):
    """Two runs of check_card on this machine, whose card has no name, and figures of another card and another model."""

    def write(number, speed, *, model=GEMMA, gpu="", savings=None, qlora_rank=0, **more):
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
    found = training_speed(GEMMA, Savings(), 0, checks=checks)
    assert (found.tokens_per_second, found.folder.name, found.differs) == (1_000.0, "002", "")
    assert training_speed(GEMMA, TILED, 0, checks=checks).tokens_per_second == 800.0
    assert training_speed(GEMMA, Savings(), 8, checks=checks).tokens_per_second == 700.0
    near = training_speed(GEMMA, Savings(tile_tokens=4096, offload_inputs=True), 0, checks=checks)
    assert (near.tokens_per_second, near.differs) == (1_000.0, "--tile_tokens 0 --no_offload_inputs")
    assert sampling_speed(GEMMA, 20, checks=checks).differs == "--num_slots 16"
    assert training_speed("meta-llama/Llama-3.2-1B-Instruct", Savings(), 0, checks=checks) is None


def test_hours_follow_from_what_was_measured_and_say_from_what(checks):
    assert training_time(GEMMA, Savings(), 0, 36_000_000, checks=checks) == (
        f"10.0 hours at 1,000 tokens/s (measured here, {checks / '002'})"
    )
    assert sampling_time(GEMMA, 10, 4_000, 32, checks=checks) == (
        "at most 2.2 minutes, if every response takes all of 4,000 tokens, "
        f"at 300 tokens/s (measured here with --num_slots 16, {checks / '001'})"
    )


def test_what_was_not_measured_is_not_guessed(checks, tmp_path, monkeypatch):
    assert (
        training_time(GEMMA, Savings(), 0, 1, checks=tmp_path / "none")
        == "not known: no card is here to measure"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a third card")
    said = sampling_time(GEMMA, 1, 1, 1, checks=checks)
    assert (
        said
        == f"not known: measure this card with python recipes/check_card.py --only sampler --models {GEMMA}"
    )
