"""Works that take turns: nothing runs beside another, and whatever is raised ends all of them."""

import threading

import pytest
from conftest import make_model

from kit.generate.interleave import take_turns
from kit.generate.sampler import generate
from kit.generate.sampling import SamplingParams


def answers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "answer"]


def counting(log: list, name: str, number: int):
    def work(pause):
        for i in range(number):
            log.append(f"{name}{i}")
            pause()

    return work


def test_works_take_turns_and_the_longer_one_goes_on_alone():
    log = []
    take_turns([counting(log, "a", 2), counting(log, "b", 4), counting(log, "c", 0)], lambda: log.append("|"))
    assert "".join(log) == "a0b0|a1b1|b2|b3||"
    assert answers() == []
    take_turns([], lambda: None)


def test_an_error_of_one_work_is_raised_and_ends_the_others():
    log = []

    def fails(pause):
        pause()
        raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"):
        take_turns([counting(log, "a", 99), fails], lambda: None)
    assert log == ["a0", "a1"] and answers() == []


def test_what_is_raised_between_turns_ends_all_works_and_they_clean_up():
    log = []

    def work(pause):
        try:
            counting(log, "a", 99)(pause)
        finally:
            log.append("cleaned")

    def stop():
        if len(log) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take_turns([work], stop)
    assert log == ["a0", "a1", "a2", "cleaned"] and answers() == []


def test_models_that_take_turns_answer_as_they_do_alone():
    params = SamplingParams(temperature=1.0, max_new_tokens=13)
    how = {"num_slots": 1, "seed": 3, "eos_token_id": 2}
    models = [make_model("gemma3"), make_model("llama")]
    alone = [generate(model, [[5, 6, 7]], params, **how)[0].ids for model in models]
    found = [[], []]

    def work_of(model, ids):
        def work(pause):
            def take(_, token):
                ids.append(token)
                pause()

            generate(model, [[5, 6, 7]], params, on_token=take, description="", **how)

        return work

    take_turns([work_of(*pair) for pair in zip(models, found, strict=True)], lambda: None)
    assert found == alone and alone[0] != alone[1]
