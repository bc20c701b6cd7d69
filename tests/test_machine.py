import mmap
import sys

import pytest
import torch

from kit.machine import describe_machine, peak_resident_bytes, resident_bytes


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
