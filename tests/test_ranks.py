"""Ranks in processes of their own, started as torchrun does: what they exchange, and how they end."""

import json
import os
import re
import signal
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from children import start_ranks

from kit import command, ranks
from kit import run as run_folder
from kit.command import LetFinish, open_run, start, together
from kit.config import RunSettings
from kit.journal import CONFIG, Journal


@dataclass(frozen=True)
class Config(RunSettings):
    lr: float = 1.0
    seed: int = 0


def run(count, function, *arguments, cwd="."):
    """Return the ranks' exit statuses, what each printed, and their errors."""
    children = start_ranks(count, __file__, function, *arguments, cwd=cwd)
    return [child.wait() for child in children], [c.stdout for c in children], [c.stderr for c in children]


def exchange():
    here = ranks.join("cpu")
    total = torch.tensor([here.rank + 1.0, 0.1], dtype=torch.float64)
    here.sum_(total)
    found = here.gather({"text": "é\ud800" * here.rank, "nan": float("nan")})
    first = here.from_first(lambda: [here.rank, None])
    try:
        here.check_same({"model": "a", "lr": 1 if here.rank < 2 else 2})
    except ValueError as error:
        said = str(error)
    here.check_same({"lr": 1})
    print(json.dumps([total.tolist(), [x["text"] for x in found], first, said, here.share("abcde")]))
    ranks.leave()
    print(ranks.here().count)


def test_each_rank_gets_sums_values_and_its_share_and_a_fact_that_differs_is_named_on_all():
    statuses, printed, errors = run(3, "exchange")
    assert statuses == [0, 0, 0], errors
    for text, share in zip(printed, ("ad", "be", "c"), strict=True):
        total, texts, first, said, own = json.loads(text.splitlines()[0])
        assert total == [6.0, pytest.approx(0.3)]
        assert texts == ["", "é\ud800", "é\ud800" * 2]
        assert first == [0, None]
        assert re.match(r"lr is 1 on rank 0 on \S+ but 2 on rank 2 on \S+; start all ranks with", said)
        assert own == share
        assert text.splitlines()[1] == "1"


def end_badly(how):
    ranks.BEAT_EVERY, ranks.GRACE, ranks.SAID_WITHIN = 0.1, 0.5, 2.0
    if how == "own error":
        ranks.GRACE, ranks.SAID_WITHIN = 5.0, 10.0
    if how == "killed":
        ranks.LOST_AFTER = 1.0

    def main(config):
        folder = open_run(config)
        print("begun")
        if how == "late":
            folder.metrics.append({"step": 1})
        if how == "own error" and ranks.here().is_first:
            time.sleep(0.5)
            raise ValueError("no file t.jsonl")
        if ranks.here().rank == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "interrupted":
                raise KeyboardInterrupt
            raise ValueError("no file t.jsonl")
        ranks.here().gather(0)

    if how == "other disk" and os.environ["RANK"] == "1":
        run_folder.LOCK = "a file that its disk lacks"
    flags = ["--out", "run"]
    flags += ["--lr", os.environ["RANK"]] if how == "other flags" else []
    flags += ["--rl", "2"] if how == "wrong flags" else []
    alone = "it takes all cards itself; start it without torchrun" if how == "no ranks" else ""
    start(main, Config, flags, alone=alone)


FAILED_ALONE = r"error: rank 1 on \S+: ValueError: no file t.jsonl. All stopped"
ENDS = {  # how a run ends -> what rank 0 says
    "early": FAILED_ALONE + " before anything was trained or measured",
    "late": FAILED_ALONE + "; what is finished is kept. Go on with: torchrun --nproc_per_node 2",
    "own error": r"error: no file t.jsonl",
    "killed": r"error: rank 1 has been silent for 1 s. All stopped",
    "interrupted": r"error: rank 1 on \S+: KeyboardInterrupt\. All stopped before",
    "other disk": r"error: rank 1 on .* \S+/run of rank 0 is not on a disk that rank 1 on",
    "other flags": r"error: lr is 0.0 on rank 0 on \S+ but 1.0 on rank 1 on \S+; start all",
    "taken": "error: run already holds a run; pass --resume to continue it, or another --out",
    "wrong flags": r"error: there is no --rl; did you mean --lr\?",
    "no ranks": "error: it takes all cards itself; start it without torchrun",
}


@pytest.mark.parametrize("how", ENDS)
def test_if_a_rank_ends_all_do_and_rank_0_says_in_one_line_which_and_why(how, tmp_path):
    if how == "taken":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / CONFIG).write_text("{}")
    children = start_ranks(2, __file__, "end_badly", how, cwd=tmp_path)
    statuses = [child.wait() for child in children]
    errors = children[0].stderr.splitlines()
    assert len(errors) == 1, errors
    assert re.match(ENDS[how], errors[0]), errors
    assert statuses[0] in (1, 2)
    of_rank_1 = {"killed": -signal.SIGKILL, "interrupted": command.INTERRUPTED}
    assert statuses[1] == of_rank_1[how] if how in of_rank_1 else statuses[1] in (1, 2)
    assert not children[1].stdout
    assert "already holds" not in children[1].stderr
    assert (tmp_path / "run").exists() == (how in ("late", "taken"))


def test_a_rank_is_silent_after_as_many_beats_of_this_one_as_fit_into_the_time():
    store, most = torch.distributed.HashStore(), int(ranks.LOST_AFTER / ranks.BEAT_EVERY)
    watch = ranks._Watch(SimpleNamespace(rank=0, count=3, is_first=True, store=store))
    said = []
    for beat in range(5 + most):
        store.set("beat 1", str(beat))
        store.set("beat 2", str(min(beat, 4)))
        said.append(watch._silent())
    assert said == [""] * len(said)
    assert watch._silent() == "rank 2 has been silent for 42 s" == store.get(ranks.FAILED).decode()


@dataclass(frozen=True)
class Planned(Config):
    plan: bool = False


def plan():
    start(lambda config: print("planned"), Planned, ["--plan"])


def test_what_only_prints_is_done_by_rank_0_alone():
    assert run(2, "plan") == ([0, 0], ["planned\n", ""], ["", ""])


def stop():
    """Rank 0 gets Ctrl-C while it waits for rank 1; then rank 1 does in its part of some work."""
    here = ranks.join("cpu")
    num_steps = 0
    try:
        with LetFinish("this step") as interrupt:
            for num_steps in range(1, 1_000):
                if num_steps == 2 and here.is_first:
                    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
                time.sleep(0.5 if num_steps == 2 and here.rank else 0.01)
                if interrupt.agreed():
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        print(num_steps)
    try:
        together(lambda: os.kill(os.getpid(), signal.SIGINT) or time.sleep(9) if here.rank else "done")
    except KeyboardInterrupt:
        print("also in one rank's work")

    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        here.store.set("interrupted", "")

    try:
        wait = partial(here.store.wait, ["interrupted"])
        together(wait if here.rank else threading.Timer(0.1, interrupt).start)
    except KeyboardInterrupt:
        print("also if it comes while a rank waits")
    here.gather("whoever went on alone would not be here")
    ranks.leave()


def test_ctrl_c_in_one_rank_stops_all_after_the_same_step():
    statuses, printed, errors = run(2, "stop")
    assert statuses == [0, 0], errors
    assert printed[0] == printed[1]
    assert re.fullmatch(
        r"[0-9]{1,2}\nalso in one rank's work\nalso if it comes while a rank waits\n", printed[0]
    )


def write_in_turn(folder):
    ranks.join("cpu")
    journal = Journal(Path(folder, "rows.jsonl"))
    journal.append({"step": ranks.here().rank})
    ranks.leave()


def test_only_the_first_rank_writes_a_log(tmp_path):
    statuses, _, errors = run(2, "write_in_turn", str(tmp_path))
    assert statuses == [0, 0], errors
    assert Journal(tmp_path / "rows.jsonl").read() == [{"step": 0}]


def test_fewer_cards_than_processes_are_refused_with_how_many_there_are(monkeypatch):
    for name, value in {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"is above 2 but .* has 2 cards; pass --nproc_per_node 2"):
        ranks.join("cuda")
