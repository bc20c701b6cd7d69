"""Templates that can think or not, as Qwen3's: what is trained is what the template itself would write."""

import pytest
from chat_styles import make_tokenizer, make_writer, named_ends
from transformers import AutoTokenizer

from kit.data.chat import ChatFormat
from kit.data.documents import make_documents
from kit.data.traces import Trace
from kit.models.folder import save_model

THOUGHT, EMPTY = "<think>\nhm, 2\n</think>\n\nIt is 2.", "<think>\n\n</think>\n\n"
ASKED = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"


def form_of(template="", style="qwen3"):
    return ChatFormat(make_tokenizer(style), template=template, instruction="")


def trained(form, trace):
    """Return (the prompt, the response) of a document, as text."""
    document = make_documents([Trace("1+1?", trace, "here")], form)[0]
    ids = document.ids.tolist()
    return form.tokenizer.decode(ids[: document.prompt_len]), form.tokenizer.decode(
        ids[document.prompt_len :]
    )


def rendered(form, *turns, **options):
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    return form.tokenizer.apply_chat_template(messages, tokenize=False, **options)


@pytest.mark.parametrize("trace", [THOUGHT, "It is 2."])
def test_by_default_a_trace_is_trained_as_the_models_own_template_writes_it(trace):
    form = form_of()
    prompt, response = trained(form, trace)
    assert prompt == ASKED == rendered(form, "1+1?", add_generation_prompt=True)
    assert response == (trace if trace == THOUGHT else EMPTY + trace) + "<|im_end|>"
    assert f"{prompt}{response}\n" == rendered(form, "1+1?", trace)


@pytest.mark.parametrize("trace", ["<think>hm", "hm</think>2", "2</think>"])
def test_a_thought_that_lacks_a_tag_gets_no_empty_one_before_it(trace):
    assert trained(form_of(), trace)[1] == f"{trace}<|im_end|>"


def test_with_thinking_off_the_prompt_holds_an_empty_thought_and_the_answer_follows():
    form = form_of("no_thinking")
    assert trained(form, "It is 2.") == (ASKED + EMPTY, "It is 2.<|im_end|>")
    assert (form.opening, form.empty_thought) == ("", "")
    assert form.decode(form.encode(["It is 2.<|im_end|>"])[0]) == "It is 2."
    assert form.key != form_of().key


@pytest.mark.parametrize("trace", [THOUGHT, "hm</think>2"])
def test_with_thinking_off_a_trace_with_a_thought_is_refused(trace):
    with pytest.raises(
        ValueError, match=r"thinking is off .* but a trace has a thought: '.*hm.*; pass traces"
    ):
        trained(form_of("no_thinking"), trace)


def test_a_model_that_was_trained_with_thinking_off_is_saved_so_and_stays_so(tmp_path):
    tokenizer = make_tokenizer("qwen3")
    model = make_writer(tokenizer, ["\n3<|im_end|>"], ends=named_ends(tokenizer, "qwen3"))
    form = ChatFormat(tokenizer, model, template="no_thinking", instruction="")
    save_model(tmp_path / "model", model, tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path / "model")
    for template in ("", "no_thinking"):
        assert ChatFormat(again, model, template=template, instruction="").key == form.key
    assert rendered(form, "1+1?", add_generation_prompt=True) == ASKED + EMPTY


def test_thoughts_of_earlier_turns_are_left_out_and_the_last_one_is_kept():
    text = rendered(form_of(), "1+1?", THOUGHT, "1+2?", "<think>\nsoon\n</think>\n\n3")
    assert "hm" not in text and "It is 2." in text and "<think>\nsoon\n</think>\n\n3<|im_end|>" in text


@pytest.mark.parametrize("style", ["qwen", "base"])
def test_thinking_cannot_be_turned_off_in_a_template_that_has_no_switch_for_it(style):
    with pytest.raises(
        ValueError, match=r"'no_thinking' but .* no switch enable_thinking; pass --chat_template"
    ):
        form_of("no_thinking", style)
