import pytest

from kit.data import template_trial
from kit.data.chat import ChatFormat
from kit.data.toy import make_tokenizer

SHOWN = "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ eos_token }}"
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = "{% set t = namespace(x='ab') %}{% for i in range(60) %}{% set t.x = t.x + t.x %}{% endfor %}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "endless",
    [
        LOOP,
        "{% if add_generation_prompt %}" + LOOP + "{% endif %}",
        "{% if messages|length > 1 %}" + LOOP + "{% endif %}",
        "{% if date_string and eos_token == '<eos>' %}" + LOOP + "{% endif %}",
        "{{ 7 ** (10 ** 10) }}",  # which Jinja computes while it compiles
        "{{ 'a' * 10**11 }}",
        DOUBLED,
    ],
)
def test_a_template_that_never_ends_or_fills_the_memory_is_refused_with_what_to_do(
    tmp_path, monkeypatch, endless
):
    monkeypatch.setattr(template_trial, "SECONDS", 1)
    file = tmp_path / "t.jinja"
    file.write_text(SHOWN + endless)
    with pytest.raises(ValueError, match="may loop for ever; pass --chat_template plain, or a Jinja file"):
        ChatFormat(make_tokenizer(), template=str(file))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% bad", "Encountered unknown tag 'bad'"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_a_template_with_another_fault_keeps_its_own_error(tmp_path, broken, message):
    file = tmp_path / "t.jinja"
    file.write_text(SHOWN + broken)
    with pytest.raises(Exception, match=message) as error:
        ChatFormat(make_tokenizer(), template=str(file))
    assert "trial" not in str(error.value)


def test_a_template_is_tried_once_and_those_of_the_kit_never(monkeypatch):
    tried = []
    run = template_trial.subprocess.run
    monkeypatch.setattr(template_trial.subprocess, "run", lambda *a, **k: tried.append(a) or run(*a, **k))
    for template in ("", "plain"):
        ChatFormat(make_tokenizer(), template=template)
    assert tried == []
    for _ in range(2):
        tokenizer = make_tokenizer()
        tokenizer.chat_template = SHOWN + "{# another #}"
        assert ChatFormat(tokenizer, instruction="").prompt("1+1?") == "1+1?<eos>"
    assert len(tried) == 1
