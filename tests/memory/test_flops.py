import pytest
import torch
from conftest import ALL_FAMILIES, WINDOW, make_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from kit.memory.flops import Sizes
from kit.models.loading import load_config
from kit.packing import Document, PackedBatch
from kit.train.savings import Savings
from kit.train.step import TrainingStep

T = 37
LEAN = {"optimizer": "adamw8bit", "update_in_backward": True}


class MatmulFlops(TorchDispatchMode):
    """Of every matrix product but those inside attention."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::bmm", "kit::add_matmul_"):
            a, b = [x for x in args if isinstance(x, torch.Tensor) and x.dim() > 1][-2:]
            self.flops += 2 * a.numel() * b.shape[-1]
        return func(*args, **kwargs or {})


def tied_model(family):
    model = make_model(family)
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    model.config.tie_word_embeddings = True
    return model


def counted_flops(family, **savings) -> int:
    training_step = TrainingStep(tied_model(family), Savings(**savings), lr=1e-3)
    ids = torch.randint(3, 97, (T + 1,), dtype=torch.int32)
    batch = PackedBatch.build([Document(ids, 0)])
    assert batch.num_targets == T
    with MatmulFlops() as counter:
        training_step([batch])
    return counter.flops


def attention_flops(config) -> int:
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    pairs = sum(
        min(i + 1, WINDOW if kind == "sliding_attention" else T + 1) for kind in kinds for i in range(T + 1)
    )
    return 4 * pairs * Sizes.of(config).q


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_rows_flops_are_those_of_a_real_step(family):
    """The counter does not see attention, and the last token, which has no target, costs no head."""
    config = tied_model(family).config
    sizes, attention, tokens = Sizes.of(config), attention_flops(config), T + 1
    for savings, passes, uses_of_head in (
        ({"recompute": False}, 3, 6),
        ({}, 4, 6),
        ({"head_update": "blocked"}, 4, 8),
    ):
        counted = counted_flops(family, **LEAN, **savings)
        missing = passes * attention + uses_of_head * sizes.V * sizes.H
        assert sizes.row_flops(tokens, Savings(**LEAN, **savings)) == counted + missing


def test_frozen_weights_get_no_gradient_and_save_a_pass():
    sizes = Sizes.of(tied_model("gemma3").config)
    forward, head = sizes.forward_flops(T), T * sizes.V * sizes.H
    assert sizes.row_flops(T, Savings(), qlora_rank=4) == 3 * forward + 4 * head
    assert sizes.row_flops(T, Savings(recompute=False), qlora_rank=4) == 2 * forward + 4 * head


def test_the_weights_of_a_model_and_its_adapters_are_counted_without_building_it():
    config = load_config("google/gemma-3-1b-it")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    matrices = [parameter.numel() for parameter in model.parameters() if parameter.dim() == 2]
    assert Sizes.of(config).weights == sum(matrices)
    layers = [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    rank_4 = sum(4 * (layer.in_features + layer.out_features) for layer in layers)
    assert Sizes.of(config).adapters(4) == rank_4


@pytest.mark.parametrize("model", ["google/gemma-3-1b-it", "Qwen/Qwen2.5-0.5B-Instruct"])
@pytest.mark.parametrize("tokens", [100, 3_000])
def test_a_step_of_sampling_reads_the_weights_and_each_slots_cache_within_its_windows(model, tokens):
    sizes = Sizes.of(load_config(model))
    windows = [*sizes.windows, *[tokens] * (sizes.L - len(sizes.windows))]
    cache = 2 * 2 * sizes.kv * sum(min(tokens, window) for window in windows)  # keys and values in bf16
    weights = sizes.linears + sizes.V * sizes.H
    assert sizes.token_step(3, tokens) == (2 * 3 * weights, 2 * weights + 3 * cache)
    assert sizes.token_step(3, tokens, nf4=True)[1] > sizes.token_step(3, tokens)[1]
