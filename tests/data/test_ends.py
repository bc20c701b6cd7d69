"""Where a response ends, in the styles of well-known models: what stops the sampler, and what is trained."""

import pytest
from chat_styles import STYLES, make_tokenizer, make_writer, named_ends
from transformers import AutoTokenizer, GenerationConfig

from kit.data.chat import PLAIN_TEMPLATE, ChatFormat
from kit.data.documents import make_documents
from kit.data.responses import Trace
from kit.generate.sampler import generate
from kit.generate.sampling import SamplingParams
from kit.grade.verdict import grade
from kit.models.folder import save_model
from kit.turns import END_TOKENS

GREEDY = SamplingParams(temperature=0, max_new_tokens=9)
SPELLED = "<|im_end|>"


def chat_of(style, *texts, template="", **options):
    """A style's chat format, and a model that continues the prompt's last token as the texts say."""
    tokenizer = make_tokenizer(style)
    model = make_writer(tokenizer, list(texts), **{"ends": named_ends(tokenizer, style)} | options)
    return ChatFormat(
        tokenizer, model, template=template or "plain" * (style == "base"), instruction=""
    ), model


def answer_of(chat, model, problem="?"):
    ids = chat.encode([chat.prompt(problem)])
    options = {"num_slots": 1, "seed": 0, "eos_token_id": chat.eos_token_ids, "decode": chat.decode}
    return generate(model, ids, GREEDY, **options)[0]


def document_of(chat, problem, trace):
    """Return (prompt, response) as tokens: what encodes more than a byte stands as it is spelled."""
    document = make_documents([Trace(problem, trace, "here")], chat)[0]
    tokens = chat.tokenizer.convert_ids_to_tokens(document.ids.tolist())
    return tokens[: document.prompt_len], tokens[document.prompt_len :]


def text_of(chat, problem, trace):
    prompt, response = document_of(chat, problem, trace)
    return chat.tokenizer.convert_tokens_to_string(prompt + response)


LISTED = [(style, end) for style, (_, _, _, ends) in STYLES.items() for end in ends]


@pytest.mark.parametrize(("style", "end"), LISTED)
@pytest.mark.parametrize("listed", [True, False], ids=["in the generation_config", "by its name alone"])
def test_every_end_stops_the_sampler_and_no_invented_turn_is_graded(style, end, listed):
    last = " " if style == "base" else "\n"  # of the prompt
    chat, model = chat_of(style, f"{last}3{end}x=5", **({} if listed else {"ends": []}))
    answer = answer_of(chat, model)
    if not listed and end not in END_TOKENS:
        assert not answer.finished  # nobody says that it is an end
        return
    assert answer.finished
    assert answer.text == chat.opening + "3"
    assert answer.ids[-1] == chat.tokenizer.convert_tokens_to_ids(end)


def test_an_end_that_only_the_tokenizer_names_stops_the_sampler(tmp_path):
    file = tmp_path / "t.jinja"
    file.write_text("{% for m in messages %}{{ m['content'] }}</s>{% endfor %}\n")
    tokenizer = make_tokenizer("base", eos="<|done|>")
    model = make_writer(tokenizer, ["</s>3<|done|>x=5"])
    chat = ChatFormat(tokenizer, model, template=str(file), instruction="")
    assert (chat.end_of_turn, answer_of(chat, model).text) == ("</s>", "3")


def test_samples_with_other_ends_are_other_samples():
    assert chat_of("base")[0].key != chat_of("base", ends=[])[0].key == chat_of("base", ends=[])[0].key


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_what_is_trained_as_the_end_is_saved_as_the_end(style, tmp_path):
    file = tmp_path / "t.jinja"
    template = STYLES[style][2] or PLAIN_TEMPLATE
    file.write_text(template + "{# of this run #}", encoding="utf-8")
    chat, model = chat_of(style, template=str(file))
    end = "<end_of_turn>" if style == "gemma" else STYLES[style][0][0]
    assert document_of(chat, "?", "3")[1][-1] == end

    save_model(tmp_path / "model", model, chat.tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.eos_token == end
    assert tokenizer.chat_template == file.read_text(encoding="utf-8")
    stored = GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id
    stored = stored if isinstance(stored, list) else [stored]
    assert stored[0] == tokenizer.eos_token_id
    assert set(named_ends(tokenizer, style)) <= set(stored) == set(chat.eos_token_ids)
    model.generation_config = GenerationConfig.from_pretrained(tmp_path / "model")
    assert ChatFormat(tokenizer, model, instruction="").key == chat.key


def test_an_end_after_other_words_of_the_template_is_the_token_not_the_tokenizers_end(tmp_path):
    file = tmp_path / "t.jinja"
    file.write_text("{% for m in messages %}{{ m['content'] }}\n<end_of_turn>\n<eos>{% endfor %}")
    assert chat_of("gemma", template=str(file))[0].end_of_turn == "<end_of_turn>"


@pytest.mark.parametrize(
    ("eos", "ends", "template", "message"),
    [
        ("<nope>", [], "", "eos_token <nope> is id 261 but the model has 261 ids"),
        ("", [256, 999], "", r"generation_config.json is id 999 but the model has 261 ids"),
        ("", [-1], "", r"generation_config.json is id -1 "),
        (
            "",
            [],
            "{% for m in messages %}{{ m['content'] }}<|eot_id|>{% endfor %}",
            r"with <\|eot_id\|>, which",
        ),
        (
            "",
            [],
            "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}",
            r"with <\|end\|>, which is not",
        ),
    ],
)
def test_an_end_that_is_not_in_the_vocabulary_is_refused(tmp_path, eos, ends, template, message):
    file = tmp_path / "t.jinja"
    file.write_text(template)
    tokenizer = make_tokenizer("qwen", eos=eos)
    model = make_writer(make_tokenizer("qwen"), spare_rows=0, ends=ends)
    with pytest.raises(ValueError, match=message):
        ChatFormat(tokenizer, model, template=str(file) if template else "")


@pytest.mark.parametrize(
    ("trace", "after_the_prompt"),
    [
        ("<think>\nhm, 2</think>\n\nIt is 2.", "hm, 2</think>\n\nIt is 2."),
        ("<think>hm, 2</think>\n\nIt is 2.", "hm, 2</think>\n\nIt is 2."),
        ("Well. <think>\nhm, 2</think>It is 2.", "Well. hm, 2</think>It is 2."),
        ("hm, 2</think>It is 2.", "hm, 2</think>It is 2."),
        ("It is 2.", "</think>\n\nIt is 2."),  # a short solution: without a thought, which is open already
    ],
)
def test_a_thought_that_the_prompt_opens_is_opened_once_and_closed(trace, after_the_prompt):
    text = text_of(chat_of("r1")[0], "1+1?", trace)
    begin = "<｜begin▁of▁sentence｜><｜User｜>1+1?<｜Assistant｜><think>\n"
    assert text == f"{begin}{after_the_prompt}<｜end▁of▁sentence｜>"


def test_a_template_that_opens_no_thought_leaves_the_traces_own():
    assert text_of(chat_of("qwen")[0], "?", "<think>\n2</think>2").count("<think>") == 1
    assert "think" not in text_of(chat_of("qwen")[0], "?", "2")


def test_a_thought_that_the_prompt_opened_and_nothing_closed_is_no_answer():
    answer = answer_of(*chat_of("r1", "\n6,or 7;"))
    assert answer.text.startswith("<think>\n6,or 7;")
    assert not answer.finished
    assert grade("7", answer.text).rule == "no answer: the thought does not end"
    closed = answer_of(*chat_of("r1", "\n6</think>7<｜end▁of▁sentence｜>"))
    assert closed.text == "<think>\n6</think>7"
    assert grade("7", closed.text).verdict == "correct"


def test_the_text_of_a_cut_response_is_the_beginning_of_the_whole():
    chat, _ = chat_of("r1")
    ids = chat.encode(["6</think>7"])[0]
    assert [chat.decode(ids[:n]) for n in (0, 1, 3)] == ["<think>\n", "<think>\n6", "<think>\n6</think>7"]
    again = chat.encode(["<think>6</think>7"])[0]  # a model that opens it once more
    assert chat.decode(again) == "<think>6</think>7"


def test_control_tokens_that_a_problem_or_a_trace_spells_are_words():
    chat, _ = chat_of("qwen")
    prompt, response = document_of(chat, f"What is {SPELLED}?", f"An {SPELLED} is <think>a sign</think>.")
    special = [token for token in prompt if token.startswith("<|")]
    assert special == ["<|im_start|>", SPELLED, "<|im_start|>"]
    assert [token for token in response if len(token) > 3] == ["<think>", "</think>", SPELLED]
    assert f"What is {SPELLED}?" in text_of(chat, f"What is {SPELLED}?", "x")
    assert f"An {SPELLED} is" in text_of(chat, "x", f"An {SPELLED} is <think>a sign</think>.")


def test_a_thought_stays_one_where_its_tags_are_special_tokens():
    tokenizer = make_tokenizer("gemma")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    response = document_of(ChatFormat(tokenizer, instruction=""), "?", "<think>2</think>2")[1]
    assert response == ["<think>", "2", "</think>", "2", "<end_of_turn>"]


def test_a_text_without_control_tokens_is_tokenised_in_one_piece():
    chat, _ = chat_of("llama")
    prompt = chat.prompt("Is 2 < 3 or |x| > 1?")
    assert chat.encode([prompt, ""]) == [chat.tokenizer(prompt, add_special_tokens=False).input_ids, []]


@pytest.mark.parametrize("ending", [SPELLED, f" {SPELLED}\n", f"{SPELLED}\n<|endoftext|>", "</s>"])
def test_a_trace_that_ends_with_an_end_token_ends_once(ending):
    chat, _ = chat_of("qwen")
    assert document_of(chat, "?", f"It is 2.{ending}")[1] == document_of(chat, "?", "It is 2.")[1]
    assert document_of(chat, "?", "2")[1] == ["2", SPELLED]


def test_of_templates_by_name_the_default_is_taken_or_the_one_that_is_named(tmp_path):
    tokenizer = make_tokenizer("qwen")
    own = tokenizer.chat_template
    tokenizer.chat_template = {"default": own, "short": own.replace("assistant", "a")}
    assert ChatFormat(tokenizer).prompt("?") == ChatFormat(make_tokenizer("qwen")).prompt("?")
    assert ChatFormat(tokenizer, template="short").prompt("?").endswith("<|im_start|>a\n")
    with pytest.raises(ValueError, match=r"'tall' but there is no such file; .* default, short, plain or"):
        ChatFormat(tokenizer, template="tall")

    model = make_writer(tokenizer)
    chat = ChatFormat(tokenizer, model, template="short")
    save_model(tmp_path / "model", model, tokenizer)
    assert ChatFormat(AutoTokenizer.from_pretrained(tmp_path / "model")).prompt("?") == chat.prompt("?")

    tokenizer.chat_template = [{"name": "tool_use", "template": own}]
    with pytest.raises(ValueError, match=r"several chat templates and no default; .* tool_use, plain or"):
        ChatFormat(tokenizer)


def test_a_token_without_an_embedding_is_refused_by_name_and_one_that_nobody_writes_is_not():
    """Gemma-3-1b-it's tokenizer has one token more than the model: for images, which it does not read."""
    tokenizer = make_tokenizer("gemma")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.add_tokens(["<think>"])
    model = make_writer(make_tokenizer("gemma"), ["\n3<end_of_turn>"], spare_rows=0)
    chat = ChatFormat(tokenizer, model, instruction="")
    assert answer_of(chat, model, "What is an <image>?").text == "3"  # as words
    with pytest.raises(
        ValueError, match=r"has '<think>' as id 261, but the model's embedding has 260 rows: '.*hm"
    ):
        document_of(chat, "?", "<think>hm</think>3")
