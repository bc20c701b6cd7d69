"""The token step as a card replays it: to run the captured step again stands for a replay of its kernels."""

import warnings
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, inject_adapter_in_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kit.generate import engine, graph, kv_cache, sampler
from kit.generate.engine import Engine
from kit.generate.graph import Eager, Graphs, steps_for
from kit.generate.sampling import SamplingParams
from kit.models.nf4 import quantise_decoder

PARAMS = SamplingParams(temperature=1.0, top_p=0.9, max_new_tokens=14)
SLOTS = 11  # of which a step computes 8 or all


@pytest.fixture(autouse=True)
def lengths_stay_on_the_device(monkeypatch):
    """Let the cache be read as on a card; decode_attention computes it in torch here."""
    monkeypatch.setattr(kv_cache, "_takes_kernel", lambda *_: True)
    monkeypatch.setattr(Graphs, "failure", "")


class Addresses(TorchDispatchMode):
    """Collects the addresses of the tensors that operators read and did not make themselves."""

    def __enter__(self):
        self.read, self.made, self.kept = set(), set(), []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.read |= addresses((args, kwargs)) - self.made
        self.made |= addresses(out) - self.read
        self.kept.append(out)  # no other tensor may get its memory
        return out


def addresses(tree):
    return {x.untyped_storage().data_ptr() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)}


class Replay:
    """The captured step. What it reads, and what the engine holds, must lie where it lay at first."""

    def __init__(self, step):
        self.step, self.addresses, self.times = step, None, 0

    def replay(self):
        with Addresses() as seen:
            self.step()
        in_place = seen.read | addresses(vars(self.step.func.__self__))
        self.addresses = self.addresses or in_place
        assert in_place == self.addresses
        self.times += 1


class Rerun:
    """Takes the place of a card's recorder: a capture runs nothing, and its result cannot be used."""

    def __init__(self, replay=Replay):
        self.replay, self.captured = replay, []

    def run(self, step):
        step()

    def capture(self, step):
        self.captured.append(self.replay(step))
        return self.captured[-1]


def sampled(model, monkeypatch, steps):
    """Answer prompts that end at different times: rows are refilled, move, and get fewer than 8."""
    monkeypatch.setattr(engine, "steps_for", lambda *_: steps)
    torch.manual_seed(3)
    prompts = [torch.randint(3, 97, (1 + 5 * i % 13,)).tolist() for i in range(24)]
    options = {"num_slots": SLOTS, "seed": 0, "eos_token_id": range(2, 9)}
    return sampler.generate(model, prompts, PARAMS, **options)


def with_adapters(model):
    quantise_decoder(model, "cpu")
    inject_adapter_in_model(LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False), model)
    return model.eval()


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3", "qwen2 in NF4 with adapters"])
def test_replayed_steps_give_the_bits_of_eager_ones_and_find_all_they_read_in_its_place(name, monkeypatch):
    model = make_model(name.split()[0])
    model = with_adapters(model) if "adapters" in name else model
    recorder = Rerun()
    replayed = sampled(model, monkeypatch, Graphs(recorder))
    assert [graph.times > 2 for graph in recorder.captured] == [True, True]  # one per size, each in use
    assert len({len(completion.ids) for completion in replayed}) > 5
    assert replayed == sampled(model, monkeypatch, Graphs(None))

    exact = sampled(model, monkeypatch, Eager())  # as many rows as there are: products may round otherwise
    assert [completion.ids for completion in replayed] == [completion.ids for completion in exact]
    for ours, theirs in zip(replayed, exact, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, rel=1e-4, abs=1e-5)


def test_a_step_that_cannot_be_captured_is_named_once_and_sampling_goes_on_with_the_same_tokens(monkeypatch):
    model, recorder = make_model("llama"), Rerun()
    expected = sampled(model, monkeypatch, Graphs(None))
    tried = []

    class Capturing:  # as torch.cuda.graph: to end such a capture fails, too
        def __enter__(self):
            """Begin."""

        def __exit__(self, *_):
            raise RuntimeError("operation failed due to a previous error during capture")

    def capture(step):
        tried.append(step)
        with Capturing():
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(recorder, "capture", capture)
    with pytest.warns(UserWarning, match=r"without CUDA graphs.*: operation not permitted when") as warned:
        assert sampled(model, monkeypatch, Graphs(recorder)) == expected
    assert len(tried) == len(warned) == 1
    assert Graphs.failure  # so it is not tried in the next call either


def test_a_replay_that_raises_is_named_once_and_ends_graphs_everywhere_but_no_call(
    monkeypatch,
):
    class Raises(Replay):
        def replay(self):
            raise RuntimeError("CUDA error: out of memory")

    model = make_model("llama")
    expected = sampled(model, monkeypatch, Graphs(None))
    other = Rerun()
    with torch.inference_mode():
        beside = engine_of(model, Graphs(other), monkeypatch)
        drawn = [beside.decode([9 + step] * SLOTS).read() for step in range(4)]
        assert [graph.times for graph in other.captured] == [2]
        with pytest.warns(UserWarning, match="without CUDA graphs.*: CUDA error: out of memory.*--no_cuda_"):
            assert sampled(model, monkeypatch, Graphs(Rerun(Raises))) == expected
        drawn += [beside.decode([13 + step] * SLOTS).read() for step in range(2)]
        assert [graph.times for graph in other.captured] == [2]  # which goes on without its graphs

        Graphs.failure = ""
        eager = engine_of(model, Graphs(None), monkeypatch)
        assert drawn == [eager.decode([9 + step] * SLOTS).read() for step in range(6)]


class WithStale(Replay):
    """A graph that computes with what `name` of the engine held when it was captured, `left` apart."""

    name, left = "", True

    def __init__(self, step):
        super().__init__(step)
        self.tensor = getattr(step.func.__self__, self.name)
        self.stale = self.tensor.clone()

    def replay(self):
        now = self.tensor.clone()
        self.tensor.copy_(self.stale)
        self.step()
        self.times += 1
        if self.left:  # leaves what a right one leaves, where a step adds one
            self.tensor.copy_(now + 1)


class StaleDrawn(WithStale):
    """Draws again with the random numbers of the captured step."""

    name = "drawn"


class StaleTokens(WithStale):
    """Reads the tokens from where they lay."""

    name, left = "tokens", False


class StalePlaces(Replay):
    """Writes keys and values where the captured step wrote them; all else is right."""

    def __init__(self, step):
        super().__init__(step)
        self.cache = step.func.__self__.cache
        self.stale = dict(self.cache.places)
        for row, position in enumerate(step.func.__self__.positions.tolist()):
            for tensor in (*self.cache.keys, *self.cache.values):
                tensor[row, :, position:] = 7.0  # its memory may hold what the same run left there before

    def replay(self):
        at_decode = self.cache.at_decode

        def misled(positions, longest):
            at_decode(positions, longest)
            self.cache.places |= self.stale

        self.cache.at_decode = misled
        self.step()
        self.cache.at_decode = at_decode
        self.times += 1


class NeverAdvances(Replay):
    """Draws the right tokens, and does not count them."""

    def replay(self):
        drawn = self.step.func.__self__.drawn
        before = drawn.clone()
        self.step()
        drawn.copy_(before)
        self.times += 1


@pytest.mark.parametrize("broken", [StaleDrawn, StaleTokens, StalePlaces, NeverAdvances])
def test_a_graph_that_differs_from_its_step_is_named_once_and_never_replayed_again(broken, monkeypatch):
    model, recorder = make_model("llama"), Rerun(broken)
    expected = sampled(model, monkeypatch, Graphs(None))
    left = "draws" if broken is NeverAdvances else "(tokens and )?log-probs"
    with pytest.warns(UserWarning, match=rf"the graph of 11 rows left other {left} than the same") as warned:
        found = sampled(model, monkeypatch, Graphs(recorder))
    assert len(warned) == 1 and [graph.times for graph in recorder.captured] == [1]
    assert Graphs.failure
    if broken is not StalePlaces:  # which has written over keys of the step before
        assert found == expected


def test_a_graph_is_proved_by_a_step_whose_rows_are_not_those_of_its_capture(monkeypatch):
    """Right after the capture even a graph that holds all its values fast would leave the right ones."""
    seen = []

    class Logged(Replay):
        def __init__(self, step):
            super().__init__(step)
            self.drawn = step.func.__self__.drawn[0].item()

        def replay(self):
            seen.append(self.step.func.__self__.drawn[0].item() - self.drawn)
            super().replay()

    with torch.inference_mode():
        made = engine_of("llama", Graphs(Rerun(Logged)), monkeypatch)
        for step in range(4):
            made.decode([9 + step] * SLOTS)
    assert seen == [1, 2]


def test_logits_that_are_not_finite_are_no_fault_of_a_graph(monkeypatch):
    model = make_model("llama")
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    with warnings.catch_warnings(action="error"), torch.inference_mode():
        made = engine_of(model, Graphs(Rerun()), monkeypatch)
        for step in range(4):
            _, logprobs = made.decode([9 + step] * SLOTS).read()
    assert all(x != x for x in logprobs) and not Graphs.failure


def test_a_step_that_is_replayed_and_run_again_leaves_every_key_of_a_ring_as_one_eager_step(monkeypatch):
    held = []
    for steps in (Graphs(Rerun()), Graphs(None)):
        with torch.inference_mode():
            made = engine_of("gemma3", steps, monkeypatch, length=30)
            window = min(made.cache.sizes)
            assert window < 30 < max(made.cache.sizes)  # the proof overwrites what the window has left
            drawn = [made.decode([30 + step] * SLOTS).read() for step in range(4)]
            rings = [x for x in (*made.cache.keys, *made.cache.values) if x.shape[2] == window]
            rows = [x[:, :, :34] for x in (*made.cache.keys, *made.cache.values) if x.shape[2] > window]
            held.append((drawn, [x.clone() for x in rings + rows]))
    (drawn, cache), (expected, expected_cache) = held
    assert drawn == expected and all(map(torch.equal, cache, expected_cache))


def test_steps_are_replayed_on_a_card_whose_kernel_reads_the_cache_unless_it_is_switched_off(monkeypatch):
    monkeypatch.setattr(graph, "Recorder", lambda device: Rerun())
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert isinstance(steps_for(cuda, True, True), Graphs)
    eager = (cpu, True, True), (cuda, False, True), (cuda, True, False)
    assert all(isinstance(steps_for(*how), Eager) for how in eager)
    Graphs.failure = "a graph before"
    assert isinstance(steps_for(cuda, True, True), Eager)


def test_engines_capture_on_streams_of_their_own_which_later_ones_use_again(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device=device))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(graph.Recorder, "idle", defaultdict(list))
    first, second = (graph.Recorder(torch.device("cuda", 0)) for _ in range(2))
    elsewhere = graph.Recorder(torch.device("cuda", 1))
    assert len({id(made.stream) for made in (first, second, elsewhere)}) == 3
    stream, first = first.stream, None
    assert graph.Recorder(torch.device("cuda", 1)).stream is not stream
    assert graph.Recorder(torch.device("cuda", 0)).stream is stream
    assert second.stream is not stream


def test_generate_hands_the_switch_to_what_decides(monkeypatch):
    asked = []
    monkeypatch.setattr(engine, "steps_for", lambda *how: asked.append(how) or Eager())
    options = {"num_slots": 1, "seed": 0, "eos_token_id": 2}
    for switch in ({}, {"cuda_graphs": False}):
        sampler.generate(make_model("llama"), [[5]], PARAMS, **options, **switch)
    assert [cuda_graphs for _, _, cuda_graphs in asked] == [True, False]


def test_a_step_is_rounded_up_to_few_sizes_and_never_beyond_the_slots():
    sizes = [Graphs(None).size(rows, 300) for rows in range(1, 301)]
    assert sorted(set(sizes)) == [8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 300]
    assert all(rows <= size <= 1.5 * rows for rows, size in enumerate(sizes, 1) if rows > 16)
    assert [Graphs(None).size(rows, 5) for rows in (1, 5)] == [5, 5]


def engine_of(model, steps, monkeypatch, length=9):
    """Return an engine whose slots have all read the same prompt."""
    monkeypatch.setattr(engine, "steps_for", lambda *_: steps)
    model = make_model(model) if isinstance(model, str) else model
    made = Engine(model, PARAMS, SLOTS, 40)
    made.prefill(list(range(SLOTS)), [(5,) * length] * SLOTS, list(range(SLOTS)))
    return made


def test_rows_that_only_fill_up_a_step_read_one_key_whatever_they_held_before(monkeypatch):
    read, attention = [], kv_cache.decode_attention

    def logged(q, keys, values, lengths, **scale):
        read.append(lengths.tolist())
        return attention(q, keys, values, lengths, **scale)

    monkeypatch.setattr(kv_cache, "decode_attention", logged)
    with torch.inference_mode():
        made = engine_of("llama", Graphs(Rerun()), monkeypatch)
        for step in range(4):
            made.decode([9 + step] * 3)
            assert read[-1] == [10 + step] * 3 + [1] * 5
