"""The library: one noun a file. The Triton kernels are imported as `kit.kernels.*`."""

from pathlib import Path

if not (Path(__file__).parent / "kernels").is_dir():  # an installed wheel has them inside
    __path__.append(str(Path(__file__).resolve().parents[1]))  # in a source checkout, kernels/ lies beside kit/
