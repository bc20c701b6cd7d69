"""Change the loss: fine-tune the tiny model with the tokens after </think> counted twice.

    python recipes/change_the_loss.py          about ten seconds on a CPU

A loss is a function of hidden states, the head's weight, the row and the step's scale (kit/train/loss.py).
This one gives the answer a larger weight than the thinking before it. Left out on purpose: measuring its
effect; recipes/gemma3_1b_8k.py shows how.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kit import data, models, train
from kit.command import clean_up_if_refused, start, suggest
from kit.command_line import command_of
from kit.config import RunSettings
from kit.data.toy import LONG_TRACES
from kit.machine import one_thread_if_small
from kit.run import RunFolder

ROW_TOKENS = 1_024


@dataclass(frozen=True)
class Config(RunSettings):
    num_traces: int = 64  # shipped traces of the toy; 0 = all [>= 0]
    answer_weight: float = 2.0  # of a token after </think>; 1 = plain cross-entropy [>= 0]
    lr: float = 1e-3  # peak learning rate [> 0, <= 1]
    seed: int = 0  # of the subset and of how documents share rows [>= 0]


def weigh_answers(end_of_thinking: int, answer_weight: float) -> train.loss.LossOfRow:
    """Return cross-entropy in which a token after </think> (end_of_thinking) counts answer_weight times."""
    import torch  # here, so that flags are read at once

    from kit.kernels.linear_cross_entropy import linear_cross_entropy

    def loss_of(hidden, weight, batch, scale):
        closed = (batch.input_ids == end_of_thinking).cumsum(0)  # (T,): </think>s so far in the whole row
        start = torch.arange(len(batch), device=hidden.device) - batch.position_ids  # (T,): of its document
        token_weight = torch.where(closed > closed[start], answer_weight, 1.0)
        loss = linear_cross_entropy(hidden, weight, batch.targets, reduction="sum", token_weight=token_weight)
        return scale * loss

    return loss_of


@clean_up_if_refused
def main(config: Config) -> Path:
    """Train and return the folder of the finished model."""
    run = RunFolder.open(config)
    model, tokenizer = models.load_to_train("tiny", device="cpu")
    one_thread_if_small(model)
    loss_of = weigh_answers(tokenizer.convert_tokens_to_ids("</think>"), config.answer_weight)
    chat = data.ChatFormat(tokenizer, model, instruction="")
    traces = {"row_tokens": ROW_TOKENS, "num_traces": config.num_traces, "seed": config.seed}
    documents, _ = data.load_documents(str(LONG_TRACES), chat, **traces)
    lengths = [len(document) for document in documents]
    plan = train.TrainingPlan.make(lengths, row_tokens=ROW_TOKENS, batch_traces=8, epochs=1)
    print(f"training    {plan}")

    settings = {"lr": config.lr, "warmup_ratio": 0.05}
    model_folder = train.train(model, tokenizer, documents, plan, run, **settings, loss_of=loss_of)
    print(f"model {model_folder}")
    words = ("--model", str(model_folder), "--beside", "tiny", "3+2-4+4?")
    suggest("what it says now, beside the model that it was", command_of("ask"), *words)
    return model_folder


if __name__ == "__main__":
    start(main, Config)
