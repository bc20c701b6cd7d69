"""Train the tiny model that ships with the kit, from nothing, on short traces of the toy task (kit/data/toy.py).

    python recipes/train_tiny_base.py --out runs/tiny_base

A Llama of 365k parameters learns 40,000 short traces in three epochs, through the same data, packing, fused
loss and loop as the real recipes. It writes the model and, beside it, the toy's long traces and held-out
problems, in the form of kit/models/shipped/tiny/. Time: about ten minutes on two CPU cores. Left out on
purpose: a validation set (the benchmark is one), larger sizes."""

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kit.config import parse, show
from kit.data import ChatFormat, Trace, make_documents
from kit.data.toy import make_rows, make_tokenizer, write_rows
from kit.evaluate import BENCHMARKS, evaluate
from kit.generate import SamplingParams
from kit.models.attention import REGISTERED
from kit.models.folder import save_model
from kit.run import RunFolder
from kit.train import Savings, TrainingPlan, train


@dataclass(frozen=True)
class Config:
    # model
    hidden_size: int = 96  # a multiple of num_heads
    num_layers: int = 3  # layers
    num_heads: int = 4  # heads
    # data
    num_traces: int = 40_000  # short traces
    num_long_traces: int = 512  # shipped for --smoke
    num_problems: int = 100  # held out: in no training set
    row_tokens: int = 4_096  # tokens a pack
    # optimisation
    epochs: int = 3  # passes over the traces
    batch_traces: int = 40  # fewer than a pack holds, so that a step is one pack
    lr: float = 4e-3  # peak
    warmup_ratio: float = 0.02  # share of all steps; 0 = none
    weight_decay: float = 0.01  # 0 = none
    beta2: float = 0.95  # short memory: there are few steps
    seed: int = 0  # of data, weights and packs
    # run
    smoke: bool = False  # a tiny version of everything, in seconds
    resume: bool = False  # go on with the run in --out
    out: str = ""  # run folder; "" = the next free one under runs/


SMOKE = {"num_traces": 400, "num_long_traces": 8, "num_problems": 8, "epochs": 1}


def main(config: Config) -> None:
    run = RunFolder.open(config)
    print(f"settings\n{show(config)}")
    tokenizer = make_tokenizer()
    chat = ChatFormat(tokenizer, instruction="")
    problems = make_rows("short", config.num_problems, seed=config.seed + 1, min_operands=4)
    held_out = {row["problem"] for row in problems}
    rows = make_rows("short", config.num_traces, seed=config.seed, exclude=held_out)
    documents = make_documents([Trace(row["problem"], row["trace"], "toy") for row in rows], chat)

    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=config.hidden_size, intermediate_size=3 * config.hidden_size,
            num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads, num_key_value_heads=config.num_heads,
            max_position_embeddings=1024, tie_word_embeddings=True, attn_implementation=REGISTERED["kit"],
            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    plan = TrainingPlan.make(
        [len(document) for document in documents],
        row_tokens=config.row_tokens, batch_traces=config.batch_traces, epochs=config.epochs, seed=config.seed,
    )  # fmt: skip
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; {len(documents):,} traces\n{plan}")
    train(
        model, tokenizer, documents, plan, run,
        lr=config.lr, warmup_ratio=config.warmup_ratio, weight_decay=config.weight_decay, beta2=config.beta2,
        savings=Savings(recompute=False), checkpoint_every=500, seed=config.seed,
    )  # fmt: skip
    tiny = run.path / "tiny"
    save_model(tiny, model, tokenizer)
    write_rows(
        tiny / "long_traces.jsonl",
        make_rows("long", config.num_long_traces, seed=config.seed, exclude=held_out),
    )
    write_rows(
        tiny / "problems.jsonl", [{"problem": row["problem"], "answer": row["answer"]} for row in problems]
    )
    benchmark = BENCHMARKS["toy"].read(str(tiny / "problems.jsonl"))
    params = SamplingParams(max_new_tokens=300)
    result = evaluate(
        model, chat, benchmark, params, run.path / "samples", num_samples=1, num_slots=64, seed=config.seed
    )
    print(f"{result}\n{tiny} holds what ships as kit/models/shipped/tiny")


if __name__ == "__main__":
    main(parse(Config, smoke=SMOKE))
