"""Packaging. `kernels/` and `recipes/` lie beside `kit/` in the source, and are installed as parts of it.

Neither may put a name of its own on the path: Hugging Face publishes packages called `kernels`, which `import
transformers` looks for, and `evaluate`, which is also a recipe.

What is installed by default runs the demo, the reports and the evaluation of a plain model. The extra
`train` adds what only some features need: the kernels, QLoRA, adapters, GGUF files, data sets of the hub.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

# pages of package indexes show neither its pictures nor what its relative links point to
README = re.sub(r"!\[[^]]*\]\([^)]*\)\n*", "", Path("README.md").read_text(encoding="utf-8"))
README = re.sub(r"\[([^]]*)\]\((?!https://)[^)]*\)", r"\1", README)

# Here and below: the tests have passed on the lower ends and on what .ci/constraints.txt lists. Up to the
# next major version, a recipe says at its start what is newer than that (kit/versions.py).
TRAIN = [
    'triton>=3.6,<4; platform_system == "Linux"',
    'triton-windows>=3.6,<4; platform_system == "Windows"',
    "peft>=0.21,<1",
    "bitsandbytes>=0.50,<1",
    "datasets>=5.2,<6",
    "accelerate>=1.15,<2",
    "gguf>=0.19,<1",
]
PEERS = [  # what tests and benchmarks compare with
    "trl>=1.16,<2",
    "math-verify[antlr4_13_2]>=0.9,<1",
    'liger-kernel>=0.8,<1; platform_system == "Linux"',
    'cut-cross-entropy>=25.1,<26; platform_system == "Linux"',
]

setup(
    name="through-the-valley-kit",
    version="0.1.0",
    description="Long-CoT training of small models on one consumer GPU: 'Through the Valley' (EMNLP 2025)",
    long_description=README,
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.14",
    project_urls={"Paper": "https://arxiv.org/abs/2506.07712"},
    keywords="language models, chain of thought, fine-tuning, QLoRA, GRPO, Triton, consumer GPU",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=[*find_packages(include=["kit", "kit.*"]), "kit.kernels", "kit.recipes", "kit.recipes.card"],
    package_dir={"kit.kernels": "kernels", "kit.recipes": "recipes"},
    entry_points={"console_scripts": ["valley = kit.command_line:main"]},
    package_data={"kit.models": ["shipped/*/*"]},
    install_requires=[
        "torch>=2.10,<3",
        "transformers>=5.20,<6",
        "sympy>=1.14,<2",
        "safetensors>=0.8,<1",
        "matplotlib>=3.10,<4",
        "tqdm>=4.66,<5",
    ],
    extras_require={
        "train": TRAIN,
        "test": [
            *TRAIN,
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            "hypothesis>=6.100,<7",
            "ruff>=0.12",
            "kernels>=0.10",
            "nbclient>=0.10,<1",  # runs the lesson
            "ipykernel>=7,<8",
            "tensorboard>=2.20,<3",
            *PEERS,
        ],
        "peers": PEERS,
    },
)
