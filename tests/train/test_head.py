import copy

import pytest
import torch
from conftest import FAMILIES, make_model, random_documents
from torch.profiler import ProfilerActivity, profile

from kit.kernels.linear_cross_entropy import linear_cross_entropy
from kit.models.backbone import head_weight, hidden_states, softcap
from kit.packing import PackedBatch
from kit.train.head import AutogradHead, TiedHead, _add_lookup_, make_head
from kit.train.loss import cross_entropy
from kit.train.optimizer import make_optimizer
from kit.train.savings import Savings
from kit.train.weight_updates import UpdateAtEnd

SCALE = 0.125


def tied(family, dtype=torch.float32):
    model = make_model(family, dtype)
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return model


def batches(model):
    """Return two rows in which ids occur many times, the padding id among them."""
    rows = [random_documents([9, 4, 23]), random_documents([5, 1], seed=1)]
    rows[0][0].ids[:3] = model.get_input_embeddings().padding_idx or 0
    return [PackedBatch.build(row) for row in rows]


def by_autograd(model):
    """Return loss and gradients of the plain model, lookup included."""
    total = 0.0
    for batch in batches(model):
        hidden = hidden_states(model, batch)
        settings = {"reduction": "sum", "softcap": softcap(model)}
        loss = linear_cross_entropy(hidden, head_weight(model), batch.targets, **settings) * SCALE
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters()}


def by_tied_head(model):
    updates = UpdateAtEnd(make_optimizer(model, lr=0.0), max_grad_norm=0.0)
    updates.begin(2)
    head = TiedHead(model, updates, 0)
    total = sum(head.backward(batch, SCALE).item() for batch in batches(model))
    head.finish()
    return total, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tied_heads_gradient_is_autograds_over_several_rows(family):
    loss, plain = by_autograd(tied(family))
    ours, gradients = by_tied_head(tied(family))
    assert ours == pytest.approx(loss)
    for name, expected in plain.items():
        atol = 1e-6 * expected.abs().max().item()
        torch.testing.assert_close(gradients[name], expected, atol=atol, rtol=1e-5, msg=name)


def test_a_bf16_gradient_of_an_id_that_occurs_often_is_as_exact_as_autograds():
    """Parts are summed in fp32 and rounded once. Truth: the same bf16 model in fp32."""
    name = "model.embed_tokens.weight"
    model = tied("llama", torch.bfloat16)
    truth = by_autograd(copy.deepcopy(model).float())[1][name]
    runs = by_tied_head, by_autograd
    ours, plain = ((run(copy.deepcopy(model))[1][name].float() - truth).norm() for run in runs)
    assert 0 < ours <= 1.1 * plain


def test_the_gradient_exists_once(monkeypatch):
    """The loss allocates the only tensor of V rows: the lookup outside of autograd saves a second one."""
    from kit.memory.live_bytes import LiveBytes

    class Whole(LiveBytes):
        def created(self, func, x):
            if x.shape == shape:
                made.append(str(func))
            super().created(func, x)

    model, made = tied("llama"), []
    shape = head_weight(model).shape
    updates = UpdateAtEnd(make_optimizer(model, lr=0.0), max_grad_norm=0.0)
    head = TiedHead(model, updates, 0)
    with Whole():
        head.backward(batches(model)[0], SCALE)
    assert len(made) == 1


def test_the_loss_writes_the_gradient_of_hidden_over_it():
    model = make_model("llama")
    batch, places = batches(model)[0], []
    hidden = torch.randn(len(batch), model.config.hidden_size).requires_grad_() * 1
    hidden.register_hook(lambda gradient: places.append(gradient.data_ptr()))
    cross_entropy(model)(hidden, head_weight(model), batch, SCALE).backward()
    assert places == [hidden.data_ptr()]


def test_the_head_is_chosen_by_tied_and_trained_weights():
    savings = Savings()
    assert isinstance(make_head(tied("llama"), savings, None), TiedHead)
    assert isinstance(make_head(make_model("llama"), savings, None), AutogradHead)
    frozen = tied("llama")
    head_weight(frozen).requires_grad_(False)
    assert isinstance(make_head(frozen, savings, None), AutogradHead)


def test_a_block_gets_the_looked_up_rows_of_its_own_ids_and_no_others():
    """Every row is added once over all blocks. Ids occur many times, and some blocks have none."""
    torch.manual_seed(0)
    V, H, T, block = 50, 5, 37, 8
    ids, rows = torch.randint(20, V, (T,)), torch.randn(T, H, dtype=torch.float64)
    ids[0] = V - 1
    sorted_ids, order = ids.sort()
    found = torch.zeros(V, H, dtype=torch.float64)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        for first in range(0, V, block):
            _add_lookup_(found[first : first + block], first, sorted_ids, order, sorted_ids, rows)
    torch.testing.assert_close(found, torch.zeros_like(found).index_add_(0, ids, rows))
    added = [event.input_shapes[3][0] for event in profiler.events() if event.name == "aten::index_add_"]
    assert sum(added) == T and len(added) == 7
    arguments = found[:8], 0, sorted_ids, order, sorted_ids, rows
    torch.library.opcheck(_add_lookup_, arguments, test_utils=("test_schema", "test_faketensor"))
