"""A GGUF file that the kit writes, read by transformers: the same weights, logits, tokens and template."""

import copy
import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, SHAPE
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers import models as kinds
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from kit import models
from kit.data.toy import make_tokenizer
from kit.models import shipped
from kit.models.gguf_file import (
    LAYOUTS,
    check_exportable,
    file_bytes,
    restore_rotation,
    rotation_factors,
    write_gguf,
)
from kit.models.gguf_tokenizer import BY_WORDS, BYTE_LEVEL, CONTROL, UNUSED, USER_DEFINED, WORDS, Vocabulary
from kit.models.loading import load_config

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
GEMMA = SHAPE | {"num_hidden_layers": 7, "num_key_value_heads": 1, "tie_word_embeddings": True}
CONFIGS = {
    "llama": FAMILIES["llama"],
    "llama, tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama, heads of their own width": LlamaConfig(**SHAPE, head_dim=12),
    "qwen2": FAMILIES["qwen2"],
    "qwen3": Qwen3Config(**SHAPE, head_dim=128),
    "gemma3_text": Gemma3TextConfig(**GEMMA, head_dim=256, sliding_window=7),
}
LLAMA32 = LlamaConfig(**SHAPE | {"num_hidden_layers": 1, "head_dim": 64}, rope_parameters=LLAMA3)
IDS = torch.randint(3, 67, (2, 41), generator=torch.Generator().manual_seed(0))


def random_model(config):
    """A model whose weights, norms and biases included, are random and have the bits of bf16."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.1 * torch.randn_like(parameter)).bfloat16())
    return model


def read(path):
    """Read a file as anybody does: with transformers alone."""
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


@torch.no_grad()
def logits_of(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_the_weights_and_logits_that_were_written(tmp_path, name):
    model = random_model(CONFIGS[name])
    assert write_gguf(tmp_path / "m.gguf", model, make_tokenizer(), "bf16", name="of random numbers") == []
    found = read(tmp_path / "m.gguf")
    weights, expected = found.state_dict(), model.state_dict()
    assert weights.keys() == expected.keys()
    for key, tensor in expected.items():
        rounding = 2**-23 if "norm" in key else 0.0  # of 1 + w, in fp32
        assert (weights[key] - tensor).abs().max() <= rounding, key
    torch.testing.assert_close(logits_of(found), logits_of(model))
    sizes = {key: value for key, value in vars(model.config).items() if key in SHAPE}
    assert {key: getattr(found.config, key) for key in sizes} == sizes
    assert found.config.tie_word_embeddings == model.config.tie_word_embeddings


def test_q8_0_errs_by_half_a_step_at_most_and_f16_takes_matrices_whose_rows_it_cannot_split(tmp_path):
    model = random_model(FAMILIES["llama"])
    whole = write_gguf(tmp_path / "m.gguf", model, make_tokenizer(), "q8_0", name="m")
    assert whole == [f"blk.{layer}.ffn_down.weight" for layer in range(4)]  # rows of 48
    weights = read(tmp_path / "m.gguf").state_dict()
    for key, tensor in model.state_dict().items():
        error = (weights[key] - tensor).abs()
        if "down_proj" in key:
            assert error.max() <= tensor.abs().max() * 2**-11
        elif tensor.dim() == 2:
            blocks = error.unflatten(1, (-1, 32)), tensor.unflatten(1, (-1, 32)).abs()
            step = blocks[1].amax(-1) / 127
            # half a step, and the scale's own rounding to fp16, 127 times
            assert (blocks[0].amax(-1) <= step * (0.5 + 127 * 2**-11)).all(), key
        else:
            assert error.max() == 0
    written, num_weights = (tmp_path / "m.gguf").stat().st_size, sum(p.numel() for p in model.parameters())
    assert file_bytes(num_weights, "q8_0") < written < file_bytes(num_weights, "f16")


def test_f16_refuses_a_weight_that_it_cannot_hold_and_names_bf16(tmp_path):
    model = random_model(FAMILIES["qwen2"])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = -70_000.0
    with pytest.raises(ValueError, match=r"blk.1.ffn_up.weight has a weight beyond .* pass --gguf bf16"):
        write_gguf(tmp_path / "m.gguf", model, make_tokenizer(), "f16", name="m")


def test_the_scaled_rotation_of_llama_3_2_is_written_for_llama_cpp_and_restored_by_the_kit(tmp_path):
    model = random_model(LLAMA32)
    write_gguf(tmp_path / "m.gguf", model, make_tokenizer(), "bf16", name="m")
    factors = rotation_factors(LLAMA32)
    assert (factors[0], factors[-1]) == (1, pytest.approx(32)) and factors.diff().min() > -1e-5
    ours, _ = models.load(str(tmp_path / "m.gguf"), device="cpu", attention="torch")
    ours.set_attn_implementation("sdpa")
    assert ours.config.rope_parameters == model.config.rope_parameters
    torch.testing.assert_close(logits_of(ours), logits_of(model))
    # transformers alone does not: should it learn to, restore_rotation can go
    assert (logits_of(read(tmp_path / "m.gguf")) - logits_of(model)).abs().max() > 1e-3


def test_a_rotation_that_is_not_llama_3s_is_refused_when_it_is_read(tmp_path):
    config = LlamaConfig(**LLAMA32.to_dict() | {"rope_parameters": LLAMA3 | {"low_freq_factor": 2.0}})
    write_gguf(tmp_path / "m.gguf", random_model(config), make_tokenizer(), "bf16", name="m")
    with pytest.raises(ValueError, match="not those of Llama 3"):
        models.load(str(tmp_path / "m.gguf"), device="cpu")


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        (FAMILIES["gemma3"], "layer_types"),
        (LlamaConfig(**SHAPE, attention_bias=True), "attention_bias"),
        (Gemma3TextConfig(**GEMMA, head_dim=16), "query_pre_attn_scalar"),
        (Gemma3TextConfig(**GEMMA, head_dim=256, final_logit_softcapping=30.0), "softcap"),
        (LlamaConfig(**SHAPE, rope_parameters=LINEAR), "rope_type"),
        (Qwen3Config(**SHAPE, use_sliding_window=True, sliding_window=4, max_window_layers=2), "layer_types"),
    ],
    ids=["windows", "biases", "scale of attention", "cap", "linear rotation", "windows of Qwen"],
)  # fmt: skip
def test_a_model_that_a_reader_would_take_for_another_is_refused(config, fault):
    with pytest.raises(ValueError, match=f"{fault} of m is .* leave out --gguf"):
        check_exportable(config, "m")


def test_every_model_whose_config_ships_can_be_written():
    names = [path.stem.replace("--", "/") for path in Path(shipped.__file__).parent.glob("configs/*.json")]
    assert {check_exportable(load_config(name), name).name for name in names} == {
        layout.name for layout in LAYOUTS.values()
    }


def test_an_unknown_family_is_refused_with_those_that_are_known():
    config = LlamaConfig(**SHAPE)
    config.model_type = "mamba"
    with pytest.raises(ValueError, match=", ".join(LAYOUTS)):
        check_exportable(config, "m")
    with pytest.raises(ValueError, match=r"m.gguf holds a mamba model but .* pass the model's Hugging Face"):
        restore_rotation(Path("m.gguf"), config)


def reload(tmp_path, tokenizer, *, num_rows=0):
    config = LlamaConfig(**SHAPE | {"vocab_size": num_rows or len(tokenizer), "num_hidden_layers": 1})
    write_gguf(tmp_path / "m.gguf", random_model(config), tokenizer, "bf16", name="m")
    return AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")


def test_the_toys_tokenizer_and_template_survive_with_rows_of_padding(tmp_path):
    tokenizer = make_tokenizer()
    found = reload(tmp_path, tokenizer, num_rows=97)
    text = "<user>7+5-3?<assistant><think>7+5=12, recheck: 12-5=7 ok;\nno</think>\\boxed{9}<eos>"
    assert found(text).input_ids == tokenizer(text).input_ids
    assert found.chat_template == tokenizer.chat_template
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(found, name) == getattr(tokenizer, name)
    vocabulary = Vocabulary.of(tokenizer, 97)
    assert vocabulary.tokens[67:] == [f"[PAD{i}]" for i in range(67, 97)]
    assert set(vocabulary.types[67:]) == {UNUSED}
    assert vocabulary.types[tokenizer.eos_token_id] == CONTROL
    assert vocabulary.types[tokenizer.convert_tokens_to_ids("<think>")] == USER_DEFINED


TEXT = "Let x = 12345, it's\n\n  what  You'll  see in über 7%?!"


def trained(tokenizer, trainer_options, **special):
    from tokenizers.trainers import BpeTrainer

    lines = [TEXT, "it's what you'll see", "see in 12345 and 7", "what  it  is,  is"] * 5
    tokenizer.train_from_iterator(lines, BpeTrainer(vocab_size=400, show_progress=False, **trainer_options))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.add_tokens(["<think>"])
    fast.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"
    return fast


def byte_level(split):
    tokenizer = Tokenizer(kinds.BPE())
    splits = isinstance(split, pre_tokenizers.Split)
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splits)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytewise])
    tokenizer.decoder = decoders.ByteLevel()
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "special_tokens": ["<|endoftext|>"]}
    return trained(tokenizer, options, eos_token="<|endoftext|>")


REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "qwen2": pre_tokenizers.Split(Regex(WORDS + r"\p{N}" + REST), "isolated"),
    "llama-bpe": pre_tokenizers.Split(Regex(WORDS + r"\p{N}{1,3}" + REST), "isolated"),
    "smollm": pre_tokenizers.Digits(individual_digits=True),
}


@pytest.mark.parametrize("name", SPLITS)
def test_byte_level_bpe_keeps_its_tokens_types_and_way_of_splitting(tmp_path, name):
    tokenizer = byte_level(SPLITS[name])
    found, vocabulary = reload(tmp_path, tokenizer), Vocabulary.of(tokenizer, len(tokenizer))
    assert (vocabulary.kind, vocabulary.split) == (BYTE_LEVEL, name)
    text = f"<think>{TEXT}<|endoftext|>"
    assert found(text).input_ids == tokenizer(text).input_ids
    assert found.decode(found(text).input_ids) == text
    assert found.eos_token == "<|endoftext|>" and found.chat_template == tokenizer.chat_template


def by_words():
    """BPE as Gemma's: words with their spaces, bytes for what is unknown."""
    tokenizer = Tokenizer(kinds.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<end_of_turn>"]
    options = {"special_tokens": special + [f"<0x{byte:02X}>" for byte in range(256)], "limit_alphabet": 12}
    named = {"eos_token": "<end_of_turn>", "bos_token": "<bos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return trained(tokenizer, options | {"max_token_length": 6}, **named)


def merged_by_score(vocabulary, text):
    """SentencePiece's way: merge the neighbours with the highest score, the left ones first."""
    scores = dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    parts = list(text.replace(" ", "▁"))
    while pairs := [(-scores[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in scores]:
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def test_scores_lead_to_the_merges_that_they_stand_for():
    tokenizer = by_words()
    vocabulary = Vocabulary.of(tokenizer, len(tokenizer))
    assert vocabulary.kind == BY_WORDS and vocabulary.merges == ()
    letters = sorted({token for token in vocabulary.tokens if len(token) == 1 and token.isalpha()})
    rng, longest = random.Random(0), 0
    for _ in range(200):  # the order of merges decides for some
        text = " ".join("".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(5))
        expected = tokenizer.tokenize(text)
        assert merged_by_score(vocabulary, text) == expected
        longest = max(longest, *map(len, expected))
    assert longest > 2


def split_by(tokenizer, step):
    tokenizer.backend_tokenizer.pre_tokenizer = step


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda t: t.add_tokens(["<one more>"]), "has '<one more>' as id"),
        (lambda t: split_by(t, pre_tokenizers.ByteLevel(add_prefix_space=True)), "splits a text by"),
        (lambda t: split_by(t, pre_tokenizers.Whitespace()), "is a BPE model"),
    ],
    ids=["a token without a row", "a prefix space", "words"],
)
def test_a_tokenizer_that_the_file_cannot_express_is_refused(change, fault):
    tokenizer = byte_level(SPLITS["qwen2"])
    num_rows = len(tokenizer)
    change(tokenizer)
    with pytest.raises(ValueError, match=f"{fault}.* leave out --gguf"):
        Vocabulary.of(tokenizer, num_rows)
