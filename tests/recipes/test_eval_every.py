"""--eval_every of the fine-tuning recipe, from the flag to the report."""

import pytest

from kit.config import parse
from kit.recipes import gemma3_1b_8k as recipe
from kit.run import Journal


@pytest.mark.slow
def test_accuracy_and_loss_are_measured_along_the_way_and_drawn_and_the_last_report_stands_still(
    tmp_path, capsys
):
    small = {"num_traces": 24, "max_steps": 4, "num_questions": 3, "num_samples": 1, "max_new_tokens": 24}
    during = {"eval_every": 2, "eval_questions": 2, "out": str(tmp_path / "run")}
    recipe.main(recipe.Config(**recipe.SMOKE | small | during))
    printed = capsys.readouterr().out
    assert "during      every 2 steps: toy 2 x 1; the loss on 64 held-out traces" in printed
    assert "data        24 traces kept, " in printed
    rows = Journal(tmp_path / "run" / "during.jsonl").read()
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert rows[0]["held_out_loss"] > rows[-1]["held_out_loss"] > 0
    page = (tmp_path / "run" / "report.html").read_text()
    recipe.main(recipe.Config(**recipe.SMOKE | small | during | {"eval_every": 0, "resume": True}))
    assert "http-equiv" not in page and "accuracy, loss, length, reflection by step" in page


def test_a_plan_says_that_it_does_not_count_the_measurements_along_the_way(capsys):
    small = ["--plan", "--model", "tiny", "--row_tokens", "64", "--max_new_tokens", "16"]
    for flags, times in ([], 0), (["--eval_every", "5"], 1):
        recipe.main(parse(recipe.Config, [*small, *flags]))
        assert capsys.readouterr().out.count("not counted: measurements during training") == times
