"""Take a trained model home: one plain folder, a GGUF file for llama.cpp and Ollama, and a model card.

    python recipes/export.py --model runs/gemma3_1b_8k/001                a Hugging Face folder and its card
    python recipes/export.py --model runs/gemma3_1b_8k/001 --gguf q8_0    and a GGUF file with a Modelfile
    python recipes/export.py --model runs/gemma3_1b_8k/001 --benchmark math500=math500.jsonl
    python recipes/export.py --smoke                                      the tiny model, seconds on any CPU

Adapters are merged into the base that they were trained on. Then everything that was written is loaded again,
and the greedy answers to twenty problems are graded and compared with those of the model as it was: "19 of 20
the same". The card holds what the run measured, with intervals, what differs from the paper, and the machine.

The GGUF file is read again by transformers. It was not tried in llama.cpp or Ollama. Left out on purpose:
formats below 8 bits (llama.cpp's own llama-quantize makes them from an f16 file), uploads to the hub.

Time: a 135M model takes minutes on one CPU core, most of them for the answers: --check 0 leaves them out.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kit import data, evaluate, memory, models, report
from kit.command import ONE_PROCESS, clean_up_if_refused, start, suggest
from kit.command_line import command_of, shell_word, started_as
from kit.config import Checked
from kit.data.problems import Question
from kit.disk import check_space, publish, scratch_beside
from kit.evaluate.results import read_results
from kit.extras import require
from kit.machine import GIB, one_thread_if_small, require_gpu
from kit.models.shipped import SHIPPED
from kit.paper import INSTRUCTION
from kit.run import AFTER, BEFORE, CONFIG, read_json
from kit.valley.finished import STUDY

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Config(Checked):
    # model
    model: str = ""  # run folder, model folder, folder of adapters, hub id, .gguf file, or "tiny"
    dtype: str = "auto"  # type of the written weights; auto: the model's or its base's [auto | bf16 | fp32]
    chat_template: str = ""  # "plain", "no_thinking", a Jinja file or a name of the model's; "" = its own
    # what is written
    gguf: str = ""  # also a GGUF file with matrices of this kind; "" = none [q8_0 | f16 | bf16]
    temperature: float = 0.6  # in Ollama's Modelfile [0 | 0.001..1000]
    top_p: float = 0.95  # in Ollama's Modelfile; 1 = off [> 0, <= 1]
    # check
    check: int = 20  # problems whose answers are compared; 0 = nothing is loaded again [0..1000]
    benchmark: str = ""  # name or name=FILE; "" = what the run was measured on, without a run the toy's
    max_new_tokens: int = 512  # tokens per answer; a longer one is cut off [>= 1]
    device: str = "auto"  # where answers are computed; auto: on a card if there is one [auto | cuda | cpu]
    # run
    smoke: bool = False  # the tiny model with a GGUF file, seconds
    out: str = ""  # folder to write; "" = exports/ and the name of the model


SMOKE = {"model": "tiny", "gguf": "q8_0", "device": "cpu"}


@dataclass(frozen=True)
class Source:
    """What is exported."""

    model: str  # as kit.models.load takes it
    name: str  # without spaces, which Ollama refuses
    base: str  # what it was trained from; itself if it was not trained here
    run: Path | None = None  # whose model it is


@clean_up_if_refused
def main(config: Config) -> Path:
    source = find_source(config.model)
    out = Path(config.out) if config.out else Path("exports") / source.name
    if out.exists():
        raise ValueError(f"{out} is there already; pass another --out, or delete it")
    loaded = models.loading.load_config(source.model)
    if config.gguf:
        require("--gguf", "gguf", "accelerate")
        models.gguf_file.check_exportable(loaded, source.model)
    dtype = dtype_of(config, loaded)
    num_weights = memory.flops.Sizes.of(loaded).weights
    needed = num_weights * dtype.itemsize
    if config.gguf:
        needed += models.gguf_file.file_bytes(num_weights, config.gguf)
    check_space(out, needed, f"{source.name} with {num_weights:,} weights")
    questions, instruction = find_questions(config, source)
    require_gpu(config.device, "the export", {f"{started_as()} --device auto": "here, on the CPU"})
    device = models.loading.default_device() if config.device == "auto" else config.device
    print(f"model       {source.model}: {num_weights:,} weights, {needed / GIB:.2f} GiB to write")

    scratch = scratch_beside(out)
    try:
        write_all(config, source, scratch, dtype, device, questions, instruction)
        publish(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # it is there only if something went wrong
    print(f"written     {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    if config.gguf:
        suggest("not tried here", "ollama create", source.name, "-f", str(out / "gguf" / "Modelfile"))
    else:
        smoke = ["--smoke"] * (models.loading.default_device().type == "cpu")
        suggest("measure it again", command_of("evaluate"), "--model", str(out), *smoke)
    return out


def dtype_of(config: Config, loaded) -> torch.dtype:
    """Return what weights are written in. loaded: the model's config."""
    import torch  # here, so that flags are read at once

    named = {"bf16": torch.bfloat16, "fp32": torch.float32}
    return named.get(config.dtype) or getattr(loaded, "dtype", None) or torch.bfloat16


def write_all(
    config: Config,
    source: Source,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device | str,
    questions: list[Question],
    instruction: str,
) -> None:
    """Write the model, its GGUF file and its card into a folder, and compare what was written."""
    model, tokenizer = models.load(source.model, device=device, dtype=dtype)
    one_thread_if_small(model)
    # which writes the template and all ends to both: they are saved
    chat = data.ChatFormat(tokenizer, model, template=config.chat_template, instruction=instruction)
    how = {"questions": questions, "max_new_tokens": config.max_new_tokens}
    answer, original = evaluate.same_answers.answer, []
    if questions:
        original = answer(model, chat, **how, description="answers of the original")
    if any(models.folder.adapter_ranks(source.model).values()):
        from kit.models.merge import merge  # peft takes seconds to import

        merge(model, dtype)
    model.to("cpu")
    models.folder.save_model(folder, model, tokenizer)
    copies = {"the folder": str(folder)}
    about = [f"{report.model_card.without_folders(source.base)}, exported.", ""]
    sections = report.model_card.of_run(source.run) if source.run else about

    if config.gguf:
        file = folder / "gguf" / f"{source.name}-{config.gguf}.gguf"
        file.parent.mkdir()
        whole = models.gguf_file.write_gguf(file, model, tokenizer, config.gguf, name=source.name)
        if whole:
            print(f"            {len(whole)} matrices are f16: {whole[0]} has rows that q8_0 cannot split")
        write_modelfile(file, model, tokenizer, config)
        copies["the GGUF file"] = str(file)
    checked = []
    for name, path in copies.items() if questions else ():
        model, tokenizer = models.load(path, device=device, dtype=dtype)
        chat = data.ChatFormat(tokenizer, model, instruction=instruction)
        copied = answer(model, chat, **how, description=f"answers of {name}")
        checked.append(f"{name}: {evaluate.same_answers.agreement(original, copied)}")
        print(f"checked     {checked[-1]}")
    sections = [*sections, *card_of_files(config, source, checked)]
    report.model_card.write(folder, source.name, source.base, sections)


def card_of_files(config: Config, source: Source, checked: list[str]) -> list[str]:
    """Return the card's lines about the files: how they are used, and what was checked."""
    lines = ["## Use", "", "    AutoModelForCausalLM.from_pretrained(FOLDER)", ""]
    if config.gguf:
        name = f"{source.name}-{config.gguf}.gguf"
        lines += [f'    AutoModelForCausalLM.from_pretrained(FOLDER + "/gguf", gguf_file="{name}")']
        lines += [f"    ollama create {shell_word(source.name)} -f FOLDER/gguf/Modelfile", ""]
        lines += ["The GGUF file was read again by transformers, not by llama.cpp or Ollama.", ""]
    if checked:
        limit = f"greedy answers of up to {config.max_new_tokens} tokens"
        lines += [f"Compared with the model as it was trained ({limit}):", ""]
        lines += [*(f"- {line}" for line in checked), ""]
    return lines


def find_source(name: str) -> Source:
    """Find what --model means. Raises ValueError for anything that is no model, and for an unfinished run."""
    if not name:
        raise ValueError("model is empty; pass --model and a run folder, such as runs/gemma3_1b_8k/001")
    path = Path(name).expanduser()
    if name in SHIPPED or not path.is_dir():
        models.loading.path_of(name)
        return Source(name, path.name.removesuffix(".gguf").replace(" ", "-"), name)
    run = path if is_run(path) else path.parent if path.name == "model" and is_run(path.parent) else None
    if (path / STUDY).is_file():
        cells = sorted(model.parent for model in path.glob("*/*/model"))
        such = f", such as {cells[0]}" if cells else ""
        raise ValueError(f"{path} is a study, which has many models; pass one of its folders{such}")
    settings = read_json(run / CONFIG) if run else {}
    if run == path and "model" not in settings:
        raise ValueError(
            f"{path} does not record which model it was trained from; pass the model that it wrote: "
            f"--model {path / 'model'}"
        )
    if "model" in settings:
        check_finished(run, settings)
        parts = [part for part in run.resolve().parts[-2:] if part != "cells"]
        return Source(str(run / "model"), "-".join(parts).replace(" ", "-"), str(settings["model"]), run)
    adapters = models.folder.ADAPTER_CONFIG
    if not any((path / file).is_file() for file in (CONFIG, adapters)):
        raise ValueError(
            f"{path} is neither a run nor a model: it holds no {CONFIG} and no {adapters}; pass a run folder "
            "such as runs/gemma3_1b_8k/001, or a model's"
        )
    return Source(str(path), path.resolve().name.replace(" ", "-"), str(path))


def is_run(path: Path) -> bool:
    """Return whether a folder is a run's: a model's config.json names its type."""
    return (path / CONFIG).is_file() and "model_type" not in read_json(path / CONFIG)


def check_finished(run: Path, settings: dict) -> None:
    """Raise ValueError, with the command to type, unless the run has its model and all its figures."""
    study = run.resolve().parent.parent
    if "group_size" not in settings and "num_traces" not in settings:
        raise ValueError(
            f"{run} only samples and measures, and trains nothing; pass the model that it measured: "
            f"--model {settings.get('model')}"
        )
    if (study / STUDY).is_file():
        word, resumed = ("sweep" if "preset" in read_json(study / CONFIG) else "demo"), study
    else:
        word, resumed = ("grpo" if "group_size" in settings else "finetune"), run
    before, after = (read_results(run / stage) for stage in (BEFORE, AFTER))
    missing = [name for name in before if name not in after or len(after[name].rows) < len(before[name].rows)]
    lacks = f"has not measured {', '.join(missing)} after it" if missing else ""
    lacks = lacks if (run / "model").is_dir() else "has no model yet"
    if lacks:
        command = f"{command_of(word)} --resume --out {shell_word(str(resumed))}"
        raise ValueError(f"{run} is not finished: it {lacks}; go on with: {command}")


def find_questions(config: Config, source: Source) -> tuple[list[Question], str]:
    """Return the problems to answer, and the line below each: the run's own unless others are asked for."""
    settings = read_json(source.run / CONFIG) if source.run else {}
    instruction = settings.get("instruction", "" if source.model in SHIPPED else INSTRUCTION)
    if not config.check:
        return [], instruction
    if config.benchmark:
        (benchmark, *more) = evaluate.parse_benchmarks(config.benchmark, limit=config.check)
        if more:
            raise ValueError(f"benchmark is {config.benchmark!r}, which is several; pass one")
        return list(benchmark.questions), instruction
    for result in read_results(source.run / AFTER).values() if source.run else ():
        rows = {row["question"]: row for row in result.rows}
        kept = sorted(rows)[: config.check]
        return [Question(key, rows[key]["problem"], rows[key]["answer"]) for key in kept], instruction
    return list(evaluate.BENCHMARKS["toy"].read(limit=config.check).questions), instruction


def write_modelfile(gguf: Path, model, tokenizer, config: Config) -> None:
    """Write Ollama's Modelfile beside a GGUF file."""
    ends = model.generation_config.eos_token_id
    ends = tokenizer.convert_ids_to_tokens([ends] if isinstance(ends, int) else ends)
    lines = [
        "# Not tried in Ollama. There is no TEMPLATE: Ollama takes the chat template of the GGUF file, if it",
        "# knows it. Should `ollama show --template` print {{ .Prompt }} alone, it does not: write one here.",
        f"FROM ./{gguf.name}",
        f"PARAMETER temperature {config.temperature:g}",
        f"PARAMETER top_p {config.top_p:g}",
        *(f'PARAMETER stop "{end}"' for end in ends),
    ]
    (gguf.parent / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    start(main, Config, alone=ONE_PROCESS, smoke=SMOKE)
