"""The paper's reinforcement learning on its smallest model: GRPO on Qwen2.5-0.5B-Instruct, MATH levels 1 to 4, right or wrong.

    python recipes/grpo_qwen2_5_0_5b.py                    the paper's setting: 1,024 prompts x 8 answers of up to 8,192 tokens
    python recipes/grpo_qwen2_5_0_5b.py --preset rtx8      a step that fits a card of 8 GB
    python recipes/grpo_qwen2_5_0_5b.py --model FOLDER     from a model that was fine-tuned first, as the paper also does
    python recipes/grpo_qwen2_5_0_5b.py --plan             will it fit, and how many answers at once? no GPU, no download
    python recipes/grpo_qwen2_5_0_5b.py --gpu_gb 12        with the memory settings and the answers at once for a card of 12 GB
    python recipes/grpo_qwen2_5_0_5b.py --smoke            the same path in about a minute on any CPU: a tiny model, no network

1. Measure the model. 2. Sample 8 answers per prompt from the model itself, grade them, compare each with the
others of its prompt. 3. Raise the probability of what did better, a clipped step a mini-batch, held near the
start by a KL loss. 4. Repeat from 2, then measure again. The algorithm is kit/rl/grpo.py: read that one. What
differs from the paper's setting is printed. --resume resumes.

Time: not timed on a GPU; the paper's runs took 8 H100. The prompts are SimpleRL-Zoo's on the hub (loading them was not tried
from here); a local copy goes in with --prompts FILE, other MATH files with --levels 1-4 besides.
Left out on purpose: what kit/rl/grpo.py leaves out, a schedule of the learning rate, several passes over one rollout.
"""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from kit import models
from kit.config import as_flags, parse, show
from kit.data import ChatFormat
from kit.data.chat import INSTRUCTION
from kit.data.problems import read_prompts
from kit.data.rows import BadRows
from kit.data.toy import make_rows, write_rows
from kit.evaluate import evaluate, parse_benchmarks
from kit.generate import SamplingParams
from kit.memory.measured_speed import sampling_time
from kit.memory.simulate import check_free_memory
from kit.models import backbone
from kit.models.folder import adapter_rank
from kit.report.rl import write_report
from kit.rl import Policy, Settings, train
from kit.rl.memory_plan import RLPlan, choose_rl, eval_slots, plan_rl
from kit.run import RunFolder, recipe_name, write_json
from kit.train import Savings


@dataclass(frozen=True)
class Config:
    preset: str = "paper"  # paper, rtx8 or rtx24: settings that the other flags may change
    # model
    model: str = "Qwen/Qwen2.5-0.5B-Instruct"  # hub id, local folder, .gguf file, or "tiny"
    device: str = "cuda"  # cuda or cpu
    chat_template: str = ""  # a Jinja file, or "plain" for base models; "" = the model's own
    instruction: str = INSTRUCTION  # line added below every problem; "" = none
    weaken: float = 0.0  # noise on the weights, in their standard deviations: a start worth improving for --smoke; 0 = none
    # data
    prompts: str = "hkust-nlp/SimpleRL-Zoo-Data:simplelr_qwen_level1to4"  # hub id[:config][@split], or a .jsonl, .json or .parquet file
    levels: str = ""  # MATH levels to keep, such as 1-4; "" = all
    num_prompts: int = 0  # the first so many of the file; 0 = all
    max_bad_rows: int = (
        20  # rows without problem or gold answer that are named and left out; one more stops the run
    )
    # rollout: the paper's Table 3
    batch_prompts: int = 1_024  # prompts per step
    group_size: int = 8  # answers per prompt
    max_new_tokens: int = 8_192  # tokens an answer
    temperature: float = 1.0  # of sampling, and of the log-probs in the objective
    num_slots: int = 64  # answers sampled at once; in the evaluation as many as the same cache holds
    # objective: the paper states groups, scale, KL coefficient and mini-batch; clip range, estimator and normaliser it does not
    minibatch_prompts: int = 256  # prompts an optimizer step
    advantage_scale: str = "group-std"  # none: Dr. GRPO
    normaliser: str = "sequences"  # GRPO's own; tokens: DAPO
    clip_low: float = 0.2  # PPO's
    clip_high: float = 0.2  # PPO's; DAPO: 0.28
    kl_coef: float = 1e-4  # of the KL loss (k3, GRPO's own estimator); 0 = none
    mask_truncated: bool = False  # learn nothing from answers that were cut off
    # optimisation
    steps: int = 100  # rollouts; the paper does not state how many
    lr: float = 5e-7  # constant
    weight_decay: float = 0.0  # 0 = none; the paper does not state it
    max_grad_norm: float = 1.0  # global norm; 0 = no clipping; the paper does not state it
    checkpoint_every: int = 5  # steps; 0 = only at the end
    # memory: kit/train/savings.py
    qlora_rank: int = 0  # > 0: train adapters of this rank on an NF4 copy of the model; 0 = full fine-tuning
    row_tokens: int = 16_384  # tokens a pack of the update; a prompt and its answer must fit
    recompute: bool = True  # one layer's activations at a time, for a third more computation
    tile_tokens: int = 0  # feed-forward of recomputed layers in tiles of this many tokens; 0 = whole
    optimizer: str = "auto"  # adamw (fp32 states), adamw8bit, or auto: adamw8bit for bf16 weights
    offload_inputs: bool = False  # layer inputs in CPU memory
    logit_rows: int = 0  # rows of logits at once in the loss; 0 = as many as half a GiB holds
    offload_optimizer: bool = False  # optimizer states in CPU memory
    attention: str = (
        "auto"  # kit, flash-attn, torch, or auto: flash-attn where it is installed and able, else kit
    )
    # evaluation, before and after
    benchmarks: str = "math500"  # name or name=FILE, comma-separated; "" = none
    num_questions: int = 0  # questions per benchmark; 0 = all
    num_samples: int = 0  # samples per question; 0 = the paper's k
    eval_tokens: int = 16_384  # tokens per response; at most the model's context
    # run
    seed: int = 0  # of the prompts' order and the samples
    plan: bool = False  # say what sampling and an update would hold and which cards they fit, and stop: no GPU, no download
    gpu_gb: float = 0.0  # choose memory settings and num_slots for a card of this size; 0 = as they are set
    json: str = ""  # with --plan: file for the plan; "" = none
    smoke: bool = False  # tiny model, toy problems, CPU, about a minute
    resume: bool = False  # go on with the run in --out, or with the newest one
    out: str = ""  # run folder; "" = the next free one under runs/


CONSUMER = {
    "max_new_tokens": 2_048,
    "row_tokens": 4_096,
    "tile_tokens": 2_048,
    "mask_truncated": True,
    "num_samples": 1,
}
PRESETS = {
    "paper": {},
    "rtx8": CONSUMER | {"batch_prompts": 32, "minibatch_prompts": 8, "num_slots": 64, "lr": 1e-6, "eval_tokens": 2_048},
    "rtx24": CONSUMER | {"batch_prompts": 128, "minibatch_prompts": 32, "num_slots": 256, "max_new_tokens": 4_096,
                         "row_tokens": 16_384, "eval_tokens": 4_096},
}  # fmt: skip
STATED = ("batch_prompts", "group_size", "max_new_tokens", "temperature", "minibatch_prompts", "advantage_scale", "kl_coef", "lr",
          "qlora_rank", "mask_truncated")  # fmt: skip
SMOKE = {
    "model": "tiny", "device": "cpu", "instruction": "", "weaken": 0.2, "prompts": "toy", "batch_prompts": 32,
    "minibatch_prompts": 8, "max_new_tokens": 96, "num_slots": 256, "row_tokens": 4_096, "steps": 12, "lr": 1e-4,
    "checkpoint_every": 4, "recompute": False, "kl_coef": 1e-3, "benchmarks": "toy", "num_questions": 50, "num_samples": 2,
    "eval_tokens": 96,
}  # fmt: skip


def deviations(config: Config) -> list[str]:
    """What differs from the paper's Table 3, setting by setting."""
    paper = Config()
    return [f"{name} {getattr(config, name)} (paper: {getattr(paper, name)})" for name in STATED
            if getattr(config, name) != getattr(paper, name)]  # fmt: skip


def settings_of(config: Config, kind: type):
    return kind(
        **{field.name: getattr(config, field.name) for field in fields(kind) if hasattr(config, field.name)}
    )


def weaken(model, amount: float, seed: int) -> None:
    """Add noise to every weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter += amount * parameter.std() * noise


def plan_memory(config: Config) -> tuple[Config, RLPlan]:
    """The settings, chosen for the card where --gpu_gb says how large it is, and their plan, printed."""
    rank = config.qlora_rank or adapter_rank(config.model)
    what = {"settings": settings_of(config, Settings), "qlora_rank": rank}
    print(
        f"memory plan: simulating {config.model}, up to a minute for each setting that is tried", flush=True
    )
    if config.gpu_gb:
        answers = config.batch_prompts * config.group_size  # more slots than that stay empty
        planned = choose_rl(config.model, gpu_gb=config.gpu_gb, most_slots=answers, **what)
        chosen = {
            name: value for name, value in asdict(planned.update.savings).items() if hasattr(config, name)
        }
        chosen["num_slots"] = planned.settings.num_slots
        config = replace(config, **chosen)
        print(f"for a card of {config.gpu_gb:g} GB: {as_flags(chosen)}")
    else:
        planned = plan_rl(config.model, savings=settings_of(config, Savings), **what)
    print(planned)
    return config, planned


def main(config: Config) -> None:
    if config.weaken and config.qlora_rank:
        raise ValueError(
            f"weaken is {config.weaken:g} but qlora_rank is {config.qlora_rank}: adapters are saved with the name of their base, "
            "which is read anew, without the noise; pass --weaken 0"
        )
    planned = None
    if config.gpu_gb or config.plan:
        config, planned = plan_memory(config)
    if config.plan:
        if config.json:
            write_json(Path(config.json), planned.as_json())
        return
    settings = settings_of(config, Settings)
    if config.device == "cuda" and not torch.cuda.is_available():
        command = f"python recipes/{recipe_name(config)}.py"
        raise SystemExit(
            f"{config.model} with {config.num_slots} answers at once needs an NVIDIA GPU and none is here. Two ways out:\n"
            f"  {command} --smoke         the whole path on this CPU in about a minute, with a tiny model\n"
            f"  {command} --device cpu    this model on this CPU: slow, so make it small, for example with\n"
            "      --batch_prompts 4 --max_new_tokens 128 --row_tokens 1024 --num_slots 16 --steps 2 --benchmarks ''"
        )
    if config.device == "cuda":
        planned = planned or plan_memory(config)[1]
        check_free_memory(planned.larger)
    run = RunFolder.open(config)
    print(f"settings\n{show(config)}\nrun folder {run.path}")
    bad = BadRows(config.max_bad_rows)
    if config.prompts == "toy":
        source = run.path / "prompts.jsonl"
        write_rows(source, make_rows("short", 2_000, seed=config.seed + 2, min_operands=3))
        questions = read_prompts(str(source), bad)
    else:
        questions = read_prompts(config.prompts, bad, levels=config.levels)
    questions = questions[: config.num_prompts or None]
    model, tokenizer = models.load_to_train(
        config.model,
        qlora_rank=config.qlora_rank,
        seed=config.seed,
        device=config.device,
        attention=config.attention,
    )
    if config.weaken:
        weaken(model, config.weaken, config.seed)
    chat = ChatFormat(tokenizer, template=config.chat_template, instruction=config.instruction)

    # the consequences of the settings, before anything slow happens
    print(f"data        {len(questions):,} prompts with gold answers, {len(bad.found)} rows left out")
    for place in bad.found:
        print(f"  bad row   {place}")
    updates = -(-config.batch_prompts // config.minibatch_prompts)
    print(
        f"training    {config.steps:,} steps of {config.batch_prompts:,} prompts x {config.group_size} answers, {updates} "
        f"updates each; {config.steps * config.batch_prompts / len(questions):.2f} passes over the prompts"
    )
    print(
        f"the paper   {'; '.join(deviations(config)) or 'its Table 3'}; clip range, KL estimator and normaliser: not stated there"
    )
    answers = config.steps * config.batch_prompts * config.group_size
    sampling = sampling_time(config.model, answers, config.max_new_tokens, config.num_slots)
    print(f"time        rollouts {sampling}; updates and evaluation besides")
    params = SamplingParams(max_new_tokens=min(config.eval_tokens, backbone.context_length(model) // 2))

    def measure(stage: str) -> None:
        for benchmark in (
            parse_benchmarks(config.benchmarks, limit=config.num_questions) if config.benchmarks else []
        ):
            result = evaluate(
                model, chat, benchmark, params, run.path / stage,
                num_samples=config.num_samples, num_slots=eval_slots(settings, params.max_new_tokens), seed=config.seed,
            )  # fmt: skip
            print(f"{stage:<12}{result}")

    measure("before")
    policy = Policy(
        model, chat, settings, lr=config.lr, weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm,
        savings=settings_of(config, Savings),
    )  # fmt: skip
    trained = train(
        policy, questions, run, steps=config.steps, batch_prompts=config.batch_prompts, checkpoint_every=config.checkpoint_every,
        planned=planned and planned.larger,
    )  # fmt: skip
    del policy, model  # what is measured next is what was saved
    model, _ = models.load(str(trained), device=config.device, attention=config.attention)
    measure("after")
    print(f"model {trained}\nreport {write_report(run.path)}")


if __name__ == "__main__":
    main(parse(Config, smoke=SMOKE, presets=PRESETS))
