import json
import re
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from children import call, train_unbroken_and_killed
from conftest import make_model, random_documents
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from kit.data.toy import make_tokenizer
from kit.machine import GIB
from kit.memory.measured import PeakMemory
from kit.memory.simulate import plan
from kit.models.backbone import head_weight, hidden_states
from kit.models.families import family_of
from kit.models.layers import norm_of
from kit.packing import PackedBatch
from kit.run import RunFolder
from kit.train import checkpoint
from kit.train.loop import TrainingPlan, train
from kit.train.optimizer import make_optimizer
from kit.train.savings import Savings
from kit.train.step import TrainingStep

LENGTHS = [9, 4, 23, 12, 7, 30, 5, 18]


@dataclass(frozen=True)
class Config:
    out: str
    resume: bool = False


def mean_token_loss(model, documents):
    """Compute the loss by definition: the mean cross-entropy of all response tokens, document by document."""
    losses = []
    for document in documents:
        batch = PackedBatch.build([document])
        logits = hidden_states(model, batch) @ head_weight(model).T
        losses.append(
            torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")[batch.targets >= 0]
        )
    return torch.cat(losses).mean()


@pytest.mark.parametrize("packs", [[list(range(8))], [[0, 2], [1, 3, 4], [5], [6, 7]]])
def test_every_target_has_the_same_weight_however_documents_share_rows(tiny_model, packs):
    documents = random_documents(LENGTHS)
    truth = mean_token_loss(tiny_model, documents)
    truth.backward()
    expected = [p.grad.clone() for p in tiny_model.parameters()]
    batches = [PackedBatch.build([documents[i] for i in pack]) for pack in packs]
    loss, norm = TrainingStep(tiny_model, Savings(), lr=0.0)(batches)
    torch.testing.assert_close(loss, truth.detach())
    torch.testing.assert_close(norm, torch.stack([g.norm() for g in expected]).norm())
    for parameter, gradient in zip(tiny_model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)


def test_clipping_scales_the_gradient_to_the_norm_it_is_given():
    model = make_model("llama")
    batch = PackedBatch.build(random_documents(LENGTHS))
    _, norm = TrainingStep(model, Savings(), lr=0.0, max_grad_norm=0.1)([batch])
    assert norm > 0.1
    clipped = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    torch.testing.assert_close(clipped, torch.tensor(0.1), atol=1e-6, rtol=1e-4)


def test_the_plan_has_every_trace_once_per_epoch_and_prints_its_size():
    plan = TrainingPlan.make(LENGTHS, row_tokens=32, batch_traces=2, epochs=3)
    seen = [i for step in plan.steps for pack in step for i in pack]
    assert sorted(seen) == sorted(list(range(8)) * 3)
    assert (plan.traces, plan.tokens) == (24, 3 * sum(LENGTHS))
    assert "optimizer steps of" in str(plan)
    assert "packs of up to 32 tokens" in str(plan)
    short = TrainingPlan.make(LENGTHS, row_tokens=32, batch_traces=2, epochs=3, max_steps=2)
    assert short.steps == plan.steps[:2]
    with pytest.raises(ValueError, match="epochs is 0"):
        TrainingPlan.make(LENGTHS, row_tokens=32, batch_traces=2, epochs=0)


def run_training(
    out, family="llama", *, steps=10, resume=False, lr=1e-2, dtype=torch.float32, before_norm=None, **options
):
    documents = random_documents(LENGTHS)
    training_plan = TrainingPlan.make(
        list(map(len, documents)), row_tokens=32, batch_traces=2, epochs=9, max_steps=steps
    )
    run = RunFolder.open(Config(str(out), resume))
    model = make_model(family, dtype)
    if before_norm:
        norm_of(model.model.norm, family_of(model.config)).register_forward_pre_hook(before_norm)
    options = {"lr": lr, "warmup_ratio": 0.1, "weight_decay": 0.01, "checkpoint_every": 5} | options
    return model, train(model, make_tokenizer(), documents, training_plan, run, **options)


def test_the_loss_falls_and_a_line_is_written_per_step(tmp_path, capsys):
    _, folder = run_training(tmp_path / "run", steps=30, checkpoint_every=0)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    shown = rf"training: 30 of 30 steps in \d:\d\d:\d\d; loss {rows[-1]['loss']:.3f}, [\d,]+ tokens/s\n"
    assert re.fullmatch(shown, capsys.readouterr().err)
    assert (folder / "model.safetensors").is_file()
    assert (folder / "tokenizer.json").is_file()


@pytest.mark.parametrize("family", ["llama", "gemma3"])  # untied and tied head
def test_a_model_is_saved_in_fp32_on_demand_with_the_bits_that_bf16_lacks(tmp_path, family):
    options = {"dtype": torch.bfloat16, "steps": 3}
    model, plain = run_training(tmp_path / "bf16", family, **options)
    same, folder = run_training(tmp_path / "fp32", family, **options, save_fp32=True)
    in_bf16, in_fp32 = (load_file(path / "model.safetensors") for path in (plain, folder))
    assert {x.dtype for x in in_bf16.values()} == {torch.bfloat16} and in_bf16.keys() == in_fp32.keys()
    for name, parameter in same.named_parameters():  # which stay as they are, for whoever goes on with them
        whole, rounded = in_fp32[name], in_bf16[name]
        assert whole.dtype == torch.float32 and parameter.dtype == torch.bfloat16
        nearest = (whole.view(torch.int32) + 0x8000 >> 16).to(torch.int16).view(torch.bfloat16)
        assert torch.equal(parameter, rounded) and torch.equal(nearest, rounded)
        assert not torch.equal(whole, rounded.float()), name
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.get_input_embeddings().weight, in_fp32["model.embed_tokens.weight"])
    assert model.dtype == same.config.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"save_fp32 is on but exact_weights is off.*leave out --save_fp32"):
        run_training(tmp_path / "no", family, savings=Savings(exact_weights=False), save_fp32=True)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3"])  # untied and tied head
def test_a_checkpoint_of_exact_weights_restores_their_rests_bit_for_bit(tmp_path, family, offload):
    def make(exact_weights=True):
        model = make_model(family, torch.bfloat16)
        savings = Savings(exact_weights=exact_weights, offload_optimizer=offload)
        return model, TrainingStep(model, savings, lr=1e-4, max_grad_norm=1.0, seed=3)

    def step(training_step, seed):
        training_step([PackedBatch.build(random_documents(LENGTHS, seed=seed))])

    model, training_step = make()
    step(training_step, 0)
    path = checkpoint.save(tmp_path, model, make_tokenizer(), training_step.optimizer, 1)
    step(training_step, 1)
    other, other_step = make()
    assert checkpoint.load(path, other, other_step.optimizer) == 1
    step(other_step, 1)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        rests = training_step.optimizer.state[p]["rest"], other_step.optimizer.state[q]["rest"]
        assert torch.equal(*rests) and rests[0].any()

    plain, plain_step = make(exact_weights=False)
    with pytest.raises(ValueError, match=r"weights True but exact_weights is False.* --exact_weights"):
        checkpoint.load(path, plain, plain_step.optimizer)
    path = checkpoint.save(tmp_path, plain, make_tokenizer(), plain_step.optimizer, 1)
    with pytest.raises(ValueError, match=r"weights False but exact_weights is True.*--no_exact_weights"):
        checkpoint.load(path, other, other_step.optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3"])  # untied and tied head
def test_a_checkpoint_restores_weights_and_optimizer_bit_for_bit(tmp_path, family, dtype):
    def make():
        model = make_model(family, dtype)
        training_step = TrainingStep(model, Savings(), lr=1e-2, max_grad_norm=1.0, seed=3)
        return model, training_step, training_step.optimizer

    def step(training_step, seed):
        training_step([PackedBatch.build(random_documents(LENGTHS, seed=seed))])

    model, training_step, optimizer = make()
    step(training_step, 0)
    path = checkpoint.save(tmp_path, model, make_tokenizer(), optimizer, 1)
    step(training_step, 1)
    other, other_step, other_optimizer = make()
    assert checkpoint.load(path, other, other_optimizer) == 1
    assert head_weight(other) is other.get_input_embeddings().weight if family == "gemma3" else True
    step(other_step, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    if dtype == torch.float32:
        assert {s["exp_avg"].dtype for s in other_optimizer.state.values()} == {torch.float32}
    else:
        assert {s["m_codes"].dtype for s in other_optimizer.state.values()} == {torch.int8}


def test_the_last_two_checkpoints_are_kept_and_a_half_written_one_is_not_loaded(tmp_path):
    model = make_model("llama")
    optimizer = make_optimizer(model, lr=1.0)
    for step in (1, 2, 3, 3):
        checkpoint.save(tmp_path, model, make_tokenizer(), optimizer, step)
    (tmp_path / "writing").mkdir()
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_0000002", "step_0000003"]
    assert checkpoint.latest(tmp_path).name == "step_0000003"
    assert checkpoint.latest(tmp_path / "nowhere") is None


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path):
    model = make_model("llama")
    path = checkpoint.save(tmp_path, model, make_tokenizer(), make_optimizer(model, lr=1.0), 1)
    other = make_model("qwen2")
    with pytest.raises(ValueError, match="checkpoint of another model"):
        checkpoint.load(path, other, make_optimizer(other, lr=1.0))


def test_a_loss_that_is_not_finite_stops_the_run_and_its_display_and_names_the_step(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"step \d+: loss is .*lower --lr") as caught:
        run_training(tmp_path / "run", lr=1e38)
    step = int(re.search(r"step (\d+)", str(caught.value))[1])
    assert capsys.readouterr().err.startswith(f"training: {step - 1} of ")


def test_running_out_of_memory_is_reported_with_the_plan_and_the_checkpoint_resumes_bit_for_bit(
    tmp_path,
):
    metrics = tmp_path / "run" / "metrics.jsonl"

    def run_out(*_):
        # in the seventh step, after the checkpoint
        if metrics.exists() and len(metrics.read_text().splitlines()) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    planned = plan("tiny", row_tokens=32)
    total = f"{planned.total / GIB:.2f} GiB"
    said = rf"step 7 ran out of memory: the plan said {total}, at most in {planned.when}\. Pass --resume"
    memory = PeakMemory(torch.device("cpu"), planned, tmp_path / "memory.json")
    with pytest.raises(ValueError, match=said + r".*checkpoint is .*step_0000005$") as error:
        run_training(tmp_path / "run", before_norm=run_out, memory=memory)
    assert isinstance(error.value.__cause__, torch.OutOfMemoryError)
    _, broken = run_training(tmp_path / "run", resume=True)
    _, whole = run_training(tmp_path / "whole")
    assert (broken / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


class CardCalls(FakeTensorMode):
    """Record every operator with a tensor on a card among its arguments, and the devices of all of these."""

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.calls = []

    def record(self, name, args):
        devices = [x.device.type for x in args if isinstance(x, torch.Tensor)]
        if "cuda" in devices:
            self.calls.append((name, *devices))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.record(func.overloadpacket._qualified_op_name, args)
        return super().__torch_dispatch__(func, types, args, kwargs or {})


class CopiesToCards(TorchFunctionMode):
    """Record copies and skip them: a CPU build of torch copies nothing to a card, not even to a fake one."""

    def __init__(self, recorded: CardCalls):
        self.recorded = recorded

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.copy_ and args[0].device != args[1].device:
            assert kwargs == {"non_blocking": True}
            self.recorded.record("copy_", args)
            return args[0]
        return func(*args, **(kwargs or {}))


def test_on_a_card_the_rows_of_a_step_are_packed_there_and_nothing_comes_back(tmp_path, monkeypatch):
    """A step makes two copies to the card and one launch per row; the head gets the rows as they are."""
    card, reached = torch.device("cuda", 0), []

    def backward(batch, *_):
        reached.append(batch)
        if len(reached) == 3:
            raise InterruptedError("all rows of the step are here")
        return 0.0

    for module in ("loop", "step"):
        monkeypatch.setattr(f"kit.train.{module}.head_weight", lambda model: SimpleNamespace(device=card))
    monkeypatch.setattr("kit.train.step.make_head", lambda *_: SimpleNamespace(backward=backward))
    # the run is named by its weights' values, which fake tensors do not have
    monkeypatch.setattr("kit.train.loop.digest_of_documents", lambda documents: "")
    monkeypatch.setattr("kit.train.checkpoint.name_of_run", lambda *_, **__: "")
    documents = random_documents(LENGTHS)
    training_plan = TrainingPlan.make(LENGTHS, row_tokens=40, batch_traces=8, epochs=1)
    run = RunFolder.open(Config(str(tmp_path / "run")))
    with CardCalls() as recorded, CopiesToCards(recorded), pytest.raises(InterruptedError):
        train(make_model("llama"), make_tokenizer(), documents, training_plan, run, lr=1.0, warmup_ratio=0.1)

    to_the_card, launch = ("copy_", "cuda", "cpu"), ("kit::pack", "cuda", "cuda", "cuda")
    # operators that copy nothing, and the sum of the loss
    others = ("prim::device", "aten::split_with_sizes", "aten::new_empty", "aten::add_")
    assert [call for call in recorded.calls if call[0] not in others] == [to_the_card] * 2 + [launch] * 3
    (rows,) = training_plan.steps
    for batch, row in zip(reached, rows, strict=True):
        expected = PackedBatch.build([documents[i] for i in row])
        for name in PackedBatch.TENSORS:
            found, wanted = getattr(batch, name), getattr(expected, name)
            assert (found.device, found.dtype, found.shape) == (card, wanted.dtype, wanted.shape), name
        assert (batch.max_seqlen, batch.num_targets) == (expected.max_seqlen, expected.num_targets)


def test_a_finished_run_is_not_trained_again(tmp_path):
    _, folder = run_training(tmp_path / "run", steps=2)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    _, again = run_training(tmp_path / "run", steps=2, resume=True)
    assert again == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))  # the finished model replaces them


def start(out, resume):
    return call(__file__, "run_training", out, steps=10, resume=resume)


def test_a_run_killed_by_sigkill_and_resumed_ends_bit_equal_to_an_uninterrupted_one(tmp_path):
    train_unbroken_and_killed(start, tmp_path, lines=6, newest_checkpoint="step_0000005")
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "broken")]
    assert weights[0] == weights[1]
    rows = [
        [json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in ("whole", "broken")
    ]
    losses = [[(row["step"], row["loss"], row["grad_norm"]) for row in run] for run in rows]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 10
