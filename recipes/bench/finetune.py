"""Compare a whole fine-tuning run with TRL's SFTTrainer: target tokens per second, and peak memory.

    python recipes/bench/finetune.py --vocab_size 262144     a 20M Llama, Gemma's vocabulary, random tokens
    python recipes/bench/finetune.py --model HuggingFaceTB/SmolLM2-135M-Instruct \\
        --traces open-r1/OpenR1-Math-220k:all                a real model on real traces

Both get the same weights, documents, row length, rows per step, learning rate and AdamW, and otherwise keep
their defaults: TRL with packing=True lays a step's 8 rows end to end and recomputes activations; we process
them one after another. Both compute in fp32 on a CPU (TRL's own default, bf16, is several times slower there)
and in bf16 on a card. Each runs in a process of its own, whose peak memory is compared: resident, weights and
libraries included, or on a card what torch allocated. Time is from documents in memory to trained weights,
packing included. Takes minutes on two CPU cores. Left out on purpose: evaluation, saving.
"""

import math
import tempfile
import time
from dataclasses import dataclass

import torch
from contest import TRL, has_trl, in_a_process, peak_gib, save
from transformers import LlamaConfig, LlamaForCausalLM

from kit import models
from kit.config import Checked, parse
from kit.data import ChatFormat, load_documents
from kit.data.chat import INSTRUCTION
from kit.machine import GIB
from kit.models import loading
from kit.models.attention import attention_name
from kit.packing import IGNORE_INDEX, Document, PackedBatch, plan_packs
from kit.train import Savings, TrainingStep
from kit.train.optimizer import cosine_with_warmup


@dataclass(frozen=True)
class Config(Checked):
    # model
    model: str = "tiny"  # hub id, local folder, .gguf file, or "tiny"
    vocab_size: int = 0  # > 0: a Llama of 20M random weights with this vocabulary; 0 = `model` [>= 0]
    chat_template: str = ""  # "plain", "no_thinking", a Jinja file or a name of the model's; "" = its own
    # data
    traces: str = ""  # hub id[:config][@split] or file; "" = random tokens
    num_traces: int = 64  # documents [>= 1]
    row_tokens: int = 1_024  # tokens per row; longer traces are dropped [>= 1]
    median_tokens: int = 400  # of the lognormal lengths of random documents [>= 1]
    # optimisation
    rows_per_step: int = 8  # TRL's default [>= 1]
    lr: float = 5e-5  # peak learning rate, cosine with 5 % warm-up [> 0, <= 1]
    seed: int = 0  # of the weights and the documents [>= 0]
    # run
    json: str = ""  # file for the figures; "" = none
    smoke: bool = False  # the shipped tiny model, in seconds


LINE = (
    "  {name:<16}{targets:>9,} targets {seconds:8.1f} s {targets_per_second:9,.0f} targets/s  "
    "peak {peak_gib:6.2f} GiB  {steps} steps, loss {first_loss:.3f} to {last_loss:.3f}"
)
SMOKE = {"num_traces": 24, "row_tokens": 256, "median_tokens": 60, "rows_per_step": 2}


def main(config: Config) -> list[dict]:
    what = f"a Llama with V = {config.vocab_size:,}" if config.vocab_size else config.model
    print(
        f"\nfine-tuning {what}: {config.num_traces} documents, rows of {config.row_tokens:,} tokens, "
        f"{config.rows_per_step} rows per step"
    )
    contestants = {"ours": _ours} | ({"TRL SFTTrainer": _trl} if has_trl() else {})
    rows = []
    for name, contestant in contestants.items():
        rows.append({"name": name, **in_a_process(contestant, config)})
        print(LINE.format(**rows[-1]))
    if len(rows) == 2:
        speed, memory = (rows[0][key] / rows[1][key] for key in ("targets_per_second", "peak_gib"))
        print(f"  ours / TRL: {speed:.2f}x the target tokens per second, {memory:.2f}x the peak memory")
    save(config, rows=rows)
    return rows


def _model_and_documents(config: Config):
    torch.manual_seed(config.seed)
    model, tokenizer = models.load(config.model, device=loading.default_device())
    if config.vocab_size:
        model = _llama(config)
    if config.traces:
        chat = ChatFormat(tokenizer, template=config.chat_template, instruction=INSTRUCTION)
        rows = {"row_tokens": config.row_tokens, "num_traces": config.num_traces, "seed": config.seed}
        documents, _ = load_documents(config.traces, chat, **rows, max_bad_rows=20, cache_dir="")
        return model, tokenizer, documents

    drawn = torch.empty(config.num_traces).log_normal_(math.log(config.median_tokens), 0.6)
    lengths = drawn.long().clamp(4, config.row_tokens).tolist()
    V = model.config.vocab_size
    return model, tokenizer, [Document(torch.randint(V, (n,)), n // 10) for n in lengths]


def _llama(config: Config) -> LlamaForCausalLM:
    """Build a Llama with random weights and config.vocab_size."""
    device = loading.default_device()
    dtype = loading.default_dtype(device)
    settings = LlamaConfig(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.row_tokens,
        hidden_size=64,
        intermediate_size=1_024,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
        tie_word_embeddings=True,
    )
    settings._attn_implementation = attention_name("auto", settings, device=device, dtype=dtype)
    return LlamaForCausalLM(settings).to(device, dtype)


def _result(seconds: float, losses: list[float], documents: list[Document]) -> dict:
    targets = sum(len(document) - max(document.prompt_len, 1) for document in documents)
    return {
        "seconds": seconds,
        "steps": len(losses),
        "targets": targets,
        "targets_per_second": targets / seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else peak_gib(),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def _ours(config: Config) -> dict:
    model, _, documents = _model_and_documents(config)
    start = time.perf_counter()
    packs = plan_packs([len(document) for document in documents], config.row_tokens, seed=config.seed)
    steps = [packs[i : i + config.rows_per_step] for i in range(0, len(packs), config.rows_per_step)]
    training_step = TrainingStep(model, Savings(), lr=config.lr, max_grad_norm=1.0, seed=config.seed)
    losses = []
    for step, rows in enumerate(steps):
        for group in training_step.optimizer.param_groups:
            group["lr"] = config.lr * cosine_with_warmup(step, len(steps), 0.05)
        batches = [PackedBatch.build([documents[i] for i in row]) for row in rows]
        losses.append(training_step(batches)[0].item())
    result = _result(time.perf_counter() - start, losses, documents)
    training_step.close()
    return result


def _trl(config: Config) -> dict:
    import datasets
    from trl import SFTConfig, SFTTrainer

    model, tokenizer, documents = _model_and_documents(config)
    model.set_attn_implementation("sdpa")  # what it would have if TRL had loaded it
    ids = [document.ids.tolist() for document in documents]
    prompts = [document.prompt_len for document in documents]
    labels = [[IGNORE_INDEX] * n + tokens[n:] for n, tokens in zip(prompts, ids, strict=True)]
    dataset = datasets.Dataset.from_dict({"input_ids": ids, "labels": labels})
    datasets.disable_progress_bars()
    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        settings = SFTConfig(
            output_dir=folder,
            packing=True,
            max_length=config.row_tokens,
            num_train_epochs=1,
            max_grad_norm=1.0,
            per_device_train_batch_size=config.rows_per_step,
            learning_rate=config.lr,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            seed=config.seed,
            **TRL,
        )
        trainer = SFTTrainer(model, settings, train_dataset=dataset, processing_class=tokenizer)
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        return _result(time.perf_counter() - start, losses, documents)


if __name__ == "__main__":
    main(parse(Config, smoke=SMOKE))
