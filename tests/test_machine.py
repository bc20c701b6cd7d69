import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kit import models
from kit.machine import (
    describe_machine,
    free_memory,
    one_thread_if_small,
    peak_resident_bytes,
    require_gpu,
    resident_bytes,
    return_memory,
)

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_SETTING = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
WITHOUT_SETTING["PYTHONPATH"] = str(ROOT)


def test_the_machine_is_named_and_a_missing_gpu_is_mentioned():
    machine = describe_machine()
    assert machine["torch"] == torch.__version__ and machine["cores"] >= 1
    if not torch.cuda.is_available():
        assert "nothing here was timed on a GPU" in machine["gpu"]


def test_without_a_gpu_a_recipe_ends_with_what_works_instead_and_on_a_cpu_it_goes_on(monkeypatch):
    instead = {"python x.py --smoke": "a minute", "python x.py --device cpu": "slow:\n      --steps 1"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    require_gpu("cpu", "a 1B model", instead)
    with pytest.raises(ValueError, match="needs an NVIDIA GPU") as refused:
        require_gpu("cuda", "a 1B model", instead)
    assert str(refused.value).splitlines() == [
        "a 1B model needs an NVIDIA GPU and none is here. What works here:",
        "  python x.py --smoke         a minute",
        "  python x.py --device cpu    slow:",
        "      --steps 1",
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    require_gpu("cuda", "a 1B model", instead)
    monkeypatch.setattr(torch.version, "hip", "7.1")
    with pytest.raises(
        ValueError, match=r"a 1B model needs an NVIDIA GPU and this torch is for AMD cards, .*:"
    ):
        require_gpu("cuda", "a 1B model", instead)


def files(root, texts):
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V1 = "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("groups", "free"),
    [
        ({}, 9_000),
        ({"proc/self/cgroup": "0::/a/b\n"}, 9_000),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max\n"}, 9_000),
        (
            {
                "proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/memory.max": "8000\n", "sys/fs/cgroup/a/memory.current": "7000\n",
                "sys/fs/cgroup/a/memory.stat": "anon 5000\ninactive_file 1500\nactive_file 100\n",
            },
            2_500,
        ),
        (  # a container whose namespace is its own sees the limit at the top
            {
                "proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "5000\n",
                "sys/fs/cgroup/memory.current": "6000\n", "sys/fs/cgroup/memory.stat": "inactive_file 0\n",
            },
            0,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/not/seen\n0::/\n",
                f"{V1}/memory.limit_in_bytes": "4000\n", f"{V1}/memory.usage_in_bytes": "3000\n",
                f"{V1}/memory.stat": "inactive_file 7\ntotal_inactive_file 2000\n",
            },
            3_000,
        ),
    ],
)  # fmt: skip
def test_free_memory_is_what_the_system_has_or_less_if_a_containers_limit_leaves_less(groups, free, tmp_path):
    meminfo = "MemTotal: 99 kB\nMemFree: 1 kB\nMemAvailable: 9 kB\n"
    found = free_memory(files(tmp_path, {"proc/meminfo": meminfo, **groups}))
    assert found == (9 * 1024 if free == 9_000 else free)


def test_free_memory_is_none_where_the_system_does_not_tell(tmp_path):
    assert free_memory(tmp_path) is None
    if sys.platform == "linux":
        assert 0 < free_memory() < 2**50


class Layer(torch.nn.Linear):
    device = torch.device("cpu")


@pytest.mark.parametrize(
    ("make", "setting", "threads"),
    [
        (lambda: models.load("tiny", device="cpu")[0], None, 1),
        (lambda: models.load("tiny", device="cpu")[0], "2", 2),  # the user's own choice
        (lambda: Layer(512, 512), None, 1),
        (lambda: Layer(512, 513), None, 2),
    ],
    ids=["tiny", "tiny, set", "1 MiB", "above"],
)
def test_a_small_model_computes_on_one_thread_and_says_so(make, setting, threads, monkeypatch, capsys):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if setting:
        monkeypatch.setenv("OMP_NUM_THREADS", setting)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(2):  # said once
            one_thread_if_small(make())
        assert torch.get_num_threads() == threads
        said = capsys.readouterr().out
        assert said.count("threads     1 of 2: this model's matrices are too small") == (threads == 1)
    finally:
        torch.set_num_threads(before)


def test_a_model_on_a_card_leaves_the_threads_alone(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before, model = torch.get_num_threads(), Layer(2, 2)
    model.device = torch.device("cuda")
    torch.set_num_threads(2)
    try:
        one_thread_if_small(model)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how much memory a process uses")
def test_memory_that_is_touched_and_freed_stays_in_the_peak_only():
    before = resident_bytes()
    size = 2 * (peak_resident_bytes() - before) + 64 * 2**20  # above whatever this process used earlier
    block = mmap.mmap(-1, size)
    block.write(b"\1" * size)
    held = resident_bytes()
    block.close()
    assert held >= before + size * 0.9
    assert peak_resident_bytes() >= before + size * 0.9
    assert resident_bytes() <= held - size * 0.5


@pytest.mark.skipif(sys.platform != "linux", reason="expandable segments exist on Linux only")
@pytest.mark.parametrize(
    ("chosen", "expected"),
    [("", "expandable_segments:True"), ("garbage_collection_threshold:0.8",) * 2],
    ids=["by the kit", "by the user"],
)
def test_segments_of_a_cards_memory_can_grow_unless_the_user_chose_otherwise(chosen, expected):
    """Ask torch, which reads the variable when it first allocates, in a process that imports torch first."""
    question = "import torch, kit; print(torch._C._accelerator_getAllocatorSettings())"
    environment = WITHOUT_SETTING | ({"PYTORCH_ALLOC_CONF": chosen} if chosen else {})
    command = [sys.executable, "-c", question]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="expandable segments exist on Linux only")
def test_under_wsl_whose_driver_fails_on_growing_segments_nothing_is_chosen():
    code = "import platform; platform.release = lambda: '6.6.87-microsoft-standard-WSL2'; import os, kit; "
    code += "print([name for name in os.environ if 'ALLOC_CONF' in name])"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env=WITHOUT_SETTING, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_memory_is_returned_on_a_card_and_left_alone_on_a_cpu(monkeypatch):
    returned = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: returned.append(True))
    return_memory(torch.device("cpu"))
    assert not returned
    return_memory(torch.device("cuda"))
    assert returned == [True]
