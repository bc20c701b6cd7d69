"""A baseline that several runs share: samples of the base model, drawn once and copied to each run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kit.disk import write_whole
from kit.evaluate.benchmarks import Benchmark
from kit.evaluate.results import Result
from kit.evaluate.sample_log import SampleLog
from kit.ranks import here
from kit.run import SAMPLES, read_json


def take_baseline(
    baseline: Path,
    wanted: Sequence[tuple[Benchmark, dict]],
    *,
    model: str,
    adapted: bool,
    folder: Path,
) -> dict[str, Result]:
    """Copy the samples of a finished run of recipes/evaluate.py into `folder`. Return benchmark -> result.

    wanted: the benchmarks, each with the header (kit.evaluate.measure.header_of) that this run's own
    evaluation would have. adapted: the run's model has adapters, maybe on an NF4 copy, so its weights are
    not the baseline's, and the model is compared by its name `model` instead of by its weights.
    Raises ValueError if the baseline is of another model, prompt, decoding or version, lacks a benchmark, or
    is unfinished.
    """
    stored = baseline / "config.json"
    if not stored.is_file():
        raise ValueError(
            f"baseline is {baseline} but no run is there (no config.json); "
            "pass a run folder of recipes/evaluate.py"
        )
    measured = read_json(stored).get("model")
    if adapted and measured != model:
        raise ValueError(
            f"baseline {baseline} measured {measured} but this run is of {model}; pass a baseline of {model}"
        )

    found = {}
    for benchmark, header in wanted:
        source = baseline / SAMPLES / f"{benchmark.name}.jsonl"
        result = Result.read(source)
        if not result.rows:
            raise ValueError(
                f"baseline {baseline} holds no samples of {benchmark.name}; pass one that measured it"
            )

        there = result.header | ({"model": header["model"]} if adapted else {})
        other = [key for key in {**header, **there} if there.get(key) != header.get(key)]
        changed = [f"{key} was {there.get(key)!r}, is {header.get(key)!r}" for key in other]
        if "questions" in other:
            changed.append(f"that is, {benchmark.source} now holds other questions or answers")
        if changed:
            raise ValueError(
                f"baseline {source} was evaluated with other settings: {'; '.join(changed)}; "
                "pass one that was evaluated as this run is"
            )

        done = {(row["question"], row["sample"]) for row in result.rows}
        needed = {(q.id, i) for q in benchmark.questions for i in range(header["num_samples"])}
        if num_missing := len(needed - done):
            raise ValueError(
                f"baseline {source} is unfinished, {num_missing} samples are missing; finish it with --resume"
            )

        for file in SampleLog(source).files if here().is_first else ():
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / file.name, file.read_bytes())
        found[benchmark.name] = result
    return found
