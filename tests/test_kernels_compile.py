"""Compiles the row kernels to machine code for the cards people have. Needs no GPU. They have no tl.dot, so no mma to find."""

import os
import re
import subprocess
import sys
from itertools import product

import pytest

from kit.kernels.backend import HAS_TRITON

CARDS = [80, 86, 89, 90, 120]  # A100; RTX 30; RTX 40; H100; RTX 50
SHARED_LIMIT = 101_376  # bytes a program may use on RTX 30, 40 and 50
KERNELS = {
    "logit_rows": ["_logprob_kernel", "_gradient_kernel"],
    "cross_entropy": ["_forward_kernel", "_backward_kernel"],
}
ELEMENTS = ["bf16", "fp32"]  # fp16 loads and stores like bf16
POINTERS = {"logits_ptr": None, "targets_ptr": "*i64"}  # the others are fp32
SCALARS = {"row_stride": "i32", "V": "i32", "ignore_index": "i32", "inv_temperature": "fp32"}

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed (macOS)")


def compile_kernel(module, kernel, card, element, softcap):
    """(shared memory in bytes, ptxas' report), with the launch options of the module itself."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    source = importlib.import_module(f"kit.kernels.{module}")
    fn = getattr(source, kernel)
    constants = {"BLOCK_V": source.BLOCK_V, "SOFTCAP": softcap}
    constants = {name: value for name, value in constants.items() if name in fn.arg_names}
    signature = {}
    for name in fn.arg_names:
        pointer = POINTERS.get(name, "*fp32") or f"*{element}"
        signature[name] = "constexpr" if name in constants else pointer if name.endswith("_ptr") else SCALARS[name]
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(fn.arg_names)
        if name.endswith("_ptr") or name in ("row_stride", "V")
    }
    compiled = triton.compile(
        ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attrs),
        target=GPUTarget("cuda", card, 32), options={"num_warps": source.NUM_WARPS},
    )  # fmt: skip
    ptx = compiled.asm["ptx"]
    assert len(compiled.asm["cubin"]) > 1000
    gpu = re.search(r"\.target (\w+)", ptx).group(1)
    command = [get_ptxas(card).path, "-v", f"--gpu-name={gpu}", "-o", os.devnull, "-"]  # once more, to hear about spills
    report = subprocess.run(command, input=ptx, capture_output=True, text=True)
    assert report.returncode == 0, report.stderr
    return compiled.metadata.shared, report.stderr


def compile_all():
    """What the child process does: every kernel, card and element type; the cap only where a kernel has one."""
    for (module, kernels), card in product(KERNELS.items(), CARDS):
        for kernel, element in product(kernels, ELEMENTS):
            for softcap in (0.0, 30.0) if module == "logit_rows" and element == "bf16" else (0.0,):
                name = f"{kernel} sm_{card} {element} softcap {softcap}"
                shared, report = compile_kernel(module, kernel, card, element, softcap)
                assert "0 bytes spill stores, 0 bytes spill loads" in report, f"{name} spills: {report}"
                assert "0 bytes stack frame" in report, f"{name} uses local memory: {report}"
                assert shared <= SHARED_LIMIT, f"{name} uses {shared} bytes of shared memory, the limit is {SHARED_LIMIT}"
                print(name, shared, re.search(r"Used \d+ registers", report).group())


def test_the_row_kernels_compile_for_every_card_without_spills():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, f"\n{child.stdout[-3000:]}\n{child.stderr[-3000:]}"
    print(child.stdout)


if __name__ == "__main__":
    compile_all()
