from dataclasses import replace

import pytest

from kit.data import lengths
from kit.data.chat import ChatFormat
from kit.data.documents import load_documents, make_documents, tokenize
from kit.data.responses import Trace
from kit.data.toy import make_tokenizer
from kit.journal import write_rows

LONG_TOKEN = "wxyz" * 10


class Watched(ChatFormat):
    """Keeps the length of the longest text that is tokenised, and the most characters at once."""

    longest = most = 0

    def encode(self, texts):
        self.longest = max([self.longest, *map(len, texts)])
        self.most = max(self.most, sum(map(len, texts)))
        return super().encode(texts)


@pytest.fixture
def chat():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([LONG_TOKEN])
    return Watched(tokenizer, instruction="")


def trace(response, problem="1+1?"):
    return Trace(problem, response, "here")


@pytest.mark.parametrize("field", ["problem", "trace"])
def test_a_row_of_megabytes_is_counted_as_too_long_and_never_tokenised(tmp_path, chat, field):
    rows = [{"problem": f"{i}+1?", "trace": "\\boxed{2}", "answer": "2"} for i in range(3)]
    rows[1][field] = "1+1=2;" * 500_000 + "\\boxed{2}"
    write_rows(tmp_path / "a.jsonl", rows)
    documents, counts = load_documents(str(tmp_path / "a.jsonl"), chat, row_tokens=1_000)
    dropped = "2 traces kept, 1 dropped: 1 are longer than 1,000 tokens"
    assert len(documents) == 2 and str(counts) == f"{dropped}. Format: problem, trace"
    assert chat.longest < 10_000


@pytest.mark.parametrize("num_narrow", [0, *range(780, 806)])  # the beginning ends anywhere in a long token
def test_a_trace_of_many_characters_in_few_tokens_is_kept_if_it_fits_to_the_token(chat, num_narrow):
    wide = trace("1" * num_narrow + LONG_TOKEN * (1_000 - num_narrow))
    row_tokens = len(make_documents([wide], chat)[0])
    assert len(wide.response) > 8 * (row_tokens + lengths.MARGIN)
    for room, kept in ((row_tokens, 1), (row_tokens - 1, 0)):
        documents, too_long = tokenize([wide], chat, row_tokens=room)
        assert (len(documents), too_long.dropped) == (kept, 1 - kept)


def test_a_short_beginning_of_long_tokens_does_not_hide_a_long_rest(chat):
    documents, too_long = tokenize([trace(LONG_TOKEN * 800 + "1" * 900_000)], chat, row_tokens=900)
    assert (documents, too_long.dropped) == ([], 1)
    assert chat.longest < 100_000


@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_what_is_kept_and_counted_is_what_tokenising_everything_gives(chat, monkeypatch, chunk):
    monkeypatch.setattr(lengths, "CHUNK", chunk)
    sizes = (
        5,
        9_000,
        150,
        9_000,
        9_000,
        7,
        20,
        150,
        8,
        9_000,
        6,
        9_000,
    )  # characters; a row holds 100 tokens
    traces = [trace("1" * size) for size in sizes]
    for wanted in range(len(traces) + 1):
        fitting = [place for place, size in enumerate(sizes) if size < 100][: wanted or None]
        before_last = sizes[: fitting[-1]] if 0 < wanted <= len(fitting) else sizes
        documents, too_long = tokenize(traces, chat, row_tokens=100, num_traces=wanted)
        assert [len(d) - d.prompt_len - 1 for d in documents] == [sizes[place] for place in fitting]
        assert too_long.dropped == sum(size > 100 for size in before_last)


def test_many_traces_are_tokenised_few_characters_at_once(chat, monkeypatch):
    monkeypatch.setattr(lengths, "CHUNK_CHARACTERS", 2_000)
    documents, _ = tokenize([trace("1" * 700)] * 20, chat, row_tokens=800)
    assert len(documents) == 20 and chat.most < 2_000 + 800


def test_a_trace_of_megabytes_in_a_mixture_keeps_its_short_one_unless_that_is_as_long(chat):
    endless = "1" * 900_000
    traces = [replace(trace(endless), short=trace(short)) for short in ("2", endless)]
    documents, too_long = tokenize(traces, chat, row_tokens=100)
    assert [len(d) - d.prompt_len - 1 for d in documents] == [1] and too_long == (1, 1, 0)
    assert chat.longest < 10_000
