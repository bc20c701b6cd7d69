"""The paper's first point of the valley: Gemma-3-1B-it, 8,000 long chains of thought, full fine-tuning.

    python recipes/gemma3_1b_8k.py                  the paper's setting, on a GPU
    python recipes/gemma3_1b_8k.py --plan           will it fit on my card? no GPU, no download
    python recipes/gemma3_1b_8k.py --gpu_gb 12      with the memory settings that a card of 12 GB needs
    python recipes/gemma3_1b_8k.py --smoke          the same path in about a minute on any CPU: a tiny model, no network

Measures the model on MATH-500, AIME24 and AMC23, fine-tunes it on packed OpenR1-Math-220k traces through the fused loss, measures
it again and draws the difference. The paper finds that accuracy falls to about a quarter. Every stage resumes: --resume.

Time: not timed on a GPU. Memory: bf16 weights rounded stochastically and 8-bit optimizer states, 6 bytes per parameter with the
gradient, besides activations; --plan tells, and what to switch on where it does not fit.
Left out on purpose: several GPUs, a validation set (the paper has none), weight decay (not stated), other data sizes.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from kit import models
from kit.config import as_flags, parse, show
from kit.data import ChatFormat, load_documents
from kit.data.chat import INSTRUCTION
from kit.data.toy import LONG_TRACES
from kit.evaluate import evaluate, parse_benchmarks
from kit.evaluate.measure import header_of
from kit.evaluate.shared_baseline import take_baseline
from kit.generate import SamplingParams, cache_bytes
from kit.memory import PeakMemory, Plan, plan
from kit.memory.choose import choose, rows_of, suggest_savings, switches
from kit.memory.measured_speed import sampling_time, training_time
from kit.memory.simulate import CARDS, check_free_memory
from kit.models import backbone
from kit.report import write_report
from kit.report.before_after import findings
from kit.run import AFTER, BEFORE, RunFolder, recipe_name, write_json
from kit.train import Savings, TrainingPlan, train


@dataclass(frozen=True)
class Config:
    # model
    model: str = "google/gemma-3-1b-it"  # hub id, local folder, .gguf file, or "tiny"
    device: str = "cuda"  # cuda or cpu
    chat_template: str = ""  # a Jinja file, or "plain" for base models; "" = the model's own
    instruction: str = INSTRUCTION  # line added below every problem; "" = none
    # data
    traces: str = (
        "open-r1/OpenR1-Math-220k:all"  # hub id[:config][@split], or a .jsonl, .json or .parquet file
    )
    num_traces: int = 8_000  # problems, one trace each; 0 = all
    row_tokens: int = 16_384  # tokens a pack; longer traces are dropped
    verify: bool = True  # keep correct traces only
    long_share: float = 1.0  # of the problems; the others get the data set's short `solution` in place of a trace
    shuffle: bool = True  # a random order, keyed by seed; off: the first num_traces of the file
    max_bad_rows: int = 20  # malformed rows that are named and left out; one more stops the run
    cache_dir: str = "~/.cache/through-the-valley"  # tokenised traces; "" = no cache
    # optimisation: the paper's Table 2 (AdamW, cosine)
    epochs: int = 4  # passes over the traces
    batch_traces: int = 8  # traces an optimizer step, on average
    lr: float = 5e-5  # peak learning rate
    warmup_ratio: float = 0.05  # share of the steps; 0 = none
    beta2: float = 0.999  # of AdamW, torch's default; the paper does not state it
    weight_decay: float = 0.0  # 0 = none; the paper does not state it
    max_grad_norm: float = 1.0  # global norm; 0 = no clipping; the paper does not state it
    max_tensor_norm: float = (
        0.0  # with update_in_backward, which knows no global norm: each parameter's own; 0 = no clipping
    )
    max_steps: int = 0  # stop the schedule here; 0 = all epochs
    checkpoint_every: int = 200  # steps; 0 = only at the end
    # memory: kit/train/savings.py; what fits is told by --plan
    qlora_rank: int = 0  # > 0: train adapters of this rank on an NF4 copy of the model; 0 = full fine-tuning
    recompute: bool = True  # one layer's activations at a time, for a third more computation
    tile_tokens: int = 0  # feed-forward of recomputed layers in tiles of this many tokens; 0 = whole
    optimizer: str = "auto"  # adamw (fp32 weights only), adamw8bit, or auto: adamw8bit for bf16 weights
    update_in_backward: bool = (
        False  # a gradient dies with its layer; needs --batch_traces 1 and --max_grad_norm 0
    )
    offload_inputs: bool = False  # layer inputs in CPU memory
    logit_rows: int = 0  # rows of logits at once in the loss; 0 = as many as half a GiB holds
    offload_optimizer: bool = False  # optimizer states in CPU memory
    head_update: str = "whole"  # blocked: the embedding's gradient a block of the vocabulary at a time
    attention: str = (
        "auto"  # kit, flash-attn, torch, or auto: flash-attn where it is installed and able, else kit
    )
    # evaluation: the paper's protocol
    benchmarks: str = "math500,aime24,amc23"  # name or name=FILE, comma-separated
    num_questions: int = 0  # questions per benchmark; 0 = all
    num_samples: int = 0  # samples per question; 0 = the paper's k (4, 8, 8)
    temperature: float = 0.6  # 0 = greedy, which the paper avoids
    top_p: float = 0.95  # 1 = off
    max_new_tokens: int = 16_384  # tokens per response
    num_slots: int = 16  # responses sampled at once
    baseline: str = ""  # a run of recipes/evaluate.py on this model, which stands for measuring it before; "" = measure it
    # run
    seed: int = 0  # of the subset, the packs and the samples
    plan: bool = (
        False  # say what a training step would hold and which cards it fits, and stop: no GPU, no download
    )
    gpu_gb: float = 0.0  # choose the memory settings for a card of this size; 0 = as they are set
    json: str = ""  # with --plan: file for the plan; "" = none
    smoke: bool = False  # tiny model, shipped traces, CPU, about a minute
    resume: bool = False  # go on with the run in --out, or with the newest one
    out: str = ""  # run folder; "" = the next free one under runs/


SMOKE = {
    "model": "tiny", "device": "cpu", "instruction": "", "traces": str(LONG_TRACES), "num_traces": 0, "row_tokens": 1_024,
    "lr": 3e-3, "cache_dir": "", "benchmarks": "toy", "num_questions": 50, "num_samples": 2, "max_new_tokens": 400,
    "num_slots": 50,
}  # fmt: skip


def plan_memory(config: Config) -> tuple[Config, Plan]:
    """Print the memory plan and return it with the settings, which --gpu_gb chooses for a card of that size."""
    what = {"row_tokens": config.row_tokens, "qlora_rank": config.qlora_rank}
    print(
        f"memory plan: each simulated step of {config.model} at {config.row_tokens:,} tokens takes up to a minute",
        flush=True,
    )
    rows = 1 if config.batch_traces == 1 else 2  # of a step, at least: how many depends on the traces
    if config.gpu_gb:
        planned = choose(config.model, gpu_gb=config.gpu_gb, rows=rows, **what)
        chosen = switches(planned, config.max_grad_norm)
        config = replace(config, **chosen)
        print(f"for a card of {config.gpu_gb:g} GB: {as_flags(chosen)}")
    else:
        savings = savings_of(config)
        planned = plan(config.model, savings=savings, rows=rows_of(savings, rows), **what)
    print(planned)
    if not planned.fits(CARDS[0]):
        print(suggest_savings(planned))
    return config, planned


def savings_of(config: Config) -> Savings:
    return Savings(**{field.name: getattr(config, field.name) for field in fields(Savings)})


def main(config: Config) -> None:
    planned = None
    if config.gpu_gb or config.plan:
        config, planned = plan_memory(config)
    if config.plan:
        if config.json:
            write_json(Path(config.json), planned.as_json())
        return
    savings_of(config).check_clipping(config.max_grad_norm, config.max_tensor_norm)
    savings_of(config).check_rows(config.batch_traces)
    if config.device == "cuda" and not torch.cuda.is_available():
        command = f"python recipes/{recipe_name(config)}.py"
        raise SystemExit(
            f"{config.model} at {config.row_tokens:,} tokens needs an NVIDIA GPU and none is here. Two ways out:\n"
            f"  {command} --smoke         the whole path on this CPU in about a minute, with a tiny model\n"
            f"  {command} --device cpu    this model on this CPU: slow, so make it small, for example with\n"
            "      --row_tokens 1024 --num_traces 64 --max_steps 5 --num_questions 4 --max_new_tokens 256"
        )
    if config.device == "cuda":
        planned = planned or plan_memory(config)[1]
        check_free_memory(planned)
    run = RunFolder.open(config)
    print(f"settings\n{show(config)}\nrun folder {run.path}")
    model, tokenizer = models.load_to_train(
        config.model,
        qlora_rank=config.qlora_rank,
        seed=config.seed,
        device=config.device,
        attention=config.attention,
    )
    chat = ChatFormat(tokenizer, template=config.chat_template, instruction=config.instruction)
    params = SamplingParams(config.temperature, config.top_p, max_new_tokens=config.max_new_tokens)
    benchmarks = parse_benchmarks(config.benchmarks, limit=config.num_questions)

    # the consequences of the settings, before anything slow happens
    documents, drop_counts = load_documents(
        config.traces, chat, row_tokens=config.row_tokens, num_traces=config.num_traces, seed=config.seed,
        max_bad_rows=config.max_bad_rows, verify=config.verify, shuffle=config.shuffle, long_share=config.long_share,
        cache_dir=config.cache_dir,
    )  # fmt: skip
    longest, context = max(map(len, documents)), backbone.context_length(model)  # a row of several traces may be longer
    if longest > context:
        raise ValueError(
            f"row_tokens is {config.row_tokens} and the longest trace has {longest} tokens, but {config.model} was made for "
            f"{context}; pass --row_tokens {context}"
        )
    plan = TrainingPlan.make(
        [len(document) for document in documents], row_tokens=config.row_tokens, batch_traces=config.batch_traces,
        epochs=config.epochs, max_steps=config.max_steps, seed=config.seed,
    )  # fmt: skip
    write_json(run.path / "drop_counts.json", {"text": str(drop_counts), "bad_rows": drop_counts.bad_rows})
    print(f"data        {drop_counts}")
    for place in drop_counts.bad_rows:
        print(f"  bad row   {place}")
    print(f"training    {plan}")
    samples = ", ".join(
        f"{b.name} {len(b.questions)} x {config.num_samples or b.num_samples}" for b in benchmarks
    )
    cache = cache_bytes(model, config.num_slots, config.max_new_tokens) / 2**30
    print(
        f"evaluation  {samples} samples of up to {config.max_new_tokens:,} tokens; KV cache {cache:.2f} GiB and the prompts'"
    )
    passes = 1 if config.baseline else 2  # before and after
    responses = passes * sum(len(b.questions) * (config.num_samples or b.num_samples) for b in benchmarks)
    training = training_time(config.model, savings_of(config), config.qlora_rank, plan.tokens)
    sampling = sampling_time(config.model, responses, config.max_new_tokens, config.num_slots)
    print(f"time        training {training}\n            sampling {sampling}")

    def measure(model, stage: str):
        results = {}
        for benchmark in benchmarks:
            results[benchmark.name] = evaluate(
                model, chat, benchmark, params, run.path / stage,
                num_samples=config.num_samples, num_slots=config.num_slots, seed=config.seed,
            )  # fmt: skip
            print(f"{stage:<12}{results[benchmark.name]}")
        return results

    if config.baseline:
        headers = [
            header_of(model, chat, b, params, num_samples=config.num_samples, seed=config.seed)
            for b in benchmarks
        ]
        before = take_baseline(
            Path(config.baseline), list(zip(benchmarks, headers, strict=True)),
            model=config.model, quantised=bool(config.qlora_rank), folder=run.path / BEFORE,
        )  # fmt: skip
        print(f"before      taken from {config.baseline}")
    else:
        before = measure(model, BEFORE)
    trained = train(
        model, tokenizer, documents, plan, run,
        lr=config.lr, warmup_ratio=config.warmup_ratio, beta2=config.beta2, weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm, max_tensor_norm=config.max_tensor_norm, savings=savings_of(config),
        memory=PeakMemory(model.device, planned, run.path / "memory.json"),
        checkpoint_every=config.checkpoint_every, seed=config.seed,
    )  # fmt: skip
    del model  # what is measured next is what was saved
    model, _ = models.load(str(trained), device=config.device, attention=config.attention)
    after = measure(model, AFTER)
    report = write_report(run.path)
    print("\n".join(findings({BEFORE: before, AFTER: after})))
    print(f"model {trained}\nreport {report}")


if __name__ == "__main__":
    main(parse(Config, smoke=SMOKE))
