"""The library: one noun per file. The Triton kernels are imported as `kit.kernels.*`."""

import os
import platform
import sys
from pathlib import Path

if not (Path(__file__).parent / "kernels").is_dir():  # an installed wheel has them inside
    __path__.append(str(Path(__file__).resolve().parents[1]))  # a checkout has kernels/ beside kit/

# Rows differ in length: without segments that can grow, the gaps between blocks of the last row's sizes can
# be as large as a row. torch reads this when it first allocates on a card. Not under WSL: with some cards,
# its driver fails on such segments (pytorch issue 192330).
has_segments = sys.platform == "linux" and "microsoft" not in platform.release().lower()
if has_segments and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
