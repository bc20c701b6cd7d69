"""Reinforcement learning on the same toy task: ours and TRL's GRPOTrainer, by reward, time and peak memory.

    python recipes/bench/grpo.py                 the shipped tiny model with noise on it
    python recipes/bench/grpo.py --repeats 3     three runs of each, for a busy machine
    python recipes/bench/grpo.py --smoke         two steps

Both get the same start, prompts, rewards (kit.grade.verdict), group size, learning rate, AdamW, DAPO's token
mean, advantages divided by the group's standard deviation, no KL, and one update per rollout. Everything else
is each program's default: TRL samples with model.generate.

Each runs in a process of its own, whose peak memory is reported, libraries included. A process that has only
imported the model's class, as both must, is measured as well. Time is from the first rollout to the last
update. The random numbers differ, so rewards are compared as means over the last quarter of the steps.
Left out on purpose: evaluation, saving, and vLLM (which TRL can use on a card).
"""

import math
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from contest import TRL, has_trl, in_a_process, peak_gib, save
from transformers import AutoModelForCausalLM

from kit import models
from kit.config import Checked, parse
from kit.data import ChatFormat, Question
from kit.data.problems import draw
from kit.data.toy import make_rows
from kit.grade import grade
from kit.machine import GIB, peak_resident_bytes
from kit.models.folder import save_model
from kit.rl import Policy, Settings, rollout, update


@dataclass(frozen=True)
class Config(Checked):
    # model
    weaken: float = 0.2  # noise on the weights, in standard deviations, to leave much to learn [>= 0]
    # task
    min_operands: int = 3  # of the toy's problems [>= 2]
    max_operands: int = 6  # of the toy's problems [>= 2]
    # algorithm
    steps: int = 30  # rollouts, one update each [>= 1]
    batch_prompts: int = 2  # prompts per step [>= 1]
    group_size: int = 8  # completions per prompt [>= 2]
    max_new_tokens: int = 64  # tokens per completion [>= 1]
    row_tokens: int = 512  # tokens per row of ours; TRL pads all completions into one row [>= 1]
    lr: float = 1e-4  # constant [> 0, <= 1]
    seed: int = 0  # of everything [>= 0]
    # run
    repeats: int = 1  # runs of each, in turns; the fastest counts [>= 1]
    json: str = ""  # file for the results; "" = none
    smoke: bool = False  # two steps


SMOKE = {"steps": 2, "max_new_tokens": 16}


def main(config: Config) -> list[dict]:
    contestants = {"ours": _ours} | ({"TRL GRPOTrainer": _trl} if has_trl() else {})

    runs = {name: [] for name in contestants}
    with tempfile.TemporaryDirectory() as folder:
        size = in_a_process(_write_start, config, folder)
        steps = f"{config.steps} steps of {config.batch_prompts} x {config.group_size} completions"
        print(f"\nGRPO on the toy: {size:,} parameters, {steps} of up to {config.max_new_tokens} tokens")
        libraries = _libraries_gib()
        print(f"  torch and transformers' Llama, imported and nothing else: {libraries:.2f} GiB")
        for turn in range(config.repeats):  # in turns, so that other work on the machine slows down both
            for name, contestant in contestants.items():
                runs[name].append(in_a_process(contestant, config, folder))
                if config.repeats > 1:
                    print(f"  turn {turn + 1}: {name} {runs[name][-1]['seconds']:.1f} s", flush=True)

    rows = []
    for name, found in runs.items():
        fastest = min(found, key=lambda run: run["seconds"])
        all_seconds = [run["seconds"] for run in found]
        rows.append({"name": name, "parameters": size, **fastest, "all_seconds": all_seconds})
        print(
            "  {name:<16}{seconds:8.1f} s  peak {peak_gib:5.2f} GiB ({rise_gib:5.2f} above the start of "
            "training)  reward {first:.3f} in the first quarter, {last:.3f} in the last".format(**rows[-1])
        )
    if len(rows) == 2:
        seconds, peak, rise = (rows[0][key] / rows[1][key] for key in ("seconds", "peak_gib", "rise_gib"))
        print(
            f"  ours / TRL: {seconds:.2f}x the time, {peak:.2f}x the peak memory (libraries alone: "
            f"{libraries / rows[1]['peak_gib']:.2f}x), {rise:.2f}x what training added to it"
        )
    save(config, libraries_gib=libraries, rows=rows)
    return rows


def _libraries_gib() -> float:
    """Measure a process that has only imported what both must; nan if the system does not report it."""
    lines = (
        "from transformers import LlamaForCausalLM",
        "from kit.machine import peak_resident_bytes",
        "print(peak_resident_bytes())",
    )
    command = [sys.executable, "-c", "; ".join(lines)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return math.nan if (peak := done.stdout.split()[-1]) == "None" else int(peak) / GIB


def _write_start(config: Config, folder: str) -> int:
    """Write the weights that both start from to a folder. Return the number of parameters."""
    from kit.recipes.grpo_qwen2_5_0_5b import weaken

    torch.manual_seed(config.seed)
    model, tokenizer = models.load("tiny", device="cpu")
    weaken(model, config.weaken, config.seed)
    save_model(Path(folder) / "start", model, tokenizer)
    return sum(p.numel() for p in model.parameters())


def _questions(config: Config) -> list[Question]:
    operands = {"min_operands": config.min_operands, "max_operands": config.max_operands}
    rows = make_rows("short", 1_000, seed=config.seed + 2, **operands)
    return [Question.of(row) for row in rows]


def _result(seconds: float, rewards: list[float], before: int | None) -> dict:
    quarter = max(len(rewards) // 4, 1)
    return {
        "seconds": seconds,
        "first": fmean(rewards[:quarter]),
        "last": fmean(rewards[-quarter:]),
        "rewards": rewards,
        "peak_gib": peak_gib(),
        "rise_gib": peak_gib(before),
    }


def _ours(config: Config, folder: str) -> dict:
    model, tokenizer = models.load(str(Path(folder) / "start"), device="cpu")
    settings = Settings(
        group_size=config.group_size,
        max_new_tokens=config.max_new_tokens,
        num_slots=config.batch_prompts * config.group_size,
        row_tokens=config.row_tokens,
        minibatch_prompts=config.batch_prompts,
        kl_coef=0.0,
        dual_clip=0.0,  # as TRL's defaults
        seed=config.seed,
    )
    policy = Policy(model, ChatFormat(tokenizer, instruction=""), settings, lr=config.lr)
    questions, rewards = _questions(config), []
    before, start = peak_resident_bytes(), time.perf_counter()
    for _ in range(config.steps):
        prompts = draw(questions, policy.drawn, config.batch_prompts, seed=config.seed)
        rewards.append(update(policy, rollout(policy, prompts))["reward_mean"])
    return _result(time.perf_counter() - start, rewards, before)


def _trl(config: Config, folder: str) -> dict:
    import datasets
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    _, tokenizer = models.load("tiny", device="cpu")
    start = Path(folder) / "start"
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32, trust_remote_code=False)
    chat, golds = ChatFormat(tokenizer, instruction=""), {}
    for question in _questions(config):
        golds[chat.prompt(question.problem)] = question.answer
    asked = draw(_questions(config), 0, config.steps * config.batch_prompts, seed=config.seed)
    dataset = datasets.Dataset.from_dict({"prompt": [chat.prompt(question.problem) for question in asked]})
    datasets.disable_progress_bars()

    def reward(prompts, completion_ids, **_):
        return [
            float(grade(golds[p], chat.decode(ids)).verdict == "correct")
            for p, ids in zip(prompts, completion_ids, strict=True)
        ]

    settings = GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=config.batch_prompts * config.group_size,
        num_generations=config.group_size,
        max_completion_length=config.max_new_tokens,
        max_steps=config.steps,
        learning_rate=config.lr,
        beta=0.0,
        loss_type="dapo",
        lr_scheduler_type="constant",
        shuffle_dataset=False,
        seed=config.seed,
        **TRL,
    )
    trainer = GRPOTrainer(model, reward, settings, train_dataset=dataset, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)  # a line of figures per step
    before, start = peak_resident_bytes(), time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    return _result(seconds, rewards, before)


if __name__ == "__main__":
    main(parse(Config, smoke=SMOKE))
