"""What ships with the kit: two tiny models, the toy's traces and problems, and the configs of real models."""

from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"  # config.json of models that a plan covers without a download
TINY = Path(__file__).parent / "tiny"  # a model, and the toy's traces and problems
SHIPPED = {"tiny": TINY, "tinier": TINY.with_name("tinier")}  # models by name; the second is the smaller one
