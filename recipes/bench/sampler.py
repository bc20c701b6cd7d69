"""The sampler and transformers' two ways of answering many prompts: useful tokens per second.

    python recipes/bench/sampler.py                         48 prompts, long-tailed lengths, 32 at a time
    python recipes/bench/sampler.py --num_slots 16

All engines get the same model and the same prompts. The model is a tiny Llama whose head undoes its embedding
one step further down: token n is followed by n - 1, and 0 ends the text. So the last token of a prompt sets
the length of its answer, while every engine computes the whole model for every token and stops by itself. All
must write the same tokens; this is checked. Lengths are lognormal (mean about 575, at most 1,500),
temperature 0.6 and top-p 0.95 as in the paper. `model.generate` gets the prompts in padded batches;
`generate_batch` is transformers' continuous batching. Takes minutes on one CPU core. Left out on purpose:
other samplers (vLLM needs a card), and log-probs, which only ours returns.
"""

import math
import random
from dataclasses import dataclass
from functools import partial

import torch
from contest import save, timed
from transformers import LlamaConfig, LlamaForCausalLM

from kit.config import Checked, parse
from kit.generate import SamplingParams, generate
from kit.models.attention import attention_name
from kit.models.loading import default_device, default_dtype
from kit.recipes.card.transformers_generate import Answers, generate_batch, padded_generate

EOS = 0  # which ends an answer that counts down to it; no prompt holds it


@dataclass(frozen=True)
class Config(Checked):
    # requests
    num_prompts: int = 48  # answers [>= 1]
    median_tokens: int = 450  # of the lognormal lengths [>= 1]
    sigma: float = 0.7  # of the lognormal lengths [>= 0]
    longest: int = 1_500  # lengths are clipped to it [>= 1]
    num_slots: int = 32  # answers at once, in every engine [>= 1]
    # model
    hidden_size: int = 256  # a multiple of 4 heads [>= 1]
    num_layers: int = 4  # layers [>= 1]
    # run
    engines: str = "ours,generate_batch,generate"  # [ours | generate_batch | generate, ...]
    seed: int = 0  # of weights, prompts and lengths [>= 0]
    json: str = ""  # file for the figures; "" = none
    smoke: bool = False  # a few short answers, in seconds


SMOKE = {"num_prompts": 8, "median_tokens": 20, "longest": 60, "num_slots": 4}


def main(config: Config) -> list[dict]:
    model = countdown_model(config)
    lengths, prompts = requests(config)
    total, longest = sum(lengths), max(lengths)
    print(
        f"\nsampling {len(prompts)} answers, mean {total / len(lengths):.0f} tokens, longest {longest:,}; "
        f"{config.num_slots} at once; {model.device}"
    )
    settings = {"num_rows": config.num_slots, "new_tokens": config.longest, "eos": EOS}
    engines = {
        "ours": partial(ours, seed=config.seed, **settings),
        "generate_batch": partial(generate_batch, **settings),
        "generate": partial(padded_generate, **settings),
    }
    expected = [list(range(length - 1, -1, -1)) for length in lengths]

    rows = []
    for name in config.engines.replace(" ", "").split(","):
        answers, seconds, cpu = timed(engines[name], model, prompts)
        right, speed = sum(map(list.__eq__, answers, expected)), total / seconds
        figures = {"seconds": seconds, "cpu_seconds": cpu, "tokens_per_second": speed}
        rows.append({"name": name, **figures, "answers_as_expected": right})
        print(
            f"  {name:<16}{seconds:8.1f} s ({cpu:.1f} s of CPU) {speed:9,.0f} useful tokens/s   "
            f"{right} of {len(prompts)} answers as expected"
        )

    for row in rows[1:]:
        by_clock, by_cpu = (row[key] / rows[0][key] for key in ("seconds", "cpu_seconds"))
        print(f"  {rows[0]['name']} against {row['name']}: {by_clock:.2f} x, by CPU time {by_cpu:.2f} x")
    save(config, rows=rows)
    return rows


def requests(config: Config) -> tuple[list[int], list[list[int]]]:
    """Return the tokens of each answer, and prompts of 20 to 59 tokens whose last one is that number."""
    rng = random.Random(config.seed)
    mean = math.log(config.median_tokens)
    drawn = [round(rng.lognormvariate(mean, config.sigma)) for _ in range(config.num_prompts)]
    lengths = [min(config.longest, max(8, length)) for length in drawn]

    def beginning() -> list[int]:
        return [rng.randrange(2, config.longest) for _ in range(rng.randrange(19, 59))]

    return lengths, [[*beginning(), length] for length in lengths]


def countdown_model(config: Config) -> LlamaForCausalLM:
    torch.manual_seed(config.seed)
    device, H = default_device(), config.hidden_size
    settings = LlamaConfig(
        vocab_size=2_048,
        hidden_size=H,
        intermediate_size=3 * H,
        num_hidden_layers=config.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8_192,
        bos_token_id=2,
        eos_token_id=EOS,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(settings).eval()
    with torch.no_grad():
        embedding = torch.randn(settings.vocab_size, H)  # in this many dimensions no two are alike
        model.model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight.copy_(embedding.roll(-1, 0))  # row n - 1 answers to token n
    return model.to(device, default_dtype(device))


def ours(model, prompts: list[list[int]], *, num_rows: int, new_tokens: int, eos: int, seed: int) -> Answers:
    model.set_attn_implementation(attention_name("kit", model.config, device=model.device, dtype=model.dtype))
    params = SamplingParams(max_new_tokens=new_tokens)
    completions = generate(model, prompts, params, num_slots=num_rows, seed=seed, eos_token_id=eos)
    return [completion.ids for completion in completions]


if __name__ == "__main__":
    main(parse(Config, smoke=SMOKE))
