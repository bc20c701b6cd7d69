"""The sampler on Qwen2.5-0.5B: are its tokens right, is it faster than transformers, what does a step cost?

- greedy tokens of tiny fp32 models, sampled on the card, are those of transformers' generate on the CPU
- tokens/s with 64, 256 and 16 rows of 512 new tokens, prompts of 200, temperature 0.6, top-p 0.95
- beside transformers' generate and generate_batch on the same prompts: at least twice generate's speed
- an answer that is drawn by turns with one that ends before is the same as alone
- launches, kernels and copies to the host per decode step, also of one long row beside 31 short ones; eagerly
  and in CUDA graphs (kit/generate/graph.py), the default, which must draw the same tokens in fewer launches
- what reading 8 prompts of 1,024 tokens holds, beside the memory plan of reinforcement learning
Random weights never end a text, so all rows are equally long. Left out: long-tailed lengths, which
recipes/bench/sampler.py has, and vLLM.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch
from transformers import GenerationConfig

from kit.evaluate.asking import take_turns
from kit.generate import SamplingParams, cache_bytes, generate
from kit.generate.engine import Engine
from kit.generate.graph import Graphs
from kit.generate.sampler import PREFILL_TOKENS, stream
from kit.machine import GIB
from kit.memory.phases import SAMPLER
from kit.recipes.card import models
from kit.recipes.card.compare import attempt
from kit.recipes.card.memory import held_gib, measured, median_seconds, timed
from kit.recipes.card.models import QWEN, build_to_sample, model_config
from kit.recipes.card.profile import Profile, profiled
from kit.recipes.card.results import Card, Results
from kit.recipes.card.rl import plan_step
from kit.recipes.card.timing import copy_gbs
from kit.recipes.card.transformers_generate import generate_batch, padded_generate
from kit.rl import Settings

NEVER = 10**9  # an end of text beyond every vocabulary: no row draws it
EVEN, UNEVEN, USUAL = "even", "uneven", "usual"  # lengths of the rows of a decode step
DECODED = 96  # the most tokens that a row gets while decode steps are timed
EAGER, GRAPH = "eager", "graph"  # how it runs: the graph is what the sampler does unless told otherwise
SPREAD = 5.0  # standard deviation of the logits: a nucleus like a trained model's


def run(results: Results, card: Card) -> None:
    for name in (QWEN, "google/gemma-3-1b-it"):
        with results.case(f"tokens of a tiny {model_config(name).model_type}"):
            check_tokens(results, card, name)
    card.need_rtx_30(models.NO_BF16)
    model = build_to_sample(card, SPREAD)
    for check in (measure_speed, measure_decoding, check_turns, check_reading, compare_peers):
        with results.case(check.__name__):
            check(results, card, model)


def params(new_tokens: int, temperature: float = 0.6, top_p: float = 0.95) -> SamplingParams:
    return SamplingParams(temperature, top_p, 0, new_tokens)


def random_prompts(lengths: list[int], model, seed: int = 0) -> list[tuple[int, ...]]:
    rng, V = torch.Generator().manual_seed(seed), model.config.vocab_size
    return [tuple(torch.randint(3, V, (length,), generator=rng).tolist()) for length in lengths]


def check_tokens(results: Results, card: Card, name: str) -> None:
    """Compare greedy tokens of a tiny model with plain transformers', prompt by prompt on the CPU."""
    config = model_config(name, small=True, num_hidden_layers=4, tie_word_embeddings=False)
    cpu = Card(torch.device("cpu"), quick=True)
    on_cpu = models.build(cpu, config, seed=1, dtype=torch.float32).eval()
    models.sharpen(on_cpu, 4.0)
    on_card, new_tokens = copy.deepcopy(on_cpu).to(card.device), 24
    prompts = random_prompts([5, 40, 17, 90, 33, 1, 70, 12] * 2, on_cpu)
    # so that rows end at different times: they are refilled, move and become few, which takes a second graph
    ends = list(range(2, config.vocab_size, 25))
    found = generate(on_card, prompts, params(new_tokens, 0.0, 1.0), num_slots=12, seed=0, eos_token_id=ends)

    on_cpu.set_attn_implementation("sdpa")
    greedy = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, eos_token_id=ends, pad_token_id=0)
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt])  # (1, length)
        written = on_cpu.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
        wanted.append(written[0, len(prompt) :].tolist())

    equal = sum(completion.ids == ids for completion, ids in zip(found, wanted, strict=True))
    text = f"{equal} of {len(prompts)} answers equal transformers' on the CPU"
    results.check(f"greedy tokens of a tiny {config.model_type}", equal == len(prompts), text)


def sampled(card: Card, model, prompts: list[tuple[int, ...]], new_tokens: int) -> float:
    """Return the tokens/s of all prompts at once, reading included. Samples a little first, to compile."""

    def sample(tokens: int) -> None:
        generate(model, prompts, params(tokens), num_slots=len(prompts), seed=0, eos_token_id=NEVER)

    sample(3)
    return len(prompts) * new_tokens / median_seconds(card, lambda: sample(new_tokens))


def measure_speed(results: Results, card: Card, model) -> None:
    length, new_tokens = (16, 8) if card.small else (200, 128 if card.quick else 512)
    for rows in (2, 4) if card.small else (64,) if card.quick else (64, 256, 16):
        title = f"{rows} rows of {new_tokens} tokens"
        with results.case(title):
            results.need(seconds=0.03 * new_tokens, gib=gib_to_sample(card, model, rows, length + new_tokens))
            prompts = random_prompts([length] * rows, model, rows)
            usage = measured(card, partial(sampled, card, model, prompts, new_tokens))
            speed = usage.result
            text = f"{speed:,.0f} tokens/s, {1000 * rows / speed:.1f} ms per decode step, "
            numbers = {"model": QWEN, **card.facts, "num_slots": rows, "tokens_per_second": speed}
            results.figure(title, f"{text}{usage.allocated:.2f} GiB", new_tokens=new_tokens, **numbers)


def gib_to_sample(card: Card, model, rows: int, tokens: int) -> float:
    """Estimate the GiB that so many rows of so many tokens need."""
    return 1.5 + held_gib(card) + cache_bytes(model, rows, tokens) / GIB  # 1.5: a step's tensors, CUDA's own


@torch.inference_mode()
def measure_decoding(results: Results, card: Card, model) -> None:
    """Profile a decode step of even and uneven rows. Rows of one length share a prompt, read once."""
    long, usual, brief = (600, 60, 20) if card.small else (16_000, 1_024, 200)
    for label, lengths in ((USUAL, [usual] * 64), (EVEN, [brief] * 32), (UNEVEN, [long] + [brief] * 31)):
        title = f"decode step, [{lengths[0]:,}] + [{lengths[-1]:,}] x {len(lengths) - 1}"
        gib = gib_to_sample(card, model, len(lengths), lengths[0] + DECODED)
        results.run(title, profile_decoding, model, lengths, label, seconds=5, gib=gib)


def profile_decoding(results: Results, card: Card, title: str, model, lengths: list[int], label: str) -> None:
    """Time and profile decode steps, run eagerly and in graphs. label: of the lengths.

    Graphs that could not be captured, or that the sampler itself found to differ, fail the check. Launches
    are compared if the profiler sees any: on a CPU, and without CUPTI, it sees none.
    """
    drawn, seconds, launches, seen = [], [], [], 2 if card.small else 10
    numbers = {"lengths": label, "floor_seconds": bytes_to_move(model, lengths) / copy_gbs(card) / 1e9}
    for way in (EAGER, GRAPH):
        tokens, each, profile = decoded(card, model, lengths, seen, cuda_graphs=way == GRAPH)
        drawn.append(tokens)
        seconds.append(each)
        counts = {name: getattr(profile, name) / seen for name in ("launches", "kernels", "copies_to_host")}
        launches.append(counts["launches"])
        text = ", ".join(f"{count:.1f} {name.replace('_', ' ')}" for name, count in counts.items())
        text = f"{1000 * each:.2f} ms, {text}, the card busy for {profile.busy / seen / each:.0%}"
        numbers["seconds_per_decode_step"] = each
        results.figure(f"{title}, {way}", text, way=way, **counts, **numbers, longest=profile.longest)

    same = sum(a == b for pair in zip(*drawn, strict=True) for a, b in zip(*pair, strict=True))
    total = len(lengths) * len(drawn[0])
    holds = same == total and not Graphs.failure and (not any(launches) or launches[1] < launches[0])
    text = f"{same:,} of {total:,} tokens equal, {seconds[0] / seconds[1]:.2f}x as fast"
    text += f"; no graphs: {Graphs.failure}" if Graphs.failure else ""
    results.check(f"{title}, graph beside eager", holds, text, ratio=seconds[0] / seconds[1])


def bytes_to_move(model, lengths: list[int]) -> int:
    """Return the bytes that a decode step must move: weights, the rows' keys and values, their logits."""
    weights = sum(parameter.nbytes for parameter in model.parameters())
    logits = len(lengths) * model.config.vocab_size * model.dtype.itemsize
    return weights + sum(cache_bytes(model, 1, length) for length in lengths) + logits


def decoded(
    card: Card, model, lengths: list[int], seen: int, *, cuda_graphs: bool
) -> tuple[list, float, Profile]:
    """Read prompts of these lengths, and decode. Return each step's tokens, seconds per step, a profile.

    seen: steps in the profile. cuda_graphs: as for the engine.
    """
    card.free()
    lengths = list(lengths)
    engine = Engine(model, params(DECODED), len(lengths), lengths[0] + DECODED, cuda_graphs=cuda_graphs)
    for length in sorted(set(lengths)):
        rows = [row for row, other in enumerate(lengths) if other == length]
        engine.prefill(rows, random_prompts([length], model, length) * len(rows), rows)
    tokens = []

    def decode(times: int) -> None:
        """Decode as the sampler does: a step is read when the next one is queued."""
        queued = []
        for _ in range(times):
            queued.append(engine.decode(lengths))
            lengths[:] = [length + 1 for length in lengths]
            if len(queued) > 1:
                tokens.append(queued.pop(0).read()[0])
        tokens.append(queued.pop().read()[0])

    decode(3)  # compiles, captures, and proves the graph
    seconds = statistics.median(timed(card, lambda: decode(2 * seen))[1] for _ in range(3)) / (2 * seen)
    return tokens, seconds, profiled(card, lambda: decode(seen))


def check_turns(results: Results, card: Card, model) -> None:
    """Answer two prompts by turns, as recipes/ask.py does: one's graphs must not depend on the other's."""
    few, many = (5, 9) if card.small else (32, 96)
    results.need(seconds=10)
    prompts = random_prompts([40, 50], model)

    def answer(prompt: tuple[int, ...], new_tokens: int, tokens: list[int]) -> Iterator[None]:
        for step in stream(model, [prompt], params(new_tokens), num_slots=1, seed=0, eos_token_id=NEVER):
            tokens += [token for _, token, _ in step]
            yield

    alone, by_turns = [], []
    take_turns([answer(prompts[1], many, alone)], lambda: None)
    take_turns([answer(prompts[0], few, []), answer(prompts[1], many, by_turns)], lambda: None)
    same = sum(a == b for a, b in zip(alone, by_turns, strict=True))
    text = f"{same} of {many} tokens are those that it draws alone"
    results.check("an answer beside one that ends before", same == many and not Graphs.failure, text)


def check_reading(results: Results, card: Card, model) -> None:
    """Compare the memory that reading prompts takes, besides model and cache, with its plan."""
    rows, length = (2, 64) if card.small else (PREFILL_TOKENS // 1_024, 1_024)
    results.need(seconds=15)
    engine = Engine(model, params(16), rows, length + 16)

    places, prompts = list(range(rows)), random_prompts([length] * rows, model)

    def read() -> None:
        engine.prefill(places, prompts, places)

    with torch.inference_mode():
        read()  # compiles and allocates workspaces
        usage = measured(card, read, held=held_gib(card))

    settings = Settings(max_new_tokens=16, num_slots=rows, row_tokens=4 * length)
    planned = plan_step(card, settings, length, cuda_graphs=False).sampling.owners[SAMPLER] / GIB
    held, speed = usage.allocated, rows * length / usage.seconds
    text = f"{held:.2f} GiB besides model and cache, planned {planned:.2f}; {speed:,.0f} tokens/s"
    holds = not card.is_cuda or held <= 1.1 * planned
    name = f"reading {rows} x {length:,} prompt tokens"
    results.check(name, holds, text, held_gib=held, planned_gib=planned)


def compare_peers(results: Results, card: Card, model) -> None:
    """Time the same prompts in transformers' generate and in its continuous batching."""
    rows, length, new_tokens = (3, 16, 6) if card.small else (64, 200, 128)
    prompts = random_prompts([length] * rows, model, rows)
    peers = {"generate": padded_generate} | ({} if card.quick else {"generate_batch": generate_batch})
    results.need(seconds=25)
    ours = sampled(card, model, prompts, new_tokens)
    for name, peer in peers.items():
        title = f"{rows} rows of {new_tokens} tokens beside {name}"
        theirs, why = attempt(
            card, time_peer, card, peer, model, [list(prompt) for prompt in prompts], new_tokens
        )
        if theirs is None:
            results.not_run(title, f"{name} failed: {why}")
            continue
        text = f"{ours:,.0f} beside {theirs:,.0f} tokens/s: {ours / theirs:.2f} x"
        numbers = {"ratio": ours / theirs, "peer": name}
        if card.is_cuda and name == "generate":
            results.check(title, ours >= 2 * theirs, f"{text}, at least 2", **numbers)
        else:
            results.figure(title, text, **numbers)


def time_peer(card: Card, peer: Callable, model, prompts: list[list[int]], new_tokens: int) -> float:
    """Return a peer's tokens/s. Raises ValueError if some tokens are missing."""
    answer = partial(peer, model, prompts, num_rows=len(prompts), eos=NEVER)
    if peer is padded_generate:
        answer(new_tokens=2)  # compiles; generate_batch is timed with its own warm-up
    answers, seconds = timed(card, partial(answer, new_tokens=new_tokens))
    total, wanted = sum(map(len, answers)), len(prompts) * new_tokens
    if total != wanted:
        raise ValueError(f"{total} tokens came back, {wanted} were asked for")
    return total / median_seconds(card, partial(answer, new_tokens=new_tokens), first=seconds)
