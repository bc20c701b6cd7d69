"""What the sections on training and sampling share: models with random weights, rows and FLOPs.

Models are built on the card from the configs that ship with the kit, so nothing is downloaded; for a
rehearsal every size shrinks. Random weights cost the time and memory of real ones. What a model has learnt is
left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from kit.extras import require
from kit.memory.flops import Sizes
from kit.models.attention import REGISTERED
from kit.models.families import family_of
from kit.models.joined import place
from kit.models.shipped import CONFIGS
from kit.packing import Document, PackedBatch
from kit.recipes.card.results import Card
from kit.recipes.card.timing import matmul_flops
from kit.train import Savings

QWEN = "Qwen/Qwen2.5-0.5B-Instruct"
ROW_TOKENS = 16_384
NO_BF16 = "bf16 runs at speed from 8.0 (RTX 30) on"
SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "vocab_size": 512,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "query_pre_attn_scalar": 16,
    "sliding_window": 64,
    "sliding_window_pattern": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALLER = 64  # a rehearsal's rows are shorter by this factor


def shipped() -> list[str]:
    """Names of the models whose configs ship with the kit."""
    return sorted(path.stem.replace("--", "/") for path in CONFIGS.glob("*.json"))


def model_config(name: str, *, small: bool = False, **changes) -> PreTrainedConfig:
    """Read a shipped config. small: with tiny sizes. changes: fields to replace."""
    settings = json.loads((CONFIGS / f"{name.replace('/', '--')}.json").read_text(encoding="utf-8"))
    if small:
        settings |= {key: value for key, value in SMALL.items() if key in settings}
        if kinds := settings.get("layer_types"):  # of each layer: the last ones have both kinds
            settings["layer_types"] = kinds[-settings["num_hidden_layers"] :]
        settings["initializer_range"] = 0.075  # narrow layers then compute numbers as large as wide ones do
    return AutoConfig.for_model(**settings | changes)


def build(card: Card, config: PreTrainedConfig, *, rank=0, seed=0, dtype=torch.bfloat16):
    """Build a model with random weights on the card. rank > 0: in NF4, with adapters of that rank."""
    card.free()
    device = card.device
    if card.is_cuda and dtype.itemsize * Sizes.of(config).weights > torch.cuda.mem_get_info()[0]:
        device = torch.device("cpu")  # slow; in NF4 the model may still fit the card

    torch.manual_seed(seed)
    with device:
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=REGISTERED["kit"], trust_remote_code=False
        )

    if rank:
        require("QLoRA", "bitsandbytes", "peft")
        from kit.models.nf4 import quantise_decoder  # bitsandbytes and peft take seconds to import
        from kit.models.qlora import add_adapters

        quantise_decoder(model, card.device)
        if card.is_cuda:
            model.to("cpu")  # the codes lie among the holes of the full weights: bring them together
            card.free()
            model.to(card.device)
        add_adapters(model, base="", rank=rank)
    return model.to(card.device)


def config_to_sample(card: Card) -> PreTrainedConfig:
    """Read the config of Qwen2.5-0.5B. A rehearsal's is tiny, and untied: a tied one only repeats itself."""
    return model_config(QWEN, small=True, tie_word_embeddings=False) if card.small else model_config(QWEN)


def build_to_sample(card: Card, spread: float, dtype: torch.dtype = torch.bfloat16):
    """Build Qwen2.5-0.5B for sampling. spread: as in sharpen. dtype: what its bf16 weights are cast to."""
    model = build(card, config_to_sample(card)).eval().requires_grad_(False)
    sharpen(model, spread)
    model = model if dtype == model.dtype else model.to(dtype)  # to(bf16) rounds the rotation's frequencies
    return place(model.to("cpu"), card.device)  # as kit.models.load does


@torch.no_grad()
def sharpen(model, spread: float) -> None:
    """Scale the last norm so that logits have about this standard deviation: at random they hardly differ."""
    weight = model.model.norm.weight  # (H,)
    scale = spread / (model.get_output_embeddings().weight.float().std().item() * len(weight) ** 0.5)
    offset = family_of(model.config).norm_offset or 0.0  # the norm multiplies by offset + weight
    weight.copy_(scale * (offset + weight) - offset)


def packed_row(lengths: Sequence[int], V: int, seed: int, *, unique: bool = False) -> PackedBatch:
    """Pack documents of random tokens. unique: no token twice; sums by atomics then have one summand each."""
    rng, T = torch.Generator().manual_seed(seed), sum(lengths)
    ids = torch.randperm(V, generator=rng)[:T] if unique else torch.randint(V, (T,), generator=rng)
    return PackedBatch.build([Document(part, 0) for part in ids.split(list(lengths))])


@dataclass(frozen=True)
class Training:
    """A model to train, and how.

    rank: of its adapters; 0 = all weights. small: a rehearsal's sizes. rows: of a step.
    """

    model: str
    savings: Savings
    rank: int = 0
    small: bool = False
    rows: int = 1

    @property
    def short(self) -> str:
        return self.model.split("/")[-1]

    @property
    def config(self) -> PreTrainedConfig:
        return model_config(self.model, small=self.small)

    def row(self, lengths: Sequence[int], seed: int) -> PackedBatch:
        """Pack documents of these lengths; in a rehearsal much shorter ones."""
        lengths = [max(length // SMALLER, 1) if self.small else length for length in lengths]
        return packed_row(lengths, self.config.vocab_size, seed)

    def flops(self, row: PackedBatch) -> float:
        """Count the model FLOPs of a step: forward and backward, without recomputing or frozen gradients."""
        sizes, T = Sizes.of(self.config), len(row)
        linears = 2 * T * sizes.linears
        attention = sum(map(sizes.forward_flops, row.cu_seqlens.diff().tolist())) - linears
        return (2 if self.rank else 3) * (linears + 2 * T * sizes.V * sizes.H) + 3 * attention

    def guessed_seconds(self, card: Card, row: PackedBatch) -> float:
        """Estimate the seconds to build the model and train three steps, at 30 % of a matmul's speed."""
        steps = 3 * 4 / 3 * self.flops(row)  # recomputing adds a third
        return 6 + steps / (0.3 * matmul_flops(card)) if card.is_cuda else 1.0

    def speed(self, card: Card, row: PackedBatch, seconds: float) -> tuple[dict, str]:
        """Return what recipes look up in results.jsonl to estimate their hours, and the same in words."""
        numbers = {"model": self.model, "row_tokens": len(row), "savings": asdict(self.savings)}
        numbers |= {"qlora_rank": self.rank, **card.facts}
        numbers |= {"seconds_per_step": seconds, "tokens_per_second": len(row) / seconds}
        text = f"{seconds:.2f} s per step, {len(row) / seconds:,.0f} tokens/s"
        if card.is_cuda:
            numbers["mfu"] = self.flops(row) / seconds / matmul_flops(card)
            text += f", MFU {numbers['mfu']:.0%} of a matmul's {matmul_flops(card) / 1e12:.0f} TFLOP/s"
        return numbers, text
