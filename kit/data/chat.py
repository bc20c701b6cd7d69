"""The chat template: a problem and its response as token ids, split where the response begins and ends."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from kit.models.shipped import SHIPPED
from kit.run import digest

# as in the evaluation of Qwen2.5-Math
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
PLAIN_TEMPLATE = (  # for base models, which have no template of their own
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "Problem: {{ m['content'] }}\n\nSolution: "
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
DATE = "26 Jul 2024"  # the default of Llama 3's template; with today's date a run would not repeat tomorrow
MARK = "\ue000"  # a private-use character that shows where the template puts the assistant's words


def warn_of_instruction(model: str, instruction: str) -> None:
    """Say that a model which ships with the kit answers nonsense if an instruction is below the problem."""
    if model in SHIPPED and instruction:
        print(f"instruction {model} knows bare problems alone and answers nonsense; pass --instruction ''")


class ChatFormat:
    """A tokenizer with its chat template.

    The prompt is tokenised alone, exactly as the sampler will see it; the response and the template's end of
    turn follow. If the conversation were rendered in one piece, some templates would delete the chain of
    thought from it.

    template: a Jinja file, "plain" = `Problem: ... Solution: ...` for base models, "" = the tokenizer's own.
    instruction: a line added below every problem, the same in training and evaluation; "" = none.
    Raises ValueError if there is no template, and if it does not show the assistant's words exactly once.
    """

    def __init__(self, tokenizer, *, template: str = "", instruction: str = INSTRUCTION):
        if template == "plain":
            template = PLAIN_TEMPLATE
        elif template:
            if not Path(template).is_file():
                raise ValueError(
                    f"chat_template is {template!r} but there is no such file; pass a Jinja file or 'plain'"
                )
            template = Path(template).read_text(encoding="utf-8")
        self.tokenizer, self.instruction = tokenizer, instruction
        self.template = template or tokenizer.chat_template
        if not self.template:
            raise ValueError(
                f"{tokenizer.name_or_path} has no chat template (a base model?); pass --chat_template plain, "
                "or a Jinja file"
            )

        rendered = self._render([{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}])
        if rendered.count(MARK) != 1:
            raise ValueError(
                "the chat template does not show an assistant's message exactly once; "
                "pass --chat_template plain"
            )
        self.end_of_turn = rendered.split(MARK)[1].rstrip()  # what a template writes after it is not learned
        if len(self.encode([self.end_of_turn])[0]) != 1:  # several ids could not stop the sampler
            self.end_of_turn = tokenizer.eos_token

    def _render(self, messages: list[dict], **kwargs) -> str:
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, tokenize=False, date_string=DATE, **kwargs
        )

    @cached_property
    def eos_token_ids(self) -> list[int]:
        """Ids that end a response: the template's end of turn and the tokenizer's own end of text."""
        return sorted({*self.encode([self.end_of_turn])[0], self.tokenizer.eos_token_id} - {None})

    def prompt(self, problem: str) -> str:
        """Render a problem's prompt, up to the assistant's first word."""
        content = f"{problem}\n{self.instruction}" if self.instruction else problem
        return self._render([{"role": "user", "content": content}], add_generation_prompt=True)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Tokenise texts, on all cores. Special tokens are those that a text contains; none is added."""
        return self.tokenizer(texts, add_special_tokens=False).input_ids if texts else []

    def decode(self, ids: list[int]) -> str:
        """Return a response's text, without the special tokens that end or pad it; all others stay."""
        stop = {*self.eos_token_ids, self.tokenizer.pad_token_id}
        return self.tokenizer.decode([i for i in ids if i not in stop], skip_special_tokens=False)

    @property
    def key(self) -> str:
        """Name of tokenizer, template and instruction by their content: what a cache of ids depends on."""
        fast = self.tokenizer.is_fast
        backend = self.tokenizer.backend_tokenizer.to_str() if fast else self.tokenizer.name_or_path
        return digest(backend, self.template, self.instruction, self.prompt("?"), self.end_of_turn)
