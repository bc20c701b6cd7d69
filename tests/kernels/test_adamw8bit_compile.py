"""Test the compiled kernel of the optimizer: 16-byte accesses and no fused operations. Needs no GPU."""

import os
import re
import subprocess
import sys

import pytest
from children import ROOT
from compiled import CARDS, compile_case
from kernel_report import cases

from kit.kernels.backend import HAS_TRITON

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed (macOS)"),
]


def bytes_of_accesses(ptx, pointer, kind):
    """Return the bytes per load ("ld") or store ("st") whose address comes from parameter no. `pointer`."""
    parameter = rf"ld\.param\.b64\s+(%rd\d+), \[\w+_param_{pointer}\];"
    addresses = {re.search(parameter, ptx).group(1)}
    widths = []
    for line in ptx.splitlines():
        step = re.search(r"(?:cvta\.to\.global\.u64|mad\.wide\.\w+|add\.s64)\s+(%rd\d+), (.*);", line)
        access = re.search(rf"\b{kind}\.global\S*?(?:\.v(\d))?\.b(\d+)\s.*\[\s*(%rd\d+)", line)
        if step and addresses & set(re.findall(r"%rd\d+", step[2])):
            addresses.add(step[1])
        if access and access[3] in addresses:
            widths.append(int(access[1] or 1) * int(access[2]) // 8)
    return widths


def check_accesses():
    updates = [case for case in cases() if case.kernel == "_update_kernel"]
    rests = [case for case in updates if "rest_ptr" not in case.launch]
    assert len(updates) == 6 and len(rests) == 2
    for case in updates:
        for card in (card for card in CARDS if card.capability in (80, 89, 120)):
            ptx = compile_case(case, card).ptx
            rest = ((6, "ld"), (6, "st")) if case in rests else ()
            for pointer, kind in ((0, "ld"), (1, "ld"), (0, "st"), *rest):
                widths = bytes_of_accesses(ptx, pointer, kind)
                assert set(widths) == {16}, (
                    f"{case.name} {card.name}: {kind} of argument {pointer} is {widths} bytes wide, not 16"
                )
            assert "fma.rn.f32" not in ptx, (
                f"{case.name} {card.name} fuses multiply and add: not the torch path's bits"
            )


def test_weights_rests_and_gradients_move_16_bytes_at_a_time_and_nothing_is_fused():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        str(ROOT / folder) for folder in ("", "recipes/bench", "tests")
    )
    child = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, f"\n{child.stdout[-3000:]}\n{child.stderr[-3000:]}"


if __name__ == "__main__":
    check_accesses()
