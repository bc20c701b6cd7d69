"""Every number of the paper, once; what it leaves open, and who answers; what a run does otherwise.

    python -m kit.paper     the paper's settings and ours, side by side, with their sources

Where the paper is silent its sources speak, and are named: fine-tuning is LLaMA-Factory's, grading is
Qwen2.5-Math's, and its Table 3 is the published command of SimpleRL-Zoo, which runs verl.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kit.command_line import COMMANDS

PAPER, OPEN = "paper", "the paper does not say; ours"
LLAMA_FACTORY, QWEN_MATH = "from LLaMA-Factory", "from Qwen2.5-Math"
VERL, SIMPLERL_ZOO = "from verl", "from SimpleRL-Zoo"

OPENR1 = "open-r1/OpenR1-Math-220k:all"
SIMPLERL = "hkust-nlp/SimpleRL-Zoo-Data"
FOLDERS = "simplelr_qwen_level"  # of SimpleRL-Zoo's prompts; the levels follow, such as 1to4
MATH_LEVELS = ("1-4", "3-5")  # of the smallest model's prompts, and of all others'
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."  # Qwen2.5-Math's
MODELS = (  # those that the kit covers
    "google/gemma-3-1b-it",
    "Qwen/Qwen2.5-0.5B-Instruct",
    "Qwen/Qwen2.5-1.5B-Instruct",
    "Qwen/Qwen2.5-3B-Instruct",
    "meta-llama/Llama-3.2-1B-Instruct",
    "meta-llama/Llama-3.2-3B-Instruct",
)
REWARD = "exact_answer"  # the default of GRPO here, too: right or wrong
LARGER_MODELS = ("qwen2.5-7b-instruct", "qwen2.5-14b-instruct", "llama-3.1-8b-instruct")
SAMPLES = {"math500": (4, 500), "aime24": (8, 30), "amc23": (8, 40), "arithmetic": (4, 400)}  # k, questions
BENCHMARKS = ("math500", "aime24", "amc23")  # whose unweighted mean is the accuracy
LENGTH_BENCHMARK = "math500"  # on whose answers it measures length
# (model, traces) -> what its text says of the mean accuracy, in percent. Its curves carry no values.
ACCURACY = {
    ("gemma-3-1b-it", 0): "24",
    ("gemma-3-1b-it", 8_000): "about a quarter of its 24",
    ("gemma-3-1b-it", 220_000): "15",
    ("qwen2.5-0.5b-instruct", 0): "14",
    ("qwen2.5-0.5b-instruct", 220_000): "11",
    ("qwen2.5-1.5b-instruct", 32_000): "slightly above its baseline",
}
# section "Why it happens"; a response counts as reflective if a keyword matches and GPT-4o-mini agrees
KEYWORDS = (
    "recheck", "rethink", "reassess", "reevaluate", "re-evaluate", "reevaluation", "re-examine", "reexamine",
    "reconsider", "reanalyze", "double-check", "check again", "think again", "verify again",
    "go over the steps",
)  # fmt: skip
REFLECTION = "reflection below 5 % before, about 75 % after 8k traces (Qwen)"
REFLECTION_LENGTH = "reflective answers about 2,000 tokens longer (1.5B, 3B)"
OPERATIONS, MAX_OPERAND = (5, 15), 100  # of a synthetic problem, at least and at most
OPERATIONS_DONE = "about 10 operations per answer before, 40 after 8k traces"


@dataclass(frozen=True)
class Row:
    """A row of Table 2."""

    traces: int
    epochs: int
    batch_traces: int

    @property
    def steps(self) -> int:
        """Optimizer steps, by arithmetic."""
        return self.traces * self.epochs // self.batch_traces

    @classmethod
    def of(cls, num_traces: int) -> Row:
        """Return the largest row with no more traces, or the first; 0 traces are all: the last row."""
        return next((row for row in reversed(TABLE) if row.traces <= (num_traces or row.traces)), TABLE[0])


TABLE = (
    Row(8_000, 4, 8),
    Row(16_000, 4, 16),
    Row(32_000, 4, 32),
    Row(64_000, 3, 64),
    Row(128_000, 3, 128),
    Row(220_000, 2, 128),
)


@dataclass(frozen=True)
class Setting:
    """A setting of a recipe as the paper has it."""

    name: str  # the recipe's
    value: object
    source: str = PAPER  # who states it
    words: str = ""  # what the value stands for; "" = the value says it

    def __str__(self) -> str:
        return self.words or _written(self.value)


MEASURING = (
    Setting("device", "cuda", words="bf16 on 8 H100"),
    Setting("chat_template", "", OPEN, "the model's own"),
    Setting("instruction", INSTRUCTION, QWEN_MATH),
    Setting("benchmarks", ",".join(BENCHMARKS)),
    Setting("num_questions", 0, words="all"),
    Setting("num_samples", 0, words="8 for AIME24 and AMC23, 4 for MATH-500"),
)
EVALUATION = (
    *MEASURING,
    Setting("temperature", 0.6),
    Setting("top_p", 0.95),
    Setting("top_k", 0, OPEN, "off"),
    Setting("max_new_tokens", 16_384),
)
FINE_TUNING = (
    Setting("qlora_rank", 0, words="all parameters"),
    Setting("lora_rank", 0, words="all parameters"),
    Setting("traces", OPENR1, words="OpenR1-Math-220k"),
    Setting("row_tokens", 16_384),
    Setting("verify", "llama", words="correct traces; by whose verdict it does not say"),
    Setting("shuffle", True, OPEN, "a random order, in which subsets are nested"),
    Setting("long_share", 1.0, words="long traces alone"),
    Setting("short_traces", "", words="none"),
    Setting("lr", 5e-5),
    Setting("warmup_ratio", 0.05),
    Setting("beta2", 0.999, LLAMA_FACTORY),
    Setting("weight_decay", 0.0, LLAMA_FACTORY),
    Setting("max_grad_norm", 1.0, LLAMA_FACTORY, "1.0, of all gradients together"),
    Setting("max_steps", 0, words="all"),
    *EVALUATION,
)
RL = (
    Setting("qlora_rank", 0, words="all parameters"),
    Setting("lora_rank", 0, words="all parameters"),
    Setting("weaken", 0.0, words="no noise on the weights"),
    Setting("levels", "", words=f"MATH {MATH_LEVELS[0]} for 0.5B, {MATH_LEVELS[1]} above"),
    Setting("num_prompts", 0, words="all, about 8k"),
    Setting("reward", REWARD, words="1 for a right answer, 0 for a wrong one"),
    Setting("batch_prompts", 1_024),
    Setting("group_size", 8),
    Setting("max_new_tokens", 8_192),
    Setting("temperature", 1.0),
    Setting("minibatch_prompts", 256),
    Setting("advantage_scale", "group-std"),
    Setting("kl_coef", 1e-4),
    Setting("lr", 5e-7),
    Setting("mask_truncated", False, VERL),
    Setting("normaliser", "tokens", VERL, "tokens, the mean over the tokens of a mini-batch"),
    Setting("ratio", "token", VERL),
    Setting("clip_low", 0.2, VERL),
    Setting("clip_high", 0.2, VERL),
    Setting("dual_clip", 3.0, VERL),
    Setting("weight_decay", 0.01, VERL),
    Setting("max_grad_norm", 1.0, VERL),
    Setting("undecided_is_wrong", True, SIMPLERL_ZOO, "an answer that cannot be graded scores 0"),
    *MEASURING,
    Setting("eval_tokens", 16_384),
)


def deviations(config) -> list[str]:
    """List what a run does otherwise than the paper, and otherwise than its sources where it is silent.

    config: a recipe's Config, or its settings by name, such as a run's config.json holds. A setting that it
    lacks is not compared.
    """
    settings = config if isinstance(config, Mapping) else vars(config)
    return [
        f"{setting.name} {_written(settings[setting.name])} ({setting.source}: {setting})"
        for setting in table_of(settings)
        if setting.name in settings and settings[setting.name] != setting.value
    ] + [*_methods(settings)]


def describe(found: Sequence[str]) -> str:
    """Return the lines that a recipe prints of its deviations before it starts."""
    return "the paper   " + ("\n            ".join(found) or "its setting")


def table_of(settings: Mapping[str, object]) -> tuple[Setting, ...]:
    """Return what the settings of a recipe are compared with."""
    if "group_size" in settings:
        return RL
    if "num_traces" not in settings:
        return FINE_TUNING  # a sweep, or an evaluation, which has fewer settings
    traces, row = settings["num_traces"], Row.of(settings["num_traces"])
    sizes = ", ".join(f"{row.traces:,}" for row in TABLE)
    return (
        Setting("num_traces", row.traces if traces else 0, words=f"one of {sizes}"),
        Setting("epochs", row.epochs),
        Setting("batch_traces", row.batch_traces, words=f"{row.batch_traces}"),
        *FINE_TUNING,
    )


def _methods(settings: Mapping[str, object]) -> Iterator[str]:
    """Describe what is done otherwise and is not the value of one setting."""
    yield from deviations_of_model(str(settings.get("model", "")))
    if settings.get("server"):
        yield "a server samples, whose weights and dtype cannot be checked (paper: bf16)"
    if settings.get("instruction"):
        yield f"the instruction stands below the problem ({QWEN_MATH}: in the system turn)"
    if "lr" in settings:
        yield from _training(settings)
    if "group_size" in settings:
        yield from _reinforcing(settings)


def deviations_of_model(model: str) -> Iterator[str]:
    """List what a model says by its name; nothing for "" and for the paper's own."""
    if model and not _is_the_papers(model):
        yield f"model {model}, which by its name is none of the paper's"
    if model.endswith(".gguf"):
        yield "weights that a GGUF file has rounded (paper: bf16)"


def _is_the_papers(model: str) -> bool:
    return Path(model).name.lower() in {*(Path(name).name.lower() for name in MODELS), *LARGER_MODELS}


def _training(settings: Mapping[str, object]) -> Iterator[str]:
    bf16 = settings.get("device") == "cuda"
    rests = {True: ", bf16 weights with their fp32 rests", False: ", bf16 weights rounded stochastically"}
    if settings.get("qlora_rank"):
        yield "the frozen weights are rounded to NF4 (paper: bf16)"
    if bf16 or settings.get("optimizer") == "adamw8bit" or settings.get("offload_optimizer"):
        weights = rests.get(settings.get("exact_weights"), "") if bf16 else ""  # a CPU has fp32 weights
        yield f"AdamW with 8-bit states{weights} (paper: AdamW, bf16)"
    if bf16:
        yield f"gradients are bf16, also while a step's rows add up ({OPEN})"
    if settings.get("update_in_backward"):
        yield "each step is one row of packed traces, updated without a norm of all gradients"
    if "traces" in settings:
        yield f"whether a trace fits is counted in the model's own tokens ({OPEN})"
        yield "a step holds whole rows of packed traces, so batch_traces is its mean (paper: exactly so many)"


def _reinforcing(settings: Mapping[str, object]) -> Iterator[str]:
    if (prompts := str(settings.get("prompts", ""))) and FOLDERS not in prompts:
        yield f"prompts {prompts} (paper: SimpleRL-Zoo's)"
    levels, model = _levels_in(prompts), str(settings.get("model", ""))
    wanted = MATH_LEVELS["0.5b" not in Path(model).name.lower()]
    if levels and _is_the_papers(model) and levels != wanted:
        yield f"prompts of MATH levels {levels} (paper: {wanted} for this model)"
    yield f"no entropy bonus ({SIMPLERL_ZOO}: coefficient 0.001)"
    yield f"old log-probs are the sampler's ({VERL}: computed again by the trainer)"
    yield f"a group's standard deviation + 1e-4 ({VERL}: + 1e-6), and no clamp of k3 ({VERL}: at 10)"


def _levels_in(prompts: str) -> str:
    """Return the MATH levels that the name of SimpleRL-Zoo's folder states, such as 1-4; "" if none does."""
    found = re.search(FOLDERS + r"([0-9]+)to([0-9]+)", prompts)
    return f"{found[1]}-{found[2]}" if found else ""


def _written(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value) or "none"


def stars(model: str) -> dict[int, float]:
    """Return traces (0 = the base model) -> the paper's accuracy in percent, if it is a number."""
    return {n: float(text) for (name, n), text in ACCURACY.items() if name == model and text.isdigit()}


def accuracy_in_words(model: str) -> str:
    """Return what the paper says of a model's accuracy; "" if nothing. model: any name that holds its."""
    said = {n: text for (name, n), text in ACCURACY.items() if name in model.lower()}
    parts = [
        f"{text}{' %' if text.isdigit() else ''} {f'after {n:,} traces' if n else 'before'}"
        for n, text in said.items()
    ]
    return ", ".join(parts)


def main(words: Sequence[str] = ()) -> None:
    """Print the paper's settings and numbers, and the recipes' defaults. Raises ValueError for any word."""
    if words:
        raise ValueError(f"{words[0]!r} is not a flag: this command takes none")
    for word in ("finetune", "evaluate", "grpo"):
        recipe = COMMANDS[word][0]
        settings = vars(importlib.import_module(recipe).Config())
        print(f"{recipe.removeprefix('kit.').replace('.', '/')}.py")
        rows = [("setting", "the paper", "ours", "source")]
        for setting in table_of(settings):
            if setting.name in settings:
                ours = settings[setting.name]
                ours = "the same" if ours == setting.value else _written(ours)
                rows.append((setting.name, str(setting), ours, setting.source))
        print(_table(rows))
        print("  and " + "\n  and ".join(_methods(settings)) + "\n")

    print("Table 2")
    heads = ("traces", "epochs", "batch", "steps")
    print(
        _table([heads, *([f"{x:,}" for x in (r.traces, r.epochs, r.batch_traces, r.steps)] for r in TABLE)])
    )
    print("\naccuracy, the mean of the three benchmarks")
    print("\n".join(f"  {Path(m).name}: {accuracy_in_words(m) or 'no number in the text'}" for m in MODELS))
    print(f"\nkeywords of reflection (it also asks GPT-4o-mini): {', '.join(KEYWORDS)}")
    print(f"also stated: {REFLECTION}; {REFLECTION_LENGTH}; {OPERATIONS_DONE}")


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"  {line.rstrip()}" for line in lines)


if __name__ == "__main__":
    from kit.command import guard  # the hall's other files need none of this

    guard(main)
