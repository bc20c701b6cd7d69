"""Ask one model, or several side by side: both sides of the valley, or every model of a demo.

    python recipes/ask.py "3+2-4+4?"                   the tiny model that ships with the kit, on any CPU
    python recipes/ask.py --model runs/valley_demo/001 "3+2-4+4?"          every model of a demo
    python recipes/ask.py --model runs/valley_demo/001 --titles "base,64 long"    no question: a conversation
    python recipes/ask.py --model runs/gemma3_1b_8k/001 "What is 15 % of 80?"   before and after fine-tuning
    python recipes/ask.py --model runs/gemma3_1b_8k/001/model --beside google/gemma-3-1b-it "3+2-4+4?"
    python recipes/ask.py --gold 5 "3+2-4+4?"                grades the answer against yours

Right equations get a tick, wrong ones are struck through; the paper's reflection phrases and boxed answers
stand out. A line below each answer has its tokens, its verdict (kit.grade; the value of plain arithmetic is
computed) and its first wrong equation. Ctrl-C ends an answer; in a conversation you can then ask on.

The prompt is that of evaluation: the model's chat template, the instruction of the run that the model comes
from, and for plain arithmetic the words of the benchmark `arithmetic`, or of the toy. A question of a
benchmark gets the answer that recipes/evaluate.py logs as its first sample, up to rounding in its batches.

All models are in memory at once; if they do not fit, you are told before they are loaded. Columns, colours
and ticks need a terminal; in a pipe or file the answers are plain text, one below the other. Never run on a
GPU so far. Left out on purpose: servers, tools, pictures.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kit import data, generate, memory, models
from kit.command import INTERRUPTED, ONE_PROCESS, clean_up_if_refused, start, suggest
from kit.command_line import command_of, started_as
from kit.config import Checked, some_of
from kit.data.toy import TEMPLATE, read_chain
from kit.machine import GIB, free_memory, one_thread_if_small, require_gpu
from kit.paper import INSTRUCTION
from kit.terminal import visible
from kit.valley.models_of_run import Found, side_by_side

if TYPE_CHECKING:
    from kit.evaluate.asking import Side


@dataclass(frozen=True)
class Config(Checked):
    WORDS = "question"  # typed without its flag

    question: str = ""  # what to ask; "" = a conversation
    # models
    model: str = "tiny"  # hub id, folder (of a model, adapters, a run or a study), .gguf file, or "tiny"
    beside: str = ""  # more models, comma-separated, shown beside it; "" = none
    titles: str = ""  # only models whose title has this, or one of several, comma-separated; "" = all
    device: str = ""  # "" = the card if there is one [cuda | cpu]
    attention: str = "auto"  # auto: kit, or varlen if it won in check_card [auto | kit | varlen | torch]
    cuda_graphs: bool = True  # on a card: replay each token's step as one CUDA graph: faster, more memory
    # prompt
    chat_template: str = ""  # "plain", "no_thinking", a Jinja file or a name of the model's; "" = as measured
    instruction: str = "auto"  # line below every question; auto: as the model was measured; "" = none
    history: bool = False  # show the models the conversation so far, which no evaluation does
    # answers
    gold: str = ""  # the right answer to the question; "" = computed for plain arithmetic, else not known
    temperature: float = 0.6  # 0 = greedy [0 | 0.001..1000]
    top_p: float = 0.95  # 1 = off [> 0, <= 1]
    top_k: int = 0  # 0 = off [>= 0]
    max_new_tokens: int = 2_048  # tokens per answer; fewer if the model's context ends before [>= 1]
    seed: int = 0  # of the answers [>= 0]


HELP = """\
  /again      another answer to the same question
  /gold 5     grade the last answers, if the right one is 5
  /new        forget the conversation so far (with --history)
  /quit       end it, as Ctrl-D does"""


@clean_up_if_refused
def main(config: Config) -> None:
    if config.gold and not config.question:
        raise ValueError(
            f"gold is {config.gold!r} but there is no question; pass one, or type /gold {config.gold} "
            "in the conversation"
        )
    require_gpu(config.device, "--device cuda", {f"{started_as()} --device cpu": "the same on this CPU"})
    found = chosen(config)
    check_memory(found, config)
    sides = [load(model, config) for model in found]
    one_thread_if_small(max((side.model for side in sides), key=largest_matrix))
    if config.question:
        if not put(sides, config.question, config):
            raise SystemExit(INTERRUPTED)
    else:
        converse(sides, config)
    suggest(*next_command(config, found))


def chosen(config: Config) -> list[Found]:
    """Return the models to ask. Raises ValueError if --titles leaves none."""
    names = [config.model, *filter(None, map(str.strip, config.beside.split(",")))]
    found = side_by_side(names)
    parts = [config.titles.strip()]  # a whole title, which may hold commas itself
    if not any(parts[0] in model.title for model in found):
        parts = [part.strip() for part in config.titles.split(",") if part.strip()]
    kept = [model for model in found if not parts or any(part in model.title for part in parts)]
    if not kept:
        titles = "; ".join(model.title for model in found) or "none"
        raise ValueError(f"titles is {config.titles!r} but no title has that in it; the titles are: {titles}")
    return kept


def check_memory(found: Sequence[Found], config: Config) -> None:
    """Raise ValueError, naming each model's share, if the models do not fit in memory together."""
    import torch

    on_card = config.device != "cpu" and models.loading.default_device().type == "cuda"
    free = torch.cuda.mem_get_info()[0] if on_card else free_memory()
    needs = [needed(model.name, config.max_new_tokens, on_card=on_card) for model in found]
    if free is not None and sum(needs) > free:
        named = zip(found, needs, strict=True)
        shares = ", ".join(f"{model.title} {need / GIB:.2f} GiB" for model, need in named)
        fewer = "ask fewer models at once (--titles, or without --beside)"
        ways = f"{fewer}, or pass --device cpu" if on_card else fewer
        raise ValueError(
            f"the models need {sum(needs) / GIB:.2f} GiB ({shares}) but {free / GIB:.2f} GiB of "
            f"{'the card' if on_card else 'memory'} are free; {ways}"
        )


def needed(name: str, max_new_tokens: int, *, on_card: bool) -> int:
    """Return the bytes of a model's weights and of the cache of one answer."""
    models.loading.path_of(name)  # a name of nothing is refused with what to pass
    rank = models.folder.adapter_ranks(name)["qlora_rank"]
    fake, _ = memory.simulate.fake_model(models.loading.load_config(name), rank)
    weights = sum(weight.numel() * weight.element_size() for weight in fake.parameters())
    tokens = min(max_new_tokens, models.backbone.context_length(fake))
    wider = 1 if on_card or rank else 2  # bf16 here, fp32 on a CPU
    return wider * (weights + generate.cache_bytes(fake, 1, tokens))


def load(found: Found, config: Config) -> Side:
    """Load a model with the prompt that it was measured with, and print both."""
    from kit.evaluate.asking import Side

    device, attention = config.device or models.loading.default_device().type, config.attention
    if attention == "auto":
        attention = models.pick_attention.pick_attention([found.name], device)
    model, tokenizer = models.load(found.name, device=device, attention=attention)
    instruction = config.instruction
    if instruction == "auto":
        default = "" if tokenizer.chat_template == TEMPLATE else INSTRUCTION
        instruction = default if found.instruction is None else found.instruction
    template = config.chat_template or found.chat_template
    chat = data.ChatFormat(tokenizer, model, template=template, instruction=instruction)
    size = f"{sum(weight.numel() for weight in model.parameters()) / 1e6:,.1f} M parameters"
    below = f"below each question: {instruction}" if instruction else "no instruction"
    print(visible(f"model  {found.title} ({size}; {below})"))
    return Side(found.title, model, chat, cuda_graphs=config.cuda_graphs)


def largest_matrix(model) -> int:
    return max(weight.numel() for weight in model.parameters())


def put(sides: Sequence[Side], question: str, config: Config, *, sample: int = 0) -> bool:
    """Ask the models a question. Return False after Ctrl-C, which ends the answers."""
    from kit.evaluate.asking import ask

    if toys := [side for side in sides if side.is_toy and (side.history or not is_chain(side, question))]:
        knows = "chains such as 7+5-3?, one at a time, of up to eight digits from 1 to 9, with values 0 to 99"
        print(
            visible(f"note   {toys[0].title} knows nothing but {knows}: what it says to this means nothing")
        )
    params = generate.SamplingParams(config.temperature, config.top_p, config.top_k, config.max_new_tokens)
    return ask(
        sides, question, params, seed=config.seed, sample=sample, gold=config.gold, history=config.history
    )


def is_chain(side: Side, question: str) -> bool:
    """Return whether a question is a problem of the toy, in its words."""
    try:
        read_chain(side.problem(question))
    except ValueError:
        return False
    return True


def converse(sides: Sequence[Side], config: Config) -> None:
    """Ask what is typed, line by line, until the input ends."""
    from kit.evaluate.marks import graded

    typed = sys.stdin is not None and sys.stdin.isatty()
    if typed:
        with contextlib.suppress(ImportError):  # absent on Windows, whose console edits lines itself
            import readline  # noqa: F401  (input() has arrow keys and a history with it)
        print("Type a question, /help for more; Ctrl-C ends an answer, Ctrl-D the conversation.")
    question, asked, lengths = "", {}, []  # asked: question -> how often; lengths: of the histories before it
    while True:
        try:
            line = input("> " if typed else "").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\nCtrl-D ends the conversation")
            continue
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return
        if word == "/new":
            for side in sides:
                side.history.clear()
        elif word == "/gold" and rest.strip() and question:
            for side in sides:
                print(visible(f"{side.title}: {graded(side.text, rest.strip())}"))
        elif (word == "/again" and question) or (line and not line.startswith("/")):
            if word == "/again":
                for side, length in zip(sides, lengths, strict=True):
                    del side.history[length:]  # the answer to the same question, if there was one
            else:
                question = line
            lengths = [len(side.history) for side in sides]
            sample = asked[question] = asked.get(question, -1) + 1
            try:
                put(sides, question, config, sample=sample)
            except ValueError as error:
                print(f"error: {error}")
        elif line:
            print(HELP)


def next_command(config: Config, found: Sequence[Found]) -> tuple[str, ...]:
    """Return the effect of what to type next, and its words."""
    if [model.name for model in found] == ["tiny"]:
        return "trains models to ask beside it, in a minute", command_of("demo"), "--smoke"
    if config.question:
        given = some_of(config, "model", "beside", "titles", "chat_template")
        flags = [word for name, value in given.items() if value for word in (f"--{name}", value)]
        return "without a question: a conversation", started_as(), *flags
    return "measure one of them", command_of("evaluate"), "--model", found[-1].name


if __name__ == "__main__":
    start(main, Config, alone=ONE_PROCESS)
