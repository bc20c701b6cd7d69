"""The chat template: a problem and its response as token ids, split where the response begins and ends."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from kit.data.formats import SYSTEM, USER
from kit.data.template_trial import check_ends
from kit.data.toy import TEMPLATE
from kit.models.shipped import SHIPPED
from kit.paper import INSTRUCTION
from kit.run import digest
from kit.turns import END_TOKENS, THOUGHT, THOUGHT_END

if TYPE_CHECKING:
    from kit.data.responses import Trace

PLAIN_TEMPLATE = (  # for base models, which have no template of their own
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "Problem: {{ m['content'] }}\n\nSolution: "
    "{% elif m['role'] == 'system' %}{{ m['content'] }}\n\n"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
NO_THINKING = "no_thinking"  # names the model's own template with its switch for thinking turned off
SWITCH = "enable_thinking"  # that switch, as Qwen3's template calls it
TURNED_OFF = f"{{% set {SWITCH} = false %}}"
DATE = "26 Jul 2024"  # the default of Llama 3's template; with today's date a run would not repeat tomorrow
MARK = "\ue000"  # a private-use character that shows where the template puts the assistant's words
BREAK = "\ufdd0"  # a character that no text has: what is before it and what is after are tokenised apart
REASONING = (THOUGHT, THOUGHT_END, "<answer>", "</answer>")  # which a trace spells to have the tokens
# what a template writes to have a token
CONTROL = re.compile("|".join(map(re.escape, END_TOKENS)) + r"|<\|[^|<>\s]+\|>")


def warn_of_instruction(model: str, instruction: str) -> None:
    """Say that a model which ships with the kit answers nonsense if an instruction is below the problem."""
    if model in SHIPPED and instruction:
        print(f"instruction {model} knows bare problems alone and answers nonsense; pass --instruction ''")


class ChatFormat:
    """A tokenizer with its chat template, and where a response begins and ends.

    The prompt is tokenised alone, exactly as the sampler will see it; the response and the template's end of
    turn follow. If the conversation were rendered in one piece, some templates would delete the chain of
    thought from it.

    model: reads the ids. Its generation_config names more ends. All ends are written there, and end_of_turn
    and the template to the tokenizer, so that both are saved as they were trained. None = tokenizer alone.
    template: a Jinja file, "plain" = `Problem: ... Solution: ...` for base models, the name of one of the
    tokenizer's own, "" = its default, "no_thinking" = its default with thinking off.
    instruction: a line added below every problem, the same in training and evaluation; "" = none.

    end_of_turn: the token that training teaches. eos_token_ids: all that end a response: this one, the
    tokenizer's, those of the generation_config, and END_TOKENS. opening: the thought that the prompt opens.
    empty_thought: what the template writes before a response without a thought; "" = nothing.

    Raises ValueError if there is no template, if it does not show the assistant's words exactly once or does
    not end (see kit.data.template_trial), and for an end that is not in the vocabulary.
    """

    def __init__(self, tokenizer, model=None, *, template: str = "", instruction: str = INSTRUCTION):
        self.tokenizer, self.instruction = tokenizer, instruction
        self.template = find_template(tokenizer, template)
        vocabulary = {i: token for token, i in tokenizer.get_vocab().items()}
        self.num_ids = len(model.get_input_embeddings().weight) if model is not None else max(vocabulary) + 1
        self.beyond = {i: token for i, token in vocabulary.items() if i >= self.num_ids}

        if self.template not in (PLAIN_TEMPLATE, TEMPLATE):  # anybody's, whose end is not known
            check_ends(self.template, tokenizer.special_tokens_map | {"date_string": DATE})
        question = [{"role": "user", "content": "?"}]
        rendered = self._render([*question, {"role": "assistant", "content": MARK}])
        if rendered.count(MARK) != 1:
            raise ValueError(
                "the chat template does not show an assistant's message exactly once; "
                "pass --chat_template plain"
            )
        self.end_of_turn = self._end_of_turn(rendered.split(MARK)[1])
        special = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        known = [special[token] for token in END_TOKENS if token in special.keys() - self.beyond.values()]
        self.eos_token_ids = sorted({*self._named_ends(model), *known})

        ends = tokenizer.convert_ids_to_tokens(self.eos_token_ids)
        self._ends = _any_of({*END_TOKENS, *ends})
        self._controls = _any_of({*special, *ends} - {*REASONING})
        prompt = self._render(question, add_generation_prompt=True)
        opens = prompt.rstrip().endswith(THOUGHT)
        self.opening = prompt[prompt.rindex(THOUGHT) :] if opens else ""
        self.is_thinking_over = prompt.rstrip().endswith(THOUGHT_END)  # before the response begins
        before = rendered.split(MARK)[0]
        written = before.removeprefix(prompt) if before.startswith(prompt) else ""
        self.empty_thought = written if written.startswith(THOUGHT) else ""
        if model is not None:
            self._write_to(model)

    def _render(self, messages: list[dict], **kwargs) -> str:
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, tokenize=False, date_string=DATE, **kwargs
        )

    def _end_of_turn(self, after: str) -> str:
        """Return the token that ends a turn. after: what the template writes after the assistant's words."""
        after, added = after.strip(), self.tokenizer.added_tokens_decoder
        ids = self.encode([after])[0]
        if found := [i for i in ids if i in added]:
            return added[found[0]].content
        if len(ids) == 1:
            return after
        if unknown := CONTROL.search(after):
            raise ValueError(
                f"the chat template ends a turn with {unknown[0]}, which is not in the tokenizer's "
                "vocabulary and could not stop the sampler; pass a --chat_template for this model, or plain"
            )
        # the template writes nothing, or words, which could not stop it either
        return self.tokenizer.eos_token

    def _named_ends(self, model) -> set[int]:
        """Return the ids that template, tokenizer and generation_config name as ends."""
        listed = model.generation_config.eos_token_id if model is not None else None
        listed = [listed] if isinstance(listed, int) else listed or []
        eos = {self.tokenizer.eos_token_id: f"the tokenizer's eos_token {self.tokenizer.eos_token}"}
        for i, name in (eos | dict.fromkeys(listed, "eos_token_id of generation_config.json")).items():
            if not 0 <= i < self.num_ids:
                raise ValueError(
                    f"{name} is id {i} but the model has {self.num_ids:,} ids, so it could not stop the "
                    "sampler; write the model's own end there"
                )
        return {*self.encode([self.end_of_turn])[0], *eos, *listed}

    def _write_to(self, model) -> None:
        self.tokenizer.eos_token = self.end_of_turn
        own = self.tokenizer.chat_template
        by_name = isinstance(own, dict)
        self.tokenizer.chat_template = own | {"default": self.template} if by_name else self.template
        first, *others = dict.fromkeys([self.tokenizer.eos_token_id, *self.eos_token_ids])
        model.generation_config.eos_token_id = [first, *others] if others else first

    def prompt(self, problem: str, before: Sequence[tuple[str, str]] = ()) -> str:
        """Render a problem's prompt, up to the assistant's first word.

        before: (problem, response) of the turns of the conversation so far.
        """
        messages = []
        for asked, response in before:
            messages += [self._asked(asked), {"role": "assistant", "content": self._words(response)}]
        return self._render([*messages, self._asked(problem)], add_generation_prompt=True)

    def _asked(self, problem: str) -> dict:
        content = f"{problem}\n{self.instruction}" if self.instruction else problem
        return {"role": "user", "content": self._words(content)}

    def conversation(self, trace: Trace) -> list[str]:
        """Render a trace as texts in turn: what is given, then an answer, which carries loss, and so on.

        Some templates show an answer in another form once it is an earlier one: Qwen3's and R1's drop its
        thought. Such an answer, and all before it, is given: loss on it would teach what the model never
        sees. The last answer always carries loss. Raises ValueError if the template refuses the turns or
        leaves out the system's.
        """
        messages, texts, text = [], [], ""
        for role, content in trace.turns:
            if role == USER:
                messages.append(self._asked(content))
                continue
            if role == SYSTEM:
                messages.append({"role": role, "content": self._words(content)})
                continue
            prompt = self._prompt_after(messages, trace.where)
            said = self.response(content)
            if not prompt.startswith(text):  # rewritten
                texts, text = [], ""
            texts += [prompt[len(text) :], said]
            text = prompt + said
            messages.append({"role": role, "content": said.removesuffix(self.end_of_turn)})
        return texts

    def _prompt_after(self, messages: list[dict], where: str) -> str:
        """Render messages up to the assistant's next word."""
        way = "pass another --chat_template, or leave such rows out"
        try:
            prompt = self._render(messages, add_generation_prompt=True)
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"{where}: the chat template refuses the turns {roles}: {error}; {way}"
            ) from error
        for message in messages[:1]:
            if message["role"] == SYSTEM and message["content"].strip() not in prompt:
                raise ValueError(f"{where}: the chat template leaves out the system's turn; {way}")
        return prompt

    def response(self, trace: str) -> str:
        """Render a trace as it follows the prompt: in the thought that is open, and with one end of turn.

        Raises ValueError for a trace with a thought if the prompt has ended it.
        """
        parts = self._ends.split(trace.strip())  # text and ends take turns
        while len(parts) > 1 and not parts[-1].strip():
            del parts[-2:]
        trace = "".join(parts).rstrip()
        before, opened, thought = trace.partition(THOUGHT)
        if self.is_thinking_over and (opened or THOUGHT_END in trace):
            raise ValueError(
                f"thinking is off in the chat template but a trace has a thought: {trace[:80]!r}; pass "
                "traces without thoughts, or a chat template with thinking on"
            )
        if self.opening and opened:
            trace = before + thought.removeprefix(self.opening.removeprefix(THOUGHT))
        elif self.opening and THOUGHT_END not in trace:
            trace = f"{THOUGHT_END}\n\n{trace}"
        elif not opened and THOUGHT_END not in trace:
            trace = self.empty_thought + trace
        return self._words(trace) + self.end_of_turn

    def _words(self, text: str) -> str:
        """Break the control tokens that a text spells, so that they are tokenised as words."""
        return self._controls.sub(lambda match: match[0][0] + BREAK + match[0][1:], text)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Tokenise texts, on all cores. Special tokens are those that a text contains; none is added.

        Raises ValueError for a token without a row in the model's embedding.
        """
        pieces = [text.split(BREAK) for text in texts]
        flat = [piece for parts in pieces for piece in parts]
        # verbose: transformers would warn of texts beyond the model's context, which are dropped or refused
        ids = self.tokenizer(flat, add_special_tokens=False, verbose=False).input_ids if flat else ()
        found = iter(ids)
        encoded = [list(chain.from_iterable(islice(found, len(parts)))) for parts in pieces]
        for text, ids in zip(texts, encoded, strict=True) if self.beyond else ():
            if lacking := self.beyond.keys() & ids:
                raise ValueError(
                    f"the tokenizer has {self.beyond[min(lacking)]!r} as id {min(lacking)}, but the model's "
                    f"embedding has {self.num_ids:,} rows: {text[:80]!r}; pass a model with the tokenizer "
                    "that it was made for, or call its resize_token_embeddings and save it"
                )
        return encoded

    def decode(self, ids: list[int]) -> str:
        """Return a response's text, with the thought that the prompt opened for it.

        The tokens that end or pad it are left out; all other special tokens stay.
        """
        stop = {*self.eos_token_ids, self.tokenizer.pad_token_id}
        text = self.tokenizer.decode([i for i in ids if i not in stop], skip_special_tokens=False)
        return text if text.lstrip().startswith(THOUGHT) else self.opening + text

    @property
    def key(self) -> str:
        """Name of tokenizer, template, instruction and ends by content: what ids and samples depend on."""
        fast = self.tokenizer.is_fast
        backend = self.tokenizer.backend_tokenizer.to_str() if fast else self.tokenizer.name_or_path
        probes = self.prompt("?"), self.response("?")
        return digest(backend, self.template, self.instruction, *probes, str(self.eos_token_ids))


def find_template(tokenizer, name: str) -> str:
    """Return the text of a chat template. name: as for ChatFormat. Raises ValueError if there is none."""
    own = tokenizer.chat_template
    if isinstance(own, list):  # as they stand in files
        own = {entry["name"]: entry["template"] for entry in own}
    named = own if isinstance(own, dict) else {"default": own} if own else {}
    if (name or "default") in named:
        return named[name or "default"]
    if name == NO_THINKING and SWITCH in (default := named.get("default", "")):
        return TURNED_OFF + default.removeprefix(TURNED_OFF)
    if name == "plain":
        return PLAIN_TEMPLATE
    if Path(name).is_file():
        return Path(name).read_text(encoding="utf-8")

    way = f"pass --chat_template {', '.join([*named, 'plain'])} or a Jinja file"
    if name == NO_THINKING:
        raise ValueError(
            f"chat_template is {name!r} but the model's own template has no switch {SWITCH}; {way}"
        )
    if name:
        raise ValueError(f"chat_template is {name!r} but there is no such file; {way}")
    what = "has several chat templates and no default" if named else "has no chat template (a base model?)"
    raise ValueError(f"{tokenizer.name_or_path or 'the tokenizer'} {what}; {way}")


def _any_of(tokens: set[str]) -> re.Pattern:
    """Return a pattern of any of these tokens, the longest first, as a group, which `split` keeps."""
    return re.compile(f"({'|'.join(map(re.escape, sorted(tokens, key=len, reverse=True)))})")
