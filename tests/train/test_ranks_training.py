"""Train in two and in three processes on a CPU: they must end with the weights of one."""

import faulthandler
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from children import call, free_port, start_ranks, wait
from conftest import make_model, random_documents
from safetensors.torch import load_file, save_file
from test_train_loop import LENGTHS, Config
from transformers import AutoModelForCausalLM

from kit import ranks
from kit.command import Stopped
from kit.data.toy import make_tokenizer
from kit.packing import PackedBatch
from kit.run import RunFolder
from kit.train import checkpoint, optimizer, sum_gradients
from kit.train.loop import TrainingPlan, train
from kit.train.optimizer import AdamW8bit, owned, share_out, states_of
from kit.train.savings import Savings
from kit.train.step import TrainingStep
from kit.train.sum_gradients import InOrder, in_buckets
from kit.train.weight_updates import NotFinite

LR, NUM_STEPS = 1e-2, 3
# AdamW divides a gradient by at least its eps. So the last bit of a gradient, which another order of its sum
# may change (its norm is clipped to at most 1), changes a weight by at most this per step
TO_ROUNDING = LR * torch.finfo(torch.float64).eps / 1e-8
SEVERAL = [[9, 4, 23], [5], [31, 2, 1], [8, 8], [3, 14]]  # of each row's documents, in a step
CARDS = Savings(recompute=False)
IN_CPU_MEMORY = Savings(offload_gradients=True)
LEAN = Savings(optimizer="adamw8bit", offload_gradients=True, offload_optimizer=True, tile_tokens=7)
CASES = {  # family, dtype, savings, rows of each step, norm to clip to, whether a parameter is never used
    "untied": ("llama", torch.float64, CARDS, (4, 1, 5), 0.5, True),
    "tied": ("gemma3", torch.float64, Savings(), (4, 1, 5), 0.5, False),
    "untied, in CPU memory": ("llama", torch.float64, IN_CPU_MEMORY, (4, 1, 5), 0.5, True),
    "tied, in CPU memory": ("gemma3", torch.float64, IN_CPU_MEMORY, (4, 1, 5), 0.5, True),
    "one row": ("gemma3", torch.bfloat16, Savings(), (1, 1, 1), 0.5, False),
    "one row, in CPU memory": ("gemma3", torch.float32, IN_CPU_MEMORY, (1, 1, 1), 0.0, False),
    "one row, 8 bits in CPU memory": ("qwen2", torch.bfloat16, LEAN, (1, 1, 1), 0.0, True),
}
EXACT = [case for case in CASES if "one row" in case]  # zeros are added to its gradient


def make(case: str) -> TrainingStep:
    family, dtype, savings, _, max_grad_norm, with_unused = CASES[case]
    model = make_model(family, dtype)
    if with_unused:
        model.unused = torch.nn.Parameter(torch.ones(300, dtype=dtype))
    return TrainingStep(model, savings, lr=LR, weight_decay=0.1, max_grad_norm=max_grad_norm)


def rows(step: int, count: int) -> list[PackedBatch]:
    return [PackedBatch.build(random_documents(SEVERAL[i], seed=9 * step + i)) for i in range(count)]


def weights_of(model) -> dict:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def trained(case: str, folder: Path) -> dict:
    """Train a few steps, write a checkpoint, and return losses, norms and weights."""
    step = make(case)
    results = [step(rows(i, count)) for i, count in enumerate(CASES[case][3])]
    step.close()
    checkpoint.save(folder / case, step.model, make_tokenizer(), step.optimizer, NUM_STEPS)
    loss, norm = (torch.stack([x.double() for x in found]) for found in zip(*results, strict=True))
    return {"losses": loss, "norms": norm, **weights_of(step.model)}


def resumed(case: str, folder: Path) -> dict:
    """Go on from the checkpoint in a folder for one step. Return the weights."""
    step = make(case)
    assert checkpoint.load(checkpoint.latest(folder / case), step.model, step.optimizer) == NUM_STEPS
    step(rows(NUM_STEPS, 1))
    step.close()
    return weights_of(step.model)


def not_finite(case: str) -> None:
    """Only the last rank's loss is NaN, and all must see it with their weights as they were."""
    step, me = make(case), ranks.here()
    before = weights_of(step.model)

    def loss_of(hidden, weight, batch, scale):
        return (hidden @ weight.T).logsumexp(-1).sum() * (torch.nan if me.rank == me.count - 1 else scale)

    with pytest.raises(NotFinite, match=r"loss is nan"):
        step(rows(0, 4), loss_of)
    step.close()
    assert all(torch.equal(x, before[name]) for name, x in weights_of(step.model).items())


def refused() -> None:
    me, model = ranks.here().rank, make_model("llama")
    with pytest.raises(ValueError, match=r"^tile_tokens is 0 on rank 0 on .* but 1 on rank 1"):
        TrainingStep(model, Savings(tile_tokens=min(me, 1)), lr=LR)
    with pytest.raises(ValueError, match=r"^plan is '\[1\]' on rank 0 .* but '\[2\]' on rank 1"):
        checkpoint.name_of_run(model, documents="same", plan=[1 + min(me, 1)], settings=())
    with torch.no_grad():
        model.lm_head.weight[0, 0] += me
    with pytest.raises(ValueError, match=r"^weights is '\w+' on rank 0 "):
        checkpoint.name_of_run(model, documents="same")
    with pytest.raises(ValueError, match=r"update_in_backward is on but \d ranks .*--offload_gradients"):
        TrainingStep(model, Savings(update_in_backward=True), lr=LR)
    with pytest.raises(ValueError, match=r"head_update is blocked but \d ranks sum whole gradients"):
        TrainingStep(model, Savings(offload_gradients=True, head_update="blocked"), lr=LR)


def sums_start_in_the_backward_pass() -> None:
    """At the end of the backward pass, each rank that has a row has started every sum."""
    sum_gradients.BUCKET = 20_000
    step = TrainingStep(make_model("llama"), Savings(), lr=LR)
    updates, order, started = step.updates, step.updates.order, []
    finish = updates.finish

    def recorded(loss):
        started.append(order.next)
        return finish(loss)

    updates.finish = recorded
    step(rows(0, 5))
    step(rows(0, 1))
    step.close()
    assert len(order.buckets) > 5
    assert started == [len(order.buckets), 0 if ranks.here().rank else len(order.buckets)]
    assert not step.model.lm_head.weight._post_accumulate_grad_hooks


def train_ten_steps(out: Path, after_step=None, after_every=1):
    documents = random_documents(LENGTHS)
    plan = TrainingPlan.make(LENGTHS, row_tokens=32, batch_traces=4, epochs=9, max_steps=10)
    run = RunFolder.open(Config(str(out), (out / "config.json").exists()))
    model = make_model("llama", torch.float64)
    options = {"savings": IN_CPU_MEMORY, "warmup_ratio": 0.1, "checkpoint_every": 5, "after_step": after_step}
    options |= {"after_every": after_every}
    train(model, make_tokenizer(), documents, plan, run, lr=LR, **options)


def saves_each_measured_step_once(folder: Path) -> None:
    saved, save = [], checkpoint.save
    checkpoint.save = lambda *arguments: saved.append(arguments[4]) or save(*arguments)
    train_ten_steps(folder / "every 4", lambda step: None, after_every=4)
    train_ten_steps(folder / "every 5", lambda step: None, after_every=5)
    checkpoint.save = save
    assert saved == [4, 5, 8, 5, 10]


def work(rank: int, count: int, port: int, folder: str) -> None:
    """Do what one of the ranks does, and write what it found."""
    faulthandler.dump_traceback_later(900, exit=True)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    optimizer.TRAINED += ({torch.float64},)
    me, folder = ranks.join("cpu"), Path(folder)
    for case in CASES:
        found = trained(case, folder / str(count))
        if count == 3 and case in EXACT:
            found |= {f"resumed {name}": x for name, x in resumed(case, folder / "2").items()}
        save_file(found, folder / f"{case} {count} {rank}")
    not_finite("untied")
    not_finite("tied, in CPU memory")
    refused()
    sums_start_in_the_backward_pass()
    saves_each_measured_step_once(folder / f"saved by {count}")

    def die(step: int) -> None:
        if step == 7:
            me.gather(step)
            os.kill(os.getpid(), signal.SIGKILL)

    def interrupt(step: int) -> None:
        if step == 8 and rank == 2:
            os.kill(os.getpid(), signal.SIGINT)

    out = folder / "run"
    if count == 2:
        train_ten_steps(out, die)
    with pytest.raises(Stopped, match="at step 8 of 10, checkpoint 8 kept"):
        train_ten_steps(out, interrupt)
    assert checkpoint.latest(out / "checkpoints").name == "step_0000008"
    train_ten_steps(out)
    ranks.leave()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run two ranks, which are killed at the end, and then three."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "run").mkdir()
    for count in (2, 3):
        port = free_port()
        children = [call(__file__, "work", rank, count, port, str(folder)) for rank in range(count)]
        for child in children:
            status = child.wait()
            assert (status != 0) == (count == 2), child.stderr
        if count == 2:  # killed while step 7 was measured, which is saved before
            latest = checkpoint.latest(folder / "run" / "checkpoints")
            assert latest and latest.name == "step_0000007", children[0].stderr
    return folder


@pytest.fixture(autouse=True)
def float64_is_trained(monkeypatch):
    monkeypatch.setattr(optimizer, "TRAINED", (*optimizer.TRAINED, {torch.float64}))


def of_ranks(folder: Path, case: str, count: int) -> dict:
    """Return what rank 0 found; the others must have found the same bits."""
    first, *others = (load_file(folder / f"{case} {count} {rank}") for rank in range(count))
    for other in others:
        assert not [name for name, x in first.items() if not torch.equal(x, other[name])]
    return first


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_ranks_end_with_the_weights_of_one_process(case, count, folder, tmp_path):
    """Some steps have fewer rows than ranks. In float64 all is equal to rounding, and one row is exact."""
    expected, found = trained(case, tmp_path), of_ranks(folder, case, count)
    atol, eps = (0 if case in EXACT else NUM_STEPS * TO_ROUNDING), torch.finfo(CASES[case][1]).eps
    for name, x in expected.items():
        # losses are fp32; norms are rounded to the gradients' dtype, in CPU memory by each rank
        rtol = {"losses": 1e-6, "norms": max(1e-6, eps)}.get(name, 0)
        text = f"{name} of {case}"
        torch.testing.assert_close(
            found[name], x, atol=atol, rtol=rtol, msg=lambda why, text=text: text + why
        )


@pytest.mark.slow
@pytest.mark.parametrize("case", EXACT)
def test_a_checkpoint_is_the_same_file_whatever_the_number_of_ranks_and_any_number_resumes(
    case, folder, tmp_path
):
    trained(case, tmp_path)
    files = [
        checkpoint.latest(place / case) / name
        for place in (tmp_path, folder / "2", folder / "3")
        for name in ("optimizer.safetensors", "model.safetensors")
    ]
    assert len({file.read_bytes() for file in files}) == 2
    expected, found = resumed(case, folder / "3"), of_ranks(folder, case, 3)
    assert not [name for name, x in expected.items() if not torch.equal(found[f"resumed {name}"], x)]


@pytest.mark.slow
def test_a_run_killed_with_two_ranks_and_interrupted_with_three_ends_as_one_process_does(folder, tmp_path):
    train_ten_steps(tmp_path / "whole")
    finished = [
        load_file(out / "model" / "model.safetensors") for out in (tmp_path / "whole", folder / "run")
    ]
    for name, x in finished[0].items():
        torch.testing.assert_close(finished[1][name], x, atol=10 * TO_ROUNDING, rtol=0)
    logs = [
        [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (tmp_path / "whole", folder / "run")
    ]
    counted = [[(row["step"], row["tokens"], row["targets"], row["traces"]) for row in log] for log in logs]
    assert counted[0] == counted[1] and len(counted[0]) == 10


def save_in_fp32(out: str) -> None:
    """Train bf16 weights with one row per step, and save them. Each one's rest lies on one rank only."""
    ranks.join("cpu")
    documents, model = random_documents(LENGTHS), make_model("qwen2", torch.bfloat16)
    plan = TrainingPlan.make(LENGTHS, row_tokens=32, batch_traces=1, epochs=1, max_steps=NUM_STEPS)
    run = RunFolder.open(Config(out, resume=False))
    how = {"savings": LEAN, "warmup_ratio": 0.0, "max_grad_norm": 0.0, "save_fp32": True}
    train(model, make_tokenizer(), documents, plan, run, lr=LR, **how)
    ranks.leave()


@pytest.mark.slow
def test_two_ranks_save_the_same_file_in_fp32_as_one_process(tmp_path):
    save_in_fp32(str(tmp_path / "alone"))
    for child in start_ranks(2, __file__, "save_in_fp32", str(tmp_path / "shared")):
        wait(child)
    alone, shared = (tmp_path / name / "model" / "model.safetensors" for name in ("alone", "shared"))
    assert alone.read_bytes() == shared.read_bytes()
    weights = load_file(shared)
    assert {x.dtype for x in weights.values()} == {torch.float32}
    assert all(not torch.equal(x, x.bfloat16().float()) for x in weights.values())
    loaded = AutoModelForCausalLM.from_pretrained(shared.parent)
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.get_input_embeddings().weight, weights["model.embed_tokens.weight"])


def test_a_bucket_that_is_complete_early_waits_for_its_turn_and_the_end_starts_the_rest():
    a, b, c, d = (torch.nn.Parameter(torch.zeros(1)) for _ in range(4))
    started = []
    order = InOrder([[a], [b, c], [d], [a]], started.append)
    for parameter in (d, c, b):
        order.ready(parameter)
    assert started == []
    order.ready(a)
    assert started == [[a], [b, c], [d]]
    order.flush()
    assert started == [[a], [b, c], [d], [a]]
    order.restart()
    order.flush()
    assert len(started) == 8


def test_buckets_hold_one_dtype_each_and_a_large_parameter_alone(monkeypatch):
    monkeypatch.setattr(sum_gradients, "BUCKET", 64)
    sizes = [(40, 4), (8, 4), (8, 4), (8, 2), (1, 2), (99, 2)]
    dtypes = {4: torch.float32, 2: torch.bfloat16}
    parameters = [torch.nn.Parameter(torch.zeros(n, dtype=dtypes[size])) for n, size in sizes]
    number = {parameter: i for i, parameter in enumerate(parameters)}
    assert [[number[p] for p in bucket] for bucket in in_buckets(parameters)] == [[5], [4, 3], [2, 1], [0]]


def test_shares_are_balanced_and_only_the_owner_has_states():
    assert share_out([30, 5, 5, 5, 10, 5], 3) == [0, 2, 2, 1, 1, 2]
    model = make_model("gemma3", torch.bfloat16)
    names = []
    for rank in range(3):
        mine = optimizer.make_optimizer(model, lr=LR, exact_weights=True, share=(rank, 3))
        assert isinstance(mine, AdamW8bit) and len(mine.place) == len(list(model.parameters()))
        assert set(mine.state) == set(owned(mine.param_groups[0]))
        names += states_of(mine)
    assert sorted(names) == sorted(states_of(optimizer.make_optimizer(model, lr=LR, exact_weights=True)))
