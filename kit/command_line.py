"""The command `valley`, also `python -m kit`: the first word names what is run, with the flags after it.

    valley demo --smoke
    valley finetune --model Qwen/Qwen2.5-0.5B-Instruct --plan

Without a word it lists the commands. Nothing heavy is imported here: every part of the kit prints commands,
which must work the way the user started it.
"""

from __future__ import annotations

import difflib
import os
import runpy
import shlex
import shutil
import sys
from pathlib import Path

COMMANDS = {  # word -> (module, what it does)
    "demo": ("kit.recipes.valley_demo", "the valley of a toy, on a CPU; --smoke takes a minute"),
    "plan": ("kit.recipes.gemma3_1b_8k", "will fine-tuning fit on a card? no GPU, no download"),
    "finetune": ("kit.recipes.gemma3_1b_8k", "measure a model, fine-tune it on long traces, measure again"),
    "evaluate": ("kit.recipes.evaluate", "measure a model on benchmarks"),
    "grpo": ("kit.recipes.grpo_qwen2_5_0_5b", "train a model by reinforcement learning"),
    "sweep": ("kit.recipes.valley_sweep", "the paper's whole figure: models x numbers of traces x seeds"),
    "ask": ("kit.recipes.ask", "talk to a model, or to several side by side; tiny runs on any CPU"),
    "traces": ("kit.recipes.make_traces", "make traces of your own: a model's right answers to problems"),
    "export": ("kit.recipes.export", "one plain folder, a GGUF file and a model card of a trained model"),
    "report": ("kit.report", "write the report of a run again"),
    "grade": ("kit.grade", "is this answer right? and grade a log of answers again"),
    "paper": ("kit.paper", "every number of the paper, and our settings beside its own"),
    "check-card": ("kit.recipes.check_card", "are the kernels right on this card, and how fast?"),
}  # fmt: skip

_program = _word = ""  # "valley" and "finetune", once main() has read them


def started_as() -> str:
    """Return how the user started this program, without flags: `valley finetune`, `python recipes/X.py`."""
    if _word:
        return command_of(_word)
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"-m {module.name.removesuffix('.__main__')}" if module else shell_word(sys.argv[0])
    return f"{shell_word(sys.orig_argv[0])} {program}"


def shell_word(text: str) -> str:
    """Return text as one word of a command; Windows' shells know no single quotes around a program."""
    return (f'"{text}"' if " " in text else text) if sys.platform == "win32" else shlex.quote(text)


def command_of(word: str) -> str:
    """Return how the user would start another of the COMMANDS, such as "check-card"."""
    if _program:
        return f"{_program} {word}"
    name = COMMANDS[word][0].removeprefix("kit.recipes.")
    program = f"-m {name}" if name.startswith("kit.") else f"recipes/{name}.py"
    beside = Path(sys.argv[0]).parent / f"{name}.py"
    if not getattr(sys.modules["__main__"], "__spec__", None) and beside.is_file():
        program = shell_word(str(beside))  # the script may have been started from any folder
    return f"{shell_word(sys.orig_argv[0])} {program}"


def main() -> None:
    """Run the command that sys.argv names, as if its file had been started; exit with 2 if there is none."""
    global _program, _word
    found = shutil.which("valley")
    if Path(sys.argv[0]).name == "__main__.py":
        _program = f"{sys.orig_argv[0]} -m kit"
    else:  # as it was typed: a shell that finds it on its path passes the whole path
        _program = "valley" if found and Path(found).parent == Path(sys.argv[0]).parent else sys.argv[0]

    word, *flags = sys.argv[1:] or ["--help"]
    if word in ("-h", "--help"):
        lines = [f"  {name:<12}{what}" for name, (_, what) in COMMANDS.items()]
        usage = f"usage: {_program} COMMAND [FLAGS]; COMMAND --help lists the flags of a command"
        try:
            print("\n".join([usage, "", *lines]), flush=True)
        except BrokenPipeError:  # the reader, such as `| head`, has all that it wanted
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if word not in COMMANDS:
        near = difflib.get_close_matches(word, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"{_program} lists the commands"
        print(f"error: there is no command {word!r}; {hint}", file=sys.stderr)
        raise SystemExit(2)

    module = COMMANDS[word][0]
    if word == "plan":  # commands that the plan prints are to start the run
        word, flags = "finetune", ["--plan", *flags]
    _word, sys.argv[1:] = word, flags
    runpy.run_module(module, run_name="__main__", alter_sys=True)
