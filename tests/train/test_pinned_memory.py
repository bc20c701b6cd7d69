"""Test pinned CPU memory without a driver: a stand-in records what it is asked to pin."""

import gc
from types import SimpleNamespace

import pytest
import torch

from kit.train.offload import host_empty


@pytest.fixture
def driver(monkeypatch):
    """Record the pinned ranges, address -> bytes. `error`: what the next request returns."""
    found = SimpleNamespace(pinned={}, error=0, waited_for=[])

    def register(address, num_bytes, flags):
        if not found.error:
            found.pinned[address] = num_bytes
        return found.error

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=found.pinned.pop)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "synchronize", found.waited_for.append)
    return found


def test_exactly_as_many_bytes_are_pinned_as_are_asked_for_and_until_the_last_view_is_gone(
    driver, monkeypatch
):
    memory = host_empty(3_000_001, for_card=True)
    assert driver.pinned == {memory.data_ptr(): 3_000_001} and memory.untyped_storage().nbytes() == 3_000_001
    numbers = memory[:3_000_000].view(torch.float32).fill_(1.5)
    del memory
    gc.collect()
    assert driver.pinned and numbers.sum() == 1.5 * 750_000
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)  # as in any other thread
    del numbers
    gc.collect()
    assert not driver.pinned and driver.waited_for == [1]


def test_memory_for_no_card_and_memory_of_no_bytes_is_not_pinned(driver):
    assert len(host_empty(100, for_card=False)) == 100 and len(host_empty(0, for_card=True)) == 0
    assert not driver.pinned


def test_memory_that_cannot_be_pinned_is_pageable_and_a_warning_says_how_to_pin_it(driver, monkeypatch):
    """CUDA's runtime reports the failure at the next launch, so one launch is made for it alone."""
    driver.error, launches = 2, []

    def launch(*arguments, **options):
        launches.append(options["device"])
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "ones", launch)
    with pytest.warns(UserWarning, match=r"pageable, so the card waits for every copy: .*error 2.*ulimit -l"):
        memory = host_empty(50, for_card=True)
    assert len(memory) == 50 and not driver.pinned and launches == ["cuda"]
