"""Compiles the attention kernels to machine code for the cards people have, as they are launched. Needs no GPU."""

import os
import re
import subprocess
import sys
from itertools import product

import pytest

from kit.kernels.backend import HAS_TRITON

CARDS = [80, 86, 89, 90, 120]  # A100; RTX 30; RTX 40; H100; RTX 50
SHARED_LIMIT = 101_376  # bytes a program may use on RTX 30, 40 and 50
KERNELS = ["forward", "dkdv", "dq"]
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# head_dim, element type, cards: all there is in 16 bit; what is rare, where registers and shared memory are scarcest
CASES = [
    *product((64, 128, 256), ("bf16", "fp16"), CARDS),
    *product((64, 128, 256), ("fp32",), (89, 90)),
    *product((16, 80), ("bf16",), (89,)),
]
SCALARS = {"T": "i32", "num_documents": "i32", "window": "i32", "scale": "fp32"}
POINTERS = {"logsumexp_ptr": "*fp32", "delta_ptr": "*fp32", "cu_seqlens_ptr": "*i32"}  # the others hold elements

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed (macOS)")


def compile_kernel(kernel, head_dim, element, card):
    """(registers a thread, bytes of shared memory, bytes of stack and spills, number of tensor-core instructions)"""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    from kit.kernels import packed_attention_tiles as tiles

    fn = getattr(tiles, f"_{kernel}_kernel")
    tile = tiles.tiles(head_dim, BYTES[element])[kernel]
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    constants = {"GROUP": 4, "D": head_dim, **tile}
    signature, attrs = {}, {}
    for i, name in enumerate(fn.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in SCALARS:
            signature[name] = SCALARS[name]
        else:  # pointers and strides, which Triton finds to be multiples of 16 where head_dim is
            signature[name] = POINTERS.get(name, f"*{element}") if name.endswith("_ptr") else "i32"
            attrs[i,] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attrs),
        target=GPUTarget("cuda", card, 32),
        options=options,
    )
    ptx = compiled.asm["ptx"]
    gpu = re.search(r"\.target (\w+)", ptx).group(1)
    command = [get_ptxas(card).path, "-v", f"--gpu-name={gpu}", "-o", os.devnull, "-"]  # once more, to hear about spills
    report = subprocess.run(command, input=ptx, capture_output=True, text=True)
    assert report.returncode == 0, report.stderr
    registers = int(re.search(r"Used (\d+) registers", report.stderr).group(1))
    local = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report.stderr).groups()
    num_mma = len(re.findall(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", ptx))
    return registers, compiled.metadata.shared, sum(map(int, local)), num_mma


def compile_all():
    """What the child process does."""
    for (head_dim, element, card), kernel in product(CASES, KERNELS):
        name = f"{kernel:8}head_dim {head_dim:<4}{element:5}sm_{card:<4}"
        registers, shared, local, num_mma = compile_kernel(kernel, head_dim, element, card)
        print(f"{name}{registers:4} registers {shared:6} bytes {num_mma:4} mma", flush=True)
        assert local == 0, f"{name} spills: {local} bytes of stack and spills"
        assert shared <= SHARED_LIMIT, f"{name} uses {shared} bytes of shared memory, the limit is {SHARED_LIMIT}"
        assert num_mma or element == "fp32", f"{name} multiplies without tensor cores"


def test_the_attention_kernels_compile_for_every_card_without_spills_and_with_tensor_cores():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, f"\n{child.stdout[-3000:]}\n{child.stderr[-3000:]}"
    print(child.stdout)


if __name__ == "__main__":
    compile_all()
