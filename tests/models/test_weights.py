"""What is broken on disk is refused where it is loaded, by name; what is right is not."""

import json
import shutil

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from kit import models
from kit.data.chat import ChatFormat
from kit.data.toy import make_tokenizer
from kit.models.folder import load_weights, save_model
from kit.models.shipped import SHIPPED
from kit.models.weights import check_finite, fingerprint

UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


def change(folder, weights=lambda tensors: tensors, file="model.safetensors", **config):
    """Rewrite a model's weights and some of its config."""
    tensors = weights(load_file(folder / file))
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / file, metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))


def copy_of_tiny(folder, **changes):
    shutil.copytree(SHIPPED["tiny"], folder)
    change(folder, **changes)
    return str(folder)


def without(name):
    return lambda tensors: {key: x for key, x in tensors.items() if key != name}


def with_value(value, name=UP):
    return lambda tensors: tensors | {name: tensors[name].index_fill(0, torch.tensor([3]), value)}


BROKEN = {
    "a weight is missing": ({"weights": without(UP)}, f"file lacks {UP}"),
    "the last norm is missing": ({"weights": without(NORM)}, f"file lacks {NORM}"),
    "fewer layers than the config": ({"num_hidden_layers": 5}, r"lacks model\.layers\.3\..* and 15 more"),
    "more layers than the config": ({"num_hidden_layers": 2}, r"has besides model\.layers\.2\..* and 6 more"),
    "an untied head is missing": ({"tie_word_embeddings": False}, "file lacks lm_head.weight"),
    "names of torch.compile": (
        {"weights": lambda tensors: {f"_orig_mod.{name}": x for name, x in tensors.items()}},
        r"lacks lm_head\.weight.* has besides _orig_mod\.model\.layers\.0.*save the model that was compiled",
    ),
    "another shape": ({"weights": lambda t: t | {UP: t[UP][:-1]}}, f"in another shape {UP}"),
    "NaN": ({"weights": with_value(float("nan"))}, f"holds NaN or infinity in {UP}"),
    "infinity": (
        {"weights": with_value(-float("inf"), "model.norm.weight")},
        "infinity in model.norm.weight",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_folder_with_broken_weights_is_refused_by_name(tmp_path, fault, capfd):
    changes, message = BROKEN[fault]
    with pytest.raises(ValueError, match=message):
        models.load(copy_of_tiny(tmp_path / "model", **changes), device="cpu")
    assert "LOAD REPORT" not in capfd.readouterr().err  # it advises to train what is missing


def test_a_truncated_file_is_called_damaged(tmp_path):
    folder = copy_of_tiny(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:9_999])
    with pytest.raises(ValueError, match=r"a weights file of .* is damaged"):
        models.load(folder, device="cpu")


def test_broken_weights_are_refused_where_a_model_is_quantised(tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = copy_of_tiny(tmp_path / "model", weights=without(UP))
    with pytest.raises(ValueError, match=f"file lacks {UP}"):
        models.load_to_train(folder, qlora_rank=2, device="cpu")


RIGHT = {
    "the head that is the embedding": {"weights": without("lm_head.weight")},
    "a value head besides": {"weights": lambda t: t | {"v_head.summary.weight": torch.zeros(1, 96)}},
    "rotations of old Llamas": {"weights": lambda t: t | {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(12) for i in range(3)
    }},
    "an embedding stored a second time": {
        "weights": lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()}
    },
}  # fmt: skip


@pytest.mark.parametrize("case", RIGHT)
def test_a_folder_with_all_weights_is_loaded(tmp_path, case):
    model, _ = models.load(copy_of_tiny(tmp_path / "model", **RIGHT[case]), device="cpu")
    assert fingerprint(model) == fingerprint(models.load("tiny", device="cpu")[0])


def write_gguf(path, model, *, left_out=""):
    import gguf

    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(
        ["<pad>", "<s>", "</s>", "!!", *(chr(33 + i) for i in range(config.vocab_size - 4))]
    )
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name != left_out:
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_loaded_whole_or_not_at_all(tmp_path):
    pytest.importorskip("gguf")
    model, path = make_model("llama"), str(tmp_path / "m.gguf")
    write_gguf(path, model)
    loaded, _ = models.load(path, device="cpu")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name in ("lm_head.weight", UP):
        assert torch.equal(loaded.state_dict()[name], model.state_dict()[name])
    write_gguf(path, model, left_out=UP)
    with pytest.raises(ValueError, match=f"m.gguf are not .* its file lacks {UP}"):
        models.load(path, device="cpu")


def test_a_gguf_file_without_a_chat_template_is_refused_by_its_own_name(tmp_path):
    pytest.importorskip("gguf")
    write_gguf(str(tmp_path / "m.gguf"), make_model("llama"))
    _, tokenizer = models.load(str(tmp_path / "m.gguf"), device="cpu")
    with pytest.raises(ValueError, match=r"m\.gguf has no chat template \(a base model\?\)"):
        ChatFormat(tokenizer)


def test_adapters_that_are_not_finite_or_truncated_are_refused(tmp_path):
    theirs = get_peft_model(models.load("tiny", device="cpu")[0], LoraConfig(target_modules=["q_proj"]))
    theirs.peft_config["default"].base_model_name_or_path = "tiny"
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    models.load(str(tmp_path), device="cpu")
    file = tmp_path / "adapter_model.safetensors"
    whole = file.read_bytes()
    tensors = load_file(file)
    name = next(key for key in tensors if "layers.2" in key)
    save_file(tensors | {name: tensors[name] * float("inf")}, file)
    with pytest.raises(ValueError, match=r"NaN or infinity in .*layers\.2\.self_attn\.q_proj\.lora_A"):
        models.load(str(tmp_path), device="cpu")
    file.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged"):
        models.load(str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (lambda t: t | {UP: t[UP][:-1]}, rf"{UP} is \(47, 32\) torch.float32 there and \(48, 32\)"),
        (
            lambda t: t | {UP: t[UP].bfloat16()},
            rf"{UP} is .*bfloat16 there and .*float32 here",
        ),
        (without(UP), f"it lacks {UP} and has nothing besides; pass the --model"),
        (with_value(float("nan")), f"NaN or infinity in {UP}"),
    ],
)
def test_weights_that_a_run_cannot_go_on_from_are_refused_and_change_nothing(tmp_path, weights, message):
    model = make_model("llama")
    save_model(tmp_path / "step", model, make_tokenizer())
    change(tmp_path / "step", weights)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path / "step", model)
    assert fingerprint(model) == before


def test_only_the_tensors_that_are_not_finite_are_named():
    tensors = {f"w{i}": torch.full((3,), 3e38, dtype=torch.bfloat16) for i in range(9)}
    tensors |= {"codes": torch.ones(3, dtype=torch.uint8), "empty": torch.zeros(0)}
    check_finite(tensors, "m")
    for i in (1, 4, 5, 8):
        tensors[f"w{i}"][i % 3] = float("nan") if i % 2 else float("inf")
    with pytest.raises(ValueError, match=r"m holds NaN or infinity in w1, w4, w5 and 1 more: "):
        check_finite(tensors, "m")


def test_a_fingerprint_sees_one_bit_and_two_swapped_numbers():
    model = make_model("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    seen = [fingerprint(model)]
    with torch.no_grad():
        weight[0, 0], weight[5, 7] = weight[5, 7].clone(), weight[0, 0].clone()
        seen.append(fingerprint(model))
        weight.view(torch.int32)[47, 31] ^= 1
        seen.append(fingerprint(model))
    assert len(set(seen)) == 3


def test_a_fingerprint_does_not_depend_on_the_number_of_threads():
    """A sum of a million floats does, and a run could then not be resumed on another machine."""
    torch.manual_seed(0)
    layer, threads, found = torch.nn.Linear(1152, 1000), torch.get_num_threads(), set()
    try:
        for number in (1, 2, 3, 4):
            torch.set_num_threads(number)
            found.add(fingerprint(layer))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1
