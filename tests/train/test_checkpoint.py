"""A run goes on from a checkpoint of its own that holds what was written, or says what to do."""

import json
import shutil

import pytest
import torch
from conftest import make_model, random_documents
from safetensors.torch import load_file, save_file
from test_train_loop import LENGTHS, run_training

from kit.data.toy import make_tokenizer
from kit.inputs import digest_of_documents
from kit.models.weights import fingerprint
from kit.packing import Document, PackedBatch
from kit.train import checkpoint
from kit.train.savings import Savings
from kit.train.step import TrainingStep


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Make a run that ended as a kill ends it, in step 13, after the checkpoints of steps 5 and 10."""
    out = tmp_path_factory.mktemp("stopped") / "run"

    def stop(*_):
        if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("\n") == 12:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run_training(out, steps=20, before_norm=stop)
    return out


@pytest.fixture
def run(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


def go_on(run, **options):
    return run_training(run, steps=20, resume=True, **options)[1]


def flip_last_bit(file):
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


DAMAGES = {
    "a bit of a weight": ("model.safetensors", flip_last_bit, "does not hold what was written"),
    "a bit of a state": ("optimizer.safetensors", flip_last_bit, "does not hold what was written"),
    "the end is missing": (
        "model.safetensors",
        lambda file: file.write_bytes(file.read_bytes()[:-9]),
        "does not hold what was written",
    ),
    "a file is missing": ("optimizer.safetensors", lambda file: file.unlink(), "is missing"),
    "the step is missing": ("trainer.json", lambda file: file.write_text("{}"), "lacks the step"),
    "half a trainer.json": ("trainer.json", lambda file: file.write_text('{"st'), r"cannot be read \("),
    "a list": ("trainer.json", lambda file: file.write_text("[]"), "lacks the step"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_with_its_file_and_the_older_one_to_go_on_from(run, damage):
    name, break_it, fault = DAMAGES[damage]
    newest = run / "checkpoints" / "step_0000010"
    break_it(newest / name)
    with pytest.raises(ValueError) as error:
        go_on(run)
    said = str(error.value)
    assert said.startswith(f"{newest / name} ") and fault.strip("\\(") in said
    assert said.endswith(f"Delete {newest}; --resume then goes on from step_0000005")


def test_the_older_checkpoint_leads_to_the_bits_of_an_unbroken_run(run, tmp_path, capsys):
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step_0000005", "step_0000010"]
    shutil.rmtree(run / "checkpoints" / "step_0000010")
    again = go_on(run)
    assert "goes on after step 5 of 20" in capsys.readouterr().out
    _, whole = run_training(tmp_path / "whole", steps=20)
    assert (again / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 21))


def test_the_only_checkpoint_that_is_damaged_says_that_the_run_begins_again(run):
    shutil.rmtree(run / "checkpoints" / "step_0000005")
    flip_last_bit(run / "checkpoints" / "step_0000010" / "model.safetensors")
    with pytest.raises(ValueError, match=r"--resume then begins with the first step$"):
        go_on(run)


@pytest.mark.parametrize("changed", ["lr", "seed", "a token"])
def test_a_checkpoint_of_another_run_is_refused(run, changed, monkeypatch):
    options = {"lr": {"lr": 2e-2}, "seed": {"seed": 1}}.get(changed, {})
    if changed == "a token":
        documents = random_documents(LENGTHS)
        documents[3].ids[-1] += 1
        monkeypatch.setattr("test_train_loop.random_documents", lambda lengths: documents)
    with pytest.raises(ValueError, match=r"step_0000010 was written by the run \w{12}, and this is \w{12} "):
        go_on(run, **options)


def test_a_checkpoint_beyond_the_schedule_is_refused(run):
    file = run / "checkpoints" / "step_0000010" / "trainer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"step": 21}))
    with pytest.raises(ValueError, match="after step 21 but training has 20 steps"):
        go_on(run)


IN_8_BITS = {"dtype": torch.bfloat16, "exact_weights": True}


def trained(exact_weights=False, dtype=torch.float32, optimizer="auto", lr=1e-3):
    model = make_model("llama", dtype)
    savings = Savings(optimizer=optimizer, exact_weights=exact_weights)
    step = TrainingStep(model, savings, lr=lr)
    step([PackedBatch.build(random_documents(LENGTHS))])
    return model, step


def shorter(x):
    return x[:-1].contiguous()


def one_number(x):
    return x.reshape(-1)[0].clone()


@pytest.mark.parametrize(
    ("how", "name", "change", "said"),
    [
        ({}, "exp_avg", shorter, "there and"),
        ({}, "exp_avg_sq", one_number, "there and"),  # which could be broadcast
        ({}, "exp_avg", torch.Tensor.double, "there and"),
        ({}, "step", torch.Tensor.long, "there and"),
        ({}, "exp_avg_sq", None, "it lacks"),
        (IN_8_BITS, "m_codes", shorter, "there and"),
        (IN_8_BITS, "v_scales", one_number, "there and"),
        (IN_8_BITS, "v_codes", torch.Tensor.char, "there and"),
        (IN_8_BITS, "rest", None, "it lacks"),
    ],
)
def test_the_state_of_another_run_is_refused_and_nothing_is_loaded(tmp_path, how, name, change, said):
    model, step = trained(**how)
    path = checkpoint.save(tmp_path, model, make_tokenizer(), step.optimizer, 1)
    tensors = load_file(path / "optimizer.safetensors")
    tensor = tensors.pop(f"3.{name}")
    if change:
        tensors[f"3.{name}"] = change(tensor)
    save_file(tensors, path / "optimizer.safetensors")
    checkpoint._record(path, 1, "")  # so the file is as it was written, by another run

    other, other_step = trained(**how, lr=1e-2)
    before = fingerprint(other), [x.clone() for s in other_step.optimizer.state.values() for x in s.values()]
    with pytest.raises(ValueError, match=rf"safetensors is .*(lacks 3\.{name} |3\.{name} is )") as error:
        checkpoint.load(path, other, other_step.optimizer)
    assert said in str(error.value)
    after = [x for s in other_step.optimizer.state.values() for x in s.values()]
    assert fingerprint(other) == before[0]
    assert all(torch.equal(x, y) for x, y in zip(before[1], after, strict=True))


def test_the_state_of_one_optimizer_is_not_loaded_into_the_other(tmp_path):
    model, step = trained()
    path = checkpoint.save(tmp_path, model, make_tokenizer(), step.optimizer, 1)
    other, other_step = trained(optimizer="adamw8bit")
    with pytest.raises(ValueError, match=r"it lacks 0\.m_codes.* has 0\.exp_avg"):
        checkpoint.load(path, other, other_step.optimizer)


@pytest.mark.parametrize("made_by", ["nobody", "a run at another lr", "another base model"])
def test_a_model_folder_that_the_run_did_not_make_is_no_reason_not_to_train(tmp_path, made_by):
    _, theirs = run_training(tmp_path / "theirs", steps=2, lr=3e-2 if "lr" in made_by else 1e-2)
    if made_by == "nobody":
        (theirs / "trainer.json").unlink()
    (tmp_path / "mine").mkdir()
    shutil.copytree(tmp_path / "theirs" / "model", tmp_path / "mine" / "model")
    shutil.copy(tmp_path / "theirs" / "config.json", tmp_path / "mine")
    family = "qwen2" if "base" in made_by else "llama"
    with pytest.raises(
        ValueError, match=r"model is not the model that this run trains.*Move that folder away"
    ):
        run_training(tmp_path / "mine", family, steps=2, resume=True)


def test_documents_have_one_name_in_either_integer_and_another_if_a_boundary_moves():
    ids = torch.tensor([5, 6, 7, 8])
    whole = [Document(ids, 1), Document(ids, 2)]
    assert digest_of_documents(whole) == digest_of_documents(
        [Document(d.ids.int(), d.prompt_len) for d in whole]
    )
    others = [
        [Document(ids, 2), Document(ids, 1)],
        [Document(ids, 1), Document(ids, 3)],
        [Document(ids[:3], 1), Document(torch.tensor([8, 5, 6, 7, 8]), 2)],
        [Document(ids, 1)],
    ]
    assert len({digest_of_documents(documents) for documents in [whole, *others]}) == 5
