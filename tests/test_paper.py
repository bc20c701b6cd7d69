"""What the paper states beside what a run does: recipes have its settings by default, and say the rest."""

import importlib
from dataclasses import fields, replace

import pytest

from kit import paper
from kit.command_line import COMMANDS
from kit.paper import deviations, table_of

INSTRUCTION = "the instruction stands below the problem (from Qwen2.5-Math: in the system turn)"
ROUNDED = "AdamW with 8-bit states, bf16 weights rounded stochastically (paper: AdamW, bf16)"
RESTS = "AdamW with 8-bit states, bf16 weights with their fp32 rests (paper: AdamW, bf16)"
SUMS = "gradients are bf16, also while a step's rows add up (the paper does not say; ours)"
TRACES = [
    "whether a trace fits is counted in the model's own tokens (the paper does not say; ours)",
    "a step holds whole rows of packed traces, so batch_traces is its mean (paper: exactly so many)",
]


def config_of(word, **settings):
    return importlib.import_module(COMMANDS[word][0]).Config(**settings)


@pytest.mark.parametrize("exact", [False, True])
def test_the_defaults_of_fine_tuning_and_evaluation_differ_from_the_paper_in_what_no_setting_can_mend(exact):
    states = RESTS if exact else ROUNDED
    assert deviations(config_of("finetune", exact_weights=exact)) == [INSTRUCTION, states, SUMS, *TRACES]
    for row in paper.TABLE:
        sizes = {"num_traces": row.traces, "epochs": row.epochs, "batch_traces": row.batch_traces}
        assert deviations(config_of("finetune", exact_weights=exact, **sizes)) == [
            INSTRUCTION, states, SUMS, *TRACES
        ]  # fmt: skip
    assert deviations(config_of("evaluate")) == [INSTRUCTION]


def test_reinforcement_learning_is_the_papers_with_what_it_leaves_open_from_verl_and_the_rest_said():
    assert deviations(config_of("grpo")) == [
        INSTRUCTION,
        RESTS,
        SUMS,
        "no entropy bonus (from SimpleRL-Zoo: coefficient 0.001)",
        "old log-probs are the sampler's (from verl: computed again by the trainer)",
        "a group's standard deviation + 1e-4 (from verl: + 1e-6), and no clamp of k3 (from verl: at 10)",
    ]
    changed = {"normaliser": "sequences", "undecided_is_wrong": False, "dual_clip": 0.0, "weight_decay": 0.0}
    found = deviations(config_of("grpo", **changed, prompts="mine.jsonl"))
    assert {
        "normaliser sequences (from verl: tokens, the mean over the tokens of a mini-batch)",
        "undecided_is_wrong off (from SimpleRL-Zoo: an answer that cannot be graded scores 0)",
        "dual_clip 0 (from verl: 3)",
        "weight_decay 0 (from verl: 0.01)",
        "prompts mine.jsonl (paper: SimpleRL-Zoo's)",
    } < {*found}
    asked = config_of("grpo", prompts="hkust-nlp/SimpleRL-Zoo-Data:simplelr_qwen_level1to4")
    assert not [line for line in deviations(asked) if line.startswith("prompts")]


@pytest.mark.parametrize("word", ["finetune", "evaluate", "grpo"])
def test_every_setting_of_the_paper_that_a_recipe_changes_is_said_with_both_values_and_the_source(word):
    config = config_of(word)
    compared = [setting for setting in table_of(vars(config)) if hasattr(config, setting.name)]
    assert len(compared) > 9
    for setting in compared:
        if setting.name == "num_traces":  # which row of Table 2 it is decides about others
            continue
        other = {**vars(config), setting.name: "other"}
        said = [line for line in deviations(other) if line.startswith(f"{setting.name} ")]
        assert said == [f"{setting.name} other ({setting.source}: {setting})"]


def test_the_row_of_table_2_is_the_one_of_so_many_traces_or_the_next_smaller_one():
    assert [paper.Row.of(n).traces for n in (1, 8_000, 9_000, 127_999, 128_000, 500_000, 0)] == [
        8_000, 8_000, 8_000, 64_000, 128_000, 220_000, 220_000
    ]  # fmt: skip
    everything = config_of("finetune", num_traces=0, epochs=2, batch_traces=128)
    assert not [line for line in deviations(everything) if line.startswith(("num_traces", "epochs", "batch"))]


def test_what_is_no_single_setting_is_said_too():
    config = config_of("finetune", max_grad_norm=0.0, batch_traces=1, update_in_backward=True)
    found = deviations(replace(config, model="m.gguf", verify="none", instruction=""))
    for line in (
        "batch_traces 1 (paper: 8)",
        "max_grad_norm 0 (from LLaMA-Factory: 1.0, of all gradients together)",
        "verify none (paper: correct traces; by whose verdict it does not say)",
        "model m.gguf, which by its name is none of the paper's",
        "weights that a GGUF file has rounded (paper: bf16)",
        "each step is one row of packed traces, updated without a norm of all gradients",
    ):
        assert line in found, line
    assert INSTRUCTION not in found and f"instruction none (from Qwen2.5-Math: {paper.INSTRUCTION})" in found
    adapted = deviations(config_of("finetune", qlora_rank=8))
    assert "qlora_rank 8 (paper: all parameters)" in adapted
    assert "the frozen weights are rounded to NF4 (paper: bf16)" in adapted
    assert RESTS in adapted  # the adapters are in bf16, too
    on_cpu = deviations(config_of("finetune", device="cpu"))
    assert "device cpu (paper: bf16 on 8 H100)" in on_cpu and not [x for x in on_cpu if "AdamW" in x]
    for savings in ({"optimizer": "adamw8bit"}, {"offload_optimizer": True}):
        in_8_bits = deviations(config_of("finetune", device="cpu", **savings))
        assert "AdamW with 8-bit states (paper: AdamW, bf16)" in in_8_bits
    served = "a server samples, whose weights and dtype cannot be checked (paper: bf16)"
    assert deviations(config_of("evaluate", server="http://localhost:8000")) == [served, INSTRUCTION]
    for name in ("/data/Qwen2.5-0.5B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"):
        assert not [line for line in deviations({"model": name}) if line.startswith("model")]


@pytest.mark.parametrize(
    ("model", "levels", "told"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", "3to5", ["prompts of MATH levels 3-5 (paper: 1-4 for this model)"]),
        ("Qwen/Qwen2.5-1.5B-Instruct", "1to4", ["prompts of MATH levels 1-4 (paper: 3-5 for this model)"]),
        ("Qwen/Qwen2.5-1.5B-Instruct", "3to5", []),
        ("runs/gemma3_1b_8k/001/model", "1to4", []),  # its size is not in its name
    ],
)
def test_a_folder_of_prompts_with_other_levels_than_the_paper_gave_the_model_is_said(model, levels, told):
    found = deviations(config_of("grpo", model=model, prompts=f"zoo:simplelr_qwen_level{levels}"))
    assert [line for line in found if line.startswith("prompts")] == told


def test_a_run_folders_settings_are_compared_as_its_config_was_and_unknown_ones_are_not():
    config = config_of("finetune", lr=1e-4)
    stored = {field.name: getattr(config, field.name) for field in fields(config)}
    assert deviations(stored) == deviations(config)
    assert deviations({"num_traces": 8_000, "lr": 5e-5, "of_another_version": 1}) == []


def test_the_command_prints_every_setting_both_values_and_every_number(capsys):
    paper.main()
    printed = capsys.readouterr().out
    for word in ("finetune", "evaluate", "grpo"):
        settings = vars(config_of(word))
        for setting in table_of(settings):
            assert setting.name not in settings or f"  {setting.name} " in printed
    assert "220,000  2       128    3,437" in printed
    assert "gemma-3-1b-it: 24 % before, about a quarter of its 24 after 8,000 traces, 15 % after" in printed
    assert all(keyword in printed for keyword in paper.KEYWORDS)
    with pytest.raises(ValueError, match="'--plan' is not a flag"):
        paper.main(["--plan"])
