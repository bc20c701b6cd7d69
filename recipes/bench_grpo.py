"""Reinforcement learning on the same toy task from the same weights, ours and TRL's GRPOTrainer: reward, wall time, peak memory.

    python recipes/bench_grpo.py                                      the shipped tiny model with noise on it
    python recipes/bench_grpo.py --hidden_size 256 --num_layers 6     a Llama of that shape, first taught the task by short traces
    python recipes/bench_grpo.py --smoke                              two steps

Both get the same start, prompts, rewards (kit.grade), group size, learning rate, AdamW, DAPO's token normaliser, advantages
scaled by the group's deviation, no KL, one update a rollout; and are otherwise what they are by default: TRL samples with
model.generate. Each runs in a process of its own, whose highest memory counts, libraries included. Time is from the first rollout
to the last update. The random numbers differ, so rewards are compared as means over the last quarter of the steps.
Left out on purpose: evaluation, saving, vLLM (which TRL can use on a card).
"""

import importlib.util
import math
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from kit import models
from kit.benchmarks import Question
from kit.chat import ChatFormat, digest
from kit.checkpoint import save_model
from kit.config import parse
from kit.grade import grade
from kit.machine import GIB, describe_machine, peak_resident_bytes
from kit.optim import cosine_with_warmup
from kit.packing import Document, PackedBatch, plan_packs
from kit.rl import Policy, update
from kit.rl_loop import gather
from kit.rl_prompts import draw
from kit.rl_settings import Settings
from kit.run import write_json
from kit.savings import Savings
from kit.step import TrainingStep
from kit.toy import make_rows


@dataclass(frozen=True)
class Config:
    # model
    hidden_size: int = 0  # > 0: a Llama of this width, taught by short traces; 0 = the shipped tiny model
    num_layers: int = 4  # of that Llama
    lessons: int = 150  # its teaching steps, of 4,096 tokens
    weaken: float = 0.2  # noise on the tiny model's weights, in their standard deviations
    # task
    min_operands: int = 3  # of the toy's problems
    max_operands: int = 6
    # algorithm
    steps: int = 30  # rollouts, one update each
    batch_prompts: int = 2  # prompts a step
    group_size: int = 8  # completions a prompt
    max_new_tokens: int = 64  # tokens a completion
    row_tokens: int = 512  # tokens of our rows, which bound what activations take; TRL's batch is all completions, padded
    lr: float = 1e-4  # constant
    seed: int = 0  # of everything
    # run
    json: str = ""  # file for the figures; "" = none
    smoke: bool = False  # two steps


SMOKE = {"steps": 2, "max_new_tokens": 16}


def main(config: Config) -> list[dict]:
    rows = []
    contestants = {"ours": _ours, "TRL GRPOTrainer": _trl}
    if not importlib.util.find_spec("trl"):
        print("TRL is not installed (pip install trl): not compared")
        del contestants["TRL GRPOTrainer"]
    with tempfile.TemporaryDirectory() as folder:
        size = _apart(_write_start, config, folder)
        what = (
            f"{config.steps} steps of {config.batch_prompts} x {config.group_size} completions of up to {config.max_new_tokens}"
        )
        print(f"\nGRPO on the toy: {size:,} parameters, {what} tokens")
        for name, contestant in contestants.items():
            rows.append({"name": name, "parameters": size, **_apart(contestant, config, folder)})
            print(
                "  {name:<16}{seconds:8.1f} s  peak {peak_gib:5.2f} GiB ({rise_gib:5.2f} above the start of training)  "
                "reward {first:.3f} in the first quarter, {last:.3f} in the last".format(**rows[-1])
            )
    if len(rows) == 2:
        seconds, peak, rise = (rows[0][key] / rows[1][key] for key in ("seconds", "peak_gib", "rise_gib"))
        print(f"  ours / TRL: {seconds:.2f}x the time, {peak:.2f}x the peak memory, {rise:.2f}x what training added to it")
    if config.json:
        write_json(Path(config.json), {"machine": describe_machine(), "config": asdict(config), "rows": rows})
    return rows


def _apart(call, config: Config, folder: str):
    """In a process of its own: a peak is the highest ever."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call, config, folder, torch.get_num_threads()).result()


def _write_start(config: Config, folder: str, threads: int) -> int:
    """The weights both start from, as a folder."""
    from grpo_qwen2_5_0_5b import weaken

    torch.set_num_threads(threads)
    torch.manual_seed(config.seed)
    model, tokenizer = models.load("tiny", device="cpu")
    if config.hidden_size:
        heads = config.hidden_size // 32
        shape = {"hidden_size": config.hidden_size, "intermediate_size": 3 * config.hidden_size, "head_dim": 32,
                 "num_hidden_layers": config.num_layers, "num_attention_heads": heads, "num_key_value_heads": heads}  # fmt: skip
        settings = LlamaConfig(**model.config.to_diff_dict() | shape, attn_implementation="kit")
        model = LlamaForCausalLM(settings)
        _teach(model, ChatFormat(tokenizer, instruction=""), config)
    else:
        weaken(model, config.weaken, config.seed)
    save_model(Path(folder) / "start", model, tokenizer)
    return sum(p.numel() for p in model.parameters())


def _teach(model, chat: ChatFormat, config: Config) -> None:
    """A short training on short traces: a start that is right now and then."""
    rows = make_rows("short", 150 * config.lessons, seed=config.seed, max_operands=config.max_operands)
    prompts, answers = chat.encode([chat.prompt(row["problem"]) for row in rows]), chat.encode([row["trace"] for row in rows])
    end = chat.eos_token_ids[:1]
    documents = [Document(torch.tensor(p + a + end), len(p)) for p, a in zip(prompts, answers, strict=True)]
    packs = plan_packs([len(document) for document in documents], 4_096, seed=config.seed)[: config.lessons]
    step = TrainingStep(model, Savings(recompute=False), lr=2e-3, betas=(0.9, 0.95), max_grad_norm=1.0)
    for i, pack in enumerate(packs):
        for group in step.optimizer.param_groups:
            group["lr"] = 2e-3 * cosine_with_warmup(i, len(packs), 0.05)
        step([PackedBatch.build([documents[j] for j in pack])])
    step.close()


def _questions(config: Config) -> list[Question]:
    rows = make_rows("short", 1_000, seed=config.seed + 2, min_operands=config.min_operands, max_operands=config.max_operands)
    return [Question(digest(row["problem"])[:12], row["problem"], row["answer"]) for row in rows]


def _result(seconds: float, rewards: list[float], before: int | None) -> dict:
    quarter, peak = max(len(rewards) // 4, 1), peak_resident_bytes()
    known = peak is not None and before is not None
    return {"seconds": seconds, "first": fmean(rewards[:quarter]), "last": fmean(rewards[-quarter:]), "rewards": rewards,
            "peak_gib": peak / GIB if known else math.nan, "rise_gib": (peak - before) / GIB if known else math.nan}  # fmt: skip


def _ours(config: Config, folder: str, threads: int) -> dict:
    torch.set_num_threads(threads)
    model, tokenizer = models.load(str(Path(folder) / "start"), device="cpu")
    settings = Settings(
        group_size=config.group_size, max_new_tokens=config.max_new_tokens, num_slots=config.batch_prompts * config.group_size,
        row_tokens=config.row_tokens, minibatch_prompts=config.batch_prompts, kl="none", normaliser="tokens", seed=config.seed,
    )  # fmt: skip
    policy, questions, rewards = (
        Policy(model, ChatFormat(tokenizer, instruction=""), settings, lr=config.lr),
        _questions(config),
        [],
    )
    before, start = peak_resident_bytes(), time.perf_counter()
    for _ in range(config.steps):
        rewards.append(update(policy, gather(policy, questions, config.batch_prompts)[0])["reward_mean"])
    return _result(time.perf_counter() - start, rewards, before)


def _trl(config: Config, folder: str, threads: int) -> dict:
    import datasets
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(threads)
    _, tokenizer = models.load("tiny", device="cpu")
    model = AutoModelForCausalLM.from_pretrained(Path(folder) / "start", dtype=torch.float32)
    chat, golds, rewards = ChatFormat(tokenizer, instruction=""), {}, []
    for question in _questions(config):
        golds[chat.prompt(question.problem)] = question.answer
    asked = draw(_questions(config), 0, config.steps * config.batch_prompts, seed=config.seed)
    dataset = datasets.Dataset.from_dict({"prompt": [chat.prompt(question.problem) for question in asked]})
    datasets.disable_progress_bars()

    def reward(prompts, completion_ids, **_):
        return [
            float(grade(golds[p], chat.decode(ids)).verdict == "correct") for p, ids in zip(prompts, completion_ids, strict=True)
        ]

    class Rewards(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            rewards.extend([logs["reward"]] if "reward" in (logs or {}) else [])

    settings = GRPOConfig(
        output_dir=folder, use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
        per_device_train_batch_size=config.batch_prompts * config.group_size, num_generations=config.group_size,
        max_completion_length=config.max_new_tokens, max_steps=config.steps, learning_rate=config.lr, beta=0.0, loss_type="dapo",
        lr_scheduler_type="constant", shuffle_dataset=False, seed=config.seed,
    )  # fmt: skip
    trainer = GRPOTrainer(model, reward, settings, train_dataset=dataset, processing_class=tokenizer, callbacks=[Rewards()])
    before, start = peak_resident_bytes(), time.perf_counter()
    trainer.train()
    return _result(time.perf_counter() - start, rewards, before)


if __name__ == "__main__":
    main(parse(Config, smoke=SMOKE))
