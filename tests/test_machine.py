import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kit.machine import describe_machine, peak_resident_bytes, resident_bytes, return_memory

ROOT = Path(__file__).resolve().parents[1]


def test_the_machine_is_named_and_a_missing_gpu_is_said():
    machine = describe_machine()
    assert machine["torch"] == torch.__version__ and machine["cores"] >= 1
    if not torch.cuda.is_available():
        assert "nothing here was timed on a GPU" in machine["gpu"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much memory a process holds")
def test_memory_that_is_touched_and_freed_stays_in_the_peak_only():
    before = resident_bytes()
    size = 2 * (peak_resident_bytes() - before) + 64 * 2**20  # above whatever this process held earlier
    block = mmap.mmap(-1, size)
    block.write(b"\1" * size)
    held = resident_bytes()
    block.close()
    assert held >= before + size * 0.9
    assert peak_resident_bytes() >= before + size * 0.9
    assert resident_bytes() <= held - size * 0.5


@pytest.mark.skipif(sys.platform != "linux", reason="expandable segments exist on Linux only")
def test_segments_of_a_cards_memory_can_grow_unless_the_user_chose_otherwise():
    """Asked of torch itself, which reads the variable when it first allocates, in a process that imports torch first."""
    question = "import torch, kit; print(torch._C._accelerator_getAllocatorSettings())"
    bare = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name} | {
        "PYTHONPATH": str(ROOT)
    }
    for chosen, expected in (
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "garbage_collection_threshold:0.8"},) * 2,
    ):
        expected = expected if isinstance(expected, str) else expected["PYTORCH_ALLOC_CONF"]
        found = subprocess.run(
            [sys.executable, "-c", question], env=bare | chosen, capture_output=True, text=True, check=True
        )
        assert found.stdout.strip() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="expandable segments exist on Linux only")
def test_under_wsl_whose_driver_fails_on_growing_segments_nothing_is_chosen():
    code = "import platform; platform.release = lambda: '6.6.87-microsoft-standard-WSL2'; import os, kit; "
    code += "print([name for name in os.environ if 'ALLOC_CONF' in name])"
    bare = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name} | {
        "PYTHONPATH": str(ROOT)
    }
    found = subprocess.run([sys.executable, "-c", code], env=bare, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_memory_is_returned_on_a_card_and_left_alone_on_a_cpu(monkeypatch):
    returned = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: returned.append(True))
    return_memory(torch.device("cpu"))
    assert not returned
    return_memory(torch.device("cuda"))
    assert returned == [True]
