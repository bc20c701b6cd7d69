"""Settings that recipes share: how a model is loaded and asked, what it is measured on, how it samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from kit.config import Checked
from kit.data.chat import INSTRUCTION
from kit.evaluate.benchmarks import Benchmark, find_benchmarks, parse_benchmarks
from kit.journal import CONFIG
from kit.ranks import here
from kit.run import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kit.data.chat import ChatFormat
    from kit.generate.sampling import SamplingParams
    from kit.generate.server import Server

Config = TypeVar("Config", bound="ModelSettings")

EVENING = {  # --preset evening: what a card measures in a part of an evening
    "benchmarks": "math500",
    "num_questions": 200,
    "num_samples": 1,
    "max_new_tokens": 8_192,
    "gpu_gb": "auto",
}


@dataclass(frozen=True)
class ModelSettings(Checked):
    """How a model is loaded and asked."""

    # model
    device: str = "cuda"  # [cuda | cpu]
    attention: str = "auto"  # auto: kit, or varlen if it won in check_card [auto | kit | varlen | torch]
    cuda_graphs: bool = True  # on a card: replay each token's step as one CUDA graph: faster, more memory
    chat_template: str = ""  # "plain", "no_thinking", a Jinja file or a name of the model's; "" = its own
    instruction: str = INSTRUCTION  # line added below every problem; "" = none

    def with_attention(self: Config, *names: str) -> Config:
        """Return the settings with what attention `auto` is for these models in a run that begins.

        A run that goes on keeps what it began with: in its config.json, auto is kit's. Raises ValueError as
        kit.models.loading.load_config does.
        """
        if self.attention != "auto" or getattr(self, "resume", False):
            return self
        out = getattr(self, "out", "")
        if out and (begun := Path(out, CONFIG)).is_file():  # of a study that this process joins
            return replace(self, attention=read_json(begun).get("attention", "auto"))
        from kit.models.pick_attention import pick_attention  # imports torch: not before flags are read

        return replace(self, attention=here().from_first(lambda: pick_attention(names, self.device)))

    @property
    def plans_graphs(self) -> bool:
        """Whether a memory plan counts the sampler's CUDA graphs."""
        return self.cuda_graphs and self.device == "cuda"


@dataclass(frozen=True)
class SampledModelSettings(ModelSettings):
    """The same for a model that is sampled as it is, so that a server may have its weights."""

    # model
    server: str = ""  # URL of vLLM, SGLang or llama.cpp's server, which samples then; "" = this machine

    def load_model(self) -> tuple[PreTrainedModel | Server, ChatFormat]:
        """Load the model, or its tokenizer and config alone if a server has it; `model` is the recipe's.

        Raises ValueError as kit.models.load and kit.generate.server.connect do.
        """
        from kit import generate, models
        from kit.data.chat import ChatFormat, warn_of_instruction
        from kit.machine import one_thread_if_small

        if self.server:
            model, tokenizer = models.load_without_weights(self.model)
        else:
            model, tokenizer = models.load(self.model, device=self.device, attention=self.attention)
            one_thread_if_small(model)
        warn_of_instruction(self.model, self.instruction)
        chat = ChatFormat(tokenizer, model, template=self.chat_template, instruction=self.instruction)
        if not self.server:
            return model, chat
        server = generate.connect(self.server, self.model, tokenizer)
        print(f"server      {server.engine} samples {server.name}; its weights and dtype cannot be checked")
        return server, chat


@dataclass(frozen=True)
class BenchmarkSettings(Checked):
    """What a model is measured on."""

    # evaluation: the paper's protocol
    benchmarks: str = "math500,aime24,amc23"  # name or name=FILE (MINE=FILE: your questions), comma-separated
    num_questions: int = 0  # questions per benchmark; 0 = all [>= 0]
    num_samples: int = 0  # samples per question; 0 = the paper's k (4, 8, 8; your own: 4) [0..10000]

    def read_benchmarks(self) -> list[Benchmark]:
        """Read the benchmarks. Raises ValueError as kit.evaluate.parse_benchmarks does."""
        return parse_benchmarks(self.benchmarks, limit=self.num_questions)

    def count_samples(self) -> int:
        """Count the samples of one pass over the benchmarks; only your own questions are read."""
        return sum(
            min(self.num_questions or b.num_questions, b.num_questions) * (self.num_samples or b.num_samples)
            for b in find_benchmarks(self.benchmarks)
        )


@dataclass(frozen=True)
class EvaluationSettings(BenchmarkSettings):
    """What a model is measured on, and how its responses are sampled."""

    # evaluation: the paper's protocol
    temperature: float = 0.6  # 0 = greedy, which the paper avoids [0 | 0.001..1000]
    top_p: float = 0.95  # 1 = off [> 0, <= 1]
    max_new_tokens: int = 16_384  # tokens per response [>= 1]
    num_slots: int = 0  # responses sampled at once; changes the speed only; 0 = what memory holds [>= 0]

    @property
    def params(self) -> SamplingParams:
        from kit.generate.sampling import SamplingParams  # imports torch: not before flags are read

        return SamplingParams(self.temperature, self.top_p, max_new_tokens=self.max_new_tokens)

    def num_responses(self, benchmarks: Sequence[Benchmark]) -> int:
        """Count the responses of one pass over benchmarks that have been read."""
        return sum(len(b.questions) * (self.num_samples or b.num_samples) for b in benchmarks)

    def describe(self, benchmarks: Sequence[Benchmark]) -> str:
        """Return what is asked, as a line to print."""
        counts = ", ".join(
            f"{b.name} {len(b.questions)} x {self.num_samples or b.num_samples}" for b in benchmarks
        )
        return f"evaluation  {counts} samples of up to {self.max_new_tokens:,} tokens"
