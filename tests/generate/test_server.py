"""Sampling on a server: a real one over the kit's own sampler, with the faults that servers have."""

import socket

import pytest
from small_server import serve

from kit import models
from kit.data.chat import ChatFormat
from kit.generate.completions_api import NoAnswer, question_of, read
from kit.generate.sampler import generate
from kit.generate.sampling import SamplingParams
from kit.generate.server import Server, connect

GREEDY = SamplingParams(temperature=0, top_p=1, max_new_tokens=40)
PROBLEMS = ["1+2?", "3-4?", "5+6-7?", "2-2+2?"]
QUICK = {"timeout": 20.0, "deadline": 60.0, "pause": 0.01}


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = models.load("tiny", device="cpu")
    return model, ChatFormat(tokenizer, model, instruction="")


def sample(chat, how, params=GREEDY, problems=PROBLEMS, **options):
    """Return index -> completion, with a server's `generate` or the kit's."""
    found = {}
    prompts = chat.encode([chat.prompt(problem) for problem in problems])
    how(
        prompts,
        params,
        **{"num_slots": 1, "seed": 0, "description": "asking"} | options,
        keys=[[problem, 0] for problem in problems],
        eos_token_id=chat.eos_token_ids,
        decode=chat.decode,
        on_finish=found.__setitem__,
    )
    return found


@pytest.mark.parametrize("kind", ["vllm", "sglang", "llamacpp"])
def test_greedy_answers_of_a_server_are_the_kits_token_for_token(tiny, kind):
    model, chat = tiny
    wanted = sample(chat, lambda prompts, params, **how: generate(model, prompts, params, **how))
    assert {completion.finished for completion in wanted.values()} == {True}
    with serve(model, chat.tokenizer, kind=kind) as small:
        server = connect(f"{small.url}/v1/", "another name", chat.tokenizer, **QUICK)
        assert sample(chat, server.generate, num_slots=3) == wanted
    assert server.identity["model"] == "served" and server.engine == f"{kind} 9.9"
    assert len(small.asked) == len(PROBLEMS)


def test_each_sample_has_a_seed_of_its_own_and_a_second_run_asks_for_the_same(tiny):
    model, chat = tiny
    hot = SamplingParams(
        temperature=1_000, top_p=1, top_k=5, max_new_tokens=12
    )  # the model is too sure for less
    with serve(model, chat.tokenizer) as small:
        server = connect(small.url, "served", chat.tokenizer, **QUICK)
        first = sample(chat, server.generate, hot, num_slots=4)
        assert sample(chat, server.generate, hot) == first
        assert sample(chat, server.generate, hot, seed=1) != first
    seeds = [{question["seed"] for question in small.asked[start : start + 4]} for start in (0, 4, 8)]
    assert seeds[0] == seeds[1] and len(seeds[0] | seeds[2]) == 8 and max(seeds[0] | seeds[2]) < 2**31
    assert {question["top_k"] for question in small.asked} == {5}


def test_what_may_pass_is_tried_again_and_the_answers_are_those_without_it(tiny):
    model, chat = tiny
    with serve(model, chat.tokenizer) as small:
        server = connect(small.url, "served", chat.tokenizer, **QUICK | {"timeout": 4.0})
        wanted = sample(chat, server.generate)
        small.faults.extend([500, "half", 429, "hang up", "given up", 503, "stall"])
        assert sample(chat, server.generate) == wanted
    assert len(small.asked) == 2 * len(PROBLEMS) + 7


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("another model", "asked for the model served and answered as gpt-2"),
        ("no usage", "lacks a part .KeyError: 'usage'"),
        ("no choice", "lacks a part"),
        ("another count", "and counts 10000 tokens"),
        ("another prompt", "counts 10000 tokens in a prompt of [0-9]+"),
        ("no log-probs", "log-probs that are missing, NaN or infinite"),
        ("a NaN", "log-probs that are missing, NaN or infinite"),
        ("no ids", "sent no token ids; start vLLM >= 0.10.2"),
        ("a full context", "cut an answer off at 2 of 40 tokens"),
        ("another tokenizer", "wrote 'Bonjour', but to the tokenizer of --model"),
        (404, "refuses a question: HTTP status 404, .*not now, sorry"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused_at_once_with_its_fault(tiny, fault, message):
    model, chat = tiny
    with serve(model, chat.tokenizer, faults=[fault]) as small:
        server = connect(small.url, "served", chat.tokenizer, **QUICK)
        with pytest.raises(ValueError, match=f"the server at {small.url} .*{message}.*--resume asks for the"):
            sample(chat, server.generate)
    assert len(small.asked) <= 2  # the thread may have begun the next


def test_where_llama_cpp_names_no_token_within_a_character_the_ids_are_those_of_the_text():
    question = question_of("m", [5, 6], GREEDY, stream=0, stop=[2])
    entries = [{"id": 7, "logprob": -0.5}, {"id": 9, "logprob": -0.25}]
    choice = {"text": "7\U0001f600", "finish_reason": "stop", "logprobs": {"content": entries}}
    usage = {"prompt_tokens": 2, "completion_tokens": 5}
    reply = read(question, {"choices": [choice], "model": "m", "usage": usage}, lambda text: [*text.encode()])
    assert (len(reply.ids), reply.logprobs, reply.has_ended) == (5, [-0.5, -0.25], True)
    choice["logprobs"] = [entries]
    with pytest.raises(NoAnswer, match="lacks a part"):
        read(question, {"choices": [choice], "model": "m", "usage": usage}, list)


def test_a_server_that_stays_away_ends_the_run_with_what_it_said_last(tiny):
    model, chat = tiny
    with serve(model, chat.tokenizer, faults=[503] * 1_000) as small:
        server = connect(small.url, "served", chat.tokenizer, timeout=5.0, deadline=2.0, pause=0.01)
        said = r"in 2 seconds, attempts: [0-9]+; the last one: HTTP status 503, .*not now, sorry"
        with pytest.raises(ValueError, match=said):
            sample(chat, server.generate)
    assert 1 < len(small.asked) < 1_000


def test_the_model_is_the_one_named_or_the_only_one_and_a_key_is_sent(tiny, monkeypatch):
    model, chat = tiny
    monkeypatch.setenv("SERVER_API_KEY", "a key")
    with serve(model, chat.tokenizer, names=("base", "adapted"), kind="ollama") as small:
        server = connect(small.url, "adapted", chat.tokenizer, **QUICK)
        assert server.name == "adapted" and server.engine == "ollama (a server, of unknown version)"
        sample(chat, server.generate, problems=PROBLEMS[:1])
        assert small.keys == {"Bearer a key"} and small.asked[0]["model"] == "adapted"
        with pytest.raises(ValueError, match=r"has base, adapted, and model is tiny; start it with --served"):
            connect(small.url, "tiny", chat.tokenizer)


def test_what_is_no_server_and_prompts_too_long_for_one_are_refused_before_anything_is_asked(tiny):
    chat = tiny[1]
    with pytest.raises(ValueError, match="pass a server's URL, such as http://localhost:8000"):
        connect("localhost:8000", "tiny", chat.tokenizer)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        free = taken.getsockname()[1]
    with pytest.raises(ValueError, match=r"lists no models \(URLError.*start it, check the URL"):
        connect(f"http://127.0.0.1:{free}", "tiny", chat.tokenizer)
    server = Server("http://127.0.0.1:1", "served", "vllm 9.9", 50, chat.tokenizer)
    with pytest.raises(ValueError, match=r"max_new_tokens 40 make 64 tokens, but .* takes 50"):
        sample(chat, server.generate, problems=["1" * 20 + "?"])
