"""Train the tiny model that ships with the kit, from scratch, on the toy's short traces (kit/data/toy.py).

    python recipes/train_tiny_base.py --out runs/tiny_base

A Llama of 365k parameters learns 40,000 short traces in three epochs, through the same data, packing, fused
loss and loop as the real recipes. The recipe writes the model and, beside it, the toy's long traces and
held-out problems, in the form of kit/models/shipped/tiny/. Time: about ten minutes on two CPU cores. Left out
on purpose: a validation set (the benchmark is one), larger sizes.
"""

from dataclasses import dataclass

from kit import data, evaluate, generate, models, train
from kit.command import ONE_PROCESS, clean_up_if_refused, open_run, start, suggest
from kit.command_line import command_of
from kit.config import RunSettings, some_of
from kit.data.toy import make_rows, make_tokenizer
from kit.journal import write_rows


@dataclass(frozen=True)
class Config(RunSettings):
    # model
    hidden_size: int = 96  # a multiple of 2 x num_heads, since rotations turn pairs [>= 1]
    num_layers: int = 3  # layers [1..1000]
    num_heads: int = 4  # heads [>= 1]
    # data
    num_traces: int = 40_000  # short traces [1..1000000]
    num_long_traces: int = 512  # long traces, for the --smoke of other recipes [0..1000000]
    num_problems: int = 100  # problems held out of training, as a benchmark [1..1000000]
    row_tokens: int = 4_096  # tokens per row [>= 1]
    # optimisation
    epochs: int = 3  # passes over the traces [1..1000]
    batch_traces: int = 40  # fewer than a row holds, so that a step is one row [>= 1]
    lr: float = 4e-3  # peak learning rate [> 0, <= 1]
    warmup_ratio: float = 0.02  # share of all steps; 0 = none [0..1]
    weight_decay: float = 0.01  # 0 = none [>= 0]
    beta2: float = 0.95  # of AdamW: short memory, since there are few steps [>= 0, < 1]
    seed: int = 0  # of data, weights and of how traces share rows [>= 0]
    # run
    smoke: bool = False  # a tiny version of everything, in seconds

    def __post_init__(self):
        super().__post_init__()
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size is {self.hidden_size} but num_heads is {self.num_heads}; pass a multiple of "
                f"{2 * self.num_heads}"
            )


SMOKE = {"num_traces": 400, "num_long_traces": 8, "num_problems": 8, "epochs": 1}


@clean_up_if_refused
def main(config: Config) -> None:
    run = open_run(config)
    tokenizer = make_tokenizer()
    chat = data.ChatFormat(tokenizer, instruction="")
    problems = make_rows("short", config.num_problems, seed=config.seed + 1, min_operands=4)
    held_out = {row["problem"] for row in problems}
    rows = make_rows("short", config.num_traces, seed=config.seed, exclude=held_out)
    documents = data.make_documents([data.Trace(row["problem"], row["trace"], "toy") for row in rows], chat)

    model = tiny_llama(config, tokenizer)
    plan = train.TrainingPlan.make(
        [len(document) for document in documents],
        **some_of(config, "row_tokens", "batch_traces", "epochs", "seed"),
    )
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; {len(documents):,} traces\n{plan}")
    train.train(
        model,
        tokenizer,
        documents,
        plan,
        run,
        **some_of(config, "lr", "warmup_ratio", "weight_decay", "beta2", "seed"),
        savings=train.Savings(recompute=False),
        checkpoint_every=500,
    )

    tiny = run.path / "tiny"
    models.folder.save_model(tiny, model, tokenizer)
    long_rows = make_rows("long", config.num_long_traces, seed=config.seed, exclude=held_out)
    write_rows(tiny / "long_traces.jsonl", long_rows)
    answers = [{"problem": row["problem"], "answer": row["answer"]} for row in problems]
    write_rows(tiny / "problems.jsonl", answers)

    benchmark = evaluate.BENCHMARKS["toy"].read(str(tiny / "problems.jsonl"))
    params, samples = generate.SamplingParams(max_new_tokens=300), run.path / "samples"
    settings = {"num_samples": 1, "num_slots": 64, "seed": config.seed}
    result = evaluate.evaluate(model, chat, benchmark, params, samples, **settings)
    print(f"{result}\n{tiny} holds what ships as kit/models/shipped/tiny")
    suggest("the valley of this model", command_of("demo"), "--models", str(tiny), "--quick")


def tiny_llama(config: Config, tokenizer):
    """Build the model with random weights."""
    import torch  # here, so that flags are read at once
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.seed)
    H, heads = config.hidden_size, config.num_heads
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    settings = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=H,
        intermediate_size=3 * H,
        num_hidden_layers=config.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        attn_implementation=models.attention.REGISTERED["kit"],
        **special,
    )
    return LlamaForCausalLM(settings)


if __name__ == "__main__":
    start(main, Config, alone=ONE_PROCESS, smoke=SMOKE)
