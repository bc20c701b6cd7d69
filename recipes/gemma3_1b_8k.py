"""The paper's first point of the valley: full fine-tuning of Gemma-3-1B-it on 8,000 long chains of thought.

    python recipes/gemma3_1b_8k.py                   the paper's setting, on a GPU
    python recipes/gemma3_1b_8k.py --plan            does it fit, and how long? needs no GPU and no download
    python recipes/gemma3_1b_8k.py --gpu_gb 12       with settings that fit a card of 12 GB
    python recipes/gemma3_1b_8k.py --preset evening  what a card finishes in an evening: fewer, shorter traces
    python recipes/gemma3_1b_8k.py --smoke           all stages on any CPU in a minute: tiny model, no network
    torchrun --nproc_per_node 2 recipes/gemma3_1b_8k.py    on two cards: recipes/bench/README.md

Measure the model on MATH-500, AIME24 and AMC23, fine-tune it on packed traces of OpenR1-Math-220k, measure it
again and report the difference. The paper finds that accuracy falls to about a quarter. Every stage resumes
(--resume).

Time: not timed on a GPU. Hours are printed before the first stage: from recipes/check_card.py's measurements
if there are any, else as an estimate from a datasheet. Memory: 8 bytes per parameter (weights and
gradients in bf16, 8-bit optimizer states, the 16 bits that bf16 lacks) and activations. --plan prints the
sum, and what would lower it. Left out on purpose: a validation set (the paper has none), weight decay (the
paper does not state it), other numbers of traces (recipes/valley_sweep.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kit import data, evaluate, memory, models, paper, report, train
from kit.command import clean_up_if_refused, finish, open_run, start
from kit.command_line import command_of, started_as
from kit.config import part_of, some_of
from kit.data.chat import warn_of_instruction
from kit.data.toy import LONG_TRACES
from kit.evaluate.settings import EVENING, EvaluationSettings, ModelSettings
from kit.inputs import check_inputs, digest_of_documents
from kit.machine import on_cpu, one_thread_if_small, require_gpu
from kit.memory.settings import TrainingPlanSettings
from kit.ranks import here
from kit.run import AFTER, BEFORE, RunFolder, write_json
from kit.train.adapters import Adapters
from kit.train.savings import Savings
from kit.watch import WatchSettings, watch


@dataclass(frozen=True)
class Config(Savings, Adapters, ModelSettings, EvaluationSettings, TrainingPlanSettings, WatchSettings):
    """The settings of these classes are flags, too: kit/train/savings.py, kit/evaluate/settings.py."""

    preset: str = "paper"  # settings that the other flags may change [paper | evening]
    # model
    model: str = "google/gemma-3-1b-it"  # hub id, local folder, .gguf file, or "tiny"
    # data
    traces: str = "open-r1/OpenR1-Math-220k:all"  # hub id[:part][@split], .jsonl, .json or .parquet file
    columns: str = ""  # columns of other formats, such as problem=question,trace=response; "" = known ones
    num_traces: int = 8_000  # traces at most, one per problem; 0 = all [>= 0]
    row_tokens: int = 16_384  # tokens per packed row; longer traces are dropped [>= 1]
    verify: str = "llama"  # keep traces that Math-Verify accepts, it or Llama, or all [math | llama | none]
    long_share: float = 1.0  # share of problems with a long trace; the others get a short one [0..1]
    short_traces: str = ""  # short traces, read like traces; "" = the data set's own `solution`
    shuffle: bool = True  # a random order of problems, keyed by seed; off: the first num_traces of the file
    max_bad_rows: int = 20  # malformed rows that are listed and left out; more stop the run [>= 0]
    cache_dir: str = "~/.cache/through-the-valley"  # folder of tokenised traces; "" = no cache
    # optimisation: the paper's Table 2 (AdamW, cosine)
    epochs: int = 4  # passes over the traces [1..1000]
    batch_traces: int = 8  # traces per optimizer step, on average [>= 1]
    lr: float = 5e-5  # peak learning rate [> 0, <= 1]
    warmup_ratio: float = 0.05  # share of the steps; 0 = none [0..1]
    beta2: float = 0.999  # AdamW's, torch's default; the paper does not state it [>= 0, < 1]
    weight_decay: float = 0.0  # AdamW's; 0 = none; the paper does not state it [>= 0]
    max_grad_norm: float = 1.0  # clip the global norm here; 0 = off; the paper does not state it [>= 0]
    max_steps: int = 0  # stop the schedule here; 0 = all epochs [>= 0]
    checkpoint_every: int = 200  # steps between checkpoints; 0 = only at the end [>= 0]
    save_fp32: bool = False  # save the finished model in fp32, with the bits that bf16 lacks; off: bf16
    # evaluation: the paper's protocol
    eval_every: int = 0  # steps between measurements during training; 0 = none; changes nothing in it [>= 0]
    eval_questions: int = 50  # questions per benchmark then: the first ones, one sample each [>= 1]
    baseline: str = ""  # run of recipes/evaluate.py that replaces the first measurement; "" = none
    # run
    seed: int = 0  # of the subset, the packing and the samples [>= 0]
    smoke: bool = False  # tiny model, shipped traces, CPU, about a minute

    def __post_init__(self):
        super().__post_init__()
        self.check_saving(self.save_fp32)


PRESETS = {
    "paper": {},
    "evening": EVENING | {"num_traces": 1_000, "row_tokens": 8_192, "epochs": 2},
}
SMOKE = {
    "model": "tiny", "device": "cpu", "gpu_gb": "", "instruction": "", "cache_dir": "",
    "traces": str(LONG_TRACES), "num_traces": 0, "row_tokens": 1_024, "lr": 3e-3,
    "benchmarks": "toy", "num_questions": 50, "num_samples": 2, "max_new_tokens": 400, "num_slots": 50,
}  # fmt: skip
NOT_COUNTED = "not counted: measurements during training"  # in hours and disk, with --eval_every


@clean_up_if_refused
def main(config: Config) -> None:
    config, planned = config.with_attention(config.model).for_layers_of(config.model), None
    asked = config.held if config.gpu_gib else vars(config)  # gpu_gb chooses the others
    savings = part_of(config, Savings)
    savings.check_clipping(asked.get("max_grad_norm", 0.0))
    savings.check_rows(asked.get("batch_traces", 1))
    if config.gpu_gib or config.plan:
        config, planned = plan_memory(config)
    savings = part_of(config, Savings)
    savings.check_ranks(here().count)
    if config.plan:
        return

    data.mixtures.check_mixture(config.long_share, config.short_traces, config.columns)
    data.formats.parse_columns(config.columns)
    data.rows.check_sources(config.traces, config.short_traces)  # before the benchmarks are downloaded
    small = "--row_tokens 1024 --num_traces 64 --max_steps 5 --num_questions 4 --max_new_tokens 256"
    require_gpu(config.device, f"{config.model} at {config.row_tokens:,} tokens", on_cpu(small))
    if config.device == "cuda":
        planned = planned or plan_memory(config)[1]
        memory.measured.check_free_memory(planned)
    benchmarks = config.read_benchmarks()
    run = open_run(config)
    run.metrics = watch(run, config, report.write_report)

    model, tokenizer = models.load_to_train(
        config.model, **config.ranks, **some_of(config, "seed", "device", "attention")
    )
    one_thread_if_small(model)
    warn_of_instruction(config.model, config.instruction)
    chat = data.ChatFormat(tokenizer, model, template=config.chat_template, instruction=config.instruction)
    context = models.backbone.context_length(model)
    documents, held_out, schedule = read_documents(config, chat, run, context, benchmarks)
    print_consequences(config, model, schedule, benchmarks)
    during = evaluate.during_training.of_run(config, model, chat, benchmarks, run, held_out)
    how = some_of(config, "num_samples", "num_slots", "cuda_graphs", "seed")
    if config.baseline:
        before = copy_baseline(config, model, chat, benchmarks, run)
    else:
        before = evaluate.evaluate_all(model, chat, benchmarks, config.params, run.path / BEFORE, **how)

    trained = train.train(
        model,
        tokenizer,
        documents,
        schedule,
        run,
        **some_of(config, "lr", "warmup_ratio", "beta2", "weight_decay", "max_grad_norm"),
        **some_of(config, "checkpoint_every", "save_fp32", "seed"),
        savings=savings,
        memory=memory.PeakMemory(model.device, planned and planned.update, run.path / "memory.json"),
        after_step=during,
        after_every=config.eval_every or 1,
    )

    del model, during  # measure what was saved
    model, _ = models.load(str(trained), device=config.device, attention=config.attention)
    after = evaluate.evaluate_all(model, chat, benchmarks, config.params, run.path / AFTER, **how)
    if not here().is_first:
        return
    page = report.write_report(run.path)
    print("\n".join(report.before_after.findings({BEFORE: before, AFTER: after})))
    print(f"model {trained}")
    if config.smoke:
        flags = ("--preset", "evening", "--plan", "--gpu_gb", "12")
        finish(page, "what an evening on a card takes", started_as(), *flags)
    else:
        words = [command_of("grpo"), "--model", str(trained)]
        if config.device == "cpu":
            words += ["--smoke", "--weaken", "0"]  # on the toy's problems: the paper's would take weeks
        if any(config.ranks.values()):
            words += ["--kl_coef", "0"]  # the reference of trained adapters would be their base
        finish(page, "reinforcement learning from this model", *words)


def plan_memory(config: Config) -> tuple[Config, memory.run_plan.RunPlan]:
    """Print the plan. Return (the settings, chosen for the card if gpu_gb is set; what they hold)."""
    num_samples = config.count_samples()
    run = memory.phases.MeasuredRun(
        model=config.model,
        params=config.params,
        num_samples=num_samples,
        **some_of(config, "num_slots", "row_tokens", "attention"),
        cuda_graphs=config.plans_graphs,
        rows=1 if config.batch_traces == 1 else 2,  # per step, at least: how many depends on the traces
        **config.ranks,
    )
    work = memory.hours.Work(
        num_samples,
        min(config.response_tokens, config.max_new_tokens),
        num_traces=config.num_traces or paper.TABLE[-1].traces,
        evaluations=1 if config.baseline else 2,
        **some_of(config, "epochs", "batch_traces", "max_steps", "trace_tokens", "save_fp32"),
    )
    config, planned = memory.run_plan.plan_recipe(config, run, work, smoke=SMOKE, presets=PRESETS)
    if config.plan and config.eval_every:
        print(NOT_COUNTED)
    return config, planned


def read_documents(config: Config, chat: data.ChatFormat, run: RunFolder, context: int, benchmarks):
    """Return (the tokenised traces, held-out ones, the schedule), and print what was dropped and why.

    Raises ValueError if a trace is longer than the model's context; a row of several traces may be.
    """
    documents, drop_counts = data.load_documents(
        config.traces,
        chat,
        **some_of(config, "num_traces", "row_tokens", "verify", "shuffle", "seed", "max_bad_rows", "columns"),
        **some_of(config, "long_share", "short_traces", "cache_dir"),
        held_out=evaluate.during_training.num_held_out(config),
        benchmarks=evaluate.benchmarks.problems_at_hand(benchmarks),
    )
    documents, held_out = documents[: drop_counts.kept], documents[drop_counts.kept :]
    check_inputs(run, "traces", config.traces, count=len(documents), found=digest_of_documents(documents))
    found = {"text": str(drop_counts), "kept": drop_counts.kept, "bad_rows": drop_counts.bad_rows}
    write_json(run.path / "drop_counts.json", found)
    print(f"data        {drop_counts}")
    for place in drop_counts.bad_rows:
        print(f"  bad row   {place}")

    longest = max(map(len, documents))
    if longest > context:
        raise ValueError(
            f"row_tokens is {config.row_tokens} and the longest trace has {longest} tokens, but "
            f"{config.model} was made for {context}; pass --row_tokens {context}"
        )
    schedule = train.TrainingPlan.make(
        [len(document) for document in documents],
        **some_of(config, "row_tokens", "batch_traces", "epochs", "max_steps", "seed"),
    )
    return documents, held_out, schedule


def print_consequences(config: Config, model, schedule: train.TrainingPlan, benchmarks) -> None:
    """Print what the settings lead to, before anything slow begins."""
    print(f"training    {schedule}")
    print(config.describe(benchmarks))
    print(paper.describe(paper.deviations(config)))

    passes = 1 if config.baseline else 2  # before and after
    training = memory.hours.training_time(
        config.model, part_of(config, Savings), config.ranks, schedule.tokens, config.row_tokens
    )
    sampling = memory.hours.sampling_time(
        config.model, passes * config.num_responses(benchmarks), config.max_new_tokens, config.num_slots
    )
    print(f"time        training {training}\n            sampling {sampling}")
    if config.eval_every:
        print(f"            {NOT_COUNTED}")


def copy_baseline(config: Config, model, chat, benchmarks, run: RunFolder):
    """Return the results of --baseline, and copy its samples into the run's folder."""
    options = some_of(config, "num_samples", "seed")
    wanted = [(b, evaluate.measure.header_of(model, chat, b, config.params, **options)) for b in benchmarks]
    before = evaluate.shared_baseline.take_baseline(
        Path(config.baseline),
        wanted,
        model=config.model,
        adapted=bool(config.qlora_rank or config.lora_rank),
        folder=run.path / BEFORE,
    )
    print(f"before      taken from {config.baseline}")
    return before


if __name__ == "__main__":
    start(main, Config, smoke=SMOKE, presets=PRESETS)
