"""Run the same experiment on Llama-3.2-1B-Instruct.

    python recipes/llama3_2_1b_8k.py              the paper's setting, on a GPU
    python recipes/llama3_2_1b_8k.py --smoke      the same path on a tiny model: any CPU, one minute, offline

Everything but the model is in recipes/gemma3_1b_8k.py: read that one. Time: not timed on a GPU.
"""

from dataclasses import dataclass

from kit.command import start
from kit.recipes import gemma3_1b_8k
from kit.recipes.gemma3_1b_8k import PRESETS, SMOKE, main


@dataclass(frozen=True)
class Config(gemma3_1b_8k.Config):
    # model
    model: str = "meta-llama/Llama-3.2-1B-Instruct"  # hub id, local folder, .gguf file, or "tiny"


if __name__ == "__main__":
    start(main, Config, smoke=SMOKE, presets=PRESETS)
