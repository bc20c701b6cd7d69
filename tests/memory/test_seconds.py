import pytest
import torch
from conftest import FAMILIES, WINDOW, make_model, random_documents
from torch.utils._python_dispatch import TorchDispatchMode

from kit.memory.seconds import BANDWIDTH, BUS, FLOPS, Sizes, extra_seconds, step_seconds
from kit.packing import Document, PackedBatch
from kit.train import offload, optimizer
from kit.train.offload import host_empty
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


@pytest.mark.parametrize("family", FAMILIES)
def test_estimated_flops_are_those_of_a_real_step(family):
    config = tied_model(family).config
    plain, recompute = counted_flops(family, recompute=False, **LEAN), counted_flops(family, **LEAN)
    blocked = counted_flops(family, head_update="blocked", **LEAN)
    attention = attention_flops(config)
    head = Sizes.of(config).V * Sizes.of(config).H
    tokens = T + 1  # the last one has no target: the head sees one row fewer
    extra = extra_seconds(config, tokens, Savings(**LEAN, head_update="blocked"))
    assert extra["recompute"] * FLOPS == pytest.approx(recompute - plain + attention)
    assert extra["head_update"] * FLOPS == pytest.approx(blocked - recompute + 2 * head)
    assert step_seconds(config, tokens, Savings()) * FLOPS == pytest.approx(plain + 3 * attention + 6 * head)


def test_bytes_over_the_bus_are_those_that_lie_in_cpu_memory(monkeypatch):
    """Each is written there once per step and read once."""
    model = tied_model("llama")
    held = {}

    def count(num_bytes, **options):
        held[phase] = held.get(phase, 0) + num_bytes
        return host_empty(num_bytes, **options)

    for module in (optimizer, offload):
        monkeypatch.setattr(module, "host_empty", count)
    monkeypatch.setattr(offload, "ROUNDING", 1)
    phase = "states"
    savings = Savings(**LEAN, offload_optimizer=True, offload_inputs=True)
    training_step = TrainingStep(model, savings, lr=1e-3)
    phase = "inputs"
    tokens = 61
    training_step([PackedBatch.build(random_documents([tokens]))])
    extra = extra_seconds(model.config, tokens, savings)
    assert extra["offload_inputs"] * BUS == 2 * held["inputs"] / 2  # this model is fp32, the estimate bf16
    assert extra["offload_optimizer"] * BUS == pytest.approx(
        2 * held["states"], rel=0.1
    )  # block scales, norms


def test_a_saving_that_is_off_costs_nothing_and_tiles_or_rows_that_are_no_fewer_neither():
    config = tied_model("gemma3").config
    assert extra_seconds(config, T, Savings(recompute=False)) == {}
    extra = extra_seconds(config, T, Savings(tile_tokens=T, logit_rows=T))
    assert extra.keys() == {"recompute", "logit_rows"} and extra["logit_rows"] == 0
    sizes = Sizes.of(config)
    few = extra_seconds(config, T, Savings(tile_tokens=10, logit_rows=10))
    assert few["tile_tokens"] * BANDWIDTH == pytest.approx(3 * 4 * 3 * 32 * 48 * 14)
    assert few["logit_rows"] * BANDWIDTH == pytest.approx(3 * sizes.V * sizes.H * 12)
    adapters = extra_seconds(config, T, Savings(tile_tokens=10, logit_rows=10), qlora_rank=4)
    assert adapters["logit_rows"] < few["logit_rows"] and adapters["tile_tokens"] < few["tile_tokens"]
    assert adapters["qlora_rank"] > 0
