"""recipes/export.py: what it writes, what it says of it, and what it refuses."""

import json
import re
import shutil
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import export
import gemma3_1b_8k
import pytest
import torch
from test_gguf_file import CONFIGS, SPLITS, by_words, byte_level, random_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from kit import models
from kit.config import parse
from kit.evaluate.same_answers import Answer, agreement
from kit.models import folder
from kit.models.gguf_file import write_gguf
from kit.models.shipped import SHIPPED
from kit.report.model_card import without_folders

TUNED = {"num_questions": 3, "num_samples": 2, "max_new_tokens": 60, "max_steps": 2, "qlora_rank": 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A real run: two steps of adapters, with all of its measurements."""
    path = tmp_path_factory.mktemp("runs") / "gemma3_1b_8k" / "001"
    gemma3_1b_8k.main(gemma3_1b_8k.Config(**gemma3_1b_8k.SMOKE | TUNED, smoke=True, out=str(path)))
    return path


def settings(**given):
    return export.Config(**{"device": "cpu", "check": 4, "max_new_tokens": 60} | given)


def test_smoke_writes_a_folder_and_a_gguf_file_whose_answers_are_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = parse(export.Config, ["--smoke", "--check", "7"], smoke=export.SMOKE)
    out = export.main(config)
    assert str(out) == "exports/tiny"
    said = capsys.readouterr().out
    for what in ("the folder", "the GGUF file"):
        assert f"{what}: 7 of 7 the same (7 word for word); right 7 before and 7 after" in said
        assert f"- {what}: 7 of 7 the same" in (out / "README.md").read_text()
    assert (out / "gguf" / "Modelfile").read_text().splitlines()[2:] == [
        "FROM ./tiny-q8_0.gguf",
        "PARAMETER temperature 0.6",
        "PARAMETER top_p 0.95",
        'PARAMETER stop "<eos>"',
    ]
    assert AutoModelForCausalLM.from_pretrained(out / "gguf", gguf_file="tiny-q8_0.gguf").num_parameters() > 0
    assert [path.name for path in (tmp_path / "exports").iterdir()] == ["tiny"]


def test_a_run_that_does_not_record_its_model_is_refused_but_its_model_is_taken(tmp_path):
    """As change_the_loss.py and train_tiny_base.py write them."""
    shutil.copytree(SHIPPED["tiny"], tmp_path / "model")
    (tmp_path / "config.json").write_text('{"num_traces": 16, "seed": 0}')
    with pytest.raises(ValueError, match=r"does not record which model .*; pass .* --model .*/model$"):
        export.find_source(str(tmp_path))
    source = export.find_source(str(tmp_path / "model"))
    assert source.run is None and source.model == str(tmp_path / "model")


def test_the_command_for_ollama_is_one_that_a_shell_takes_whatever_the_model_is_called(tmp_path, capsys):
    shutil.copytree(SHIPPED["tiny"], tmp_path / "my (2nd) model")
    out = tmp_path / "my out"
    given = {"gguf": "f16", "check": 0, "out": str(out)}
    export.main(settings(model=str(tmp_path / "my (2nd) model"), **given))
    command = "ollama create 'my-(2nd)-model' -f"
    assert f"next   {command} '{out}/gguf/Modelfile'    " in capsys.readouterr().out
    assert f"    {command} FOLDER/gguf/Modelfile\n" in (out / "README.md").read_text()
    file = (out / "gguf" / "my-(2nd)-model-f16.gguf").rename(tmp_path / "no space.gguf")
    assert export.find_source(str(file)).name == "no-space"


def test_a_copy_that_answers_otherwise_is_seen(tmp_path, monkeypatch, capsys):
    def write_another(path, model, *rest, **how):
        with torch.no_grad():
            model.model.norm.weight.neg_()
        return write_gguf(path, model, *rest, **how)

    monkeypatch.setattr("kit.models.gguf_file.write_gguf", write_another)
    export.main(settings(model="tiny", gguf="f16", check=5, out=str(tmp_path / "out")))
    said = capsys.readouterr().out
    assert "the folder: 5 of 5 the same" in said
    assert re.search(r"the GGUF file: 0 of 5 the same \(0 word for word\); right 5 before and 0 after", said)


KIND_OF_TOKENIZER = {"gemma3_text": by_words, "qwen3": lambda: byte_level(SPLITS["qwen2"])}


@pytest.mark.parametrize("family", KIND_OF_TOKENIZER)
def test_folder_and_gguf_file_of_another_family_answer_word_for_word_as_the_model_did(
    family, tmp_path, capsys
):
    """Its weights are random, so that answers depend on all of them."""
    config, tokenizer = deepcopy(CONFIGS[family]), KIND_OF_TOKENIZER[family]()
    config.vocab_size = len(tokenizer)
    folder.save_model(tmp_path / "random", random_model(config), tokenizer)
    given = {"model": str(tmp_path / "random"), "chat_template": "plain", "gguf": "bf16"}
    export.main(settings(**given, out=str(tmp_path / "out"), max_new_tokens=24))
    said = capsys.readouterr().out
    for what in ("the folder", "the GGUF file"):
        assert f"{what}: 4 of 4 the same (4 word for word); right 0 before and 0 after; cut off 4" in said
    assert "other tokens" not in said


@pytest.mark.slow
def test_the_model_of_a_run_is_merged_and_its_card_holds_what_was_measured(run, tmp_path, capsys):
    before = models.load(str(run / "model"), device="cpu")[0]
    out = export.main(settings(model=str(run), out=str(tmp_path / "mine"), gguf="bf16"))
    # the run's own problems: three
    assert "the folder: 3 of 3 the same (3 word for word)" in capsys.readouterr().out
    assert not (out / folder.ADAPTER_CONFIG).exists()
    merged = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.arange(3, 60)[None]
    before.set_attn_implementation("sdpa")
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, before(ids).logits, rtol=1e-3, atol=1e-3)
    stored = AutoTokenizer.from_pretrained(out / "gguf", gguf_file="gemma3_1b_8k-001-bf16.gguf")
    assert stored.chat_template == AutoTokenizer.from_pretrained(run / "model").chat_template

    card = (out / "README.md").read_text()
    figures = json.loads((run / "machine.json").read_text())
    assert f"processor: {figures['processor']}" in card
    for line in (
        "tiny after fine-tuning",
        "| toy | ",
        "| 3 x 2 |",
        "- qlora_rank 3 (paper: all",
        "95 % intervals",
    ):
        assert line in card, line
    assert "- traces long_traces.jsonl (paper" in card and str(run.parent) not in card


@pytest.mark.slow
def test_a_run_that_did_not_record_its_machine_says_so(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "old" / "002")
    (copy / "machine.json").unlink()
    out = export.main(settings(model=str(copy / "model"), out=str(tmp_path / "mine"), check=0))
    card = (out / "README.md").read_text()
    assert f"device: cpu; machine: the run did not record it; torch: {torch.__version__}" in card
    assert "the same" not in card


def cut_short(run):
    lines = (run / "after" / "toy.jsonl").read_text().splitlines(keepends=True)
    (run / "after" / "toy.jsonl").write_text("".join(lines[:-1]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda run: shutil.rmtree(run / "model"), "has no model yet; go on with: .* --resume --out "),
        (cut_short, "has not measured toy after it; go on with: .*gemma3_1b_8k.* --resume --out "),
    ],
    ids=["training", "measuring"],
)
def test_an_unfinished_run_is_refused_with_the_command_that_goes_on(run, tmp_path, spoil, fault):
    copy = shutil.copytree(run, tmp_path / "003")
    spoil(copy)
    with pytest.raises(ValueError, match=f"{fault}{copy}"):
        export.main(settings(model=str(copy)))


def test_what_is_no_model_is_refused_with_what_to_pass(tmp_path):
    evaluation, study, empty = tmp_path / "evaluation", tmp_path / "study", tmp_path / "empty"
    for path in (evaluation, study / "cells" / "long 64" / "model", empty):
        path.mkdir(parents=True)
    (evaluation / "config.json").write_text('{"model": "google/gemma-3-1b-it", "benchmarks": "toy"}')
    (study / "config.json").write_text('{"models": "tiny"}')
    (study / "study.json").write_text("{}")
    for path, fault in {
        "": "pass --model and a run folder",
        evaluation: "only samples and measures, and trains nothing; .* --model google/gemma-3-1b-it",
        study: "pass one of its folders, such as .*long 64",
        empty: "neither a run nor a model",
        "./nowhere": "nothing is there",
    }.items():
        with pytest.raises(ValueError, match=fault):
            export.main(settings(model=str(path), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_and_a_disk_that_is_full_are_refused_before_anything_is_written(
    tmp_path, monkeypatch
):
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there is there already; pass another --out"):
        export.main(settings(model="tiny", out=str(tmp_path / "there")))
    monkeypatch.setattr("kit.disk.shutil.disk_usage", lambda path: SimpleNamespace(free=1_463_000))
    with pytest.raises(ValueError, match=r"365,856 weights takes 0.00 GiB and 0.00 GiB are free in "):
        export.main(settings(model="tiny", out=str(tmp_path / "new" / "deep")))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_unknown_kinds_and_a_library_that_is_missing_are_refused_with_what_to_type(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="gguf is 'q8_1' but must be q8_0, f16 or bf16; did you mean q8_0"):
        settings(model="tiny", gguf="q8_1")
    monkeypatch.setattr("kit.extras.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'--gguf needs gguf and accelerate, .* pip install "gguf'):
        export.main(settings(model="tiny", gguf="q8_0", out=str(tmp_path / "out")))


def test_an_export_that_fails_leaves_nothing_behind(tmp_path):
    model, tokenizer = models.load("tiny", device="cpu")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    folder.save_model(tmp_path / "large", model, tokenizer)
    with pytest.raises(ValueError, match="pass --gguf bf16"):
        export.main(
            settings(model=str(tmp_path / "large"), out=str(tmp_path / "o" / "x"), gguf="f16", check=0)
        )
    assert list((tmp_path / "o").iterdir()) == []


def test_answers_agree_by_what_was_found_and_other_prompts_are_a_fault():
    first = [Answer((1,), "so 4", "4", True, True), Answer((2,), "x", None, False, False)]
    second = [replace(first[0], text="thus 4"), replace(first[1], prompt=(3,), found="7")]
    assert agreement(first, second) == (
        "1 of 2 the same (1 word for word); right 1 before and 1 after; cut off 1 before and 1 after; "
        "1 prompts have other tokens, a fault of the copy"
    )


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/me/data/t.jsonl", "t.jsonl"),
        ("math500=/home/me/m.jsonl,toy", "math500=m.jsonl,toy"),
        (r"C:\me\t.jsonl", "t.jsonl"),
        ("open-r1/OpenR1-Math-220k:all", "open-r1/OpenR1-Math-220k:all"),
        (3, 3),
    ],
)
def test_a_card_shows_no_folders_of_its_author(value, shown):
    assert without_folders(value) == shown
