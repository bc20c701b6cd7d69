"""A tokenizer as a GGUF file stores it: tokens with their types, merges or scores, how a text is split.

    gpt2     byte-level BPE (Llama 3, Qwen, SmolLM): merges, and a name for the pattern that splits the text
    llama    BPE on words with their spaces (Gemma, Llama 2): a score per token takes the place of merges

A reader of GGUF has the patterns built in under their names, so a tokenizer with another pattern is refused.
The toy's tokenizer, a token per character, is byte-level BPE without merges.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # GGUF's types of tokens
BYTE_LEVEL, BY_WORDS = "gpt2", "llama"
SPACE = "\u2581"  # how the tokens of BY_WORDS write a space
IS_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
UNMERGED = -1e6  # score of a token that no merge makes
# how a text is split before it is merged -> GGUF's name; the patterns are those in the files of the models
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    WORDS + r"\p{N}{1,3}" + REST: "llama-bpe",
    WORDS + r"\p{N}" + REST: "qwen2",
    "digits": "smollm",  # each digit alone, then GPT-2's own pattern
    "": "gpt-2",
}


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file holds of a tokenizer."""

    kind: str  # BYTE_LEVEL or BY_WORDS
    split: str  # name of the pattern
    tokens: Sequence[str]  # one per row of the embedding
    types: Sequence[int]
    merges: Sequence[str] = ()  # of BYTE_LEVEL, "left right", the first applied first
    scores: Sequence[float] = ()  # of BY_WORDS; the highest is merged first

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, num_rows: int) -> Vocabulary:
        """Return the vocabulary of a tokenizer.

        num_rows: of the embedding; those without a token are padding. Raises ValueError for a tokenizer
        that GGUF cannot express, and for a token without a row.
        """
        if not tokenizer.is_fast:
            raise _refusal(tokenizer, f"is a {type(tokenizer).__name__} without a tokenizer.json")
        by_id = {i: token for token, i in tokenizer.get_vocab().items()}
        if (last := max(by_id)) >= num_rows:
            raise _refusal(
                tokenizer, f"has {by_id[last]!r} as id {last} and the embedding has {num_rows:,} rows"
            )
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        model, added = state["model"], tokenizer.added_tokens_decoder
        kind, split = _kind(tokenizer, state, by_id, added)
        tokens = [by_id.get(i, f"[PAD{i}]") for i in range(num_rows)]
        types = [_type(i, by_id, added, kind, model.get("unk_token")) for i in range(num_rows)]
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", ())]
        if kind == BY_WORDS:  # what is found in the text as it is has plain spaces
            stored = [
                token.replace(SPACE, " ") if of == USER_DEFINED else token
                for token, of in zip(tokens, types, strict=True)
            ]
            return cls(kind, split, stored, types, scores=_scores(tokens, pairs))
        if model["type"] == "WordLevel":
            spelling = bytes_to_unicode()
            tokens = [
                token if of != NORMAL else "".join(spelling[byte] for byte in token.encode())
                for token, of in zip(tokens, types, strict=True)
            ]
            # readers want merges. These make tokens that are found as a whole before anything is merged.
            pairs = [
                tuple(t) for t, of in zip(tokens, types, strict=True) if of == USER_DEFINED and len(t) == 2
            ]
        return cls(kind, split, tokens, types, merges=[" ".join(pair) for pair in pairs])

    def add_to(self, writer, tokenizer: PreTrainedTokenizerBase, ends: int | Sequence[int] | None) -> None:
        """Add everything to a gguf.GGUFWriter. ends: the ids that end an answer."""
        writer.add_tokenizer_model(self.kind)
        writer.add_tokenizer_pre(self.split)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores(self.scores)
        own = {
            "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "unk": tokenizer.unk_token_id,
            "pad": tokenizer.pad_token_id,
        }  # fmt: skip
        listed = [ends] if isinstance(ends, int) else list(ends or ())
        own["eot"] = next((end for end in listed if end != tokenizer.eos_token_id), None)
        for name, token in own.items():
            if token is not None:
                getattr(writer, f"add_{name}_token_id")(token)
        plain, whole = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
        writer.add_add_bos_token(len(whole) > len(plain) and whole[0] == tokenizer.bos_token_id)
        writer.add_add_eos_token(len(whole) > len(plain) and whole[-1] == tokenizer.eos_token_id)
        if self.kind == BY_WORDS:
            writer.add_add_space_prefix(tokenizer.convert_ids_to_tokens(plain)[0].startswith(SPACE))
        template = tokenizer.chat_template
        template = template.get("default") if isinstance(template, Mapping) else template
        if template:
            writer.add_chat_template(template)


def _refusal(tokenizer: PreTrainedTokenizerBase, fault: str) -> ValueError:
    name = tokenizer.name_or_path or "this model"
    return ValueError(f"the tokenizer of {name} {fault}, which a GGUF file cannot express; leave out --gguf")


def _kind(tokenizer, state: dict, by_id: Mapping[int, str], added: Mapping) -> tuple[str, str]:
    """Return the kind of a tokenizer, and GGUF's name of how it splits a text."""
    model, steps = state["model"], _steps(state["pre_tokenizer"])
    kinds, normalisers = [step["type"] for step in steps], _steps(state["normalizer"])
    if model["type"] == "BPE" and "ByteLevel" in kinds:
        patterns = [_pattern(step) for step in steps]
        found = "".join(pattern for pattern in patterns if pattern is not None)
        if None in patterns or found not in PATTERNS:
            raise _refusal(tokenizer, f"splits a text by {found or kinds}")
        return BYTE_LEVEL, PATTERNS[found]
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if model["type"] == "BPE" and model["byte_fallback"] and (spaces in normalisers or "Metaspace" in kinds):
        return BY_WORDS, "default"
    own = [token for i, token in by_id.items() if i not in added]
    if model["type"] == "WordLevel" and all(len(token) == 1 for token in own):
        return BYTE_LEVEL, PATTERNS[""]
    raise _refusal(tokenizer, f"is a {model['type']} model with {kinds or 'nothing'} before it")


def _steps(part: dict | None) -> list[dict]:
    """Return the steps of a normaliser or of what splits a text."""
    if part is None:
        return []
    inner = part.get("pretokenizers") or part.get("normalizers")
    return [step for each in inner for step in _steps(each)] if inner else [part]


def _pattern(step: dict) -> str | None:
    """Return what a step adds to the key of PATTERNS; None if there is no such key."""
    if step["type"] == "Split":
        return step["pattern"].get("Regex")
    if step["type"] == "Digits":
        return "digits" if step["individual_digits"] else None
    return "" if step["type"] == "ByteLevel" and not step["add_prefix_space"] else None


def _type(i: int, by_id: Mapping[int, str], added: Mapping, kind: str, unknown: str | None) -> int:
    if i not in by_id:
        return UNUSED
    if i in added:
        return CONTROL if added[i].special else USER_DEFINED
    if kind == BY_WORDS and by_id[i] == unknown:
        return UNKNOWN
    return BYTE if kind == BY_WORDS and IS_BYTE.fullmatch(by_id[i]) else NORMAL


def _scores(tokens: Sequence[str], pairs: Sequence[Sequence[str]]) -> list[float]:
    """Return a score per token: minus the place of the first merge that makes it."""
    first: dict[str, int] = {}
    for place, (left, right) in enumerate(pairs):
        first.setdefault(left + right, place)
    return [-float(first[token]) if token in first else UNMERGED for token in tokens]
