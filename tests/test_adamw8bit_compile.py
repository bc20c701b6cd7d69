"""Compiles the optimizer and packing kernels to machine code for the cards people have. Needs no GPU."""

import os
import re
import subprocess
import sys
from itertools import product

import pytest

from kit.kernels.backend import HAS_TRITON

CARDS = [80, 86, 89, 90, 120]  # A100; RTX 30; RTX 40; H100; RTX 50
SHARED_LIMIT = 101_376  # bytes a program may use on RTX 30, 40 and 50

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed (macOS)")


def compile_kernel(fn, card, signature, constants, num_warps, **options):
    """(PTX, shared memory in bytes, ptxas' report). Pointers and element counts are multiples of 16, as a launch sees them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(fn.arg_names)
        if name.endswith("_ptr") or name in ("N", "first_element")
    }
    signature = {name: signature.get(name, "constexpr") for name in fn.arg_names}
    compiled = triton.compile(
        ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attrs),
        target=GPUTarget("cuda", card, 32), options={"num_warps": num_warps, **options},
    )  # fmt: skip
    ptx = compiled.asm["ptx"]
    assert len(compiled.asm["cubin"]) > 1000
    gpu = re.search(r"\.target (\w+)", ptx).group(1)
    command = [get_ptxas(card).path, "-v", f"--gpu-name={gpu}", "-o", os.devnull, "-"]  # once more, to hear about spills
    report = subprocess.run(command, input=ptx, capture_output=True, text=True)
    assert report.returncode == 0, report.stderr
    return ptx, compiled.metadata.shared, report.stderr


def check(name, shared, report):
    assert "0 bytes spill stores, 0 bytes spill loads" in report, f"{name} spills: {report}"
    assert "0 bytes stack frame" in report, f"{name} uses local memory: {report}"
    assert shared <= SHARED_LIMIT, f"{name} uses {shared} bytes of shared memory, the limit is {SHARED_LIMIT}"
    print(name, shared, re.search(r"Used \d+ registers", report).group())


def bytes_of_accesses(ptx, pointer, kind):
    """The widths, in bytes, of the loads ("ld") or stores ("st") at addresses computed from parameter number `pointer`."""
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


def compile_adamw8bit(card, p, g):
    import kit.kernels.adamw8bit as source

    scales = {"m_scale_ptr": "*fp32", "v_scale_ptr": "*fp32"}
    integers = {"N": "i32", "first_element": "i64", "key": "i64"}
    names = ("gradient_scale", "keep1", "take1", "keep2", "take2", "correction", "eps", "rate", "shrink")
    signature = {"p_ptr": p, "g_ptr": g, "m_ptr": "*i8", "v_ptr": "*u8"} | scales | integers | dict.fromkeys(names, "fp32")
    constants = {name: getattr(source, name) for name in ("BLOCK", "BLOCKS", "M_LEVELS", "V_LEVELS")}
    name = f"adamw8bit sm_{card} p {p} g {g}"
    ptx, shared, report = compile_kernel(
        source._update_kernel, card, signature, constants, source.NUM_WARPS, enable_fp_fusion=False
    )
    check(name, shared, report)
    for pointer, kind in ((0, "ld"), (1, "ld"), (0, "st")):
        widths = bytes_of_accesses(ptx, pointer, kind)
        assert set(widths) == {16}, f"{name}: {kind} of argument {pointer} is {widths} bytes wide, one access should be 16"
    assert "fma.rn.f32" not in ptx, f"{name} fuses multiply and add: its bits would differ from the torch path's"


def compile_packing(card, kernel, element):
    import kit.kernels.packing as source

    fn = getattr(source, kernel)
    pointers = {"offsets_ptr": "*i64", "documents_ptr": "*i64", "prompt_lens_ptr": "*i64", "cu_seqlens_ptr": "*i32"}
    outputs = {"input_ids_ptr": "*i64", "targets_ptr": "*i64", "position_ids_ptr": "*i64"}
    payload = dict.fromkeys(("buffer_ptr", "values_ptr", "padded_ptr"), element)
    scalars = dict.fromkeys(("D", "T", "L", "C", "ignore_index", "bad_token"), "i32")
    signature = {name: kind for name, kind in (pointers | outputs | payload | scalars).items() if name in fn.arg_names}
    _, shared, report = compile_kernel(fn, card, signature, {"BLOCK": source.BLOCK}, source.NUM_WARPS)
    check(f"{kernel} sm_{card} {element}", shared, report)


def compile_all():
    """What the child process does. bf16 travels as int16; fp16 gradients load like it."""
    for card, p, g in product(CARDS, ("*i16", "*fp32"), ("*i16", "*fp32")):
        compile_adamw8bit(card, p, g)
    for card in CARDS:
        compile_packing(card, "_pack_kernel", "*i32")
        compile_packing(card, "_unpack_kernel", "*fp32")
        compile_packing(card, "_repack_kernel", "*fp32")


def test_the_kernels_compile_for_every_card_without_spills_and_load_16_bytes_at_a_time():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, f"\n{child.stdout[-3000:]}\n{child.stderr[-3000:]}"
    print(child.stdout)


if __name__ == "__main__":
    compile_all()
