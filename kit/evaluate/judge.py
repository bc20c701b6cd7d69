"""Ask a language model whether answers with a reflection keyword really reflect, as the paper does.

    python -m kit.report RUN --judge http://localhost:8000/v1     any server with OpenAI's chat interface

The paper counts an answer if a keyword matches and GPT-4o-mini agrees; without a judge, keywords alone are an
upper bound. Its question is not published, so the one here is ours. Only answers with a keyword are asked
about. The verdict is written into the answer's row: true, false, or null with the problem if the judge gave
none. That is counted, it is never a "no", and the next call asks again.

A key, if the server wants one, is read from the environment variable JUDGE_API_KEY.
"""

from __future__ import annotations

import http.client
import re
import urllib.error
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from kit.command import Stopped
from kit.evaluate.reflection_and_loops import REFLECTION
from kit.evaluate.sample_log import SampleLog
from kit.http_json import FAULTS, call, describe
from kit.journal import write_rows
from kit.progress import Progress
from kit.turns import THOUGHT_END

QUESTION = """Below are passages of an answer to a mathematics problem. Does the writer, in any of them, go
back to check, doubt or redo an earlier step of the answer? A mere mention of such a word does not count.
Reply with one word, yes or no.

{passages}"""
AROUND = 400  # characters of the answer on each side of a keyword
PASSAGES = 3  # of one answer, at most: the first
REPLY_TOKENS = 1_024  # one word, and room for a model that thinks first
AT_ONCE = 8  # questions
TIMEOUT = 300.0  # seconds for one reply
GIVE_UP = 8  # questions in a row without a connection: the others are then not asked
VERDICT = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)
JUDGED, PROBLEM = "judged", "judge_problem"  # fields of a row


@dataclass
class Judge:
    """A language model behind a server. url: up to and with its version, such as http://localhost:8000/v1.

    model: its name there; "" = the first that the server lists.
    """

    url: str
    model: str = ""
    timeout: float = TIMEOUT
    unreachable: int = field(default=0, init=False)  # questions in a row without a connection

    def __post_init__(self):
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"judge is {self.url!r}; pass a server's URL, such as http://localhost:8000/v1")
        self.url = self.url.rstrip("/")
        if not self.model:
            try:
                self.model = str(self._call("/models")["data"][0]["id"])
            except (*FAULTS, LookupError, TypeError) as error:
                raise ValueError(
                    f"the judge at {self.url} lists no models ({describe(error)}); start the server, check "
                    "the URL, or pass --judge_model NAME"
                ) from error

    def reflects(self, text: str) -> tuple[bool | None, str]:
        """Return (whether the text reflects, ""), or (None, the problem) if the judge gave no verdict."""
        if self.unreachable >= GIVE_UP:
            return None, "not asked: the judge cannot be reached"
        message = {"role": "user", "content": QUESTION.format(passages=passages_of(text))}
        question = {"model": self.model, "messages": [message], "temperature": 0, "max_tokens": REPLY_TOKENS}
        try:
            reply = self._call("/chat/completions", question)
            self.unreachable = 0
            (choice, *_) = reply["choices"]
            said = str(choice["message"]["content"])
        except (ValueError, LookupError, TypeError) as error:
            return None, f"the reply cannot be read ({describe(error)})"
        except urllib.error.HTTPError as error:
            self.unreachable = 0
            return None, f"HTTP status {error.code}"
        except (OSError, http.client.HTTPException) as error:
            self.unreachable += 1
            return None, f"no reply ({describe(error)})"
        if choice.get("finish_reason") == "length":  # what stands there may be a part of a thought
            return None, f"cut off after {REPLY_TOKENS} tokens"
        match = VERDICT.match(said.rpartition(THOUGHT_END)[2])
        return (match[1].lower() == "yes", "") if match else (None, "neither yes nor no")

    def _call(self, path: str, question: dict | None = None) -> dict:
        return call(self.url + path, question, timeout=self.timeout, key="JUDGE_API_KEY")


def passages_of(text: str) -> str:
    """Return the text around its first keywords."""
    found = [
        text[max(0, match.start() - AROUND) : match.end() + AROUND] for match in REFLECTION.finditer(text)
    ]
    return "\n\n---\n\n".join(found[:PASSAGES])


def judge_logs(files: Sequence[Path], judge: Judge) -> dict[str, int]:
    """Judge every answer with a keyword that has no verdict yet. Return outcome -> number of answers.

    files: logs of samples; each is replaced whole when its answers are judged, or when Ctrl-C or an error
    ends that early: verdicts may cost money. The outcomes are "yes", "no" and the problems of those without a
    verdict. Raises ValueError if the run is going on, and Stopped after Ctrl-C.
    """

    def ask(row: dict) -> str:
        verdict, problem = judge.reflects(row["text"])
        # here, not in the loop below, which may still wait for an earlier row
        row[JUDGED], row[PROBLEM] = verdict, problem
        return problem or ("yes" if verdict else "no")

    counts: dict[str, int] = {}
    for file in files:
        journal = SampleLog(file)
        journal.lock()
        rows = journal.read()
        matching = [row for row in rows if REFLECTION.search(row.get("text", ""))]
        open_rows = [row for row in matching if row.get(JUDGED) is None]
        progress = Progress(f"judging {file.stem}", "answers", len(open_rows))
        try:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                try:
                    for outcome in progress.over(pool.map(ask, open_rows)):
                        counts[outcome] = counts.get(outcome, 0) + 1
                finally:
                    pool.shutdown(wait=False, cancel_futures=True)  # what has been asked is waited for
        except KeyboardInterrupt:
            raise Stopped(f"while judging {file}; its verdicts are kept, the same command goes on") from None
        finally:
            if open_rows:
                write_rows(file, rows)
    return counts
