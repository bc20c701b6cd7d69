"""The token step as a card replays it: to run the captured step again stands for a replay of its kernels."""

from functools import partial

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, inject_adapter_in_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kit.generate import decode, graph, kv_cache, sampler
from kit.generate.engine import Engine
from kit.generate.graph import Eager, Graphs
from kit.generate.sampling import SamplingParams
from kit.models.nf4 import quantise_decoder

PARAMS = SamplingParams(temperature=1.0, top_p=0.9, max_new_tokens=14)
SLOTS = 11  # of which a step computes 8 or all


@pytest.fixture(autouse=True)
def lengths_stay_on_the_device(monkeypatch):
    """Let the cache be read as on a card; decode_attention computes it in torch here."""
    monkeypatch.setattr(kv_cache, "_takes_kernel", lambda *_: True)


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

    def __init__(self):
        self.captured = []

    def warm_up(self, step):
        step()

    def capture(self, step):
        self.captured.append(Replay(step))
        return self.captured[-1]


def sampled(model, monkeypatch, steps):
    """Answer prompts that end at different times: rows are refilled, move, and get fewer than 8."""
    monkeypatch.setattr(sampler, "Engine", partial(Engine, steps=steps))
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

    def capture(step):
        tried.append(step)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(recorder, "capture", capture)
    monkeypatch.setattr(graph, "USES_GRAPHS", True)
    with pytest.warns(UserWarning, match=r"without CUDA graphs.*: operation not permitted when") as warned:
        assert sampled(model, monkeypatch, Graphs(recorder)) == expected
    assert len(tried) == len(warned) == 1
    assert not graph.USES_GRAPHS  # nor is it tried in the next call


def test_a_step_is_rounded_up_to_few_sizes_and_never_beyond_the_slots():
    sizes = [Graphs(None).size(rows, 300) for rows in range(1, 301)]
    assert sorted(set(sizes)) == [8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 300]
    assert all(rows <= size <= 1.5 * rows for rows, size in enumerate(sizes, 1) if rows > 16)
    assert [Graphs(None).size(rows, 5) for rows in (1, 5)] == [5, 5]


def test_rows_that_only_fill_up_a_step_read_one_key_whatever_they_held_before(monkeypatch):
    read, attention = [], decode.decode_attention

    def logged(q, keys, values, lengths, **scale):
        read.append(lengths.tolist())
        return attention(q, keys, values, lengths, **scale)

    monkeypatch.setattr(decode, "decode_attention", logged)
    with torch.inference_mode():
        engine = Engine(make_model("llama"), PARAMS, SLOTS, 40, steps=Graphs(Rerun()))
        engine.prefill(list(range(SLOTS)), [(5,) * 9] * SLOTS, list(range(SLOTS)))
        for step in range(4):
            engine.decode([9 + step] * 3)
            assert read[-1] == [10 + step] * 3 + [1] * 5
