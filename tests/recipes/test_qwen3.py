"""A tiny Qwen3 as a person uses it: planned, trained, sampled with and without thinking; no network."""

import json

import pytest
from chat_styles import make_tokenizer
from children import run_recipe
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from kit.evaluate.results import read_result

THOUGHT = "<think>\nhm, {}\n</think>\n\nIt is \\boxed{{{}}}."
FEW = ["--instruction", "", "--device", "cpu", "--max_new_tokens", "9", "--num_samples", "1"]


@pytest.fixture
def folder(tmp_path):
    """Return a folder with a random Qwen3 (model), traces with thoughts (t.jsonl) and questions (q.jsonl)."""
    tokenizer = make_tokenizer("qwen3")
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 3, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"problem": f"{n}+1?", "trace": THOUGHT.format(n, n + 1), "answer": str(n + 1)} for n in range(7)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "q.jsonl").write_text('{"problem": "1+1?", "answer": "2"}\n')
    return tmp_path


def run(recipe, *flags, cwd):
    done = run_recipe(recipe, *flags, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_it_is_planned_trained_on_thoughts_and_measured_before_and_after(folder, rank):
    flags = [
        "--model=./model", "--traces=t.jsonl", "--benchmarks=mine=q.jsonl", *FEW, "--num_traces=0",
        "--row_tokens=200", "--lr=3e-3", "--epochs=3", "--tile_tokens=7", f"--qlora_rank={rank}", "--out=run",
    ]  # fmt: skip
    if not rank:
        assert "(simulated)" in run("gemma3_1b_8k", *flags, "--plan", cwd=folder)
    told = run("gemma3_1b_8k", *flags, cwd=folder)
    assert "7 traces kept" in told
    losses = [
        json.loads(line)["loss"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < losses[0]
    assert [
        len(read_result(folder / "run" / stage / "mine.jsonl").rows) for stage in ("before", "after")
    ] == [1, 1]

    run("evaluate", "--model=run/model", "--benchmarks=mine=q.jsonl", *FEW, "--out=measured", cwd=folder)
    assert len(read_result(folder / "measured" / "samples" / "mine.jsonl").rows) == 1


@pytest.mark.slow
def test_with_thinking_off_it_is_measured_and_trained_on_short_traces_and_long_ones_are_refused(folder):
    flags = ["--model=./model", "--benchmarks=mine=q.jsonl", *FEW, "--chat_template=no_thinking"]
    run("evaluate", *flags, "--out=measured", cwd=folder)
    train = [*flags, "--num_traces=0", "--row_tokens=200", "--max_steps=1", "--out=run", "--traces"]
    refused = run_recipe("gemma3_1b_8k", *train, "t.jsonl", cwd=folder)
    assert refused.returncode == 2 and "thinking is off in the chat template but a trace" in refused.stderr
    (folder / "s.jsonl").write_text('{"problem": "1+1?", "trace": "It is 2.", "answer": "2"}\n')
    run("gemma3_1b_8k", *train, "s.jsonl", cwd=folder)
    saved = AutoTokenizer.from_pretrained(folder / "run" / "model")
    question = [{"role": "user", "content": "?"}]
    prompt = saved.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
