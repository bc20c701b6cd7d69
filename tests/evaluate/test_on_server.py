"""An evaluation whose samples come from a server: its log, a server that dies, Ctrl-C."""

import json
import os
import signal
import threading
import time

import pytest
from small_server import serve

from kit import models
from kit.command import Stopped
from kit.data.chat import ChatFormat
from kit.evaluate.benchmarks import parse_benchmarks
from kit.evaluate.measure import evaluate
from kit.evaluate.results import read_result
from kit.generate.sampling import SamplingParams
from kit.generate.server import connect

HOT = SamplingParams(temperature=4.0, top_p=1.0, max_new_tokens=40)
QUICK = {"timeout": 20.0, "deadline": 60.0, "pause": 0.01}


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = models.load("tiny", device="cpu")
    return model, ChatFormat(tokenizer, model, instruction="")


def ask(server, chat, folder, params=HOT, **how):
    (toy,) = parse_benchmarks("toy", limit=6)
    return evaluate(server, chat, toy, params, folder, **{"num_samples": 2} | how)


def answers(found):
    return {(row["question"], row["sample"]): {**row, "seconds": 0} for row in found.rows}


def test_after_a_server_has_died_a_resume_asks_for_what_is_missing_and_the_log_is_whole(tiny, tmp_path):
    model, chat = tiny
    with serve(model, chat.tokenizer) as small:
        whole = ask(connect(small.url, "served", chat.tokenizer, **QUICK), chat, tmp_path / "whole")
    assert len({row["text"] for row in whole.rows}) == 12
    assert {row["tokens"] for row in whole.rows} > {40}  # some end by themselves

    with serve(model, chat.tokenizer, faults=[""] * 5 + ["die"]) as small:
        server = connect(small.url, "served", chat.tokenizer, timeout=20.0, deadline=8.0, pause=0.01)
        with pytest.raises(ValueError, match=r"the last one: (URLError|Remote).* --resume asks for the rest"):
            ask(server, chat, tmp_path / "broken", num_slots=2)
    kept = read_result(tmp_path / "broken" / "toy.jsonl")
    assert 1 <= len(kept.rows) <= 6
    with serve(model, chat.tokenizer) as small:  # at another address
        found = ask(connect(small.url, "served", chat.tokenizer, **QUICK), chat, tmp_path / "broken")
        assert len(small.asked) == 12 - len(kept.rows)
    assert answers(found) == answers(whole)


def test_samples_of_the_kit_of_a_server_and_of_another_of_its_models_are_never_mixed(tiny, tmp_path):
    model, chat = tiny
    with serve(model, chat.tokenizer, names=("one", "two")) as small:
        ask(connect(small.url, "one", chat.tokenizer, **QUICK), chat, tmp_path)
        header = json.loads((tmp_path / "toy.jsonl").read_text().splitlines()[0])["header"]
        assert (header["model"], header["engine"]) == ("one", "vllm 9.9") and "torch" not in header
        assert header["weights"] == "not known: a server has them"
        with pytest.raises(ValueError, match="model was 'one', is 'two'"):
            ask(connect(small.url, "two", chat.tokenizer, **QUICK), chat, tmp_path)
    with pytest.raises(ValueError, match=r"engine was 'vllm 9\.9', is 'kit'"):
        ask(model, chat, tmp_path)


def test_ctrl_c_does_not_wait_for_the_server_and_says_what_is_kept(tiny, tmp_path, ctrl_c_interrupts):
    model, chat = tiny
    with serve(model, chat.tokenizer, faults=["", "stall"]) as small:

        def interrupt():
            small.stalls.wait(60)
            while len((tmp_path / "toy.jsonl").read_text().splitlines()) < 2:  # the header, the first answer
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(Stopped, match="in toy, 1 of 12 answers kept"):
            ask(connect(small.url, "served", chat.tokenizer, **QUICK), chat, tmp_path, num_slots=1)
        assert "asks-server" in {thread.name for thread in threading.enumerate()}  # it is still waiting
