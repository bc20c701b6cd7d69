"""How many responses are sampled at once, and what is printed about it."""

import pytest
import torch
from conftest import make_model

from kit.generate import slots
from kit.generate.kv_cache import cache_bytes
from kit.generate.sampler import generate
from kit.generate.sampling import SamplingParams
from kit.generate.slots import choose_slots, slots_that_fit
from kit.machine import GIB


@pytest.fixture
def card(monkeypatch):
    """A model on a card with room for 40 answers of 100 positions in four fifths of its free memory."""
    model = make_model("gemma3", torch.bfloat16)
    free = 50 * cache_bytes(model, 1, 100) + 7
    monkeypatch.setattr(slots.torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    monkeypatch.setattr(slots, "is_card", lambda device: True)
    return model


def test_as_many_answers_at_once_as_the_free_memory_holds():
    assert slots_that_fit(999.5, 100, 16) == 9
    assert slots_that_fit(1_000, 10, 16) == 16 and slots_that_fit(10, 100, 16) == 1


def test_on_a_card_as_many_as_fit_are_chosen_and_printed(card, capsys, monkeypatch):
    assert choose_slots(card, 0, 1_000, 100) == 40
    taken, free = 40 * cache_bytes(card, 1, 100) / GIB, 50 * cache_bytes(card, 1, 100) / GIB
    line = f"slots       40 answers at once, whose cache takes {taken:.2f} of {free:.2f} GiB that are free\n"
    assert capsys.readouterr().out == line
    assert choose_slots(card, 0, 7, 100) == 7  # no more than there are prompts
    monkeypatch.setattr(slots, "MOST_SLOTS", 20)
    assert choose_slots(card, 0, 1_000, 100) == 20


def test_slots_that_are_asked_for_are_used_without_a_word_if_they_fit_and_else_fewer_are_printed(
    card, capsys
):
    assert choose_slots(card, 40, 1_000, 100) == 40 and choose_slots(card, 99, 3, 100) == 3
    assert capsys.readouterr().out == ""
    assert choose_slots(card, 47, 1_000, 100) == 47  # of a free memory of 50: a plan has counted the step
    assert choose_slots(card, 48, 1_000, 100) == 47
    assert "47 answers at once instead of 48, whose cache takes" in capsys.readouterr().out
    assert choose_slots(card, 8, 1_000, 100_000) >= 1


def test_on_a_cpu_it_is_a_number_of_its_own_and_completions_do_not_depend_on_it(capsys):
    model, prompts = make_model("llama"), [[5, 6]] * 3 + [[7]] * 30
    params = SamplingParams(max_new_tokens=3)
    options = {"seed": 0, "eos_token_id": 2}
    chosen = generate(model, prompts, params, num_slots=0, **options)
    assert capsys.readouterr().out == "slots       16 answers at once\n"
    asked = generate(model, prompts, params, num_slots=5, **options)
    assert [c.ids for c in chosen] == [c.ids for c in asked] and capsys.readouterr().out == ""
