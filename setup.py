"""Packaging. `kernels/` lies beside `kit/` in the source and is installed as `kit.kernels`.

It must never be importable as a top-level `kernels`: Hugging Face publishes a package of that name, and
`import transformers` looks for it.
"""

from pathlib import Path

from setuptools import find_packages, setup

TRITON = [
    'triton>=3.6,<3.10; platform_system == "Linux"',
    'triton-windows>=3.6,<3.10; platform_system == "Windows"',
]
PEERS = [  # what tests and benchmarks compare with
    "trl>=1.16,<1.17",
    "math-verify[antlr4_13_2]>=0.9,<0.10",
    'liger-kernel>=0.8,<0.9; platform_system == "Linux"',
    'cut-cross-entropy>=25.1,<25.2; platform_system == "Linux"',
]

setup(
    name="through-the-valley-kit",
    version="0.1.0",
    description="Long-CoT training of small models on one consumer GPU: 'Through the Valley' (EMNLP 2025)",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.14",
    packages=[*find_packages(include=["kit", "kit.*"]), "kit.kernels"],
    package_dir={"kit.kernels": "kernels"},
    package_data={"kit.models": ["shipped/*/*"]},
    install_requires=[  # the ranges whose ends the tests have passed on; widen them by testing
        "torch>=2.10,<2.14",
        "transformers>=5.20,<5.24",
        *TRITON,
        "peft>=0.21,<0.22",
        "bitsandbytes>=0.50,<0.51",
        "datasets>=5.2,<5.3",
        "accelerate>=1.15,<1.16",
        "gguf>=0.19,<0.20",
        "sympy>=1.14,<1.15",
        "safetensors>=0.8,<0.9",
        "matplotlib>=3.10,<3.12",
        "tqdm>=4.66,<5",
    ],
    extras_require={
        "test": [
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            "hypothesis>=6.100,<7",
            "ruff>=0.12",
            "kernels>=0.10",
            *PEERS,
        ],
        "flash-attn": ["flash-attn>=2.7"],
        "peers": PEERS,
    },
)
