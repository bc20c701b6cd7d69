"""Evaluation: benchmarks, samples on disk, accuracy with its uncertainty."""

from kit.front_door import hand_on

__getattr__, __all__ = hand_on(
    __name__,
    {  # file -> names
        "measure": ["evaluate", "evaluate_all"],
        "settings": ["BenchmarkSettings", "EvaluationSettings", "ModelSettings"],
        "during_training": ["DuringTraining"],
        "benchmarks": ["BENCHMARKS", "Benchmark", "parse_benchmarks"],
        "results": ["Result", "paired_difference"],
    },
)
