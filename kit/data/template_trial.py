"""Try a chat template in a process of its own, with limits on time and memory.

A template is a program that comes with a model. The sandbox of transformers keeps it from files and from
Python, and caps one range at 100,000, but neither loops inside loops nor the length of a text.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

from kit.machine import limit_process

SECONDS = 10  # of CPU time for rendering, which takes milliseconds
MEMORY = 2 << 30  # bytes of address space for rendering (Linux), beside what the libraries take
WAIT = 120.0  # seconds for the whole trial: the limit on systems without one on CPU time
OUT_OF_MEMORY = 3  # exit status

# as in kit/grade/deciding/sympy_workers.py, the caller's folder must not be searched
_TRY = (
    "import sys; sys.path[:] = [sys.argv[1], *filter(None, sys.path)]; "
    "from kit.data.template_trial import render; render()"
)
QUESTION, ANSWER = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
CONVERSATIONS = (  # messages, whether the beginning of an answer follows
    ([QUESTION], True),
    ([QUESTION, ANSWER], False),
)


def check_ends(template: str, variables: dict) -> None:
    """Render a template on the shortest question and answer. variables: of the template, beside messages.

    Raises ValueError if it takes more than SECONDS or MEMORY. Other errors of a template are left to those
    who render it.
    """
    _check_ends(json.dumps({"template": template, "variables": variables, "seconds": SECONDS}, default=str))


@lru_cache(maxsize=64)
def _check_ends(question: str) -> None:
    try:
        done = subprocess.run(
            [sys.executable or "python", "-c", _TRY, str(Path(__file__).resolve().parents[2])],
            input=question.encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=WAIT,
        )
    except subprocess.TimeoutExpired:
        status, said = -1, b""
    else:
        status, said = done.returncode, done.stderr
    if status < 0 or status == OUT_OF_MEMORY:  # ended by a limit
        raise ValueError(
            f"the chat template has not rendered a question of one character within {SECONDS} s and "
            f"{MEMORY >> 30} GiB: it may loop for ever; pass --chat_template plain, or a Jinja file that ends"
        )
    if status:
        raise RuntimeError(f"the trial of the chat template ended with status {status}: {said.decode()}")


def render() -> None:
    """Render what standard input names, within the limits: the other side of check_ends."""
    from transformers.utils.chat_template_utils import render_jinja_template

    question = json.loads(sys.stdin.buffer.read())
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit_process("RLIMIT_AS", pages * os.sysconf("SC_PAGESIZE") + MEMORY)
    limit_process("RLIMIT_CPU", int(time.process_time() + question["seconds"]) + 1)
    for messages, begins_answer in CONVERSATIONS:
        try:
            render_jinja_template(
                [messages],
                chat_template=question["template"],
                add_generation_prompt=begins_answer,
                **question["variables"],
            )
        except MemoryError:
            os._exit(OUT_OF_MEMORY)
        except Exception:  # of any kind: it is raised again where the template is rendered in earnest
            return
