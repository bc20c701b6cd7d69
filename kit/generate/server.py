"""Sample on an inference server: vLLM, SGLang or llama.cpp's, through the completions that OpenAI defined.

    server = connect("http://localhost:8000", "Qwen/Qwen3-8B", tokenizer)    GET /v1/models
    server.generate(prompts, SamplingParams(), ...)                          POST /v1/completions, per prompt

`generate` is kit.generate.generate with the weights elsewhere. Every sample has a seed of its own, but draws
and rounding are the server's, and may depend on what else it computes at the time.

A connection that fails, an answer that is cut in half, and the statuses 429 and 5xx are tried again, with
pauses, until a deadline. An answer that does not fit its question is refused
(kit/generate/completions_api.py). What cannot be checked are the server's weights, dtype and sampler.

Tried against a small server of the tests only, which answers in the forms that the three document.
"""

from __future__ import annotations

import http.client
import threading
import time
import urllib.error
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING

from kit.generate.completions_api import NoAnswer, Reply, check_ended, question_of, read
from kit.generate.sampler import Completion, Samples
from kit.generate.sampling import SamplingParams, stream_key
from kit.http_json import FAULTS, call, describe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AT_ONCE = 32  # requests that are open, unless num_slots says how many
# seconds without a byte: no answer is streamed, so 16,384 tokens at 9 per second, and the wait for a slot
TIMEOUT = 1_800.0
DEADLINE = 3_600.0  # seconds for all attempts at one answer
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between two attempts, twice as long each time
TO_LIST = 30.0  # seconds for the list of models
KEY = "SERVER_API_KEY"  # environment variable with the server's key, if it wants one
# owned_by in /v1/models -> where that server tells its version
VERSIONS = {
    "vllm": ("/version", "version"),
    "sglang": ("/server_info", "version"),
    "llamacpp": ("/props", "build_info"),
}


@dataclass(eq=False)
class Server:
    """A model behind a server, found by `connect`."""

    url: str
    name: str  # of the model, as the server calls it
    engine: str  # the server's kind and version
    context: int | None  # tokens of prompt and answer together, at most; None = the server does not tell
    tokenizer: PreTrainedTokenizerBase  # the model's
    timeout: float = TIMEOUT  # these three in seconds
    deadline: float = DEADLINE
    pause: float = FIRST_PAUSE
    tokenizer_fits: bool = False  # so far as an answer has shown

    @property
    def identity(self) -> dict[str, str]:
        """What the header of a log says of the model and of who samples it."""
        return {"model": self.name, "weights": "not known: a server has them", "engine": self.engine}

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        num_slots: int,
        seed: int,
        eos_token_id: Sequence[int],
        keys: Sequence[object],
        decode: Callable[[list[int]], str],
        on_finish: Callable[[int, Completion], None],
        description: str,
    ) -> None:
        """Sample one completion per prompt. The arguments are those of kit.generate.generate.

        num_slots: requests that are open at once; 0 = AT_ONCE. on_finish is called by this thread.
        Raises ValueError naming the server and what it answered: for a status that is not tried again, an
        answer that does not fit, and a question that is not answered by its deadline; and for prompts that
        are too long for the server.
        """
        longest = max(map(len, prompts), default=0) + params.max_new_tokens
        if self.context and longest > self.context:
            raise ValueError(
                f"the longest prompt and max_new_tokens {params.max_new_tokens:,} make {longest:,} tokens, "
                f"but the server at {self.url} takes {self.context:,}; pass a smaller --max_new_tokens, or "
                "start it with a longer context"
            )
        questions = [
            question_of(self.name, prompt, params, stream=stream_key(seed, key), stop=sorted(eos_token_id))
            for prompt, key in zip(prompts, keys, strict=True)
        ]
        found = self._answers(questions, num_slots or AT_ONCE)
        with Samples(len(prompts), description) as progress, closing(found):  # also if on_finish raises
            try:
                for index, answer, seconds in found:
                    reply = read(questions[index], answer, self._encode)
                    self._check_tokenizer(reply, eos_token_id)
                    text = decode(reply.ids)
                    completion = Completion(reply.ids, reply.logprobs, reply.has_ended, text, seconds)
                    progress.tokens += len(completion.ids)
                    progress.finish(completion)
                    on_finish(index, completion)
            except NoAnswer as error:
                raise ValueError(
                    f"the server at {self.url} {error}. Finished answers are kept; --resume asks for the rest"
                ) from error

    def _answers(self, questions: Sequence[dict], at_once: int) -> Iterator[tuple[int, object, float]]:
        """Ask the questions, some at once, and yield (index, answer, seconds) of each answer as it comes."""
        waiting, answers, stopped = deque(enumerate(questions)), SimpleQueue(), threading.Event()

        def ask_until_stopped() -> None:
            while waiting and not stopped.is_set():
                try:
                    index, question = waiting.popleft()
                except IndexError:  # another thread has taken the last one
                    return
                begin = time.perf_counter()
                try:
                    answer = self._ask(question, stopped)
                except Exception as error:  # raised again below
                    answer = error
                answers.put((index, answer, time.perf_counter() - begin))

        try:
            for _ in range(min(at_once, len(questions))):
                # daemons, so that after Ctrl-C nobody waits for what the server is still writing
                threading.Thread(target=ask_until_stopped, daemon=True, name="asks-server").start()
            for _ in questions:
                index, answer, seconds = answers.get()
                if isinstance(answer, Exception):
                    raise answer
                yield index, answer, seconds
        finally:
            stopped.set()

    def _ask(self, question: dict, stopped: threading.Event) -> object:
        """Return the server's answer, after as many attempts as the deadline allows."""
        start, pause, attempts = time.monotonic(), self.pause, 0
        while True:
            left, attempts = self.deadline - (time.monotonic() - start), attempts + 1
            try:
                timeout = min(self.timeout, left)
                answer = call(f"{self.url}/v1/completions", question, timeout=timeout, key=KEY)
                check_ended(answer)
                return answer
            except urllib.error.HTTPError as error:
                said = f"HTTP status {error.code}, {_body(error)}"
                if error.code != 429 and error.code < 500:
                    raise NoAnswer(f"refuses a question: {said}") from error
            except FAULTS as error:
                is_half = isinstance(error, (ValueError, http.client.IncompleteRead))
                said = f"an answer that is cut in half ({describe(error)})" if is_half else describe(error)
            left = self.deadline - (time.monotonic() - start)
            if left <= pause or stopped.wait(pause):
                raise NoAnswer(
                    f"has not answered a question in {self.deadline:g} seconds, attempts: {attempts}; the "
                    f"last one: {said}"
                )
            pause = min(2 * pause, LONGEST_PAUSE)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _check_tokenizer(self, reply: Reply, ends: Sequence[int]) -> None:
        """Raise NoAnswer if the first answer with words in it reads otherwise here.

        Another model's tokenizer would turn every question into noise. White space, special tokens and a
        character that is cut off are no sign of it. One answer shows it, and no odd token blocks a run later.
        """
        if self.tokenizer_fits:
            return
        ours = self.tokenizer.decode([i for i in reply.written if i not in ends], skip_special_tokens=True)
        if _words(ours) != _words(reply.text):
            raise NoAnswer(
                f"wrote {reply.text[:40]!r}, but to the tokenizer of --model its ids are {ours[:40]!r}; pass "
                f"as --model where the tokenizer and config of {self.name} are"
            )
        self.tokenizer_fits = bool(_words(ours))


def connect(url: str, model: str, tokenizer, **patience: float) -> Server:
    """Ask a server which models it has, and return the one to sample.

    url: with or without /v1 at its end. model: taken if the server lists it, otherwise the only one listed.
    patience: timeout, deadline and pause, as for Server.
    Raises ValueError if the URL is none, if nothing there lists models, and if it lists several others.
    """
    root = url.rstrip("/").removesuffix("/v1")
    if not root.startswith(("http://", "https://")):
        raise ValueError(f"server is {url!r}; pass a server's URL, such as http://localhost:8000")
    try:
        listed = {entry["id"]: entry for entry in call(f"{root}/v1/models", timeout=TO_LIST, key=KEY)["data"]}
        name = next(iter(listed)) if len(listed) == 1 else model
        kind = listed[name].get("owned_by") if name in listed else ""
    except (*FAULTS, LookupError, TypeError) as error:
        raise ValueError(
            f"the server at {root} lists no models ({describe(error)}); start it, check the URL, and if it "
            f"wants a key, set {KEY}"
        ) from error
    if name not in listed:
        raise ValueError(
            f"the server at {root} has {', '.join(listed) or 'no model'}, and model is {model}; start it "
            f"with --served-model-name {model} (vLLM, SGLang) or --alias {model} (llama.cpp)"
        )
    engine = _engine(root, str(kind))
    return Server(root, name, engine, listed[name].get("max_model_len"), tokenizer, **patience)


def _engine(root: str, kind: str) -> str:
    """Return a server's kind and version."""
    path, field = VERSIONS.get(kind, ("", ""))
    if not path:
        return f"{kind} (a server, of unknown version)"
    try:
        return f"{kind} {call(root + path, timeout=TO_LIST, key=KEY)[field]}"
    except (*FAULTS, LookupError, TypeError):  # a proxy may let nothing but /v1 through
        return f"{kind} (of unknown version)"


def _words(text: str) -> str:
    return "".join(filter(str.isalnum, text))


def _body(error: urllib.error.HTTPError) -> str:
    try:
        said = error.read().decode(errors="replace")
    except FAULTS:
        said = ""
    return " ".join(said.split())[:300] or str(error.reason)
