"""The sampler against transformers' two ways of answering many prompts: useful tokens per second on the same model and prompts.

    python recipes/bench/sampler.py                         48 prompts, long-tailed lengths, 32 at a time
    python recipes/bench/sampler.py --num_slots 16

The model is a tiny Llama whose head undoes its embedding one step further down: after token n comes n - 1, and 0 ends the text.
So the last token of a prompt sets how long its answer is, every engine computes the whole model for every token, stops by itself,
and must write the same tokens: that is checked. Lengths are lognormal (mean about 575, at most 1,500), temperature 0.6 and top-p
0.95 as in the paper. `model.generate` gets the prompts in padded batches; `generate_batch` is transformers' continuous batching.
Minutes on one CPU core. Left out on purpose: other samplers (vLLM needs a card), and log-probs, which only ours returns.
"""

import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from kit.config import parse
from kit.generate import SamplingParams, generate
from kit.machine import describe_machine
from kit.models.attention import attention_name
from kit.models.loading import default_device, default_dtype
from kit.run import write_json

EOS, PAD = 0, 1  # an answer that starts above 1 counts down past PAD to EOS; prompts never hold either
PAGE_TOKENS = 32  # of generate_batch's cache


@dataclass(frozen=True)
class Config:
    # requests
    num_prompts: int = 48  # answers
    median_tokens: int = 450  # of the lognormal lengths
    sigma: float = 0.7  # of the lognormal lengths
    longest: int = 1_500  # lengths are clipped to it
    num_slots: int = 32  # answers at once, in every engine
    # model
    hidden_size: int = 256  # a multiple of 4 heads
    num_layers: int = 4  # layers
    # run
    engines: str = "ours,generate_batch,generate"  # comma-separated
    seed: int = 0  # of weights, prompts and lengths
    json: str = ""  # file for the figures; "" = none
    smoke: bool = False  # a few short answers, in seconds


SMOKE = {"num_prompts": 8, "median_tokens": 20, "longest": 60, "num_slots": 4}


def main(config: Config) -> list[dict]:
    model = countdown_model(config)
    lengths, prompts = requests(config)
    total = sum(lengths)
    print(f"\nsampling {len(prompts)} answers, mean {total / len(lengths):.0f} tokens, longest {max(lengths):,}; "
          f"{config.num_slots} at once; {model.device}")  # fmt: skip
    engines = {"ours": _ours, "generate_batch": _generate_batch, "generate": _padded_generate}
    rows = []
    for name in config.engines.split(","):
        if name not in engines:
            raise ValueError(
                f"engines is {config.engines!r} but they are {', '.join(engines)}; leave {name!r} out"
            )
        start, cpu = time.perf_counter(), time.process_time()
        answers = engines[name](config, model, prompts)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        right = sum(
            answer == list(range(length - 1, -1, -1)) for answer, length in zip(answers, lengths, strict=True)
        )
        rows.append({"name": name, "seconds": seconds, "cpu_seconds": cpu, "tokens_per_second": total / seconds,
                     "answers_as_expected": right})  # fmt: skip
        print(f"  {name:<16}{seconds:8.1f} s ({cpu:.1f} s of CPU) {total / seconds:9,.0f} useful tokens/s   "
              f"{right} of {len(prompts)} answers as expected")  # fmt: skip
    for row in rows[1:]:
        times = " x, by CPU time ".join(
            f"{row[key] / rows[0][key]:.2f}" for key in ("seconds", "cpu_seconds")
        )
        print(f"  {rows[0]['name']} against {row['name']}: {times} x")
    if config.json:
        write_json(Path(config.json), {"machine": describe_machine(), "config": asdict(config), "rows": rows})
    return rows


def requests(config: Config) -> tuple[list[int], list[list[int]]]:
    """(tokens of each answer, prompts of 20 to 60 tokens whose last one is that number)."""
    rng = random.Random(config.seed)
    lengths = [
        min(config.longest, max(8, round(rng.lognormvariate(math.log(config.median_tokens), config.sigma))))
        for _ in range(config.num_prompts)
    ]
    return lengths, [
        [rng.randrange(2, config.longest) for _ in range(rng.randrange(19, 59))] + [n] for n in lengths
    ]


def countdown_model(config: Config) -> LlamaForCausalLM:
    torch.manual_seed(config.seed)
    device = default_device()
    settings = LlamaConfig(
        vocab_size=2_048, hidden_size=config.hidden_size, intermediate_size=3 * config.hidden_size,
        num_hidden_layers=config.num_layers, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8_192,
        bos_token_id=2, eos_token_id=EOS, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(settings).eval()
    with torch.no_grad():
        embedding = torch.randn(
            settings.vocab_size, config.hidden_size
        )  # in this many dimensions no two are alike
        model.model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight.copy_(embedding.roll(-1, 0))  # row n - 1 answers to token n
    return model.to(device, default_dtype(device))


def _ours(config: Config, model, prompts) -> list[list[int]]:
    model.set_attn_implementation(attention_name("kit", model.config, device=model.device, dtype=model.dtype))
    params = SamplingParams(max_new_tokens=config.longest)
    completions = generate(
        model, prompts, params, num_slots=config.num_slots, seed=config.seed, eos_token_id=EOS
    )
    return [completion.ids for completion in completions]


def _settings(config: Config) -> GenerationConfig:
    return GenerationConfig(
        do_sample=True,
        temperature=0.6,
        top_p=0.95,
        top_k=0,
        max_new_tokens=config.longest,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


@torch.no_grad()
def _padded_generate(config: Config, model, prompts) -> list[list[int]]:
    model.set_attn_implementation("sdpa")  # its default
    answers = []
    for first in range(0, len(prompts), config.num_slots):
        batch = prompts[first : first + config.num_slots]
        L = max(map(len, batch))
        ids = torch.tensor([[PAD] * (L - len(prompt)) + prompt for prompt in batch], device=model.device)
        mask = torch.tensor(
            [[0] * (L - len(prompt)) + [1] * len(prompt) for prompt in batch], device=model.device
        )
        written = model.generate(ids, attention_mask=mask, generation_config=_settings(config))[
            :, L:
        ].tolist()
        answers += [answer[: answer.index(EOS) + 1] if EOS in answer else answer for answer in written]
    return answers


def _generate_batch(config: Config, model, prompts) -> list[list[int]]:
    model.set_attn_implementation("sdpa")
    transformers.logging.set_verbosity_error()
    pages = -(-(config.longest + max(map(len, prompts))) // PAGE_TOKENS) + 1
    batching = ContinuousBatchingConfig(
        max_requests_per_batch=config.num_slots, page_size=PAGE_TOKENS, num_blocks=config.num_slots * pages, max_batch_tokens=512,
    )  # fmt: skip
    outputs = model.generate_batch(
        prompts, generation_config=_settings(config), continuous_batching_config=batching, progress_bar=False
    )
    return [
        output.generated_tokens
        for output in sorted(outputs.values(), key=lambda output: _number(output.request_id))
    ]


def _number(request_id: str) -> int:
    return int(request_id.rsplit("_", 1)[-1])


if __name__ == "__main__":
    main(parse(Config, smoke=SMOKE))
