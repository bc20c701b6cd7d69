"""Claims between real processes: a job has one holder, and only a dead one loses it."""

import errno
import fcntl
import json
import os
import signal
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
from children import call, wait

from kit.lock import LOCK, hold, release
from kit.valley.claims import ALIVE, CLAIM, JOURNAL, PROCESSES, claiming


@pytest.fixture(scope="module", autouse=True)
def server():
    """Start the process that children are forked from before a small recipe does, for tests/children.py."""
    forkserver.ensure_running()


def take_all(study, name, go, num_jobs):
    """Claim as many jobs as possible, and write down which."""
    with claiming(Path(study)) as claims:
        Path(study, f"{name}-ready").touch()
        while not Path(go).exists():
            time.sleep(0.001)
        taken = [job for job in range(num_jobs) if claims.take(Path(study, "cells", str(job)))]
        Path(study, name).write_text(json.dumps(taken))
        while not Path(study, "end").exists():
            time.sleep(0.01)


def wait_for(*files):
    while not all(file.exists() for file in files):
        time.sleep(0.01)


def test_of_two_processes_that_claim_the_same_jobs_each_job_has_one(tmp_path):
    children = [call(__file__, "take_all", str(tmp_path), name, str(tmp_path / "go"), 300) for name in "ab"]
    wait_for(tmp_path / "a-ready", tmp_path / "b-ready")
    (tmp_path / "go").touch()
    wait_for(tmp_path / "a", tmp_path / "b")
    with claiming(tmp_path) as claims:
        assert not any(claims.take(tmp_path / "cells" / str(job)) for job in range(300))
    (tmp_path / "end").touch()
    for child in children:
        wait(child)
    taken = [job for name in "ab" for job in json.loads((tmp_path / name).read_text())]
    assert len(taken) == len({*taken}) == 300
    with claiming(tmp_path) as claims:  # both have ended, and nothing has become of their claims
        assert claims.take(tmp_path / "cells" / "0") and not claims.take(tmp_path / "cells" / "0")


def test_a_killed_process_of_this_machine_loses_its_jobs_at_once_and_a_stopped_one_keeps_them(tmp_path):
    child = call(__file__, "take_all", str(tmp_path), "a", str(tmp_path), 1)
    wait_for(tmp_path / "a")
    job = tmp_path / "cells" / "0"
    with claiming(tmp_path) as claims:
        os.kill(child._process.pid, signal.SIGSTOP)
        assert not claims.take(job)
        child.kill()
        hold(job)  # as its run does, which outlives it for a moment
        assert not claims.take(job)
        release(job)
        assert claims.take(job)


def elsewhere(study, *jobs):
    """Write what a process of another machine leaves. Return the file that shows that it is alive."""
    folder = study / PROCESSES / "001"
    folder.mkdir(parents=True)
    (folder / JOURNAL).touch()
    (folder / LOCK).write_text("process 7 on another")
    (folder / ALIVE).write_text(json.dumps({"machine": "another", "beat": 1}))
    for job in jobs:
        job.mkdir(parents=True)
        (job / f"{CLAIM}1").write_text("001")
    return folder / ALIVE


def test_the_jobs_of_another_machine_are_taken_over_once_it_is_silent_for_a_lease(tmp_path):
    job, lease = tmp_path / "cells" / "a", 2.0
    alive = elsewhere(tmp_path, job)
    with claiming(tmp_path, lease) as claims:
        for beat in range(2, 6):  # for two leases
            alive.write_text(json.dumps({"machine": "another", "beat": beat}))
            last, until = time.monotonic(), time.monotonic() + lease / 2
            while time.monotonic() < until:
                assert not claims.take(job)
        while not claims.take(job):
            time.sleep(0.01)
        assert time.monotonic() - last >= lease
        assert (job / f"{CLAIM}2").read_text() == claims.folder.name


def test_what_failed_on_a_machine_that_has_been_silent_for_a_lease_is_tried_again(tmp_path):
    alive = elsewhere(tmp_path)
    with claiming(tmp_path) as claims:
        assert claims.ended == set()
    os.utime(alive, (0, 0))
    with claiming(tmp_path) as claims:
        assert alive.parent in claims.ended


def test_a_process_that_was_taken_for_dead_sees_that_its_job_is_lost(tmp_path):
    job = tmp_path / "cells" / "a"
    with claiming(tmp_path) as claims:
        assert claims.take(job) and not claims.is_lost(job)
        (job / f"{CLAIM}2").write_text("002")
        assert claims.is_lost(job)


def test_a_claim_without_a_name_is_void_after_a_lease_for_its_process_died_before_it_wrote_one(tmp_path):
    job = tmp_path / "cells" / "a"
    job.mkdir(parents=True)
    (job / f"{CLAIM}1").touch()
    with claiming(tmp_path, 0.2) as claims:
        assert not claims.take(job)
        time.sleep(0.25)
        assert claims.take(job)


def test_a_second_process_is_refused_where_the_file_system_has_no_locks(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with claiming(tmp_path) as claims:
        assert claims.take(tmp_path / "cells" / "a")  # alone it may
        message = r"in use by process \d+ on .* no locks.*delete .*001/alive"
        with pytest.raises(ValueError, match=message), claiming(tmp_path):
            pass
    with claiming(tmp_path):
        pass  # the first has ended


def test_locks_that_exclude_nobody_are_none(tmp_path, monkeypatch):
    elsewhere(tmp_path)
    with claiming(tmp_path):
        pass
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    with (
        pytest.raises(ValueError, match=r"in use by process 7 on another, and .* no locks"),
        claiming(tmp_path),
    ):
        pass
