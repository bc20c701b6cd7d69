"""Test gradients in CPU memory: the same bits as plain training, and no more on the card than is promised."""

import contextlib
from collections import Counter, defaultdict

import pytest
import torch
from conftest import FAMILIES, make_model, random_documents
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from kit.kernels.linear_cross_entropy import linear_cross_entropy
from kit.kernels.linear_cross_entropy_blocks import dweight_blocks
from kit.memory import live_bytes, simulate
from kit.packing import PackedBatch
from kit.train.savings import Savings
from kit.train.step import TrainingStep

LENGTHS = [[9, 4, 23, 12], [5], [31, 2, 1], [8, 8]]  # of each row's documents
OTHERS = {"tile_tokens": 7, "offload_inputs": True, "logit_rows": 5}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Most parameters of the tiny models take several pieces, the last of them shorter."""
    set_pieces(monkeypatch, 512)


def set_pieces(monkeypatch, size: int) -> None:
    for place in ("offload", "weight_updates"):
        monkeypatch.setattr(f"kit.train.{place}.PIECE", size)
    monkeypatch.setattr("kit.train.optimizer.AdamW8bit.SLAB", 2 * size)


def make(family, dtype, *, tied):
    """Make a model with a trainable parameter that nothing uses, and that therefore gets no gradient."""
    model = make_model(family, dtype)
    weight = model.get_input_embeddings().weight
    model.get_output_embeddings().weight = weight if tied else torch.nn.Parameter(weight.detach().clone())
    model.unused = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    return model


def rows(step: int, count=None) -> list[PackedBatch]:
    documents = (random_documents(lengths, seed=10 * step + i) for i, lengths in enumerate(LENGTHS))
    return [PackedBatch.build(row) for row in documents][:count]


def start(model, savings, max_grad_norm=0.1) -> TrainingStep:
    return TrainingStep(model, savings, lr=1e-2, weight_decay=0.1, max_grad_norm=max_grad_norm)


def trained(training_step, steps=3):
    """Train a few steps. Return every number that they left: losses, norms, weights, optimizer states."""
    results = [training_step(rows(i)) for i in range(steps)]
    training_step.close()
    found = {"losses": torch.stack([loss for loss, _ in results])}
    found["norms"] = torch.stack([norm for _, norm in results])
    for name, parameter in training_step.model.named_parameters():
        found[name] = parameter.detach().clone()
        state = training_step.optimizer.state.get(parameter, {})
        found |= {f"{name}, {key}": tensor for key, tensor in state.items()}
    return found


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not different


@pytest.mark.parametrize(
    ("family", "tied", "max_grad_norm"),
    [*((family, False, 1e-3) for family in FAMILIES), ("llama", True, 0.0), ("gemma3", True, 1e6)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_rows_give_the_bits_of_gradients_that_stay_beside_the_weights(
    family, dtype, tied, max_grad_norm
):
    """fp32 weights take torch's AdamW, bf16 weights 8-bit states."""
    before = make(family, dtype, tied=tied).state_dict()
    plain, ours = (
        trained(start(make(family, dtype, tied=tied), Savings(offload_gradients=on), max_grad_norm))
        for on in (False, True)
    )
    assert_same_bits(ours, plain)
    assert torch.equal(ours["unused"], before["unused"]) and ours["norms"].min() > 1e-3
    assert all(not torch.equal(ours[name], x) for name, x in before.items() if "proj" in name)


@pytest.mark.parametrize(
    ("family", "dtype", "changes"),
    [
        *((family, torch.bfloat16, {}) for family in FAMILIES),
        ("llama", torch.float32, {}),
        ("gemma3", torch.bfloat16, {"recompute": False, "tile_tokens": 0, "offload_inputs": False}),
        ("qwen2", torch.bfloat16, {"exact_weights": True}),
    ],
    ids=str,
)
def test_every_other_saving_composes_with_it_bit_by_bit(family, dtype, changes):
    settings = {**OTHERS, "optimizer": "adamw8bit", "offload_optimizer": True} | changes
    plain, ours = (
        trained(start(make(family, dtype, tied=True), Savings(**settings, offload_gradients=on)), steps=2)
        for on in (False, True)
    )
    assert_same_bits(ours, plain)


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 2**-20), (torch.bfloat16, 2**-6)], ids=str)
@pytest.mark.parametrize("family", ["gemma3", "qwen2"])
def test_a_head_in_blocks_adds_up_the_gradient_of_a_whole_one(family, dtype, share, monkeypatch):
    """Short rows are cut into larger blocks than long ones, so that their sums meet at other places."""
    monkeypatch.setattr("kit.kernels.linear_cross_entropy_blocks.VOCABULARY_UNIT", 8)
    monkeypatch.setattr("kit.kernels.linear_cross_entropy_blocks.BLOCK_BYTES", 5_000)
    blocks, found = [], []

    def counted(*arguments, **options):
        parts = list(dweight_blocks(*arguments, **options))
        blocks.append(len(parts))
        return parts

    monkeypatch.setattr("kit.train.head.dweight_blocks", counted)
    for head_update in ("whole", "blocked"):
        savings = Savings(offload_gradients=True, head_update=head_update)
        step = start(make(family, dtype, tied=True), savings)
        for i in range(2):  # nothing of the first step may be left in the second
            before = {p: p.detach().clone() for p in step.model.parameters()}
            loss, norm = step(rows(i))
            for parameter, value in before.items():
                parameter.data.copy_(value)
        gradients = step.updates.gradients
        found.append([loss, norm, *(gradients.sums[parameter] for parameter in gradients.norms)])
    assert len(blocks) == 2 * len(LENGTHS) and min(blocks) > 1 and len(set(blocks)) > 1
    for whole, blocked in zip(*found, strict=True):
        largest = whole.abs().max().item()
        torch.testing.assert_close(blocked, whole, atol=share * largest, rtol=0)
        assert largest > 0


def test_adapters_on_nf4_weights_train_to_the_same_bits():
    from kit.models.nf4 import quantise_decoder
    from kit.models.qlora import add_adapters

    runs = []
    for on in (False, True):
        model = make_model("qwen2", torch.bfloat16)
        quantise_decoder(model, "cpu")
        add_adapters(model, base="", rank=4)
        runs.append(trained(start(model, Savings(**OTHERS, offload_gradients=on)), steps=2))
    assert_same_bits(runs[1], runs[0])


@pytest.mark.parametrize(
    "savings", [{}, {"offload_gradients": True}, {**OTHERS, "offload_gradients": True}], ids=str
)
@pytest.mark.parametrize(("tied", "where"), [(True, "loss"), (False, "backward"), (True, "backward")])
def test_a_step_that_stops_half_way_leaves_nothing_to_the_next_one(tied, where, savings):
    """It stops in its third row: at the loss, or when two of four layers have their gradients."""
    expected = trained(start(make("llama", torch.bfloat16, tied=tied), Savings(**savings)))

    class Broken(Exception):
        pass

    def fail(*arguments):
        raise Broken

    def loss_of(hidden, weight, batch, scale):
        if len(batch) == sum(LENGTHS[2]):
            if where == "loss":
                fail()
            hooks.append(model.model.layers[1].mlp.up_proj.weight.register_hook(fail))
        return scale * linear_cross_entropy(hidden, weight, batch.targets, reduction="sum")

    model, hooks = make("llama", torch.bfloat16, tied=tied), []
    training_step = start(model, Savings(**savings))
    with pytest.raises(Broken):
        training_step(rows(7), loss_of)
    for hook in hooks:
        hook.remove()
    assert_same_bits(trained(training_step), expected)


LARGE = {  # a layer has about as many weights as the head, so that each would show
    "vocab_size": 4_000, "hidden_size": 128, "intermediate_size": 1_200, "num_hidden_layers": 5,
    "num_attention_heads": 4, "num_key_value_heads": 2, "dtype": torch.bfloat16,
}  # fmt: skip
PIECE_OF_LARGE = 8_192  # weights: small beside a layer
SAVINGS = Savings(optimizer="adamw8bit", tile_tokens=16, offload_gradients=True)
IN_BACKWARD = Savings(optimizer="adamw8bit", tile_tokens=16, update_in_backward=True)


def make_large(tied: bool):
    config = AutoConfig.for_model("llama", **LARGE, tie_word_embeddings=tied)
    return AutoModelForCausalLM.from_config(config, attn_implementation="kit")


def most_bytes(monkeypatch, savings, tied, rows=1) -> dict[str, Counter]:
    """Simulate a step. Return phase -> owner, or "total" on the card -> the most bytes."""
    most = defaultdict(Counter)

    class Watched(live_bytes.Ledger):
        def enter(self, tensor, owner):
            super().enter(tensor, owner)
            most[self.phase] |= self.totals
            most[self.phase]["total"] = max(most[self.phase]["total"], self.now)

    monkeypatch.setattr(simulate, "Ledger", Watched)
    with FakeTensorMode(allow_non_fake_inputs=True):
        simulate.measure(make_large(tied), savings, simulate.fake_batch(64), rows=rows)
    return most


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_the_card_holds_one_layers_gradients_more_than_if_each_were_used_at_once(tied, monkeypatch):
    set_pieces(monkeypatch, PIECE_OF_LARGE)
    model = make_large(tied)
    layer = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    head = model.lm_head.weight.nbytes
    few = 64 * 1024  # bytes: the slab, a norm and a step per parameter in units of 512, and two pieces

    at_once = most_bytes(monkeypatch, IN_BACKWARD, tied)
    ours = most_bytes(monkeypatch, SAVINGS, tied, rows=3)
    assert layer > 10 * few and head > 10 * few
    # a layer's on their way, and the embedding's
    assert max(most[live_bytes.GRADIENTS] for most in ours.values()) <= layer + head + few

    for phase, most in ours.items():
        if phase.startswith("forward") or phase == "loss":  # of the second and the third row, too
            assert most["total"] <= at_once[phase]["total"] + few, phase
            assert phase == "loss" or most[live_bytes.GRADIENTS] + most[live_bytes.HEAD] <= few
        elif phase.startswith("backward"):
            assert most["total"] <= at_once[phase]["total"] + layer + few, phase
    assert ours["update of the weights"]["total"] < ours["before"]["total"] + few


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_cpu_memory_is_the_gradients_own_size_and_the_plan_counts_it(tied, monkeypatch):
    set_pieces(monkeypatch, PIECE_OF_LARGE)
    model = make_large(tied)
    training_step = start(model, SAVINGS)
    memory = training_step.updates.gradients.memory
    assert memory.untyped_storage().nbytes() == sum(parameter.nbytes for parameter in model.parameters())
    training_step.close()

    hosts = []
    for fake in (True, False):
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext():
            batch = simulate.fake_batch(64) if fake else PackedBatch.build(random_documents([64]))
            hosts.append(simulate.measure(make_large(tied), SAVINGS, batch, rows=2).host_peak)
    unit = live_bytes.ROUNDING  # in which every size is counted
    assert hosts == [-(-memory.nbytes // unit) * unit] * 2


def test_closing_removes_every_hook_and_a_gradient_then_stays_where_it_is():
    model = make("gemma3", torch.float32, tied=True)
    training_step = start(model, Savings(**OTHERS, offload_gradients=True))
    training_step(rows(0))
    training_step.close()
    assert all(parameter.grad is None for parameter in model.parameters())
    sum(parameter.square().sum() for parameter in model.parameters()).backward()
    assert all(torch.equal(parameter.grad, 2 * parameter) for parameter in model.parameters())


def test_updating_in_the_backward_pass_is_refused_beside_it():
    both = "offload_gradients and update_in_backward are both on.*--no_update_in_backward .*--no_offload_grad"
    with pytest.raises(ValueError, match=both):
        Savings(offload_gradients=True, update_in_backward=True)
