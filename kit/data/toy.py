"""The toy task: chains of additions and subtractions that a tiny model learns in minutes.

A problem is `7+5-3?`: operands are 1 to 9, and the running value stays in 0..99. A short trace does one step
after another,

    7+5=12;12-3=9.\\boxed{9}

a long one thinks first: half of its steps are rechecked by the inverse operation, and three in ten are first
stated wrong,

    <think>7+5=12, recheck: 12-5=7 ok;12-3=8, recheck: 8+3=11, no: 12-3=9, 9+3=12 ok</think>\\boxed{9}

It takes the place of the paper's setting on machines without downloads and without a GPU. Every figure
measured with it is about the toy, not about a language model.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import TYPE_CHECKING

from kit.models.shipped import TINY

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LONG_TRACES = TINY / "long_traces.jsonl"
PROBLEMS = TINY / "problems.jsonl"

SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>"]
WORD_TOKENS = ["<think>", "</think>", "\\boxed{", "recheck", "no", "ok"]  # one token each
CHARACTERS = "0123456789+-*/=;?.(),:{}<> \nabcdefghijklmnopqrstuvwxyz"  # one token per character for all else
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<user>{{ m['content'] }}<assistant>"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
CHECKED, CORRECTED = 0.5, 0.3  # shares of the steps of a long trace; the others are plain


@dataclass(frozen=True)
class Chain:
    """One problem: values[0] operators[0] operands[0] = values[1], and so on."""

    values: tuple[int, ...]  # n: the first operand, then every intermediate result
    operators: tuple[str, ...]  # n - 1 of + and -
    operands: tuple[int, ...]  # n - 1, each 1 to 9

    @property
    def problem(self) -> str:
        rest = "".join(f"{o}{x}" for o, x in zip(self.operators, self.operands, strict=True))
        return f"{self.values[0]}{rest}?"

    @property
    def answer(self) -> str:
        return str(self.values[-1])


def make_chain(rng: random.Random, num_operands: int) -> Chain:
    """Draw a random chain of num_operands operands whose running value stays in 0..99."""
    values, operators, operands = [rng.randint(1, 9)], [], []
    for _ in range(num_operands - 1):
        operand, value = rng.randint(1, 9), values[-1]
        plus = value < operand or (value + operand < 100 and rng.random() < 0.5)
        operators.append("+" if plus else "-")
        operands.append(operand)
        values.append(value + operand if plus else value - operand)
    return Chain(tuple(values), tuple(operators), tuple(operands))


def short_trace(chain: Chain) -> str:
    return ";".join(steps_of(chain)) + f".\\boxed{{{chain.answer}}}"


def long_trace(
    chain: Chain, rng: random.Random, *, checked: float = CHECKED, corrected: float = CORRECTED
) -> str:
    """checked, corrected: shares of the steps that are rechecked, and that are first stated wrong."""
    steps = []
    for a, o, x, b in _operations(chain):
        inverse, sign = ("-", -1) if o == "+" else ("+", 1)
        step, check = f"{a}{o}{x}={b}", f"{b}{inverse}{x}={a} ok"
        luck = rng.random()
        if luck < corrected:
            wrong = rng.choice([value for value in (b - 10, b - 1, b + 1, b + 10) if value >= max(0, x)])
            found = f"{wrong}{inverse}{x}={wrong + sign * x}"
            step = f"{a}{o}{x}={wrong}, recheck: {found}, no: {step}, {check}"
        elif luck < corrected + checked:
            step += f", recheck: {check}"
        steps.append(step)
    return f"<think>{';'.join(steps)}</think>\\boxed{{{chain.answer}}}"


def make_rows(
    kind: str,
    num_rows: int,
    *,
    seed: int,
    min_operands: int = 2,
    max_operands: int = 8,
    exclude: Iterable[str] = (),
) -> list[dict]:
    """Draw rows {problem, trace, solution, answer}, as kit.data.traces reads them.

    No problem occurs twice, and none is in `exclude`.

    kind: of the traces, "short" or "long"; the solution is always short.
    """
    if kind not in ("short", "long"):
        raise ValueError(f"kind is {kind!r} but a toy trace is 'short' or 'long'")
    rng = random.Random(f"{kind} {seed}")
    chains = _chains(rng, exclude, min_operands, max_operands)
    return [
        _row(chain, short_trace(chain) if kind == "short" else long_trace(chain, rng))
        for chain in islice(chains, num_rows)
    ]


def make_pairs(
    num_rows: int,
    *,
    seed: int,
    exclude: Iterable[str] = (),
    checked: float = CHECKED,
    corrected: float = CORRECTED,
) -> list[dict]:
    """Draw rows {problem, trace, solution, answer}, each with a long trace and a short solution.

    The problems depend on the seed alone; none is in `exclude`, and none occurs twice. Those of a smaller
    number are a prefix of those of a larger one, so that subsets are nested. checked, corrected: as for
    long_trace, which exercise 1 of recipes/valley.ipynb changes.
    """
    rows = []
    for chain in islice(_chains(random.Random(f"problems {seed}"), exclude), num_rows):
        rng = random.Random(f"trace {seed} {chain.problem}")
        rows.append(_row(chain, long_trace(chain, rng, checked=checked, corrected=corrected)))
    return rows


def _chains(
    rng: random.Random, exclude: Iterable[str], min_operands: int = 2, max_operands: int = 8
) -> Iterator[Chain]:
    """Draw chains without end, each as it is asked for. No problem occurs twice, and none is in `exclude`."""
    seen = set(exclude)
    while True:
        chain = make_chain(rng, rng.randint(min_operands, max_operands))
        if chain.problem not in seen:
            seen.add(chain.problem)
            yield chain


def _row(chain: Chain, trace: str) -> dict:
    return {"problem": chain.problem, "trace": trace, "solution": short_trace(chain), "answer": chain.answer}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Build the toy's tokenizer: one token per character, and a few whole words."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers  # takes seconds
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *WORD_TOKENS, *CHARACTERS, "\\"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in WORD_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
        model_max_length=1024,
    )


def read_chain(problem: str) -> Chain:
    """Read the chain of a toy problem such as 7+5-3?. Raises ValueError for any other text."""
    if not re.fullmatch(r"[1-9](?:[+-][1-9])+\?", problem):
        raise ValueError(f"{problem!r} is not a problem of the toy; pass one such as 7+5-3?")
    first, *operands = map(int, re.findall(r"\d", problem))
    values = accumulate(map(int, re.findall(r"[+-]\d", problem)), initial=first)
    return Chain(tuple(values), tuple(re.findall(r"[+-]", problem)), tuple(operands))


def steps_of(chain: Chain) -> list[str]:
    return [f"{a}{o}{x}={b}" for a, o, x, b in _operations(chain)]


def _operations(chain: Chain) -> Iterator[tuple[int, str, int, int]]:
    """(value before, operator, operand, value after) of each step."""
    return zip(chain.values, chain.operators, chain.operands, chain.values[1:], strict=False)


def num_tokens(problem: str, trace: str) -> int:
    """Return the length of a toy document in tokens.

    It has four of the chat format, one per word, and one per other character.
    """
    return 4 + len(problem) + len(trace) - sum(trace.count(word) * (len(word) - 1) for word in WORD_TOKENS)
