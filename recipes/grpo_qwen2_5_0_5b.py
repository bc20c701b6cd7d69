"""The paper's reinforcement learning on its smallest model: GRPO on Qwen2.5-0.5B-Instruct, MATH levels 1-4.

    python recipes/grpo_qwen2_5_0_5b.py                   the paper's setting: 1,024 prompts x 8 answers
    python recipes/grpo_qwen2_5_0_5b.py --preset rtx8     a step that fits a card of 8 GB
    python recipes/grpo_qwen2_5_0_5b.py --model FOLDER    start from a fine-tuned model, as the paper does too
    python recipes/grpo_qwen2_5_0_5b.py --preset evening  what a card finishes in an evening
    python recipes/grpo_qwen2_5_0_5b.py --plan            does it fit, and how long? no GPU, no download
    python recipes/grpo_qwen2_5_0_5b.py --gpu_gb 12       choose memory settings for a card of 12 GB
    python recipes/grpo_qwen2_5_0_5b.py --smoke           the same in about a minute on any CPU: a tiny model
    python recipes/grpo_qwen2_5_0_5b.py --reward mine.py:short  raise what a function of yours returns
    torchrun --nproc_per_node 2 recipes/grpo_qwen2_5_0_5b.py    the same on two cards: recipes/bench/README.md

Measures the model, trains it by comparing answers to the same prompt, right or wrong, and measures it again.
recipes/rewards.py holds the rewards that ship with the kit and says how to write your own.
The algorithm is kit/rl/grpo.py, a minimal GRPO. The paper's Table 3 equals SimpleRL-Zoo's published command
on verl wherever both state a value, so what it leaves open is set as there: the mean over tokens, clip 0.2,
dual clip 3.0, k3, weight decay 0.01, reward 0 for what cannot be graded. Left out:

1. A value network and a reward model (GRPO has none), tools, and answers of several turns.
2. Old log-probs recomputed by the trainer (verl): they are the sampler's, see kit/rl/grpo.py.
3. An entropy bonus (SimpleRL-Zoo: 0.001): the fused loss knows a token's log-prob, not its distribution's.
4. Estimators of the KL other than k3 (verl also clamps it at 10), and the KL as a part of the reward.
5. New prompts in place of those whose answers all get the same reward (DAPO): they stay, for their KL alone.
6. A penalty on the answers' length (DAPO), and the constant normaliser of Dr. GRPO.
7. Several passes over one rollout, a schedule of the learning rate, and sampling while training.
8. Updates inside the backward pass and blocks of the head: --update_in_backward and --head_update blocked are
   refused.

There, but off: GRPO's own mean over answers (--normaliser sequences), Dr. GRPO's advantages
(--advantage_scale none), DAPO's upper clip (--clip_high 0.28), and GSPO's ratio (--ratio sequence). What
differs from the paper's setting is printed, with the source of each value. --resume continues a run.

The prompts are SimpleRL-Zoo's on the hub (not tried from here), as the paper chose them by the model's size:
MATH levels 1-4 for 0.5B and 3-5 above. --prompts DIR:simplelr_qwen_level1to4 reads a local copy of that data
set, and --prompts FILE other MATH problems, of which --levels 1-4 keeps some.

Time: not timed on a GPU; the paper's runs used 8 H100.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from kit import data, evaluate, generate, memory, models, paper, report, rl
from kit.command import clean_up_if_refused, finish, open_run, start
from kit.command_line import command_of
from kit.config import part_of, some_of
from kit.data.rows import BadRows
from kit.data.toy import make_rows
from kit.evaluate.settings import BenchmarkSettings, ModelSettings
from kit.inputs import check_code, check_inputs, digest_of_questions
from kit.journal import write_rows
from kit.machine import on_cpu, one_thread_if_small, require_gpu
from kit.memory.settings import PlanSettings
from kit.ranks import here
from kit.rl.settings import Settings, check_savings
from kit.run import RunFolder
from kit.train.adapters import Adapters
from kit.train.savings import Savings
from kit.watch import WatchSettings, watch


@dataclass(frozen=True)
class Config(Settings, Savings, Adapters, BenchmarkSettings, ModelSettings, PlanSettings, WatchSettings):
    """The run. Settings of the algorithm are in kit/rl/settings.py, of memory in kit/train/savings.py, of how
    the model is asked and measured in kit/evaluate/settings.py."""

    preset: str = "paper"  # settings that the other flags may change [paper | evening | rtx8 | rtx24]
    # model
    model: str = "Qwen/Qwen2.5-0.5B-Instruct"  # hub id, local folder, .gguf file, or "tiny"
    weaken: float = 0.0  # noise on the weights, in standard deviations: --smoke then has more to learn [>= 0]
    # data
    prompts: str = ""  # hub id[:part][@split], or a file; "" = SimpleRL-Zoo's MATH prompts, by levels
    levels: str = ""  # MATH levels to keep, such as 1-4; "" = all; of SimpleRL-Zoo's, by the model's size
    num_prompts: int = 0  # prompts: the first so many of the file; 0 = all [>= 0]
    max_bad_rows: int = 20  # rows without problem or answer that are left out; more stop the run [>= 0]
    reward: str = "exact_answer"  # of recipes/rewards.py, or FILE.py:FUNCTION; comma-separated ones add up
    # optimisation
    batch_prompts: int = 1_024  # prompts per step [1..1000000]
    steps: int = 100  # rollouts; the paper does not state how many [>= 1]
    lr: float = 5e-7  # learning rate, constant [> 0, <= 1]
    weight_decay: float = 0.01  # AdamW's, from verl; 0 = none [>= 0]
    max_grad_norm: float = 1.0  # clip the global norm here, from verl; 0 = off [>= 0]
    checkpoint_every: int = 5  # steps between checkpoints; 0 = only at the end [>= 0]
    save_fp32: bool = False  # save the finished model in fp32, with the bits that bf16 lacks; off: bf16
    # evaluation: the paper's protocol
    benchmarks: str = BenchmarkSettings.benchmarks  # name, name=FILE or MINE=FILE, comma-separated; "" = none
    eval_tokens: int = 16_384  # tokens per response; at most half of the model's context [>= 1]
    # run
    smoke: bool = False  # tiny model, toy problems, CPU, about a minute

    def __post_init__(self):
        super().__post_init__()
        check_savings(self)
        self.check_saving(self.save_fp32)


CONSUMER = {
    "max_new_tokens": 2_048,
    "row_tokens": 4_096,
    "tile_tokens": 2_048,
    "mask_truncated": True,
    "benchmarks": "math500",
    "num_samples": 1,
}
PRESETS = {
    "paper": {},
    "evening": CONSUMER | {
        "batch_prompts": 32, "minibatch_prompts": 8, "steps": 40, "lr": 1e-6, "num_questions": 200,
        "eval_tokens": 2_048, "gpu_gb": "auto",
    },
    "rtx8": CONSUMER | {
        "batch_prompts": 32, "minibatch_prompts": 8, "num_slots": 64, "lr": 1e-6, "eval_tokens": 2_048,
    },
    "rtx24": CONSUMER | {
        "batch_prompts": 128, "minibatch_prompts": 32, "num_slots": 256, "max_new_tokens": 4_096,
        "row_tokens": 16_384, "eval_tokens": 4_096,
    },
}  # fmt: skip
SMOKE = {
    "model": "tiny", "device": "cpu", "gpu_gb": "", "instruction": "", "weaken": 0.2, "prompts": "toy",
    "batch_prompts": 32, "minibatch_prompts": 8, "max_new_tokens": 96, "row_tokens": 4_096, "num_slots": 256,
    "steps": 12, "lr": 1e-4, "kl_coef": 1e-3, "recompute": False, "tile_tokens": 0, "checkpoint_every": 4,
    "benchmarks": "toy", "num_questions": 50, "num_samples": 2, "eval_tokens": 96,
}  # fmt: skip
REWARDS = Path(__file__).with_name("rewards.py")
SMALL = 0.5e9  # weights without norms and biases; Qwen2.5-0.5B has 0.494e9


def weaken(model, amount: float, seed: int) -> None:
    """Add noise to every weight."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter += amount * parameter.std() * noise


def plan_memory(config: Config) -> tuple[Config, memory.run_plan.RunPlan]:
    """Print the plan. Return (the settings, chosen for the card if gpu_gb is set; what they hold)."""
    samples = config.batch_prompts * config.group_size
    ranks = config.ranks if any(config.ranks.values()) else models.folder.adapter_ranks(config.model)
    run = rl.memory_plan.RLRun(
        model=config.model,
        settings=part_of(config, Settings),
        num_samples=samples,
        attention=config.attention,
        cuda_graphs=config.plans_graphs,
        **ranks,
    )
    answers, tokens = config.steps * samples, min(config.response_tokens, config.max_new_tokens)
    work = memory.hours.Work(
        answers,
        tokens,
        num_traces=answers,
        batch_traces=config.minibatch_prompts * config.group_size,
        trace_tokens=tokens,
        evaluations=1,
        num_logged=config.steps * config.group_size,  # rollouts.jsonl has the first group of every step
        trained_on="answers",
        save_fp32=config.save_fp32,
    )
    config, planned = memory.run_plan.plan_recipe(config, run, work, smoke=SMOKE, presets=PRESETS)
    if config.plan:
        print("not counted: the evaluations before and after, and the pass that scores answers for the KL")
    return config, planned


def default_prompts(config: Config) -> str:
    """Return SimpleRL-Zoo's prompts for the model, as the paper chose them, and print the choice."""
    weights = memory.flops.Sizes.of(models.loading.load_config(config.model)).weights
    levels = config.levels or paper.MATH_LEVELS[weights > SMALL]
    why = f"the model has {weights / 1e9:.2f}B weights" if not config.levels else "as asked for"
    print(f"prompts     MATH levels {levels}: {why} (paper: {' for 0.5B, '.join(paper.MATH_LEVELS)} above)")
    return f"{paper.SIMPLERL}:{paper.FOLDERS}{levels.replace('-', 'to')}"


def read_questions(config: Config, run: RunFolder) -> list[data.Question]:
    """Read the prompts; print how many rows were left out, and which."""
    bad = BadRows(config.max_bad_rows)
    source = config.prompts
    if source == "toy":
        source = str(run.path / "prompts.jsonl")
        rows = make_rows("short", 2_000, seed=config.seed + 2, min_operands=3)
        here().from_first(lambda: write_rows(Path(source), rows))
    questions = data.problems.read_prompts(source, bad, levels=config.levels)[: config.num_prompts or None]
    check_inputs(run, "prompts", source, count=len(questions), found=digest_of_questions(questions))
    found = f"{len(questions):,} prompts with gold answers of {source}"
    print(f"data        {found}, {len(bad.found)} rows left out")
    for place in bad.found:
        print(f"  bad row   {place}")
    return questions


@clean_up_if_refused
def main(config: Config) -> None:
    if config.weaken and (rank := config.qlora_rank or config.lora_rank):
        raise ValueError(
            f"weaken is {config.weaken:g} but adapters of rank {rank} are trained, which are saved with the "
            "name of their base, which is then loaded without the noise; pass --weaken 0"
        )
    config.check_reference(adapters_are_trained=any(models.folder.adapter_ranks(config.model).values()))
    if config.benchmarks:
        evaluate.benchmarks.find_benchmarks(config.benchmarks)  # a wrong name, before a minute's plan
    rewards, files = rl.load_rewards(config.reward, REWARDS)
    config, planned = config.with_attention(config.model).for_layers_of(config.model), None
    if config.gpu_gib or config.plan:
        config, planned = plan_memory(config)
    if config.plan:
        return
    small = "--batch_prompts 4 --max_new_tokens 128 --row_tokens 1024 --num_slots 16 --steps 2"
    require_gpu(config.device, f"{config.model} with {config.num_slots} answers at once", on_cpu(small))
    if config.device == "cuda":
        planned = planned or plan_memory(config)[1]
        memory.measured.check_free_memory(planned)

    if not config.prompts:
        config = replace(config, prompts=default_prompts(config))
    if config.prompts != "toy":
        data.rows.check_sources(config.prompts)  # before the benchmarks are downloaded
    benchmarks = config.read_benchmarks() if config.benchmarks else []
    run = open_run(config)
    run.metrics = watch(run, config, report.rl.write_report)
    questions = read_questions(config, run)
    check_code(run, files)
    print(f"reward      {config.reward}: {rl.rewards.try_out(rewards, questions[0])}")
    where = some_of(config, "device", "attention")
    model, tokenizer = models.load_to_train(config.model, **config.ranks, seed=config.seed, **where)
    one_thread_if_small(model)
    if config.weaken:
        weaken(model, config.weaken, config.seed)
    chat = data.ChatFormat(tokenizer, model, template=config.chat_template, instruction=config.instruction)

    # the consequences of the settings, before anything slow happens
    prompts = config.steps * config.batch_prompts
    updates = -(-config.batch_prompts // config.minibatch_prompts)
    each = f"{config.batch_prompts:,} prompts x {config.group_size} answers, {updates} updates each"
    passes = f"{prompts / len(questions):.2f} passes over the prompts"
    print(f"training    {config.steps:,} steps of {each}; {passes}")
    print(paper.describe(paper.deviations(config)))
    answers = prompts * config.group_size
    sampling = memory.hours.sampling_time(config.model, answers, config.max_new_tokens, config.num_slots)
    print(f"time        rollouts {sampling} (updates and evaluations not included)")

    settings = part_of(config, Settings)
    drawn = data.problems.draw(questions, 0, min(prompts, len(questions)), seed=config.seed)
    settings.check_prompts(chat.encode([chat.prompt(question.problem) for question in drawn]))
    eval_tokens = min(config.eval_tokens, models.backbone.context_length(model) // 2)
    params = generate.SamplingParams(max_new_tokens=eval_tokens)
    slots = rl.memory_plan.eval_slots(settings, eval_tokens)

    def measure(stage: str) -> None:
        how = some_of(config, "num_samples", "cuda_graphs", "seed") | {"num_slots": slots}
        evaluate.evaluate_all(model, chat, benchmarks, params, run.path / stage, **how)

    measure("before")
    how = some_of(config, "lr", "weight_decay", "max_grad_norm", "cuda_graphs")
    policy = rl.Policy(model, chat, settings, savings=part_of(config, Savings), reward=rewards, **how)
    schedule = some_of(config, "steps", "batch_prompts", "checkpoint_every", "save_fp32")
    trained = rl.train(policy, questions, run, **schedule, planned=planned and planned.larger)
    del policy, model  # what is measured next is what was saved
    model, _ = models.load(str(trained), **where)
    measure("after")
    print(f"model {trained}")
    if not here().is_first:
        return
    page = report.rl.write_report(run.path)
    words = [command_of("evaluate"), "--model", str(trained), *["--smoke"] * (config.device == "cpu")]
    finish(page, "measure it again" if config.device == "cpu" else "measure it on more benchmarks", *words)


if __name__ == "__main__":
    start(main, Config, smoke=SMOKE, presets=PRESETS)
