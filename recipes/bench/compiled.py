"""
Compile a kernel for a card that is not there, and read registers, spills, shared memory and instructions.

How it works. Triton compiles a kernel ahead of time for any card it knows; no GPU and no driver are needed.
ptxas then runs once more on the PTX with -v, which prints registers and spills. Loads and tensor-core
instructions are counted in the PTX, so an instruction in a loop counts once. Nothing here is timed.
"""

import os
import re
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType

from kit.kernels.backend import HAS_TRITON, INTERPRET, triton


@dataclass(frozen=True)
class Card:
    """A target of the compiler.

    Source: NVIDIA, CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
    """

    capability: int  # 89 = sm_89
    name: str
    shared_kib: int  # of shared memory, the most that one program can use


CARDS = [
    Card(75, "RTX 20", 64),
    Card(80, "A100", 163),
    Card(86, "RTX 30", 99),
    Card(89, "RTX 40", 99),
    Card(90, "H100", 227),
    Card(120, "RTX 50", 99),
]


# The types of the arguments with these names, unless a case gives another. "i32:16" = a multiple of 16, as
# nearly all strides are, which lets the compiler load 16 bytes at once.
NAMES = {
    "*i32": "cu_seqlens_ptr input_ids_ptr position_ids_ptr",
    "*i64": "keys_ptr lengths_ptr offsets_ptr positions_ptr prompt_lens_ptr targets_ptr tokens_ptr",
    "*fp32": "delta_ptr dloss_ptr entropy_ptr logprobs_ptr logsumexp_ptr logsumexps_ptr loss_ptr parts_ptr "
    "r_ptr threshold_ptr",
    "i32": "Hkv Hq N T W bad_token ignore_index num_documents num_parts num_splits num_tiles split_keys "
    "steps top_k window",
    "i32:16": "H K V first width",
    "fp32": "cube eps inv_temperature noise offset scale slope temperature top_p",
}
TYPES = {name: kind for kind, names in NAMES.items() for name in names.split()}
OPTIONS = "num_warps", "num_stages", "enable_fp_fusion"  # of a launch


@dataclass(frozen=True)
class Case:
    """One kernel with one launch configuration, everything its compilation depends on.

    launch: OPTIONS and tl.constexpr arguments, as a launch has them. The warps and the constants that are
    missing are those of the module, NUM_WARPS and what has the argument's name; superfluous ones are ignored.
    arguments: Triton's type of arguments, "*bf16", "i32", "fp32". If a name is missing here and in TYPES, one
    that ends in `_ptr` is a pointer to `element`, and one with `stride` in it is "i32:16".
    """

    module: ModuleType
    kernel: str  # its name in module
    element: str  # of the big tensors: "bf16", "fp16", "fp32"
    label: str = ""  # what distinguishes it from the kernel's other cases
    launch: dict[str, object] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        kernel = f"{self.module.__name__.split('.')[-1]}.{self.kernel}"
        return " ".join(filter(None, (kernel, self.element, self.label)))

    def argument_type(self, name: str) -> str:
        if found := (TYPES | self.arguments).get(name):
            return found
        if name.endswith("_ptr"):
            return f"*{self.element}"
        if "stride" in name:
            return "i32:16"
        raise ValueError(
            f"{self.name}: argument {name!r} has neither a type nor a value; add it to arguments or launch"
        )

    @property
    def options(self) -> dict[str, int]:
        """Return the options of the launch. Three stages are Triton's own default."""
        options = {"num_warps": getattr(self.module, "NUM_WARPS", 4), "num_stages": 3}
        return options | {name: value for name, value in self.launch.items() if name in OPTIONS}


@dataclass(frozen=True)
class Compiled:
    case: Case
    card: Card
    ptxas: str  # its report
    shared: int  # bytes per program
    ptx: str
    has_dot: bool

    def _reported(self, pattern: str) -> int:
        found = re.search(pattern, self.ptxas)
        if found is None:
            raise ValueError(f"{self.case.name}: ptxas no longer reports {pattern!r}; it said {self.ptxas!r}")
        return int(found.group(1))

    @property
    def registers(self) -> int:
        return self._reported(r"Used (\d+) registers")

    @property
    def spilled(self) -> int:
        """Return the bytes per thread of spills and of everything else in local memory."""
        kinds = "stack frame", "spill stores", "spill loads"
        return sum(self._reported(rf"(\d+) bytes {kind}") for kind in kinds)

    @property
    def shared_limit(self) -> int:
        return self.card.shared_kib * 1024

    @cached_property
    def tensor_core(self) -> dict[str, int]:
        """Count the tensor-core instructions in the PTX."""
        pattern = r"^\s*(?:@\S+ )?(mma\.sync|wgmma\.mma_async|tcgen05\.mma)"
        return dict(Counter(re.findall(pattern, self.ptx, re.MULTILINE)))

    @cached_property
    def loads(self) -> dict[int, int]:
        """Count global loads, asynchronous ones too: bytes per thread -> number of instructions."""
        widths = Counter()
        for line in self.ptx.splitlines():
            if found := re.search(r"ld\.global[\w.:]*\.[busf](\d+)\s", line):
                vector = re.search(r"\.v(\d)\.", line)
                widths[int(found.group(1)) // 8 * int(vector.group(1) if vector else 1)] += 1
            elif found := re.search(r"cp\.async\.c[ag]\.shared\.global.*\], *(0x[0-9a-f]+|\d+)", line):
                widths[int(found.group(1), 0)] += 1
        return dict(sorted(widths.items(), reverse=True))

    def row(self) -> dict:
        """Return the figures for the JSON file."""
        return {
            "kernel": self.case.name, "card": self.card.name, "target": f"sm_{self.card.capability}",
            "warps": self.case.options["num_warps"], "stages": self.case.options["num_stages"],
            "registers": self.registers, "spilled": self.spilled,
            "shared": self.shared, "shared_limit": self.shared_limit,
            "tensor_core": self.tensor_core, "has_dot": self.has_dot, "loads": self.loads,
        }  # fmt: skip


def refuse_where_nothing_compiles() -> None:
    """Raise ValueError if Triton compiles nothing here, with what to do about it."""
    if not HAS_TRITON:
        raise ValueError(
            "Triton is not installed, and its compiler is needed here. There is none for macOS. On any Linux "
            "or Windows machine, also without a GPU: pip install triton (Windows: triton-windows)"
        )
    if INTERPRET:
        raise ValueError(
            "TRITON_INTERPRET is 1: Triton then runs kernels in Python and compiles nothing; unset it"
        )


def compile_case(case: Case, card: Card) -> Compiled:
    """Compile the case for the card.

    Raises ValueError if that fails (no Triton, the interpreter, a type missing).
    """
    refuse_where_nothing_compiles()
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    fn = getattr(case.module, case.kernel)
    fixed = {parameter.name for parameter in fn.params if parameter.is_constexpr}
    values = {name: value for name, value in vars(case.module).items() if name in fixed} | case.launch
    signature, attrs = {}, {}
    for i, name in enumerate(fn.arg_names):
        declared = "constexpr" if name in values else case.argument_type(name)
        kind, _, divisor = declared.partition(":")
        signature[name] = kind
        if divisor or kind.startswith("*"):  # torch's allocations are aligned
            attrs[i,] = [["tt.divisibility", int(divisor or 16)]]
    constants = {name: values[name] for name, kind in signature.items() if kind == "constexpr"}
    compiled = triton.compile(
        ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attrs),
        target=GPUTarget("cuda", card.capability, 32),
        options=case.options,
    )
    ptx = compiled.asm["ptx"]
    target = re.search(r"\.target (\w+)", ptx).group(1)
    command = [get_ptxas(card.capability).path, "-v", f"--gpu-name={target}", "-o", os.devnull, "-"]
    if not case.options.get("enable_fp_fusion", True):
        command.insert(1, "--fmad=false")  # as Triton calls it
    report = subprocess.run(command, input=ptx, capture_output=True, text=True)
    if report.returncode:
        raise ValueError(
            f"{case.name}: ptxas refused Triton's code for sm_{card.capability}: {report.stderr.strip()}"
        )
    has_dot = "tt.dot" in compiled.asm["ttir"]
    return Compiled(case, card, report.stderr, compiled.metadata.shared, ptx, has_dot)
