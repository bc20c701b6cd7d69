"""Jobs in processes of their own: results in the order they end, a job's error as it is, a process that dies named."""

import os
import platform
import signal
import time

import pytest
import torch

from kit.valley.processes import KEEP_FREED_MEMORY, run_apart


def square(name, number):
    time.sleep(0.4 if name == "slow" else 0)
    return number**2, torch.get_num_threads(), os.getpid()


def fail(name):
    if name == "refused":
        raise ValueError("row_tokens is 3; pass 4")
    if name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise KeyError("missing")


def test_every_job_is_done_once_in_one_thread_and_no_more_processes_run_than_were_asked_for(tmp_path):
    jobs = [("slow", 3), ("quick", 4), ("quick", 5), ("quick", 6)]
    seen = []
    found = dict(
        run_apart(
            square,
            jobs,
            num_workers=2,
            log=tmp_path / "log",
            on_wait=lambda running: seen.append(len(running)),
        )
    )
    assert {job: result[0] for job, result in found.items()} == {job: job[1] ** 2 for job in jobs}
    assert {result[1] for result in found.values()} == {1}
    assert len({result[2] for result in found.values()}) == 2 and os.getpid() not in {
        result[2] for result in found.values()
    }
    assert max(seen) <= 2 and seen[-1] == 0


def test_nothing_to_do_is_done_at_once(tmp_path):
    assert (
        list(run_apart(square, [], num_workers=2, log=tmp_path / "log", on_wait=lambda running: None)) == []
    )


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("refused", ValueError, "^row_tokens is 3; pass 4$"),
        ("wrong", RuntimeError, "wrong failed:\n(.|\n)*KeyError: 'missing'"),
        ("killed", RuntimeError, "the process of killed ended without a word(.|\n)*fewer --workers"),
    ],
)
def test_a_job_that_fails_ends_the_others_and_says_why(tmp_path, name, error, message):
    with pytest.raises(error, match=message):
        list(
            run_apart(fail, [(name,)] * 3, num_workers=2, log=tmp_path / "log", on_wait=lambda running: None)
        )


def use_memory(name):
    """The allocator's settings, and how many pages 40 blocks of 16 MiB, used one after another, took from the system."""
    settings = {key: os.environ.get(key) for key in KEEP_FREED_MEMORY}
    if platform.libc_ver()[0] != "glibc":
        return settings, 0, 1
    import resource  # not on Windows

    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(40):
        torch.ones(2**22)
    return (
        settings,
        resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before,
        2**24 // resource.getpagesize(),
    )


def test_freed_memory_stays_with_the_processes_and_the_environment_is_as_it_was(tmp_path, monkeypatch):
    for name in KEEP_FREED_MEMORY:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MALLOC_TOP_PAD_", "12345")
    before = dict(os.environ)
    ((_, (settings, faults, pages)),) = run_apart(
        use_memory, [("job",)], num_workers=1, log=tmp_path / "log", on_wait=lambda running: None
    )
    assert settings == KEEP_FREED_MEMORY | {"MALLOC_TOP_PAD_": "12345"}
    assert dict(os.environ) == before
    assert faults < 4 * pages  # of 40 blocks
