"""Asking models: with the prompt and the random stream of evaluation, and safe to show while written."""

import io
import os
import re
import signal

import pytest
from screens import CODES, make_screen
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kit import models as kit_models
from kit.data.arithmetic import PROMPT
from kit.data.chat import ChatFormat
from kit.evaluate import asking
from kit.evaluate.asking import Side, ask, computed_gold, expression_of, take_turns
from kit.evaluate.benchmarks import BENCHMARKS
from kit.evaluate.measure import evaluate
from kit.generate import sampler
from kit.generate.sampling import SamplingParams

PARAMS = SamplingParams(max_new_tokens=70)


@pytest.fixture(scope="module")
def side() -> Side:
    model, tokenizer = kit_models.load("tiny", device="cpu")
    return Side("tiny", model, ChatFormat(tokenizer, model, instruction=""))


class Bytes(ChatFormat):
    """A chat whose tokens are single bytes, so that a character may take four of them."""

    def __init__(self):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="!")
        super().__init__(fast, template="plain")


def test_an_answer_is_what_evaluation_logs_as_the_same_sample_of_the_question(side, tmp_path):
    benchmark, hot = BENCHMARKS["toy"].read(limit=2), SamplingParams(temperature=3.0, max_new_tokens=70)
    how = {"num_samples": 2, "num_slots": 1, "seed": 4}
    logged = evaluate(side.model, side.chat, benchmark, hot, tmp_path, **how)
    assert len({row["text"] for row in logged.rows}) == 4
    for question in benchmark.questions:
        for sample in (0, 1):
            out = io.StringIO()
            assert ask([side], question.problem, hot, seed=4, sample=sample, out=out)
            row = next(r for r in logged.rows if (r["question"], r["sample"]) == (question.id, sample))
            assert (side.text, len(side.ids)) == (row["text"], row["tokens"])
            assert f"== tiny ==\n{row['text']}\n-- {row['tokens']} tokens" in out.getvalue()
            assert f"{row['verdict']}: {row['extracted']}" in out.getvalue()


def test_plain_arithmetic_is_asked_in_the_words_of_its_benchmark(side):
    assert side.problem(" 3 + 2-4+4 ") == side.problem("3+2-4+4?") == "3+2-4+4?"
    assert side.problem("What is 3+2?") == "What is 3+2?"
    other = Side("other", None, Bytes())
    assert other.problem("3 + 2*4 = ?") == PROMPT + "3+2*4"
    assert other.problem("What is 3+2?") == "What is 3+2?"
    assert [expression_of(text) for text in ("5", "-3", "2024-11-27", "3+2; 4")] == ["", "", "2024-11-27", ""]
    assert computed_gold("3 + 2?") == "5" and computed_gold("3+2 4?") == ""
    assert computed_gold("3+2-4+4?") == "5" and computed_gold("1/0") == computed_gold("why?") == ""


def test_a_character_of_several_tokens_is_shown_when_it_is_whole():
    side, whole = Side("bytes", None, Bytes()), "né 漢 🎲 \ufffd x"
    ids = side.chat.encode([whole])[0]
    assert len(ids) > len(whole)
    for end in range(len(ids)):
        side.ids = ids[:end]
        assert whole.startswith(side.text), side.text
    side.ids, side.has_ended = ids[:-4], True  # the end of U+FFFD itself is missing: it ends like that
    assert side.text == "né 漢 🎲 \ufffd"


def test_the_conversation_so_far_is_in_the_prompt_only_if_it_is_asked_for(side):
    ask([side], "3+2?", PARAMS, out=io.StringIO())
    assert side.history == []
    ask([side], "3+2?", PARAMS, history=True, out=io.StringIO())
    first = side.text
    assert side.history == [("3+2?", first)]
    assert (
        side.chat.prompt("4+4?", side.history)
        == f"<bos><user>3+2?<assistant>{first}<eos><user>4+4?<assistant>"
    )
    side.history = [("3+2?", "5" * 1_100)]
    with pytest.raises(ValueError, match=r"tiny: the conversation has 1,1\d\d tokens and .* 1,024; forget"):
        ask([side], "4+4?", PARAMS, history=True, out=io.StringIO())
    side.history = []


def test_the_context_of_a_model_limits_an_answer_and_says_so(side):
    side.history = [("3+2?", "5" * 990)]
    ask([side], "3+2-1+7?", SamplingParams(max_new_tokens=600), out=(out := io.StringIO()))
    side.history = []
    prompt = 1_024 - len(side.ids)
    assert prompt > 1_000 and "cut off: its context is full" in out.getvalue()
    ask([side], "3+2-1+7?", SamplingParams(max_new_tokens=5), out=(out := io.StringIO()))
    assert "-- 5 tokens, cut off by max_new_tokens" in out.getvalue()


@pytest.mark.parametrize("columns", [200, 40])
def test_two_models_stand_side_by_side_or_one_below_the_other_in_a_narrow_terminal(
    side, columns, monkeypatch
):
    out = make_screen(monkeypatch, columns, 24)
    other = Side("other", side.model, side.chat)
    ask([side, other], "3+2-4+4?", PARAMS, out=out)
    side_by_side = [row for row in out.rows if row.count("\\boxed{5}") == 2]
    assert len(side_by_side) == (columns == 200)
    assert sum(row.count("\\boxed{5}") for row in out.rows) == 2
    assert sum(row.count("✓") for row in out.rows) == 6


def test_the_codes_of_an_answer_do_not_reach_the_terminal(side, monkeypatch):
    evil = "\x1b[2J\x1b]0;x\x07\r3+2=5 \x9bok\u202e"
    monkeypatch.setattr(side.chat, "decode", lambda ids: evil)
    titled = Side("\x1b[31mred", side.model, side.chat)
    for out in (make_screen(monkeypatch, 80, 24), io.StringIO()):
        ask([titled], "3+2?", PARAMS, out=out)
        assert r"\x1b[2J\x1b]0;x\x07\r3+2=5" in out.getvalue().replace("✓", "")
        rest = CODES.sub("", out.getvalue())
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", rest.replace("\r", "", out.isatty() * 99))


def test_a_terminal_that_has_no_ticks_gets_plain_text(side, monkeypatch):
    out = make_screen(monkeypatch, 80, 24)
    out.encoding = "cp1252"
    ask([side], "3+2-4?", PARAMS, out=out)
    assert out.rows[:2] == ["== tiny ==", "3+2=5;5-4=1.\\boxed{1}"] and "\x1b" not in out.getvalue()


def test_ctrl_c_ends_the_answers_and_shows_what_they_have(side, ctrl_c_interrupts, monkeypatch):
    out, turns, update = make_screen(monkeypatch, 90, 24), [], asking._View.update

    def interrupted(view):
        update(view)
        turns.append(1)
        if len(turns) == 9:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(asking._View, "update", interrupted)
    other = Side("other", side.model, side.chat)
    assert ask([side, other], "3+2-4+4+1+1+1?", PARAMS, out=out) is False
    assert len(side.ids) in (9, 10) and len(other.ids) in (9, 10)
    assert sum("tokens, stopped" in row for row in out.rows) == 1  # both on one row
    monkeypatch.undo()
    assert ask([side, other], "3+2?", PARAMS, out=io.StringIO())


def counting(log: list, name: str, number: int):
    try:
        for i in range(number):
            log.append(f"{name}{i}")
            yield
    finally:
        log.append(f"{name}.")


def test_works_take_turns_and_the_longer_one_goes_on_alone():
    log = []
    take_turns([counting(log, "a", 2), counting(log, "b", 4), counting(log, "c", 0)], lambda: log.append("|"))
    assert "".join(log) == "a0b0c.|a1b1|a.b2|b3|b.|"
    take_turns([], lambda: log.append("never"))
    assert log[-1] == "|"


def test_an_error_of_one_work_is_raised_and_ends_the_others():
    log = []

    def fails():
        yield
        raise ValueError("no room")

    works = [counting(log, "a", 99), fails(), counting(log, "b", 99)]  # held here: nothing else closes them
    with pytest.raises(ValueError, match="no room"):
        take_turns(works, lambda: None)
    assert log == ["a0", "b0", "a1", "b.", "a."]


def test_what_is_raised_between_turns_ends_all_works_and_they_clean_up():
    log = []

    def stop():
        if len(log) == 3:
            raise KeyboardInterrupt

    works = [counting(log, "a", 99)]
    with pytest.raises(KeyboardInterrupt):
        take_turns(works, stop)
    assert log == ["a0", "a1", "a2", "a."]


@pytest.mark.parametrize("ahead", [0, 1])
def test_models_that_take_turns_answer_as_they_do_alone(side, ahead, monkeypatch):
    monkeypatch.setattr(sampler, "steps_ahead", lambda _: ahead)
    model, tokenizer = kit_models.load("tinier", device="cpu")
    sides = [side, Side("tinier", model, ChatFormat(tokenizer, model, instruction=""))]
    hot, out = SamplingParams(temperature=5.0, top_p=1.0, max_new_tokens=40), io.StringIO()
    alone = []
    for one in sides:
        ask([one], "3+2-4+4?", hot, seed=3, out=out)
        alone.append(list(one.ids))
    assert ask(sides, "3+2-4+4?", hot, seed=3, out=make_screen(monkeypatch, 200, 24))
    assert [one.ids for one in sides] == alone and alone[0] != alone[1]
