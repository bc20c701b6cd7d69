"""Compile every kernel to machine code for common cards, with recipes/bench/kernel_report.py. Needs no GPU.

TRITON_INTERPRET is read when Triton is imported, so compiling runs in a child process without it.
"""

import json
import multiprocessing
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
from children import ROOT
from compiled import CARDS, Case, Compiled, compile_case
from kernel_report import Config, cases, chosen, line

from kit.kernels.backend import HAS_TRITON, tl, triton

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed (macOS)")
TARGETS = [card for card in CARDS if card.capability >= 80]


@triton.jit
def _matmul_kernel(a_ptr, b_ptr, c_ptr, num_steps, BLOCK: tl.constexpr):
    """Multiply tiles: a kernel with a dot, to see that the report finds tensor-core instructions."""
    rows, acc = tl.arange(0, BLOCK), tl.zeros((BLOCK, BLOCK), tl.float32)
    tile = rows[:, None] * BLOCK + rows[None, :]
    for step in range(num_steps):
        a, b = tl.load(a_ptr + tile + step * BLOCK * BLOCK), tl.load(b_ptr + tile + step * BLOCK * BLOCK)
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + tile, acc.to(c_ptr.dtype.element_ty))


@triton.jit
def _hoarding_kernel(x_ptr, BLOCK: tl.constexpr):
    """Keep BLOCK numbers in registers during a sum: 512 per thread with one warp and 16,384 numbers."""
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(x_ptr + tl.arange(0, BLOCK), x / tl.sum(x, 0))


def matmul(**options):
    launch = {"BLOCK": 64, **options}
    return Case(sys.modules[__name__], "_matmul_kernel", "bf16", "", launch, {"num_steps": "i32"})


# loops x products of an attention kernel, each of BLOCK_M x BLOCK_N x D; of two loops, one masks its tiles
PRODUCTS = {"_forward_kernel": 2 * 2, "_dq_kernel": 2 * 3, "_dkdv_kernel": 2 * 4, "_split_kernel": 2}
MAX_SPILLED = 64  # bytes per thread, of attention: fewer than computing a product twice costs


def tensor_core_macs(compiled: Compiled) -> int:
    """Count the multiply-adds of a program's tensor-core instructions, those in a loop once.

    mma.sync is an instruction of a warp, wgmma of four.
    """
    pattern = r"^\s*(?:@\S+ )?(mma\.sync|wgmma\.mma_async)\S*?\.m(\d+)n(\d+)k(\d+)"
    found = re.findall(pattern, compiled.ptx, re.MULTILINE)
    macs = (int(m) * int(n) * int(k) / (1 if kind == "mma.sync" else 4) for kind, m, n, k in found)
    return round(sum(macs) * compiled.case.options["num_warps"])


def complaints(compiled: Compiled) -> list[str]:
    """Return what is wrong with a kernel."""
    found, is_attention = [], "attention" in compiled.case.name
    if compiled.spilled > MAX_SPILLED * is_attention:
        found.append(f"{compiled.spilled} bytes per thread spill to memory")
    if is_attention and compiled.tensor_core:
        sizes = compiled.case.launch
        needed = PRODUCTS[compiled.case.kernel] * sizes["BLOCK_M"] * sizes["BLOCK_N"] * sizes["BLOCK_D"]
        if (done := tensor_core_macs(compiled)) != needed:
            found.append(f"tensor cores do {done:,} multiply-adds, {needed:,} are needed")
    if compiled.shared > compiled.shared_limit:
        found.append(
            f"does not fit: {compiled.shared} bytes of shared memory, {compiled.shared_limit} are allowed"
        )
    if compiled.has_dot and compiled.case.element != "fp32" and not compiled.tensor_core:
        found.append("has a dot but no tensor-core instruction")
    if compiled.case.element != "fp32" and 16 not in compiled.loads:
        found.append(f"never loads 16 bytes at once: {compiled.loads}")
    return found


def worth_compiling(case: Case, card) -> bool:
    """Return whether the test compiles this case for this card; the report compiles all.

    Everything is compiled for RTX 40. fp16 and fp32 compile like bf16, so on other cards bf16 is enough.
    RTX 30 is RTX 40 without fp8 and has as much shared memory: only attention, which comes near both limits,
    is compiled for it.
    """
    if card.capability == 89:
        return True
    is_attention = "attention" in case.name
    return (is_attention or card.capability != 86) and (
        case.element not in ("fp16", "fp32") or "packing." in case.name
    )


def judge(job: tuple[int, int]) -> tuple[str, list[str]]:
    """Return (a line of the report, what is wrong) for the indices of a case and a target."""
    card = TARGETS[job[1]]
    case = cases(card.capability)[job[0]]
    compiled = compile_case(case, card)
    return f"{card.name} {line(compiled)}", [
        f"{case.name} on {card.name}: {wrong}" for wrong in complaints(compiled)
    ]


def check_every_case():
    everything = [
        (i, j)
        for i, case in enumerate(cases())
        for j, card in enumerate(TARGETS)
        if worth_compiling(case, card)
    ]
    # safe to fork: nothing has run here yet
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("fork")) as pool:
        lines, found = zip(*pool.map(judge, everything, chunksize=4), strict=True)
    print("\n".join(lines))
    assert not any(found), "\n".join(wrong for each in found for wrong in each)


def check_dots():
    for card in CARDS:
        if card.capability in (80, 86):  # like 89
            continue
        compiled = compile_case(matmul(), card)
        kinds = (
            {"wgmma.mma_async"} if card.capability == 90 else {"mma.sync"} if card.capability >= 80 else set()
        )
        assert compiled.has_dot and set(compiled.tensor_core) == kinds, (card.name, compiled.tensor_core)
        assert card.capability < 80 or (set(compiled.loads) == {16} and not complaints(compiled))


def check_bad():
    card = next(card for card in CARDS if card.capability == 89)
    launch = {"BLOCK": 16_384, "num_warps": 1}
    hoarding = Case(sys.modules[__name__], "_hoarding_kernel", "fp32", "", launch)
    assert "spill" in complaints(compile_case(hoarding, card))[0]
    twice = next(case for case in cases() if case.name == "packed_attention_tiles._forward_kernel bf16 D 256")
    twice = replace(twice, launch=twice.launch | {"num_warps": 8})
    assert "are needed" in complaints(compile_case(twice, card))[0]
    deep = matmul(num_stages=9)  # 8 KiB per tile, two tiles per stage
    assert any("does not fit" in complaint for complaint in complaints(compile_case(deep, card)))
    for missing in ("launch", "arguments"):
        with pytest.raises(ValueError, match=r"'(BLOCK|num_steps)' has neither"):
            compile_case(replace(matmul(), **{missing: {}}), card)


def run_child(*args, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(str(ROOT / folder) for folder in ("", "recipes/bench", "tests"))
    return subprocess.run(
        [sys.executable, *args],
        env=inherited | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@needs_triton
def test_every_case_compiles_well_a_dot_shows_its_tensor_cores_and_bad_kernels_are_found():
    child = run_child(__file__)
    assert child.returncode == 0, f"\n{child.stdout[-3000:]}\n{child.stderr[-3000:]}"
    print(child.stdout)


def test_ptx_is_read_right():
    ptx = """
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    ld.global.L1::evict_last.v2.b64 { %rd3, %rd4 }, [ %rd1 + 0 ];
    @%p2 ld.global.b16 { %rs1 }, [ %rd2 + 0 ];
    ld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %r9 ];
    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd4 + 0 ], 0x10, %r2;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %f1 }, { %r1 }, { %r2 }, { %f1 };
    """
    compiled = Compiled(matmul(), CARDS[0], "", 0, ptx, True)
    assert compiled.loads == {16: 3, 2: 1} and compiled.tensor_core == {"mma.sync": 1}


@pytest.mark.slow
@needs_triton
def test_the_command_prints_one_card_and_writes_json(tmp_path):
    flags = ["--card", "75", "--kernel", "cross_entropy._forward", "--json", str(tmp_path / "x")]
    child = run_child(str(ROOT / "recipes/bench/kernel_report.py"), *flags)
    assert child.returncode == 0 and "FP_FUSION" not in child.stderr, child.stderr
    rows = json.loads((tmp_path / "x").read_text())
    assert {row["target"] for row in rows} == {"sm_75"} and len(rows) == 3
    assert "no tensor cores from this compiler" in child.stdout and all(
        0 < row["registers"] <= 255 for row in rows
    )


@needs_triton
def test_the_command_refuses_the_interpreter():
    child = run_child(str(ROOT / "recipes/bench/kernel_report.py"), TRITON_INTERPRET="1")
    assert (
        child.returncode == 1
        and "error: TRITON_INTERPRET is 1" in child.stderr
        and "Traceback" not in child.stderr
    )


def test_a_kernel_or_card_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(ValueError, match=r"kernel is 'nothing' but.*_gradient_kernel"):
        chosen(Config(kernel="nothing"))
    with pytest.raises(ValueError, match=r"card is 88 but.*89 \(RTX 40\)"):
        chosen(Config(card=88))
    ((card, kernels),) = chosen(Config(kernel="._gradient_kernel bf16", card=89)).items()
    assert card.capability == 89 and len(kernels) == 2


def test_without_triton_the_command_says_what_to_do():
    child = run_child("-c", """
import sys
sys.modules["triton"] = None  # import triton now raises ImportError, as on macOS
from kernel_report import Config, main
try:
    main(Config())
except ValueError as error:
    print(error)
""")  # fmt: skip
    assert "pip install triton" in child.stdout, child.stderr


if __name__ == "__main__":
    check_every_case()
    check_dots()
    check_bad()
