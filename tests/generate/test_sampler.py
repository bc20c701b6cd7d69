import gc
import io
import itertools
import os
import random
import re
import sys

import pytest
import torch
from conftest import make_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from kit import models
from kit.data.chat import ChatFormat
from kit.generate import engine, kv_cache
from kit.generate import sampler as generating
from kit.generate.engine import Engine
from kit.generate.kv_cache import SlotCache
from kit.generate.sampler import Completion, arrange, generate, stream
from kit.generate.sampling import SamplingParams
from kit.models import backbone
from kit.models.backbone import hidden_states
from kit.packing import Document, PackedBatch
from kit.progress import show

LENGTHS = (5, 1, 9, 13, 3, 7, 2)  # of prompts; with 40 new tokens each passes the window, 7, many times
SLOTS = (1, 3, 16)
GREEDY = SamplingParams(temperature=0, max_new_tokens=40)
RANDOM = SamplingParams(temperature=1.0, top_p=0.9, max_new_tokens=40)


def prompts():
    torch.manual_seed(5)
    return [torch.randint(3, 97, (length,)).tolist() for length in LENGTHS]


def run(model, params, num_slots=3, seed=0, eos_token_id=2, **options):
    return generate(
        model,
        options.pop("prompts", prompts()),
        params,
        num_slots=num_slots,
        seed=seed,
        eos_token_id=eos_token_id,
        **options,
    )


def transformers_greedy(model, eos_token_id=2):
    model.set_attn_implementation("eager")
    options = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": eos_token_id}
    whole = [(prompt, model.generate(torch.tensor([prompt]), **options)[0]) for prompt in prompts()]
    return [ids[len(prompt) :].tolist() for prompt, ids in whole]


def test_greedy_equals_transformers_token_for_token(tiny_model):
    truth = transformers_greedy(tiny_model)
    # the id that most responses contain, so that some rows end early and are refilled
    eos = max({i for ids in truth for i in ids}, key=lambda i: sum(i in ids for ids in truth))
    truth_with_end = transformers_greedy(tiny_model, [eos, 2])
    for num_slots in SLOTS:
        ours = run(tiny_model, GREEDY, num_slots)
        stopped = run(tiny_model, GREEDY, num_slots, eos_token_id=[eos, 2])
        assert [completion.ids for completion in ours] == truth
        assert [completion.ids for completion in stopped] == truth_with_end
        assert any(completion.finished for completion in stopped)


def test_samples_depend_neither_on_slots_nor_on_order_nor_on_what_else_runs(tiny_model):
    keys = [["q", i] for i in range(len(LENGTHS))]
    first = run(tiny_model, RANDOM, 1, keys=keys)
    assert len({tuple(completion.ids) for completion in first}) == len(first)
    for num_slots in SLOTS[1:]:
        assert [c.ids for c in run(tiny_model, RANDOM, num_slots, keys=keys)] == [c.ids for c in first]
    order = [4, 0, 6]
    some = run(tiny_model, RANDOM, 2, prompts=[prompts()[i] for i in order], keys=[keys[i] for i in order])
    assert [c.ids for c in some] == [first[i].ids for i in order]
    assert [c.ids for c in run(tiny_model, RANDOM, 3, seed=1, keys=keys)] != [c.ids for c in first]


def test_rows_that_move_answer_as_they_do_alone(tiny_model, monkeypatch):
    """Requests end at different times, so that rows move, a few positions at once here, to freed places."""
    monkeypatch.setattr(kv_cache, "MOVED_AT_ONCE", 3)
    moves, move = [], kv_cache.SlotCache.move

    def counted_move(self, sources, targets, length):
        moves.append(len(sources))
        move(self, sources, targets, length)

    monkeypatch.setattr(kv_cache.SlotCache, "move", counted_move)
    torch.manual_seed(7)
    many = [torch.randint(3, 97, (length,)).tolist() for length in (5, 31, 9, 13, 3, 27, 2, 18, 1, 22, 4, 16)]
    options = {"prompts": many, "eos_token_id": list(range(2, 12))}
    alone = run(tiny_model, RANDOM, 1, **options)
    assert len({len(completion.ids) for completion in alone}) > 3
    assert [c.ids for c in run(tiny_model, RANDOM, 5, **options)] == [c.ids for c in alone]
    assert moves


class Rows:
    """A stand-in for the engine that records what each row of the cache holds."""

    def __init__(self, slots):
        self.held = [slot.request for slot in slots]
        self.moved = 0

    def move(self, sources, targets, length):
        assert len(set(targets)) == len(targets) == len(sources) == len(set(sources))
        copies = [self.held[row] for row in sources]
        for target, copy in zip(targets, copies, strict=True):
            self.held[target] = copy
        self.moved += len(sources)
        self.length = length


def test_arranging_puts_active_rows_first_and_moves_no_row_without_need():
    rng = random.Random(0)
    for _ in range(300):
        slots = [generating._Slot(-1) for _ in range(rng.randint(1, 9))]
        for i in range(len(slots)):
            if rng.random() < 0.7:
                slots[i] = generating._Slot(i, rng.choice((3, 255, 257, 600, 900)), 1)
        before, active = list(slots), sorted(slot.request for slot in slots if slot.request >= 0)
        rows = Rows(slots)
        arrange(slots, rows)
        B = len(active)
        assert sorted(slot.request for slot in slots[:B]) == active
        assert all(slot.request < 0 for slot in slots[B:])
        assert rows.held[:B] == [slot.request for slot in slots[:B]]  # the cache went with them
        misplaced = [i for i in active if i >= B]
        assert rows.moved == len(misplaced)
        if misplaced:
            assert rows.length == max(before[i].length for i in misplaced)


def logprobs_of(model, ids, prompt_len, temperature):
    with torch.no_grad():
        logprobs = (model(ids).logits[0] / temperature).log_softmax(-1)
    return logprobs[prompt_len - 1 : -1].gather(-1, ids[0, prompt_len:, None])[:, 0].double()


@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(temperature=0.7, top_p=1.0, max_new_tokens=40)], ids=["greedy", "0.7"]
)
def test_logprobs_are_those_of_the_distribution_that_was_sampled(tiny_model, params):
    completions = run(tiny_model, params)
    tiny_model.set_attn_implementation("eager")
    errors = {"ours": 0.0, "torch": 0.0}
    for prompt, completion in zip(prompts(), completions, strict=True):
        ids = torch.tensor([prompt + completion.ids])

        truth, theirs = (
            logprobs_of(tiny_model.to(dtype), ids, len(prompt), params.temperature or 1)
            for dtype in (torch.float64, torch.float32)
        )
        errors["ours"] = max(errors["ours"], (torch.tensor(completion.logprobs) - truth).abs().max().item())
        errors["torch"] = max(errors["torch"], (theirs - truth).abs().max().item())
    assert errors["ours"] <= 2 * errors["torch"]


def test_samples_of_one_question_are_the_same_whether_they_share_a_prefill_or_not(tiny_model, monkeypatch):
    same = [prompts()[3]] * 3 + [prompts()[0]] + [prompts()[3]] * 2
    read = []
    embed = tiny_model.get_input_embeddings()
    handle = embed.register_forward_hook(lambda module, inputs, output: read.append(tuple(inputs[0].shape)))
    together = run(tiny_model, RANDOM, 6, prompts=same)
    packs = [shape for shape in read if len(shape) == 2]
    assert packs == [(1, LENGTHS[3] + LENGTHS[0])]  # two prompts for six rows
    read.clear()
    monkeypatch.setattr(generating, "PREFILL_TOKENS", 1)  # a longer prompt is read alone, and still once
    run(tiny_model, RANDOM, 6, prompts=same)
    handle.remove()
    assert read[:3] == [(1, LENGTHS[3]), (1, LENGTHS[0]), (1, LENGTHS[3])]
    assert [c.ids for c in together] == [c.ids for c in run(tiny_model, RANDOM, 1, prompts=same)]
    assert len({tuple(c.ids) for c in together}) == 6


def test_a_prefill_reads_no_more_tokens_at_once_than_its_budget(tiny_model, monkeypatch):
    monkeypatch.setattr(generating, "PREFILL_TOKENS", 14)
    read = []
    embed = tiny_model.get_input_embeddings()
    handle = embed.register_forward_hook(lambda module, inputs, output: read.append(tuple(inputs[0].shape)))
    expected = [c.ids for c in run(tiny_model, GREEDY, 1)]
    read.clear()
    assert [c.ids for c in run(tiny_model, GREEDY, 7)] == expected
    handle.remove()
    assert [shape for shape in read if len(shape) == 2] == [(1, 5 + 1), (1, 9), (1, 13), (1, 3 + 7 + 2)]


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor that an operator returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *found])
        return result


def test_reading_a_long_prompt_makes_neither_a_mask_nor_scores_of_its_length_squared(tiny_model):
    prompt = [5] * 450  # beyond the window; the widest activation is 450 x 97
    with LargestTensor() as largest, torch.no_grad():
        engine = Engine(tiny_model, GREEDY, 2, 460)
        engine.prefill([0, 1], [tuple(prompt), (4, 3)], [0, 1])
    assert largest.numel < 450 * 450 // 2


def test_the_bounds_of_a_pack_of_prompts_are_not_created_in_inference_mode_where_every_layer_would_check_them(
    tiny_model, monkeypatch
):
    packs = []
    monkeypatch.setattr(
        engine,
        "hidden_states",
        lambda model, pack, cache: packs.append(pack) or hidden_states(model, pack, cache=cache),
    )
    run(tiny_model, GREEDY, 3)
    assert packs and not any(pack.cu_seqlens.is_inference() for pack in packs)


def caches() -> list[SlotCache]:
    return [x for x in gc.get_objects() if type(x) is SlotCache]


def test_a_card_gets_its_memory_back_after_sampling_when_the_cache_is_gone(tiny_model, monkeypatch):
    gc.collect()
    earlier = caches()  # of other tests; kept here, so that a new cache cannot have an old one's id
    ids, alive = set(map(id, earlier)), []
    monkeypatch.setattr(
        generating,
        "return_memory",
        lambda device: alive.append(sum(id(cache) not in ids for cache in caches())),
    )
    run(tiny_model, GREEDY, 3)
    assert alive == [0]


def test_each_completion_is_handed_over_once_as_it_ends(tiny_model):
    seen = {}
    completions = run(
        tiny_model,
        RANDOM,
        eos_token_id=range(2, 30),
        on_finish=lambda i, completion: seen.setdefault(i, []).append(completion),
        decode=lambda ids: " ".join(map(str, ids)),
    )
    assert {i: [c] for i, c in enumerate(completions)} == seen
    for completion in completions:
        assert completion.text == " ".join(map(str, completion.ids))
        assert completion.finished == (completion.ids[-1] in range(2, 30))
        assert not any(i in range(2, 30) for i in completion.ids[:-1])
        assert len(completion.logprobs) == len(completion.ids)
    assert list(seen) != sorted(seen)  # short answers do not wait for long ones


def test_a_first_token_that_ends_the_text_is_a_whole_completion(tiny_model):
    completions = run(tiny_model, GREEDY, eos_token_id=range(97))
    assert [len(completion.ids) for completion in completions] == [1] * len(LENGTHS)
    assert all(completion.finished for completion in completions)


def test_no_prompts_give_no_completions_and_one_token_is_enough(tiny_model):
    assert run(tiny_model, GREEDY, prompts=[]) == []
    (completion,) = run(tiny_model, SamplingParams(temperature=0, max_new_tokens=1), prompts=[[5]])
    assert isinstance(completion, Completion)
    assert len(completion.ids) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": [[5], []]}, "prompt 1 is empty"),
        ({"num_slots": -1}, "num_slots is -1 but must be >= 1"),
        ({"keys": [1, 2]}, "2 keys for 7 prompts"),
        (
            {"params": SamplingParams(max_new_tokens=510)},
            r"prompt 3 has 13 tokens .* made for 512 in all; pass max_new_tokens <= 499",  # the longest fits
        ),
        (
            {"prompts": [[5], [5] * 512], "keys": ["a", ["b", 0]]},
            r"prompt \['b', 0\] has 512 tokens .* pass a model with a longer context, or leave it out",
        ),
    ],
)
def test_what_cannot_be_sampled_is_refused(tiny_model, options, message):
    with pytest.raises(ValueError, match=message):
        run(tiny_model, **{"params": GREEDY} | options)


def test_training_mode_is_put_back_and_no_gradient_is_kept(tiny_model):
    tiny_model.train()
    run(tiny_model, GREEDY)
    assert tiny_model.training
    assert all(parameter.grad is None for parameter in tiny_model.parameters())


def test_a_model_learns_after_it_was_sampled_and_within_on_finish(tiny_model):
    """Autograd refuses tensors of inference mode: none may stay in the model or reach the caller."""
    batch = PackedBatch.build([Document(torch.tensor([5, 6, 7]), 1)])

    def learn(*_):
        backbone.hidden_states(tiny_model, batch).sum().backward()
        losses.append(tiny_model.get_input_embeddings().weight.grad.abs().sum().item())

    losses = []
    run(tiny_model, RANDOM, on_finish=learn)
    learn()
    assert len(losses) == len(LENGTHS) + 1
    assert all(before < after for before, after in itertools.pairwise([0, *losses]))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_shows_finished_of_total_pace_length_truncated_and_time_left(tiny_model, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(tqdm, "monitor_interval", 0)
    # `decode` is called before a sample counts as finished
    options = {"eos_token_id": range(2, 10), "decode": lambda ids: show() or "", "description": "toy"}
    completions = run(tiny_model, RANDOM, **options)
    frames = terminal.getvalue().split("\r")
    last = frames[-1].strip()
    lengths = [len(c.ids) for c in completions]
    truncated = sum(not c.finished for c in completions)
    assert last.startswith("toy: 100%")
    assert "7/7 [" in last
    assert f"mean length {sum(lengths) / 7:,.0f}, truncated {truncated}]" in last
    assert 0 < truncated < 7 or len(set(lengths)) > 1
    pace = float(re.search(r"([\d,]+) tokens/s", last)[1].replace(",", ""))
    assert pace > 0
    # elapsed<left, once one has finished
    assert any(re.search(r"[1-6]/7 \[\d\d:\d\d<\d\d:\d\d", frame) for frame in frames)
    assert any("0/7" in frame and "mean length ?" in frame for frame in frames)


def test_without_a_terminal_there_is_no_bar_but_a_line_at_the_end(tiny_model, capfd):
    run(tiny_model, SamplingParams(temperature=0, max_new_tokens=2), eos_token_id=-1, description="toy")
    pattern = r"toy: 7 of 7 samples in 0:00:\d\d; [\d,]+ tokens/s, mean length 2, truncated 7\n"
    assert re.fullmatch(pattern, capfd.readouterr().err)


def test_what_on_finish_raises_comes_out_and_leaves_the_model_as_it_was(tiny_model):
    def fail(index, completion):
        raise KeyError("disk full")

    tiny_model.train()
    # `caught` keeps the frames alive, and what they hold
    with pytest.raises(KeyError, match="disk full") as caught:
        run(tiny_model, GREEDY, on_finish=fail)
    assert caught.value
    assert tiny_model.training
    assert torch.is_grad_enabled()


def test_real_weights_decode_greedily_as_transformers_does():
    path = os.environ.get("KIT_MODEL")
    if not path:
        pytest.skip(
            "real weights do not ship with the kit: set KIT_MODEL to a folder or .gguf file of a model with "
            "a chat template"
        )
    model, tokenizer = models.load(path, device="cpu")
    chat = ChatFormat(tokenizer)
    problems = [
        "What is 2 + 3?",
        "A train goes 60 km in 1.5 hours. How fast is it?",
        "Name a prime between 24 and 30, and say why.",
    ]
    prompts = chat.encode([chat.prompt(problem) for problem in problems])
    params = SamplingParams(temperature=0, max_new_tokens=120)
    ours = generate(model, prompts, params, num_slots=2, seed=0, eos_token_id=chat.eos_token_ids)
    model.set_attn_implementation("sdpa")
    for prompt, completion in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=120,
            eos_token_id=chat.eos_token_ids,
            pad_token_id=chat.eos_token_ids[0],
        )
        assert completion.ids == theirs[0, len(prompt) :].tolist()


def test_logits_that_are_not_finite_stop_the_sampler_and_what_ended_before_is_kept():
    model, ended = make_model("llama"), []
    expected = run(model, RANDOM, num_slots=1)
    with torch.no_grad():
        model.get_input_embeddings().weight[2] = float("nan")  # end of text, which nothing here reads
        broken = [[9, 2, 9] if i == 3 else prompt for i, prompt in enumerate(prompts())]
    model.train()
    with pytest.raises(ValueError, match=r"logits are NaN or infinite for 1 of 1 responses.*in float32"):
        run(model, RANDOM, num_slots=1, prompts=broken, on_finish=lambda i, found: ended.append((i, found)))
    assert ended == list(enumerate(expected[:3]))
    assert model.training


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_stream_hands_over_every_token_as_it_is_drawn_and_can_be_left(ahead, monkeypatch):
    monkeypatch.setattr(generating, "steps_ahead", lambda _: ahead)
    model, seen, ends = make_model("llama"), {}, {}
    model.train()
    how = {"num_slots": 3, "seed": 0, "eos_token_id": range(2, 30)}
    done = generate(model, prompts(), RANDOM, **how)
    for step in stream(model, prompts(), RANDOM, **how):
        for index, token, completion in step:
            seen.setdefault(index, []).append(token)
            ends |= {index: completion} if completion else {}
    assert [ends[index] for index in range(len(done))] == done
    assert [seen[index] for index in range(len(done))] == [completion.ids for completion in done]
    assert model.training

    steps = stream(model, prompts(), RANDOM, **how)
    next(steps)
    assert not model.training and not torch.is_inference_mode_enabled()
    steps.close()
    assert model.training


def test_without_a_description_no_progress_is_shown(capsys):
    run(make_model("llama"), GREEDY, description="")
    assert capsys.readouterr() == ("", "")
