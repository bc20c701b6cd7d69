"""recipes/ask.py: which models it asks, what a conversation understands, and what it refuses."""

import builtins
import importlib
import json
import os
import re
import shutil
import signal
import sys
from dataclasses import asdict

import pytest
from children import run_recipe

from kit import models
from kit.config import parse
from kit.evaluate import asking
from kit.models.folder import save_model
from kit.models.shipped import TINY
from kit.valley.study import Cell


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipes/ask.py"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # pytest may have been started with -m
    return importlib.import_module("ask")


def talk(recipe, monkeypatch, lines, **settings):
    """Hold a conversation. A line that is an exception is raised instead."""
    typed = iter([*lines, EOFError()])

    def type_line(prompt):
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(builtins, "input", type_line)
    recipe.main(recipe.Config(**settings))


def test_one_question_is_answered_graded_and_followed_by_what_to_type_next(recipe, capsys):
    recipe.main(parse(recipe.Config, ["3+2-4+4?", "--device", "cpu"]))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "model  tiny (0.4 M parameters; no instruction)",
        "== tiny ==",
        "3+2=5;5-4=1;1+4=5.\\boxed{5}",
        "-- 22 tokens; correct: 5; 3 of 3 equations right",
        "",
        lines[-1],
    ]
    assert re.fullmatch(r"next   \S+ recipes/valley_demo.py --smoke    # trains models .*", lines[-1])


def test_the_question_may_be_typed_as_words_or_with_its_flag(recipe):
    for words in (["What is", "3+2?"], ["--question", "What is 3+2?"]):
        assert parse(recipe.Config, ["--model", "m", *words, "--history"]) == recipe.Config(
            question="What is 3+2?", model="m", history=True
        )
    assert parse(recipe.Config, ["--question=-3+2?"]).question == "-3+2?"
    assert parse(recipe.Config, []).question == ""


def test_a_conversation_asks_again_grades_forgets_and_ends(recipe, monkeypatch, capsys):
    lines = [
        "",
        "/again",
        "3+2-4?",
        "/gold 1",
        "/gold 7",
        "/again",
        "what?",
        "/new",
        "/nonsense",
        "/quit",
        "7+1?",
    ]
    talk(recipe, monkeypatch, lines, beside="tinier", temperature=5.0, top_p=1.0, max_new_tokens=30)
    said = capsys.readouterr().out
    assert said.count("== tiny ==") == said.count("== tinier ==") == 3
    first, again = re.findall(r"== tiny ==\n(.*?)\n--", said, flags=re.DOTALL)[:2]
    assert first != again
    assert len(re.findall(r"tinier: (?:correct|wrong).*", said)) == 2
    assert "note   tiny knows nothing but chains such as 7+5-3?" in said
    assert said.count("/gold 5     grade the last answers") == 2  # /again without a question, and /nonsense
    assert "7+1" not in said


def test_ctrl_c_ends_an_answer_and_the_conversation_goes_on(recipe, ctrl_c_interrupts, monkeypatch, capsys):
    turns, update = [], asking._View.update

    def interrupted(view):
        turns.append(1)
        if len(turns) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        update(view)

    monkeypatch.setattr(asking._View, "update", interrupted)
    talk(recipe, monkeypatch, ["3+2-4+4?", KeyboardInterrupt(), "3+2-4+4?"])
    said = capsys.readouterr().out
    assert re.search(r"-- [34] tokens, stopped; ", said)
    assert "Ctrl-D ends the conversation" in said and "\\boxed{5}\n-- 22 tokens; correct: 5" in said


def test_ctrl_c_in_the_answer_to_one_question_shows_what_there_is_with_status_130(
    recipe, ctrl_c_interrupts, monkeypatch, capsys
):
    monkeypatch.setattr(asking._View, "update", lambda view: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as ended:
        recipe.main(recipe.Config(question="3+2-4+4?"))
    assert ended.value.code == 130
    assert re.search(r"-- [12] tokens, stopped; wrong: ", capsys.readouterr().out)


def test_all_models_of_a_study_are_asked_or_those_that_only_names(recipe, tmp_path, capsys):
    model, tokenizer = models.load("tinier", device="cpu")
    cells = [Cell("tiny", "full", size, 0) for size in (16, 64)]
    for cell in cells:
        save_model(tmp_path / "cells" / cell.name / "model", model, tokenizer)
        settings = {"model": "tiny", "instruction": ""}
        (tmp_path / "cells" / cell.name / "config.json").write_text(json.dumps(settings))
    (tmp_path / "study.json").write_text(json.dumps({"cells": [asdict(cell) for cell in cells]}))

    recipe.main(recipe.Config(question="3+2?", model=str(tmp_path)))
    said = capsys.readouterr().out
    titles = ["tiny, base model", "tiny, 16 long traces", "tiny, 64 long traces"]
    assert re.findall("== (.*) ==", said) == titles
    assert said.count("no instruction") == 3
    assert said.splitlines()[-1].startswith(
        f"next   {sys.orig_argv[0]} recipes/ask.py --model {tmp_path}    # "
    )
    recipe.main(recipe.Config(question="3+2?", model=str(tmp_path), titles="base, 64 long"))
    assert re.findall("== (.*) ==", capsys.readouterr().out) == [titles[0], titles[2]]
    for typed, kept in {
        titles[2]: titles[2:],
        "tiny, 16": titles[1:2],
        "y, ": titles,
        ",": titles,
        "64 long,16 long,": titles[1:],
    }.items():
        chosen = recipe.chosen(recipe.Config(model=str(tmp_path), titles=typed))
        assert [model.title for model in chosen] == kept, typed
    with pytest.raises(ValueError, match=r"titles is 'short' but no title has that .* tiny, 64 long traces"):
        recipe.main(recipe.Config(question="3+2?", model=str(tmp_path), titles="short"))


def test_what_cannot_be_asked_is_refused_before_anything_is_loaded(recipe, monkeypatch):
    for settings, message in (
        ({"gold": "5"}, "gold is '5' but there is no question; pass one, or type /gold 5"),
        ({"model": "./nowhere", "question": "?"}, "nothing is there"),
        ({"device": "cuda", "question": "?"}, "--device cpu"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            recipe.main(recipe.Config(**settings))

    monkeypatch.setattr(recipe, "free_memory", lambda: 2**21)
    needs = r"need 0\.01 GiB \(tiny 0\.00 GiB, tinier 0\.00 GiB\) but 0\.00 GiB of memory are free; ask fewer"
    with pytest.raises(ValueError, match=needs):
        recipe.main(recipe.Config(question="3+2?", beside="tinier"))


def test_two_runs_with_the_same_numbers_are_told_apart_and_both_need_memory(recipe, tmp_path, monkeypatch):
    runs = [tmp_path / name for name in ("001", "002")]
    for run in runs:
        shutil.copytree(TINY, run / "model")
        (run / "config.json").write_text('{"model": "tiny", "instruction": ""}')
    monkeypatch.setattr(recipe, "free_memory", lambda: 2**21)
    after = [re.escape(f"tiny, after training ({run}) 0.00 GiB") for run in runs]
    with pytest.raises(ValueError, match=rf"need 0\.01 GiB \(tiny, before 0\.00 GiB, {', '.join(after)}\)"):
        recipe.main(recipe.Config(question="3+2?", model=str(runs[0]), beside=str(runs[1])))


def test_what_a_model_needs_is_its_weights_and_the_cache_of_an_answer(recipe):
    model, _ = models.load("tiny", device="cpu")
    weights = sum(weight.numel() * 4 for weight in model.parameters())
    config = model.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert recipe.needed("tiny", 100, on_card=False) == weights + 100 * token
    assert recipe.needed("tiny", 10**6, on_card=True) == (weights + 1_024 * token) // 2


def test_the_command_for_a_conversation_keeps_the_template_without_which_a_base_model_is_refused(recipe):
    config = recipe.Config(question="1+1?", model="base.gguf", chat_template="plain")
    words = recipe.next_command(config, [])
    assert words[2:] == ("--model", "base.gguf", "--chat_template", "plain")


def test_with_history_again_forgets_the_first_answer_and_new_forgets_all(recipe, monkeypatch, capsys):
    prompts, prompt = [], asking.Side.answer

    def spy(side, question, *arguments, **how):
        prompts.append([asked for asked, _ in side.history])
        return prompt(side, question, *arguments, **how)

    monkeypatch.setattr(asking.Side, "answer", spy)
    talk(recipe, monkeypatch, ["1+1?", "2+2?", "/again", "/new", "3+3?"], history=True, max_new_tokens=9)
    assert prompts == [[], ["1+1?"], ["1+1?"], []]
    assert capsys.readouterr().out.count("one at a time") == 2


@pytest.mark.slow
def test_in_a_pipe_the_answer_is_plain_text_and_nothing_is_written_to_the_folder(tmp_path):
    done = run_recipe("ask", "3+2-4+4?", "--gold", "6", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\\boxed{5}\n-- 22 tokens; wrong: 5 (right: 6); 3 of 3" in done.stdout
    assert "\x1b" not in done.stdout and list(tmp_path.iterdir()) == []
