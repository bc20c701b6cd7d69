"""Small tokenizers with end tokens and templates in the style of well-known models, and a model to match."""

from itertools import pairwise

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

USER = "{% if m['role'] == 'user' %}"
LOOP, NEXT, ASKED = "{% for m in messages %}", "{% endfor %}", "{% if add_generation_prompt %}"

# style -> special tokens (the first is eos), other added tokens, template, ends in the generation_config
STYLES = {
    "qwen": (
        ["<|im_end|>", "<|endoftext|>", "<|im_start|>"],
        ["<think>", "</think>"],
        f"{LOOP}<|im_start|>{{{{ m['role'] }}}}\n{{{{ m['content'] }}}}<|im_end|>\n{NEXT}"
        f"{ASKED}<|im_start|>assistant\n{{% endif %}}",
        ["<|im_end|>", "<|endoftext|>"],
    ),
    "llama": (
        ["<|eot_id|>", "<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|head|>", "<|/head|>"],
        [],
        f"<|begin_of_text|>{LOOP}<|head|>{{{{ m['role'] }}}}<|/head|>\n\n{{{{ m['content'] | trim }}}}"
        f"<|eot_id|>{NEXT}{ASKED}<|head|>assistant<|/head|>\n\n{{% endif %}}",
        ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"],
    ),
    "gemma": (  # whose tokenizer ends with <eos> although its turns end otherwise
        ["<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        [],
        f"<bos>{LOOP}<start_of_turn>{{{{ 'model' if m['role'] == 'assistant' else m['role'] }}}}\n"
        f"{{{{ m['content'] | trim }}}}<end_of_turn>\n{NEXT}"
        f"{ASKED}<start_of_turn>model\n{{% endif %}}",
        ["<eos>", "<end_of_turn>"],
    ),
    "r1": (  # which opens the thought in the prompt, and hides that of an earlier turn
        ["<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"],
        ["<think>", "</think>"],
        f"<｜begin▁of▁sentence｜>{LOOP}{USER}<｜User｜>{{{{ m['content'] }}}}{{% else %}}<｜Assistant｜>"
        "{{ m['content'].split('</think>')[-1] }}<｜end▁of▁sentence｜>{% endif %}"
        f"{NEXT}{ASKED}<｜Assistant｜><think>\n{{% endif %}}",
        ["<｜end▁of▁sentence｜>"],
    ),
    "qwen3": (  # which can think or not, and hides the thoughts of earlier turns
        ["<|im_end|>", "<|endoftext|>", "<|im_start|>"],
        ["<think>", "</think>"],
        "{% set asked = namespace(at=-1) %}"
        f"{LOOP}{USER}{{% set asked.at = loop.index0 %}}{{% endif %}}{NEXT}"
        f"{LOOP}<|im_start|>{{{{ m['role'] + '\n' }}}}{{% set parts = m['content'].split('</think>') %}}"
        "{% if m['role'] == 'assistant' and loop.index0 > asked.at %}<think>\n"
        "{{ parts[0].split('<think>')[-1].strip('\n') if parts[1:] else '' }}\n</think>\n\n{% endif %}"
        f"{{{{ parts[-1].lstrip('\n') }}}}<|im_end|>\n{NEXT}{ASKED}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
        "{% endif %}",
        ["<|im_end|>", "<|endoftext|>"],
    ),
    "base": (["</s>", "<s>", "<|done|>"], [], None, ["</s>", "<|done|>"]),
}


def make_tokenizer(style: str, *, eos: str = "") -> PreTrainedTokenizerFast:
    """Make a tokenizer of bytes and added tokens. eos: its end of text; "" = the style's own."""
    special, added, template, _ = STYLES[style]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({sign: i for i, sign in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    eos = eos or special[0]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, chat_template=template)


def make_writer(
    tokenizer, texts: list[str] = (), *, spare_rows: int = 3, ends: list = ()
) -> LlamaForCausalLM:
    """Make a model that writes what these texts have: after each of their tokens, the one that follows there.

    No token may have two followers. ends: ids in its generation_config.
    """
    V = len(tokenizer) + spare_rows
    config = LlamaConfig(
        vocab_size=V, hidden_size=V + V % 2, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()  # so that the last token alone decides
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(V, config.hidden_size))
        model.lm_head.weight.zero_()
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False).input_ids
            for token, following in pairwise(ids):
                assert not model.lm_head.weight[:, token].any(), f"{text}: two tokens follow one"
                model.lm_head.weight[following, token] = 1
    model.generation_config = GenerationConfig(eos_token_id=list(ends) or None)
    return model


def named_ends(tokenizer, style: str) -> list[int]:
    """Return the ids that the style's generation_config lists."""
    return tokenizer.convert_tokens_to_ids(STYLES[style][3])
