import logging

import pytest

from kit.data.chat import ChatFormat
from kit.data.toy import make_tokenizer
from kit.run import digest


def chat(template="", **options):
    tokenizer = make_tokenizer()
    if template is None:
        tokenizer.chat_template = None
        template = ""
    return ChatFormat(tokenizer, template=template, **options)


def test_prompt_and_end_of_turn_come_from_the_models_own_template():
    form = chat(instruction="")
    assert form.prompt("1+1?") == "<bos><user>1+1?<assistant>"
    assert form.end_of_turn == "<eos>"
    assert form.eos_token_ids == [2]


def test_the_instruction_stands_below_the_problem():
    assert chat(instruction="think").prompt("1+1?") == "<bos><user>1+1?\nthink<assistant>"


def test_a_base_model_needs_a_template_and_plain_is_one():
    with pytest.raises(ValueError, match="--chat_template plain"):
        chat(None)
    form = chat("plain", instruction="")
    assert form.prompt("1+1?") == "<bos>Problem: 1+1?\n\nSolution: "
    assert form.end_of_turn == "<eos>"


def test_a_template_file_is_used_and_a_missing_one_is_named(tmp_path):
    file = tmp_path / "t.jinja"
    file.write_text(
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    form = chat(str(file), instruction="")
    assert form.prompt("x") == "[user]x[assistant]"
    assert form.end_of_turn == "<eos>"  # the template writes none: the text's end it is
    with pytest.raises(ValueError, match="no such file"):
        chat("missing.jinja")


def test_a_template_that_hides_the_assistants_words_is_refused(tmp_path):
    file = tmp_path / "t.jinja"
    file.write_text(
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="exactly once"):
        chat(str(file))


def test_an_end_of_turn_of_several_tokens_cannot_stop_the_sampler_and_is_replaced(tmp_path):
    file = tmp_path / "t.jinja"
    file.write_text("{% for m in messages %}{{ m['content'] }} end{% endfor %}")
    assert chat(str(file)).end_of_turn == "<eos>"


def test_a_template_that_writes_the_date_does_not_change_from_day_to_day(tmp_path):
    file = tmp_path / "t.jinja"
    file.write_text("{{ date_string }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert chat(str(file), instruction="").prompt("x") == "26 Jul 2024x"


def test_a_text_longer_than_the_models_context_is_tokenised_without_a_warning(caplog):
    form = chat()
    form.tokenizer.model_max_length = 10
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        assert len(form.encode(["3+2-4+4?" * 10])[0]) == 80
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.messages


def test_decoding_leaves_out_the_end_and_keeps_thinking():
    form = chat()
    ids = form.encode(["<think>1</think>\\boxed{2}<eos><pad>"])[0]
    assert form.decode(ids) == "<think>1</think>\\boxed{2}"


def test_the_key_names_template_and_instruction_by_content():
    assert chat().key == chat().key
    assert len({chat().key, chat("plain").key, chat(instruction="").key}) == 3
    assert digest("ab", "c") != digest("a", "bc")
