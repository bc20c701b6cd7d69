"""A judge of reflection on a real server, with the faults that servers have."""

import json
import signal
import socket
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from sample_rows import sample, write_samples

from kit.command import guard
from kit.evaluate import judge as judging
from kit.evaluate.judge import AROUND, Judge, judge_logs, passages_of
from kit.evaluate.results import read_result
from kit.report.__main__ import main
from kit.run import Journal

REPLIES = {  # word of an answer -> what the server does: a reply's text, a status, or a fault
    "alpha": "Yes.",
    "beta": " **no**, it only names the word",
    "gamma": "maybe",
    "delta": 500,
    "epsilon": b"{not JSON",
    "zeta": b'{"choices": []}',
    "eta": "hang up",
    "theta": "sleep",
    "kappa": b'{"choices": [{"finish_reason": "length", "message": {"content": "No, wait"}}]}',
    "iota": f"<think>No, {'or ' * 100}maybe.</think>\n\nYes",
}


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.keys = [], set()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        """Say nothing."""

    def _send(self, body: bytes, status=200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        assert self.path == "/v1/models"
        self._send(b'{"data": [{"id": "small-judge"}, {"id": "other"}]}')

    def do_POST(self):
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions" and question["model"] == "small-judge"
        text = question["messages"][0]["content"]
        word = next(word for word in REPLIES if f" {word} " in text)
        self.server.asked.append(word)
        self.server.keys.add(self.headers["Authorization"])
        reply = REPLIES[word]
        if reply == "hang up":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif reply == "sleep":
            time.sleep(30.0)
        elif reply is signal.SIGINT:
            while len(self.server.asked) < 4:
                time.sleep(0.01)
            signal.pthread_kill(threading.main_thread().ident, reply)
            self._send(b"{}")
        elif isinstance(reply, int):
            self._send(b"{}", reply)
        else:
            if isinstance(reply, str):
                words = " ".join(reply.split()[: question["max_tokens"]])
                reply = json.dumps({"choices": [{"message": {"content": words}}]}).encode()
            self._send(reply)


@contextmanager
def server():
    with Server() as found:
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        yield found, f"http://127.0.0.1:{found.server_address[1]}/v1/"
        found.shutdown()


def write_log(path, words):
    """Write a log with one answer per word; those that are not in REPLIES have no keyword."""
    texts = [f"so {word} let me double-check" if word in REPLIES else "plain" for word in words]
    rows = [sample(f"q{i}", text=text) for i, text in enumerate(texts)]
    return write_samples(path, rows, {"max_new_tokens": 64})


def test_yes_and_no_are_verdicts_and_every_fault_is_counted_and_named_and_never_a_no(tmp_path):
    log = write_log(tmp_path / "toy.jsonl", [*REPLIES, "none"])
    header = Journal(log).read()[0]
    with server() as (found, url):
        counts = judge_logs([log], Judge(url, timeout=4.0))
    problems = Counter()
    for problem, count in counts.items():
        problems[problem.split(" (")[0]] += count
    assert problems == {
        "yes": 2,
        "no": 1,
        "neither yes nor no": 1,
        "cut off after 1024 tokens": 1,
        "HTTP status 500": 1,
        "the reply cannot be read": 2,
        "no reply": 2,
    }
    assert sorted(found.asked) == sorted(REPLIES) and found.keys == {None}
    assert Journal(log).read()[0] == header
    result = read_result(log)
    judged = {row["text"].split()[1]: row["judged"] for row in result.rows if row["text"] != "plain"}
    assert judged == dict.fromkeys(REPLIES) | {"alpha": True, "beta": False, "iota": True}
    assert "judged" not in result.rows[-1]  # it has no keyword, so it was not asked about
    assert (result.reflection, result.judged_reflection, result.unjudged) == (10 / 11, 9 / 11, 7)


def test_the_next_call_asks_again_about_those_without_a_verdict_alone(tmp_path, monkeypatch):
    log = write_log(tmp_path / "toy.jsonl", ["alpha", "beta", "delta"])
    monkeypatch.setenv("JUDGE_API_KEY", "a key")
    with server() as (found, url):
        judge_logs([log], Judge(url))
        monkeypatch.setitem(REPLIES, "delta", "No")
        found.asked.clear()
        assert judge_logs([log], Judge(url)) == {"no": 1}
        assert found.asked == ["delta"] and found.keys == {"Bearer a key"}
        assert judge_logs([log], Judge(url)) == {}
    result = read_result(log)
    assert (result.judged_reflection, result.unjudged) == (1 / 3, 0)
    assert {row["judge_problem"] for row in result.rows} == {""}


def test_a_server_that_dies_is_not_asked_about_every_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "AT_ONCE", 1)
    log = write_log(tmp_path / "toy.jsonl", ["alpha"] * 30)
    with server() as (_, url):
        judge = Judge(url, timeout=5)
    counts = judge_logs([log], judge)  # it is gone
    assert counts.pop("not asked: the judge cannot be reached") == 30 - judging.GIVE_UP
    ((problem, count),) = counts.items()
    assert problem.startswith("no reply (") and count == judging.GIVE_UP
    result = read_result(log)
    assert result.judged_reflection == result.reflection == 1.0 and result.unjudged == 30


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x"])
def test_what_is_no_url_and_a_server_without_models_is_refused_before_anything_is_asked(url):
    with pytest.raises(ValueError, match="pass a server's URL, such as http://localhost:8000/v1"):
        Judge(url)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        free = taken.getsockname()[1]
    with pytest.raises(ValueError, match=r"lists no models \(URLError.*start the server, check the URL"):
        Judge(f"http://127.0.0.1:{free}/v1", timeout=2)
    assert Judge("http://127.0.0.1:1/v1", "named").model == "named"  # nothing to look up


def test_passages_are_the_surroundings_of_the_first_keywords_of_an_answer():
    text = "a" * 1_000 + " recheck " + "b" * 1_000 + " think again " + "c" * 9_000 + " rethink " * 3
    first, second, third = passages_of(text).split("\n\n---\n\n")
    assert first.startswith("a" * (AROUND - 1) + " recheck") and first.endswith("b" * (AROUND - 1))
    assert "think again" in second and "rethink" in third and len(third) < 2 * AROUND + 20


def test_the_report_command_judges_every_log_of_a_run_and_shows_what_is_left(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"model": "tiny"}))
    for stage in ("before", "after"):
        write_log(run / stage / "toy.jsonl", ["alpha", "beta", "delta", "none"])
    with server() as (_, url):
        main([str(run), "--judge", url])
    said = capsys.readouterr().out
    for line in ("2 answers: yes", "2 answers: no", "2 answers: HTTP status 500"):
        assert f"judge       {line}\n" in said
    page = (run / "report.html").read_text()
    assert page.count("50.0 %<br>(1 left open)") == 2 and "confirmed by the judge" in page
    assert page.count("<td>75.0 %") >= 2  # by keywords


@pytest.fixture
def run(tmp_path):
    """A run with a log of its own and, in it, a cell of a study that has a copy of its baseline's samples."""
    cell = tmp_path / "run" / "cells" / "cell"
    cell.mkdir(parents=True)
    for folder in (tmp_path / "run", cell):
        (folder / "config.json").write_text(json.dumps({"model": "tiny", "baseline": "base"}))
    write_log(tmp_path / "run" / "before" / "toy.jsonl", ["beta"])
    write_log(cell / "before" / "toy.jsonl", ["alpha"])
    write_log(cell / "after" / "toy.jsonl", ["iota"])
    return tmp_path / "run"


def test_a_cells_copy_of_the_baseline_is_not_judged_again(run):
    with server() as (found, url):
        main([str(run), "--judge", url])
    assert sorted(found.asked) == ["beta", "iota"]


def test_after_ctrl_c_all_verdicts_are_kept_also_behind_an_answer_without_one(run, monkeypatch, capsys):
    monkeypatch.setattr(judging, "AT_ONCE", 2)
    monkeypatch.setitem(REPLIES, "delta", signal.SIGINT)
    log = run / "before" / "toy.jsonl"
    log.unlink()
    write_log(log, ["delta", *["alpha"] * 30])
    with server() as (found, url):
        with pytest.raises(SystemExit) as ended:
            guard(main, [str(run), "--judge", url])
        said = capsys.readouterr().err
        assert ended.value.code == 130 and "its verdicts are kept, the same command goes on" in said
        judged = [row.get("judged") for row in read_result(log).rows]
        assert judged.count(True) == found.asked.count("alpha") >= 3
        monkeypatch.setitem(REPLIES, "delta", "No")
        found.asked.clear()
        assert judge_logs([log], Judge(url)) == {"no": 1, "yes": 30 - judged.count(True)}


def test_a_judges_name_without_its_server_is_refused(run):
    with pytest.raises(ValueError, match="judge_model is 'small' but --judge_model needs --judge URL"):
        main([str(run), "--judge_model", "small"])
