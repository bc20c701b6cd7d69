"""The lesson runs from top to bottom in a kernel; its checks refuse the stubs and accept the solutions."""

import json
import re

import nbformat
import pytest
from children import ROOT
from nbclient import NotebookClient

LESSON = ROOT / "recipes" / "valley.ipynb"

SHORTER = """
from kit.recipes import valley_demo

valley_demo.SMOKE |= {"sizes": "16,64", "arms": "long", "num_questions": 20, "num_samples": 1}
"""


def lesson():
    return nbformat.read(LESSON, as_version=4)


def printed(cell):
    return "".join(output.get("text", "") for output in cell.get("outputs", ()))


def test_the_lesson_is_stored_without_outputs_and_is_a_valid_notebook():
    notebook = lesson()
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (not cell.outputs and cell.execution_count is None)


@pytest.mark.slow
def test_the_lesson_runs_its_checks_refuse_the_stubs_and_accept_the_teachers_solutions(tmp_path):
    notebook = lesson()
    solutions = dict.fromkeys(
        re.findall(r"```python\n(.*?)\n```", notebook.cells[-1].source, re.DOTALL), False
    )
    solutions["share_rechecked, share_first_wrong, expected = 0.0, 0.0, 50"] = False
    cells, again = [], []
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = cell.source.replace('SIZE = "quick"', 'SIZE = "smoke"') + SHORTER
        cells.append(cell)
    for cell in notebook.cells:  # every exercise once more, solved; the cells that check it follow
        if "exercise" in cell.metadata.get("tags", []):
            name = re.match(r"def (\w+)|(\w+)", cell.source).group(0)
            (solution,) = (text for text in solutions if text.startswith(name))
            again.append(nbformat.v4.new_code_cell(solution))
        elif again and cell.cell_type == "code":
            again.append(nbformat.from_dict(json.loads(json.dumps(cell))))
    notebook.cells = cells + again
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()

    first, second = ("".join(map(printed, part)) for part in (cells, again))
    for exercise in (1, 2, 3, 4):
        assert f"exercise {exercise}: not yet. " in first
        assert f"exercise {exercise}: right\n" in second
    assert "lowest: " in first and "rechecks per step of your traces: 0.00" in second
    pictures = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in pictures)
    assert any("mark class=right" in output.get("data", {}).get("text/html", "") for output in pictures)
