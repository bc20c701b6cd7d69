"""How the sampler keeps a card busy: a step is queued before the last one is read, and nothing else waits."""

import pytest
import torch
from conftest import make_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kit.generate import sampler, sampling
from kit.generate.engine import Drawn, Engine, steps_ahead
from kit.generate.sampler import generate
from kit.generate.sampling import SamplingParams
from kit.kernels import gumbel

LENGTHS = (5, 1, 9, 13, 3, 7, 2)  # of prompts
STOP = range(2, 5)
RANDOM = SamplingParams(temperature=1.0, top_p=0.9, max_new_tokens=30)


def run(model, monkeypatch, ahead, params=RANDOM, num_slots=3, stop=STOP):
    monkeypatch.setattr(sampler, "steps_ahead", lambda device: ahead)
    torch.manual_seed(5)
    prompts = [torch.randint(12, 97, (length,)).tolist() for length in LENGTHS]
    return generate(model, prompts, params, num_slots=num_slots, seed=0, eos_token_id=stop)


@pytest.fixture
def log(monkeypatch):
    """Record what the engine does: ("prefill" | "decode", its Drawn, lengths) and ("read", the Drawn)."""
    events = []
    prefill, decode, read = Engine.prefill, Engine.decode, Drawn.read

    def logged_prefill(self, rows, prompts, keys):
        events.append(("prefill", prefill(self, rows, prompts, keys), [len(p) - 1 for p in prompts]))
        return events[-1][1]

    def logged_decode(self, lengths):
        events.append(("decode", decode(self, lengths), lengths))
        return events[-1][1]

    def logged_read(self):
        events.append(("read", self, None))
        return read(self)

    monkeypatch.setattr(Engine, "prefill", logged_prefill)
    monkeypatch.setattr(Engine, "decode", logged_decode)
    monkeypatch.setattr(Drawn, "read", logged_read)
    return events


@pytest.mark.parametrize("num_slots", [1, 3])
def test_a_step_that_is_queued_ahead_changes_no_completion(tiny_model, monkeypatch, num_slots):
    expected = run(tiny_model, monkeypatch, 0, num_slots=num_slots)
    found = run(tiny_model, monkeypatch, 1, num_slots=num_slots)
    assert [c.ids for c in found] == [c.ids for c in expected]
    assert [c.finished for c in found] == [c.finished for c in expected]
    assert {len(c.ids) for c in found} > {30}  # some end early, some at max_new_tokens
    for ours, theirs in zip(
        found, expected, strict=True
    ):  # the rows of a batch differ, and with them rounding
        assert ours.logprobs == pytest.approx(theirs.logprobs, rel=1e-4, abs=1e-5)


def test_the_next_step_is_queued_before_one_is_read_and_each_is_read_once(log, monkeypatch):
    run(make_model("llama"), monkeypatch, 1)
    queued = [drawn for event, drawn, _ in log if event != "read"]
    reads = [drawn for event, drawn, _ in log if event == "read"]
    assert reads == queued  # one wait per step, in order
    ahead = [log[:i] for i, (event, _, _) in enumerate(log) if event == "read"]
    left = [sum(1 if event != "read" else -1 for event, _, _ in before) for before in ahead]
    assert max(left) == 2 and left.count(1) <= 2  # alone only at the end


def test_on_a_cpu_each_step_is_read_before_the_next_and_no_token_is_computed_in_vain(log, monkeypatch):
    assert steps_ahead(torch.device("cpu")) == 0 and steps_ahead(torch.device("cuda")) == 1
    completions = run(make_model("llama"), monkeypatch, 0)
    assert [event == "read" for event, _, _ in log] == [False, True] * (len(log) // 2)
    assert sum(len(drawn.tokens) for event, drawn, _ in log if event == "read") == sum(
        len(c.ids) for c in completions
    )


def test_a_row_runs_one_token_past_its_end_at_most_and_stays_inside_the_cache(log, monkeypatch):
    completions = run(make_model("gemma3"), monkeypatch, 1)
    computed = sum(len(drawn.tokens) for event, drawn, _ in log if event == "read")
    cut = computed - sum(len(c.ids) for c in completions)
    assert 0 < cut <= len(completions)
    written = max(max(lengths) for event, _, lengths in log if event == "decode")
    assert written < max(LENGTHS) + RANDOM.max_new_tokens  # the capacity


@pytest.mark.parametrize("max_new_tokens", [1, 2])
def test_no_step_is_queued_when_every_row_has_all_its_tokens(log, monkeypatch, max_new_tokens):
    params = SamplingParams(temperature=0, max_new_tokens=max_new_tokens)
    completions = run(make_model("llama"), monkeypatch, 1, params, num_slots=7, stop=[])
    assert [len(c.ids) for c in completions] == [max_new_tokens] * len(LENGTHS)
    assert sum(event == "decode" for event, _, _ in log) == max_new_tokens - 1


def test_a_log_prob_that_is_not_finite_counts_only_if_its_token_does(monkeypatch):
    """A token past the end may be anything: here each text ends at its first token, read after the second."""
    model = make_model("llama")
    read, seen = Drawn.read, []

    def broken(self):
        tokens, logprobs = read(self)
        seen.append(len(seen))
        return tokens, [float("nan")] * len(tokens) if len(seen) > 1 else logprobs

    monkeypatch.setattr(Drawn, "read", broken)
    completions = run(model, monkeypatch, 1, num_slots=7, stop=range(97))
    assert len(seen) == 2 and [len(c.ids) for c in completions] == [1] * len(LENGTHS)
    seen.clear()
    with pytest.raises(ValueError, match="NaN or infinite for 7 of 7 responses"):
        run(model, monkeypatch, 1, num_slots=7, stop=[])


ASKS = {f"aten::{name}" for name in ("item", "_local_scalar_dense", "is_nonzero", "nonzero", "equal")}


class Waits(TorchDispatchMode):
    """Counts copies from a card to the host, and values that the host asks for at once."""

    copies = values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.values += func._schema.name in ASKS
        if isinstance(result, torch.Tensor) and result.device.type == "cpu":
            self.copies += any(isinstance(x, torch.Tensor) and x.device.type != "cpu" for x in args)
        return result


@pytest.mark.parametrize("params", [RANDOM, SamplingParams(0.0), SamplingParams(0.7, 1.0, 5)])
def test_a_decode_step_asks_for_no_value(tiny_model, monkeypatch, params):
    """The operator stands for its kernels here, which tests/kernels/test_gumbel.py holds to the same."""
    engine = Engine(tiny_model, params, 4, 40)
    order = "temperature", "top_k", "top_p"
    draws = []

    def draw(*streams, **settings):
        draws.append(gumbel._draw(*streams, *(settings[name] for name in order)))
        return draws[-1]

    monkeypatch.setattr(sampling, "draw", draw)
    with torch.inference_mode():
        engine.prefill([0, 1, 2], [(5, 6), (7,), (5, 6)], [0, 1, 2])
        with Waits() as waits:
            engine.decode([2, 1, 2])
    assert len(draws) == 2 and waits.values == 0


class Event:
    """An event of a card that is not there."""

    recorded = 0

    def record(self):
        Event.recorded += 1


def test_tokens_and_log_probs_come_from_a_card_in_two_copies_and_one_event(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    with FakeTensorMode(), Waits() as waits:
        drawn = Drawn(torch.zeros(3, dtype=torch.int64, device="cuda"), torch.zeros(3, device="cuda"))
    assert drawn.tokens.device.type == drawn.logprobs.device.type == "cpu"
    assert (waits.copies, waits.values, Event.recorded) == (2, 0, 1)
