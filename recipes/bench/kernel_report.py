"""Compile every kernel for common cards and report what the compiler says. Needs no GPU; nothing is timed.

    python recipes/bench/kernel_report.py           all kernels and cards: two minutes, seconds once cached
    python recipes/bench/kernel_report.py --card 89 --kernel gradient     one card; kernels with this name
    python recipes/bench/kernel_report.py --json kernels.json             the same figures as JSON

registers: per thread, at most 255.
spilled: bytes per thread in memory because registers ran out; should be 0.
shared: bytes of shared memory per program, and what the card allows.
tensor cores: instructions that use them.
loads: number of load instructions x bytes that each loads per thread; 16 is the widest.

Triton compiles for RTX 20 (Turing) without its tensor cores, which matters only to kernels with a dot.
"""

import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from compiled import CARDS, Card, Case, Compiled, compile_case, refuse_where_nothing_compiles

from kit.config import Checked, parse
from kit.kernels import (
    adamw8bit,
    cross_entropy,
    decode_attention,
    glu,
    gumbel,
    gumbel_tiles,
    linear_cross_entropy_rows,
    packed_attention_tiles,
    packing,
    rms_norm,
    rope,
)
from kit.run import write_json

ELEMENTS = ["bf16", "fp16", "fp32"]
LOGIT_ROWS = ["_logprob_kernel", "_gradient_kernel", "_block_gradient_kernel"]
HEADS = [(14, 2, 64), (24, 8, 128), (4, 1, 256)]  # q, k, D: Qwen2.5-0.5B, Llama-3.2-3B, Gemma-3-1B
HEAD_DIMS = [D for *_, D in HEADS]
GROUPS = [(Hq // Hkv, D) for Hq, Hkv, D in HEADS]  # query heads per head of keys, D
NORMALISED = [128, 256, 1_152, 3_072]  # heads; rows of Gemma-3-1B and Llama-3.2-3B
BOTH_WAYS = ["_forward_kernel", "_backward_kernel"]


def _logit_rows(kernel: str, element: str, softcap: float) -> Case:
    label = "softcap" if softcap else ""
    return Case(linear_cross_entropy_rows, kernel, element, label, {"SOFTCAP": softcap})


def _attention(kernel: str, element: str, head_dim: int, capability: int) -> Case:
    tile = packed_attention_tiles.tiles(head_dim, 4 if element == "fp32" else 2, capability)[kernel]
    launch = tile | {"GROUP": 4, "D": head_dim}
    return Case(packed_attention_tiles, f"_{kernel}_kernel", element, f"D {head_dim}", launch)


def _decode_attention(kernel: str, element: str, heads: tuple[int, int]) -> Case:
    group, head_dim = heads
    tile = decode_attention.tile(head_dim, group, 4 if element == "fp32" else 2)
    launch = tile | {"GROUP": group, "D": head_dim}
    if kernel == "_join_kernel":
        launch["num_warps"] = decode_attention.JOIN_WARPS
    return Case(decode_attention, kernel, element, f"D {head_dim}", launch)


def _adamw8bit(weight: str, gradient: str, rest: bool) -> Case:
    """bf16 is passed as int16. rest: of exact bf16 weights."""
    numbers = ("gradient_scale", "keep1", "take1", "keep2", "take2", "correction", "rate", "shrink")
    states = {"m_ptr": "*i8", "m_scale_ptr": "*fp32", "v_ptr": "*u8", "v_scale_ptr": "*fp32"}
    integers = {"N": "i32:16", "first_element": "i64:16", "key": "i64"}
    return Case(
        adamw8bit, "_update_kernel", weight, f"gradient {gradient}" + ", rest" * rest,
        {"enable_fp_fusion": False} | ({} if rest else {"rest_ptr": None}),
        states | integers | {"g_ptr": f"*{gradient}"} | dict.fromkeys(numbers, "fp32"),
    )  # fmt: skip


def _packing(buffer: str) -> Case:
    arguments = {"D": "i32", "buffer_ptr": f"*{buffer}"}
    return Case(packing, "_pack_kernel", "fp32", f"buffer {buffer}", arguments=arguments)


def _rms_norm(kernel: str, element: str, H: int) -> Case:
    return Case(rms_norm, kernel, element, f"H {H}", rms_norm.tile(H))


def _rope(kernel: str, element: str, heads: tuple[int, int, int]) -> Case:
    return Case(rope, kernel, element, f"D {heads[-1]}", rope.tile(*heads), {"D": "i32:16"})


def _gumbel(kernel: str, element: str, is_cut: bool) -> Case:
    """is_cut: with a threshold. 64 tiles hold 262,144 tokens."""
    launch = {"num_warps": gumbel.NUM_WARPS, "BLOCK_V": gumbel.BLOCK_V, "CANDIDATES": gumbel.CANDIDATES}
    if not is_cut and kernel != "_cut_kernel":
        launch["threshold_ptr"] = None
    return Case(gumbel_tiles, kernel, element, "cut" if is_cut else "", launch | {"TILES": 64})


def cases(capability: int = 89) -> list[Case]:
    """Return every kernel in every launch configuration that a card of this capability gets.

    Add new kernels here; the test finds them. Their number is the same for all cards.
    """
    return [
        *(_logit_rows(*case) for case in product(LOGIT_ROWS, ELEMENTS, [0.0, 30.0])),
        *(Case(cross_entropy, *case) for case in product(BOTH_WAYS, ELEMENTS)),
        *(_attention(*case, capability) for case in product(["forward", "dq", "dkdv"], ELEMENTS, HEAD_DIMS)),
        *(_decode_attention("_split_kernel", *case) for case in product(ELEMENTS, GROUPS)),
        *(_decode_attention("_join_kernel", "bf16", heads) for heads in GROUPS),
        *(_adamw8bit(*case, rest=False) for case in product(["i16", "fp32"], ["i16", "fp32"])),
        *(_adamw8bit("i16", gradient, rest=True) for gradient in ("i16", "fp32")),
        *(_packing(buffer) for buffer in ("i32", "i64")),
        *(_rms_norm(*case) for case in product([*BOTH_WAYS, "_sum_kernel"], ELEMENTS, NORMALISED)),
        *(_rope(*case) for case in product(BOTH_WAYS, ELEMENTS, HEADS)),
        *(Case(glu, *case) for case in product(BOTH_WAYS, ELEMENTS)),
        *(_gumbel(*case) for case in product(["_race_kernel", "_join_kernel"], ELEMENTS, [False, True])),
        *(_gumbel("_cut_kernel", element, is_cut=True) for element in ELEMENTS),
    ]


@dataclass(frozen=True)
class Config(Checked):
    kernel: str = ""  # only kernels whose name contains this; "" = all
    card: int = 0  # only this target: 75, 80, 86, 89, 90, 120; 0 = all [0 | 75..120]
    json: str = ""  # file for the figures; "" = none


def chosen(config: Config) -> dict[Card, list[Case]]:
    """Return the cards and their kernels that the flags select. Raises ValueError if there are none."""
    cards = [card for card in CARDS if config.card in (0, card.capability)]
    if not any(config.kernel in case.name for case in cases()):
        names = ", ".join(dict.fromkeys(case.name.split()[0] for case in cases()))
        raise ValueError(f"kernel is {config.kernel!r} but the kernels are {names}; pass a part of a name")
    if not cards:
        known = ", ".join(f"{card.capability} ({card.name})" for card in CARDS)
        raise ValueError(f"card is {config.card} but the targets are {known}; pass a number, or 0 for all")
    return {card: [case for case in cases(card.capability) if config.kernel in case.name] for card in cards}


def line(compiled: Compiled) -> str:
    used = f"{compiled.shared:,} of {compiled.shared_limit:,}"
    tensor_core = ", ".join(f"{n} {name}" for name, n in compiled.tensor_core.items())
    if compiled.has_dot and not tensor_core:
        tensor_core = "NONE: slow here, the torch path runs" if compiled.card.capability < 80 else "none"
    loads = " ".join(f"{n}x{width}" for width, n in compiled.loads.items())
    return (
        f"    {compiled.case.name:<52}{compiled.registers:>9}{compiled.spilled:>8}  {used:>18}"
        f"  {tensor_core if compiled.has_dot else 'no dot':<20}  {loads}"
    )


def main(config: Config) -> list[dict]:
    refuse_where_nothing_compiles()
    rows = []
    for card, kernels in chosen(config).items():
        limit = " - no tensor cores from this compiler" if card.capability < 80 else ""
        print(f"\n{card.name} (sm_{card.capability}){limit}")
        head = f"    {'kernel':<52}{'registers':>9}{'spilled':>8}  {'shared, bytes':>18}"
        print(f"{head}  {'tensor cores':<20}  loads, n x bytes")
        for case in kernels:
            try:
                compiled = compile_case(case, card)
            except ValueError as error:
                print(f"    {case.name:<52} does not compile: {error}")
                target = {"card": card.name, "target": f"sm_{card.capability}"}
                rows.append({"kernel": case.name, **target, "error": str(error)})
                continue
            print(line(compiled))
            rows.append(compiled.row())
    if config.json:
        write_json(Path(config.json), rows)
    return rows


if __name__ == "__main__":
    try:
        main(parse(Config))
    except ValueError as error:
        sys.exit(f"error: {error}")
