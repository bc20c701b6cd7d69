"""A server with OpenAI-style completions over the kit's sampler: the forms of real ones, and their faults."""

import json
import threading
from collections import deque
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from kit.generate.sampler import generate
from kit.generate.sampling import SamplingParams

VERSIONS = {
    "vllm": ("/version", "version"),
    "sglang": ("/server_info", "version"),
    "llamacpp": ("/props", "build_info"),
}
SPOIL = {  # fault -> what it does to an answer
    "another model": lambda answer, choice: answer.update(model="gpt-2"),
    "no usage": lambda answer, choice: answer.pop("usage"),
    "no choice": lambda answer, choice: answer.update(choices=[]),
    "another count": lambda answer, choice: answer["usage"].update(completion_tokens=10_000),
    "another prompt": lambda answer, choice: answer["usage"].update(prompt_tokens=10_000),
    "no log-probs": lambda answer, choice: choice.update(logprobs=None),
    "a NaN": lambda answer, choice: choice["logprobs"]["token_logprobs"].append(float("nan")),
    "no ids": lambda answer, choice: choice.pop("token_ids"),
    "a full context": lambda answer, choice: shorten(answer, choice),
    "another tokenizer": lambda answer, choice: choice.update(text="Bonjour"),
    "given up": lambda answer, choice: choice.update(finish_reason="abort"),
}


def shorten(answer, choice):
    choice.update(token_ids=choice["token_ids"][:2], finish_reason="length", text="")
    choice["logprobs"]["token_logprobs"] = choice["logprobs"]["token_logprobs"][:2]
    answer["usage"]["completion_tokens"] = 2


class SmallServer(ThreadingHTTPServer):
    """faults: of the next questions, in their order: an HTTP status, or a name."""

    daemon_threads = True

    def __init__(self, model, tokenizer, *, kind="vllm", names=("served",), faults=()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.tokenizer, self.kind, self.names = model, tokenizer, kind, names
        self.faults, self.asked, self.keys, self.lock = deque(faults), [], set(), threading.Lock()
        self.stalls, self.goes_on = threading.Event(), threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def die(self):
        self.shutdown()
        self.server_close()

    def answer(self, question):
        params = SamplingParams(
            question["temperature"], question["top_p"], max(question["top_k"], 0), question["max_tokens"]
        )
        # llama.cpp does not know what the tests call ends
        stop = [-1] if self.kind == "llamacpp" else question["stop_token_ids"]
        how = {"num_slots": 1, "seed": question["seed"], "eos_token_id": stop, "description": ""}
        with self.lock:
            (found,) = generate(self.model, [question["prompt"]], params, **how)
        words = [i for i in found.ids if i not in question["stop_token_ids"]]
        choice = {
            "text": self.tokenizer.decode(words, skip_special_tokens=True),
            "finish_reason": "stop" if found.finished else "length",
        }
        if self.kind == "llamacpp":
            pairs = zip(found.ids, found.logprobs, strict=True)
            choice["logprobs"] = {"content": [{"id": i, "logprob": logprob} for i, logprob in pairs]}
        else:
            choice |= {"logprobs": {"token_logprobs": found.logprobs}, "token_ids": found.ids}
        usage = {"prompt_tokens": len(question["prompt"]), "completion_tokens": len(found.ids)}
        return {"model": question["model"], "choices": [choice], "usage": usage}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        """Say nothing."""

    def send(self, answer, status=200, share=1.0):
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: int(share * len(body))])

    def do_GET(self):
        path, field = VERSIONS.get(self.server.kind, ("", ""))
        if self.path == "/v1/models":
            more = {"owned_by": self.server.kind, "max_model_len": 1_024}
            self.send({"data": [{"id": name, **more} for name in self.server.names]})
        else:
            self.send({field: "9.9"}, 200 if self.path == path else 404)

    def do_POST(self):
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(question)
            self.server.keys.add(self.headers["Authorization"])
            fault = self.server.faults.popleft() if self.server.faults else ""
        if isinstance(fault, int):
            self.send({"error": {"message": "not now, sorry"}}, fault)
        elif fault == "die":
            threading.Thread(target=self.server.die, daemon=True).start()
        elif fault == "stall":
            self.server.stalls.set()
            self.server.goes_on.wait(60)
        elif fault != "hang up":
            answer = self.server.answer(question)
            if fault in SPOIL:
                SPOIL[fault](answer, answer["choices"][0])
            self.send(answer, share=0.5 if fault == "half" else 1.0)


@contextmanager
def serve(*args, **how):
    """Serve in threads of this process. Whatever stalls then goes on at the end."""
    with SmallServer(*args, **how) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.goes_on.set()
            server.shutdown()
