"""The recipes that can leave sampling to a server."""

import json

import evaluate
import make_traces
import pytest
from small_server import serve

from kit import models
from kit.config import parse


def config_of(recipe, out, *flags):
    return parse(recipe.Config, ["--smoke", "--out", str(out), *flags], smoke=recipe.SMOKE)


@pytest.fixture(scope="module")
def tiny():
    return models.load("tiny", device="cpu")


def test_an_evaluation_on_a_server_is_that_of_the_same_model_here(tiny, tmp_path, capsys):
    flags = ["--num_questions=5", "--num_samples=1", "--max_new_tokens=64", "--temperature=0"]
    (here,) = evaluate.main(config_of(evaluate, tmp_path / "here", *flags))
    with serve(*tiny, kind="sglang", names=("my-tiny",)) as small:
        (there,) = evaluate.main(config_of(evaluate, tmp_path / "there", *flags, "--server", small.url))
    said = capsys.readouterr().out
    assert "server      sglang 9.9 samples my-tiny; its weights and dtype cannot be checked" in said
    texts = [{row["question"]: row["text"] for row in found.rows} for found in (here, there)]
    assert texts[0] == texts[1] and (tmp_path / "there" / "report.html").is_file()
    assert here.header["prompt"] == there.header["prompt"]  # the ends, too


def test_traces_of_a_server_say_what_made_them_and_a_run_resumes_at_another_address(tiny, tmp_path):
    flags = [tmp_path / "run", "--num_problems=4", "--server"]
    with serve(*tiny, names=("my-tiny",)) as small:
        path = make_traces.main(config_of(make_traces, *flags, small.url))
    made_by = [json.loads(line)["made_by"] for line in path.read_text().splitlines()]
    known = {"model": "my-tiny", "engine": "vllm 9.9", "weights": "not known: a server has them"}
    assert made_by and all(each.items() >= {**known, "tokenizer": "tiny"}.items() for each in made_by)
    with serve(*tiny, names=("my-tiny",)) as small:
        make_traces.main(config_of(make_traces, *flags, small.url, "--resume"))
        assert small.asked == []


def test_a_card_is_not_planned_for_a_server(tmp_path):
    with pytest.raises(ValueError, match="server is http://x, whose card is not planned for; leave out --pl"):
        evaluate.main(config_of(evaluate, tmp_path, "--server=http://x", "--plan"))
