"""Questions and answers of POST /v1/completions, as vLLM, SGLang and llama.cpp's server have them.

A question holds the fields of all three; a server ignores those that it does not know.

    prompt            token ids, so that nothing is tokenised twice
    return_token_ids  vLLM from 0.10.2 on and SGLang from July 2026 on (pull request 30917): token_ids
    logprobs          1: llama.cpp returns none for 0. vLLM and SGLang: logprobs.token_logprobs; llama.cpp:
                      logprobs.content, whose entries have an id, too. It has none for tokens that end within
                      a character: the ids of such an answer are those of its text. The distribution is the
                      model's own, before temperature and top_p (of vLLM unless --logprobs-mode says
                      otherwise).
    stop_token_ids    vLLM, SGLang; llama.cpp stops at the ends that its file names. Every answer is cut
                      behind its first end here.
    seed              SGLang heeds it if it was started with --enable-deterministic-inference
    min_p and others  off. vLLM takes what is not asked for from the model's generation_config.json, and
                      llama.cpp has a min_p, and applies the temperature last unless `samplers` says not to.

An answer that does not say enough to be checked, or not what was asked for, is refused: NoAnswer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kit.generate.sampling import SamplingParams
from kit.http_json import describe

NOTHING_ELSE = {  # that changes the distribution
    "min_p": 0.0,
    "repetition_penalty": 1.0,  # vLLM, SGLang
    "repeat_penalty": 1.0,  # llama.cpp
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "samplers": ["temperature", "top_k", "top_p"],  # llama.cpp; the kit's order, and that of the others
}


class NoAnswer(ValueError):
    """A server did not answer a question, or not this question. Its text goes on after the server's name."""


@dataclass(frozen=True)
class Reply:
    """What a server wrote."""

    ids: list[int]  # up to the first end
    logprobs: list[float]  # of each id that the server names
    has_ended: bool  # False: cut off at max_new_tokens
    text: str  # of all ids that it wrote, without special tokens
    written: list[int]  # all ids that it wrote


def question_of(
    model: str, prompt: Sequence[int], params: SamplingParams, *, stream: int, stop: Sequence[int]
) -> dict:
    """Return the body of a request. stream: the sample's, from stream_key. stop: ids of the ends."""
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k or -1,  # off for all three
        "seed": stream % 2**31,  # llama.cpp's has 32 bits, and all of them set means none
        "stop_token_ids": list(stop),
        "logprobs": 1,
        "return_token_ids": True,
        **NOTHING_ELSE,
    }


def check_ended(answer: object) -> None:
    """Raise ConnectionError for an answer that the server has given up, as when it shuts down."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    reasons = [choice.get("finish_reason") for choice in choices or () if isinstance(choice, dict)]
    if reasons and reasons[0] not in ("stop", "length"):
        raise ConnectionError(f"the answer was given up, finish_reason is {reasons[0]!r}")


def read(question: dict, answer: object, encode: Callable[[str], list[int]]) -> Reply:
    """Read the answer to a question. Raises NoAnswer, saying what is missing or does not fit.

    encode: returns the token ids of a text, without special tokens.
    """
    try:
        (choice,), model, usage = answer["choices"], answer["model"], answer["usage"]
        text, reason = choice["text"], choice["finish_reason"]
        prompt_tokens, tokens = usage["prompt_tokens"], usage["completion_tokens"]
        ids, logprobs = _ids_and_logprobs(choice)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise NoAnswer(f"sent an answer that lacks a part ({describe(error)})") from error
    if model != question["model"]:
        raise NoAnswer(f"was asked for the model {question['model']} and answered as {model}")

    if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in logprobs) or not logprobs:
        raise NoAnswer("sent log-probs that are missing, NaN or infinite; they are asked for with logprobs=1")
    if not ids or None in ids:
        raise NoAnswer(
            "sent no token ids; start vLLM >= 0.10.2, SGLang of July 2026 or later, or llama.cpp's server"
        )
    if "content" in choice["logprobs"] and len(ids) < tokens:
        ids = encode(text)
    elif not len(ids) == len(logprobs) == tokens:
        raise NoAnswer(f"sent {len(ids)} ids and {len(logprobs)} log-probs, and counts {tokens} tokens")
    if prompt_tokens != len(question["prompt"]):
        raise NoAnswer(f"counts {prompt_tokens} tokens in a prompt of {len(question['prompt'])}")

    ends = set(question["stop_token_ids"])
    length = next((place for place, token in enumerate(ids, 1) if token in ends), 0)
    if not length and reason == "length" and tokens < question["max_tokens"]:
        raise NoAnswer(
            f"cut an answer off at {tokens:,} of {question['max_tokens']:,} tokens; start it with a longer "
            "context, or pass a smaller --max_new_tokens"
        )
    length = length or len(ids)
    has_ended = reason == "stop" or ids[length - 1] in ends
    return Reply(ids[:length], logprobs[:length], has_ended, text, ids)


def _ids_and_logprobs(choice: dict) -> tuple[list, list]:
    """Return an answer's token ids and log-probs; [] if they are not there."""
    found = choice.get("logprobs") or {}
    if "content" in found:
        entries = found["content"] or []
        return [entry.get("id") for entry in entries], [entry.get("logprob") for entry in entries]
    return choice.get("token_ids") or [], found.get("token_logprobs") or []
