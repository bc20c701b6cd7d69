"""A run that is resumed on changed data is refused, and names what it began with and what it found."""

import json
import re

import pytest
from children import run_recipe

from kit.data.toy import make_rows

FEW = [
    "--benchmarks=",
    "--num_prompts=0",
    "--steps=1",
    "--batch_prompts=2",
    "--group_size=2",
    "--minibatch_prompts=2",
]
TRACES = ["--benchmarks=toy", "--num_questions=2", "--num_samples=1", "--max_steps=1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "setting", "what", "flags"),
    [
        ("gemma3_1b_8k", "--traces", "traces", TRACES),
        ("grpo_qwen2_5_0_5b", "--prompts", "prompts", FEW),
    ],
)
def test_the_same_path_with_other_data_is_refused_on_resume(tmp_path, recipe, setting, what, flags):
    rows = make_rows("long", 8, seed=3, min_operands=3)
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [recipe, "--smoke", f"{setting}=mine.jsonl", "--out=run", *flags]
    done = run_recipe(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again = run_recipe(*command, "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr

    changed = rows[:-1] + make_rows("long", 1, seed=4, min_operands=3)
    file.write_text("".join(json.dumps(row) + "\n" for row in changed))
    refused = run_recipe(*command, "--resume", cwd=tmp_path)
    assert refused.returncode == 2
    digests = r"\(digest (\w{12})\)"
    said = (
        rf"run began with 8 {what} of mine\.jsonl {digests}, but mine\.jsonl holds others now: 8 {digests}; "
    )
    found = re.search(said + "restore that data, or begin a new run in another --out", refused.stderr)
    assert found and found[1] != found[2], refused.stderr
