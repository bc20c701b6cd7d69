import sys
import textwrap

import pytest
import torch
from children import ROOT, run_recipe
from conftest import make_model
from test_train_loop import run_training

from kit.kernels.linear_cross_entropy import linear_cross_entropy_reference
from kit.packing import Document, PackedBatch
from kit.train.loss import cross_entropy

sys.path.insert(0, str(ROOT / "recipes"))
from change_the_loss import weigh_answers

END = 7  # </think>


def test_a_loss_that_is_passed_to_train_is_the_one_that_is_trained_on(tmp_path):
    calls = []

    def half(hidden, weight, batch, scale):
        calls.append(scale * batch.num_targets)
        return cross_entropy(make_model("llama"))(hidden, weight, batch, scale) / 2

    losses = []
    for name, loss_of in (("plain", None), ("half", half)):
        run_training(tmp_path / name, steps=1, loss_of=loss_of)
        losses.append((tmp_path / name / "metrics.jsonl").read_text().split('"loss": ')[1].split(",")[0])
    assert float(losses[1]) == pytest.approx(float(losses[0]) / 2)
    assert sum(calls) == pytest.approx(1)  # the scale is 1 / the targets of the whole step


def test_the_recipe_counts_tokens_after_the_end_of_thinking_twice_in_each_document_of_a_row():
    """Documents with a </think>, without one, with it first, which changes nothing, and with it last."""
    texts = [[1, 3, END, 4, 5], [1, 9, 9, 3], [END, 8, 8], [1, 6, END]]
    batch = PackedBatch.build([Document(torch.tensor(ids), 1) for ids in texts])
    torch.manual_seed(0)
    hidden, weight = torch.randn(len(batch), 6, dtype=torch.float64), torch.randn(11, 6, dtype=torch.float64)
    losses = linear_cross_entropy_reference(hidden, weight, batch.targets, reduction="none")
    expected = torch.tensor([1, 1, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2.0])
    found = weigh_answers(END, 2.0)(hidden, weight, batch, 0.25)
    torch.testing.assert_close(found, (losses * expected).sum() * 0.25)


@pytest.mark.slow
def test_the_recipe_trains_a_model_and_the_readme_shows_its_loss(tmp_path):
    done = run_recipe("change_the_loss", "--num_traces", "12", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/change_the_loss/001/model/model.safetensors").is_file()
    shown = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    recipe = (ROOT / "recipes" / "change_the_loss.py").read_text()
    assert textwrap.indent(shown, "    ") in recipe  # there it is a function in a function
