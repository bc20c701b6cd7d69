"""GRPO with a reward of one's own: logged by name, shown in the report, and an input of the run."""

import json

import pytest
from children import run_recipe

MINE = """
def short(question, completions):
    return [-len(completion.ids) / 100 for completion in completions]

def broken(question, completions):
    return [1 / len(completion.text) for completion in completions]
"""
FEW = [
    "--smoke",
    "--benchmarks=",
    "--steps=2",
    "--batch_prompts=2",
    "--group_size=3",
    "--minibatch_prompts=2",
    "--max_new_tokens=40",
]


@pytest.mark.slow
def test_a_reward_of_ones_own_is_logged_by_name_shown_in_the_report_and_may_not_change(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    flags = [*FEW, "--reward=mine.py:short,exact_answer", "--out=run"]
    done = run_recipe("grpo_qwen2_5_0_5b", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "reward      mine.py:short,exact_answer: -0.08, 1 for a right answer, -0.01, 0 for" in done.stdout
    assert "reward mine.py:short,exact_answer (paper: 1 for a right answer, 0 for a wrong one)" in done.stdout

    step = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert step["reward: short"] == pytest.approx(-step["length"] / 100)
    assert step["reward_mean"] == pytest.approx(step["reward: short"] + step["reward: exact_answer"])
    assert f" (short {step['reward: short']:.3f}, exact_answer " in done.stdout

    answers = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert [row["step"] for row in answers] == [1, 1, 1, 2, 2, 2]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "the answers with a higher reward (mine.py:short,exact_answer) among them become" in page
    for row in (answers[0], answers[-1]):
        assert row["rewards"]["short"] == -row["tokens"] / 100
        parts = ", ".join(f"{name} {value:.3g}" for name, value in row["rewards"].items())
        assert f"reward {row['reward']:.3g} ({parts}), {row['tokens']} tokens" in page
        assert f": {row['problem']}</summary><p>gold answer {row['gold']}</p>" in page

    assert run_recipe("grpo_qwen2_5_0_5b", *flags, "--resume", cwd=tmp_path).returncode == 0
    (tmp_path / "mine.py").write_text(MINE.replace("100", "10"))
    refused = run_recipe("grpo_qwen2_5_0_5b", *flags, "--resume", cwd=tmp_path)
    assert refused.returncode == 2
    assert "run began with " in refused.stderr and " lines of code of mine.py, " in refused.stderr
    assert "restore that data, or begin a new run in another --out" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("mine.py:long", "error: reward is 'mine.py:long' but mine.py has no function 'long'; it has sh"),
        ("mine.py:broken", "ZeroDivisionError: division by zero (mine.py, line 6); correct the function"),
    ],
)  # fmt: skip
def test_a_reward_that_does_not_work_is_refused_before_a_model_is_loaded(reward, message, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    done = run_recipe("grpo_qwen2_5_0_5b", *FEW, f"--reward={reward}", cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not list((tmp_path / "runs").rglob("*.json"))
