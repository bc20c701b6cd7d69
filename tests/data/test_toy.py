import random
import re

import pytest

from kit.data.toy import (
    CHARACTERS,
    long_trace,
    make_chain,
    make_pairs,
    make_rows,
    make_tokenizer,
    short_trace,
)
from kit.grade.verdict import grade

CHAINS = [make_chain(random.Random(seed), 2 + seed % 7) for seed in range(200)]


def test_chains_stay_in_range_and_their_values_follow():
    for chain in CHAINS:
        value = chain.values[0]
        for operator, operand, result in zip(chain.operators, chain.operands, chain.values[1:], strict=True):
            value = value + operand if operator == "+" else value - operand
            assert value == result
            assert 0 <= value <= 99
            assert 1 <= operand <= 9


def test_every_equation_of_a_trace_is_true_unless_it_is_taken_back():
    for chain in CHAINS:
        for trace in (short_trace(chain), long_trace(chain, random.Random(1))):
            for step in trace.replace("<think>", "").split("</think>")[0].split(";"):
                equations = re.findall(r"(\d+)([+-])(\d+)=(\d+)", step)
                true = [
                    int(a) + int(b) == int(c) if o == "+" else int(a) - int(b) == int(c)
                    for a, o, b, c in equations
                ]
                if "no:" in step:
                    assert true == [False, True, True, True]  # the check of a wrong result is itself right
                else:
                    assert all(true)


def test_both_traces_are_graded_correct_and_the_long_one_is_longer():
    for chain in CHAINS[:20]:
        for trace in (short_trace(chain), long_trace(chain, random.Random(1))):
            assert grade(chain.answer, trace).verdict == "correct"
        assert len(long_trace(chain, random.Random(1))) > len(short_trace(chain))


def test_rows_repeat_no_problem_leave_out_the_held_out_ones_and_depend_on_the_seed():
    held_out = {row["problem"] for row in make_rows("short", 30, seed=9)}
    rows = make_rows("long", 300, seed=0, exclude=held_out)
    assert len({row["problem"] for row in rows} | held_out) == 330
    assert rows == make_rows("long", 300, seed=0, exclude=held_out)
    assert rows != make_rows("long", 300, seed=1, exclude=held_out)
    with pytest.raises(ValueError, match="'short' or 'long'"):
        make_rows("medium", 1, seed=0)


def test_the_tokenizer_gives_back_every_character_it_knows():
    tokenizer = make_tokenizer()
    text = CHARACTERS + "<think>1+1=2</think>\\boxed{2}"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(CHARACTERS) - 1 + 2 + 5 + 1 + 2  # the alphabet holds the word "no"
    assert tokenizer("é", add_special_tokens=False).input_ids == [tokenizer.unk_token_id]


def test_a_long_trace_rechecks_the_share_of_its_steps_that_it_is_given():
    shares = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)]  # checked, corrected
    plain, checked, corrected = (
        [row["trace"] for row in make_pairs(20, seed=3, checked=checked, corrected=corrected)]
        for checked, corrected in shares
    )
    assert not any("recheck" in trace for trace in plain)
    assert all(trace.count(" ok") == trace.count(";") + 1 for trace in checked + corrected)
    assert all(trace.count("no: ") == trace.count(";") + 1 for trace in corrected)
    assert not any("no: " in trace for trace in checked)
