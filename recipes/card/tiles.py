"""Attention's tiles beside others that the compiler's figures do not rule out: which is fastest on this card?

A tile that wins here by more than the noise belongs into kernels/packed_attention_tiles.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kit.kernels import packed_attention_tiles
from kit.kernels.backend import compute_capability, has_tensor_cores, uses_triton
from kit.recipes.card.compare import attempt, normal, running_sum
from kit.recipes.card.results import Card, Results, Skip
from kit.recipes.card.timing import milliseconds

HEADS = {64: (14, 2), 128: (12, 2), 256: (4, 1)}  # D -> Hq, Hkv
Tile = tuple[int, int, int, int]  # BLOCK_M, BLOCK_N, num_warps, num_stages
# Kernel, D -> tiles to try. Those of dK/dV have more warps per SM, or copy asynchronously, at the price of
# half as much tensor-core work again (16 queries) or of spills outside the inner loop.
CANDIDATES: dict[tuple[str, int], list[Tile]] = {
    ("forward", 64): [(64, 64, 4, 2)],
    ("forward", 128): [(64, 64, 4, 2)],
    ("forward", 256): [(128, 32, 8, 2)],  # 131,072 bytes on an H100
    ("dq", 128): [(64, 32, 4, 2)],
    ("dq", 256): [(32, 32, 4, 1)],
    ("dkdv", 128): [(16, 64, 4, 2)],
    ("dkdv", 256): [(32, 32, 4, 2), (16, 32, 4, 2)],
}


def run(results: Results, card: Card) -> None:
    """Time all candidates. One that does not fit the card's shared memory is named as such."""
    if card.quick:
        raise Skip("not with --quick")
    for (kernel, D), candidates in CANDIDATES.items():
        name = f"tiles of attention's {kernel}, D{D}"
        with results.case(name):
            results.need(seconds=2 + 4 * len(candidates))  # each compiles for seconds
            compare(results, card, name, kernel, D, candidates)


def compare(results: Results, card: Card, name: str, kernel: str, D: int, candidates: list[Tile]) -> None:
    call = prepared(card, kernel, D)
    times = {in_words(tile_in_use(card, kernel, D)) + " in use": milliseconds(card, call)}
    words = []
    for tile in candidates:
        with instead(card, kernel, D, tile):
            found, why = attempt(card, lambda: milliseconds(card, call))
        if found is None:
            words.append(f"{in_words(tile)}: {why}")
        else:
            times[in_words(tile)] = found
    words = [f"{label} {taken:.2f} ms" for label, taken in times.items()] + words
    text = f"fastest {min(times, key=times.get)}; {'; '.join(words)}"
    results.figure(name, text, milliseconds=times, gpu=card.name)


def prepared(card: Card, kernel: str, D: int) -> Callable[[], object]:
    """Return a call of the forward pass, or of the backward pass, over a row of four documents."""
    T, (Hq, Hkv) = 64 if card.small else 16_384, HEADS[D]
    q, k, v, dout = (normal(card, T, heads, D) for heads in (Hq, Hkv, Hkv, Hq))
    if card.small:
        q, k, v, dout = (x.half() for x in (q, k, v, dout))  # the interpreter has no bf16
    if not uses_triton(q) or (card.is_cuda and not has_tensor_cores(card.device)):
        raise Skip("the kernels do not run here")
    rest = running_sum(card, [T // 4] * 4), T, D**-0.5
    out, logsumexp = packed_attention_tiles.forward(q, k, v, *rest)
    if kernel == "forward":
        return lambda: packed_attention_tiles.forward(q, k, v, *rest)
    return lambda: packed_attention_tiles.backward(dout, q, k, v, out, logsumexp, *rest)


def tile_in_use(card: Card, kernel: str, D: int) -> Tile:
    held = packed_attention_tiles.tiles(D, 2, compute_capability(card.device))[kernel]
    return held["BLOCK_M"], held["BLOCK_N"], held["num_warps"], held["num_stages"]


@contextmanager
def instead(card: Card, kernel: str, D: int, tile: Tile) -> Iterator[None]:
    """Launch a kernel with another tile."""
    is_hopper = compute_capability(card.device) == 90
    table = packed_attention_tiles.HOPPER_TILES if is_hopper else packed_attention_tiles.TILES
    before = table.get((2, D), {})
    table[2, D] = before | {kernel: tile}
    try:
        yield
    finally:
        table[2, D] = before


def in_words(tile: Tile) -> str:
    return "{}x{}, {} warps, {} stages".format(*tile)
