import json
from dataclasses import replace

import pytest
import torch

from kit.machine import CONTEXT, GIB
from kit.memory import measured
from kit.memory.measured import COMPARED_AFTER, PeakMemory, check_free_memory
from kit.memory.phases import RunPlan
from kit.memory.simulate import plan
from kit.train.savings import Savings

CPU = torch.device("cpu")


@pytest.fixture
def card(monkeypatch):
    """No card is here: one that has held 3.21 GiB in tensors, and 3.55 with the gaps between them."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: round(3.21 * GIB))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: round(3.55 * GIB))

    def make(planned, path):
        memory = PeakMemory(CPU, planned, path)
        memory.on_card = True
        return memory

    return make


def test_after_ten_steps_or_the_last_what_a_card_held_is_printed_and_kept_with_the_plan(
    card, tmp_path, capsys
):
    planned = plan("tiny", row_tokens=32)
    for num_steps, when in ((50, COMPARED_AFTER), (4, 4)):
        memory = card(planned, tmp_path / f"{num_steps}.json")
        for step in range(1, when):
            memory.look(step, num_steps)
        assert memory.gib is not None and not memory.path.exists() and capsys.readouterr().out == ""
        memory.look(when, num_steps)
        said = capsys.readouterr().out
        assert f"measured peak 3.21 GiB of tensors, planned {planned.peak / GIB:.2f} GiB (simulated)" in said
        assert f"3.55 GiB reserved for them, planned at most {(planned.peak + 2**26) / GIB:.2f} GiB" in said
        kept = json.loads(memory.path.read_text())
        assert round(kept["measured_peak_gib"], 2) == 3.21 and kept["planned"]["peak"] == planned.peak
        assert round(kept["measured_reserved_gib"], 2) == 3.55
        memory.path.unlink()
        memory.look(when + 1, num_steps)
        assert not memory.path.exists()


def test_without_a_plan_nothing_is_compared_and_on_a_cpu_nothing_is_measured(card, tmp_path, capsys):
    path = tmp_path / "memory.json"
    without_plan, cpu = card(None, path), PeakMemory(CPU, plan("tiny", row_tokens=32), path)
    for step in range(1, COMPARED_AFTER + 1):
        without_plan.look(step, 20)
        cpu.look(step, 20)
    assert cpu.gib is None and capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_a_step_that_ran_out_says_what_is_known(tmp_path):
    memory = PeakMemory(CPU, None, tmp_path)
    error = str(memory.exhausted(7, None))
    assert "step 7 ran out of memory: no plan was made. Pass --resume with settings" in error
    assert "none, so the run starts over" in error

    memory.gib, memory.reserved_gib = 3.21, 3.55
    error = str(memory.exhausted(7, tmp_path / "step_0000005"))
    assert "no plan was made; the steps before peaked at 3.21 GiB, 3.55 GiB reserved." in error
    assert "step_0000005" in error


def test_a_card_with_too_little_free_memory_is_refused_before_anything_loads(monkeypatch):
    step = plan("tiny", row_tokens=256)
    planned = RunPlan(step, lambda slots: replace(step, peak=0), 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (step.total - CONTEXT, 8 * GIB))
    check_free_memory(planned)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (step.total - CONTEXT - 1, 8 * GIB))
    with pytest.raises(ValueError, match="the plan needs"):
        check_free_memory(planned)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(5.67 * GIB), 8 * GIB))
    way_out = r"5\.67 of the card's 8\.00 GiB are free; its largest owners .*, .*, .*--gpu_gb 5\.6 "
    with pytest.raises(ValueError, match=way_out):
        check_free_memory(replace(planned, update=replace(step, peak=7 * GIB)))


def test_a_machine_with_too_little_cpu_memory_for_what_leaves_the_card_is_refused_before_anything_loads(
    monkeypatch,
):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (8 * GIB, 8 * GIB))
    savings = Savings(offload_optimizer=True, offload_gradients=True)
    step = replace(plan("tiny", row_tokens=256, savings=savings), host=3 * GIB)
    planned = RunPlan(step, lambda slots: step, 1)
    monkeypatch.setattr(measured, "free_memory", lambda: 3 * GIB)
    check_free_memory(planned)
    monkeypatch.setattr(measured, "free_memory", lambda: None)  # the system does not tell
    check_free_memory(planned)
    monkeypatch.setattr(measured, "free_memory", lambda: 2 * GIB)
    told = (
        r"keeps 3\.00 GiB in CPU memory \(offload_optimizer, offload_gradients\) but 2\.00 GiB are free; "
        r".* --no_offload_gradients"
    )
    with pytest.raises(ValueError, match=told):
        check_free_memory(planned)
    on_card = plan("tiny", row_tokens=256)
    monkeypatch.setattr(measured, "free_memory", lambda: 0)
    check_free_memory(RunPlan(on_card, lambda slots: on_card, 1))
