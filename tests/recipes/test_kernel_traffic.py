"""Compare the formulas with counts of real calls, and our counts with their limits.

Tests that launch Triton kernels run in a child process: TRITON_INTERPRET is read when Triton is imported.
Peers that are not installed are skipped by name; our own part always runs.
"""

import importlib.util
import math
import random

import pytest
import torch
from children import pass_in_the_interpreter
from counting import Count
from kernel_traffic import (
    MODELS,
    Config,
    Loss,
    decode_bytes,
    liger,
    main,
    ours,
    total,
    unfused,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_counting import Counter

import kit.kernels.linear_cross_entropy_chunks as head
from kit.kernels.backend import HAS_TRITON, INTERPRET
from kit.kernels.cross_entropy import IGNORE_INDEX
from kit.kernels.decode_attention import decode_attention
from kit.kernels.linear_cross_entropy import linear_cross_entropy
from kit.kernels.packed_attention import packed_attention
from kit.kernels.packed_attention_tiles import tiles as attention_tiles
from kit.memory.live_bytes import LiveBytes
from kit.packing import plan_packs

MIB = 2**20
DTYPES = [torch.float32, torch.float16]
needs_interpreter = pytest.mark.interpreter
needs_liger = pytest.mark.skipif(
    not importlib.util.find_spec("liger_kernel"),
    reason="liger-kernel is not installed: its formula is NOT CHECKED here",
)
SIZES = [
    (77, 19),
    (301, 19),
    (77, 24),
    (4099, 3),
]  # V, H: nothing divides anything; more columns than a step of the row kernel


def problem(loss: Loss):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(n, loss.H, generator=generator).to(loss.dtype).requires_grad_() for n in (loss.N, loss.V)
    )
    targets = torch.randint(loss.V, (loss.N,), generator=generator)
    targets[loss.K :] = IGNORE_INDEX
    return hidden, weight, targets


def count(function, loss: Loss, upstream: float = 1.0) -> Counter:
    """Count a forward and a backward pass."""
    arguments, upstream = problem(loss), torch.tensor(upstream)
    with Counter() as counter:
        function(*arguments).backward(upstream)
    return counter


def assert_only_vectors_are_left(differences: list[Count], N: int):
    """Check that what a formula leaves out does not depend on V or H and is a few numbers per row."""
    assert len(set(differences)) == 1, differences
    left = differences[0]
    assert (
        left.launches == 0
        and left.flops == 0
        and 0 <= left.bytes_loaded <= 200 * N
        and 0 <= left.bytes_stored <= 200 * N
    ), left


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K"), [(1, 1), (13, 13), (13, 9)])
@pytest.mark.parametrize("scaled", [False, True])
def test_ours_is_exact(N, K, scaled, dtype, monkeypatch):
    monkeypatch.setattr(head, "MIN_ROWS", 5)
    monkeypatch.setattr(head, "MAX_CHUNK_BYTES", 1)
    differences = []
    for V, H in SIZES:
        loss = Loss(N, K, V, H, dtype)
        terms, counter = (
            ours(loss, scaled=scaled),
            count(linear_cross_entropy, loss, upstream=0.5 if scaled else 1.0),
        )
        # a CPU has no product of 16-bit matrices with an fp32 sum: a GPU needs one operator for it
        if dtype == torch.float16:
            terms.pop("dW")
            counter.by_operator.pop("kit::add_matmul_")
        differences.append(counter.total - total(terms))
    assert_only_vectors_are_left(differences, N)


def transformers_loss(hidden, weight, targets):
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss(
        hidden @ weight.T, None, len(weight), ignore_index=IGNORE_INDEX, shift_labels=targets
    )


@pytest.mark.skipif(INTERPRET, reason="runs no kernel")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("N", "K"), [(1, 1), (13, 9)])
def test_fake_tensors_count_the_unfused_path_as_real_ones_do(N, K, dtype):
    for V, H in SIZES:
        loss = Loss(N, K, V, H, dtype)
        assert unfused(loss) == count(transformers_loss, loss).total


@needs_interpreter
@needs_liger
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K"), [(1, 1), (13, 9), (40, 39)])
@pytest.mark.parametrize("scaled", [False, True])
def test_liger_is_exact_in_what_it_does_on_a_cpu(N, K, scaled, dtype):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    differences = []
    for V, H in SIZES[:3]:  # it scales dW with one program per row, which the interpreter runs one by one
        loss = Loss(N, K, V, H, dtype)
        counted = count(liger_fused_linear_cross_entropy, loss, upstream=0.5 if scaled else 1.0).total
        # the scaling kernel reads the upstream gradient once per row, of dX and of dW
        upstream_loads = (N + V) * 4 * scaled
        differences.append(
            counted - total(liger(loss, on_gpu=False, scaled=scaled)) - Count(0, upstream_loads)
        )
    assert_only_vectors_are_left(differences, N)


def fake_problem(model: str, N: int = 16_384, dtype: torch.dtype = torch.bfloat16):
    V, H = MODELS[model]
    loss = Loss(N, N, V, H, dtype)
    hidden, weight = (torch.empty(n, H, dtype=dtype, requires_grad=True) for n in (N, V))
    return loss, (hidden, weight, torch.empty(N, dtype=torch.int64))


@pytest.mark.skipif(INTERPRET, reason="runs no kernel")
@pytest.mark.parametrize("model", MODELS)
def test_at_full_size_in_bf16_the_torch_operators_are_as_the_formula_says(model):
    """Without the operators of torch.library, which fake tensors do not run; the interpreter counts those."""
    with FakeTensorMode():
        loss, arguments = fake_problem(model)
        upstream = torch.ones(())
        with Counter() as counter:
            linear_cross_entropy(*arguments).backward(upstream)
    terms = ours(loss, scaled=False)
    torchs = sum((count for name, count in counter.by_operator.items() if name.startswith("aten")), Count())
    left = torchs - terms["logits"] - terms["dX"] - terms["hand over"]
    assert left.flops == 0 and 0 <= left.bytes <= 200 * loss.N, left
    scaling = ours(loss)["hand over"] - terms["hand over"]
    assert 0 <= (counter.by_operator["kit::scale_"] - scaling).bytes <= 16  # and the upstream gradient itself


@pytest.mark.parametrize("ignored", [0.0, 0.1])
def test_gemmas_loss_moves_at_most_three_quarters_of_the_unfused_path_and_a_third_of_liger(ignored):
    N, (V, H) = 16_384, MODELS["Gemma-3-1B"]
    loss = Loss(N, N - round(ignored * N), V, H, torch.bfloat16)
    bytes_moved = total(ours(loss)).bytes
    assert bytes_moved <= 0.75 * unfused(loss).bytes
    assert bytes_moved <= 0.35 * total(liger(loss)).bytes


def extra_memory(loss: Loss, arguments) -> int:
    with LiveBytes() as memory:
        linear_cross_entropy(*arguments).backward()
    return memory.peak


@pytest.mark.skipif(INTERPRET, reason="runs no kernel")
@pytest.mark.parametrize("model", MODELS)
def test_while_summing_extra_memory_is_both_gradients_one_chunk_and_thin_matrices(model):
    """In fp32, where dW needs no cast at the end."""
    with FakeTensorMode():
        loss, arguments = fake_problem(model, dtype=torch.float32)
        extra = extra_memory(loss, arguments)
    # a chunk's rows, their gradient, and it again scaled
    thin = 4 * head.rows_per_chunk(loss.K, loss.V, loss.H, loss.e) * loss.H * loss.e
    assert extra <= (loss.N + loss.V) * loss.H * 4 + 512 * MIB + thin + 64 * loss.N


@pytest.mark.skipif(INTERPRET, reason="runs no kernel")
@pytest.mark.parametrize("model", MODELS)
def test_extra_memory_is_at_most_both_gradients_and_512_mib(model):
    with FakeTensorMode():
        loss, arguments = fake_problem(model)
        extra = extra_memory(loss, arguments)
    assert extra <= loss.V * loss.H * 4 + loss.N * loss.H * 2 + 512 * MIB


def causal_pairs(lengths: list[int], window: int | None = None) -> int:
    """Count the query-key pairs that packed attention needs: documents' causal areas, inside the window."""
    pairs = 0
    for n in lengths:
        w = min(n, window or n)
        pairs += w * (w + 1) // 2 + (n - w) * w
    return pairs


def tiled_pairs(
    lengths: list[int], BLOCK_M: int, BLOCK_N: int, window: int | None = None, *, by_keys: bool = False
) -> int:
    """Count the same in whole tiles of BLOCK_M queries by BLOCK_N keys, which is what the kernels multiply.

    Tiles start at each document's first token, and a program walks from its window's edge to its diagonal.
    by_keys: one program per block of keys, as in the dK/dV kernel; else one per block of queries, as in the
        forward and the dQ kernel.
    """
    num_tiles = 0
    for n in lengths:
        w = window or n
        if by_keys:
            for first in range(0, n, BLOCK_N):
                num_tiles += math.ceil((min(first + BLOCK_N - 1 + w, n) - first) / BLOCK_M)
        else:
            for first in range(0, n, BLOCK_M):
                num_tiles += math.ceil((min(first + BLOCK_M, n) - max(first - w + 1, 0)) / BLOCK_N)
    return num_tiles * BLOCK_M * BLOCK_N


DOTS = {"forward": 2, "dq": 3, "dkdv": 4}  # products of each kernel, every one 2 * head_dim flops per pair


def attention_flops(pairs: dict[str, int], head_dim: int, num_heads: int) -> int:
    """Return the flops of one layer, forward and backward, from the pairs that each kernel multiplies."""
    return sum(2 * head_dim * num_heads * DOTS[kernel] * pairs[kernel] for kernel in DOTS)


def attention_work(lengths: list[int], tiles: dict[str, dict[str, int]], window: int | None = None) -> float:
    """Return flops of the tiled kernels / flops of exactly the pairs needed.

    tiles: kernel -> {"BLOCK_M": .., "BLOCK_N": ..}.
    """
    needed, done = dict.fromkeys(DOTS, causal_pairs(lengths, window)), {}
    for kernel in DOTS:
        BLOCK_M, BLOCK_N = tiles[kernel]["BLOCK_M"], tiles[kernel]["BLOCK_N"]
        done[kernel] = tiled_pairs(lengths, BLOCK_M, BLOCK_N, window, by_keys=kernel == "dkdv")
    return attention_flops(done, 1, 1) / attention_flops(needed, 1, 1)


def realistic_pack(
    row_tokens: int = 16_384, median: int = 4_096, sigma: float = 0.8, seed: int = 0
) -> list[int]:
    """Return the document lengths of one packed row.

    1,000 lengths are lognormal, like those of long chains of thought, and clipped to the row; plan_packs
    packs them; the row with the median number of documents is returned.
    """
    rng = random.Random(seed)
    drawn = [round(rng.lognormvariate(math.log(median), sigma)) for _ in range(1000)]
    lengths = [min(row_tokens, max(1, length)) for length in drawn]
    packs = sorted(plan_packs(lengths, row_tokens), key=lambda pack: (len(pack), pack))
    return [lengths[i] for i in packs[len(packs) // 2]]


def seen_pairs(lengths, window):
    """Return (queries, keys) of a pack, True where a query sees a key."""
    blocks = [torch.ones(n, n).tril().bool() & ~torch.ones(n, n).tril(-(window or n)).bool() for n in lengths]
    return torch.block_diag(*blocks).bool()


@pytest.mark.parametrize("window", [None, 1, 3, 16, 50])
def test_the_causal_area_is_what_the_mask_shows(window):
    lengths = [1, 37, 16, 40, 2]
    assert causal_pairs(lengths, window) == seen_pairs(lengths, window).sum()


@pytest.mark.parametrize("window", [None, 1, 3, 16, 50])
@pytest.mark.parametrize(("BLOCK_M", "BLOCK_N"), [(16, 16), (32, 16), (16, 32)])
@pytest.mark.parametrize("by_keys", [False, True])
def test_tiles_cover_what_the_mask_shows_and_no_whole_tile_more_than_they_must(
    BLOCK_M, BLOCK_N, window, by_keys
):
    """Walk as the kernels do: the tiles together cover every pair that is seen, and no tile is empty."""
    for n in (1, 37, 16, 40):
        w, missing, tiles = window or n, seen_pairs([n], window), 0
        for first in range(0, n, BLOCK_N if by_keys else BLOCK_M):
            low, high = (
                (first, first + BLOCK_N - 1 + w) if by_keys else (max(first - w + 1, 0), first + BLOCK_M)
            )
            for other in range(low, min(high, n), BLOCK_M if by_keys else BLOCK_N):
                q, k = (other, first) if by_keys else (first, other)
                tile = missing[q : q + BLOCK_M, k : k + BLOCK_N]
                assert tile.any()
                tile.zero_()
                tiles += 1
        assert (
            not missing.any()
            and tiled_pairs([n], BLOCK_M, BLOCK_N, window, by_keys=by_keys) == tiles * BLOCK_M * BLOCK_N
        )


def largest_work(head_dim: int, window: int | None) -> float:
    """Return the work for five packs of realistic lengths (realistic_pack)."""
    return max(
        attention_work(realistic_pack(seed=seed), attention_tiles(head_dim, 2), window) for seed in range(5)
    )


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_attention_multiplies_at_most_a_tenth_more_than_it_needs(head_dim):
    assert largest_work(head_dim, None) <= 1.10


def test_attention_in_gemmas_window_multiplies_at_most_a_tenth_more_than_it_needs():
    assert largest_work(256, 512) <= 1.10


@needs_interpreter
@pytest.mark.parametrize("window", [None, 20])
def test_attention_flops_are_those_of_the_tiles(window):
    lengths, Hq, D = [1, 37, 5, 40], 4, 16
    tile = attention_tiles(D, 4)
    q, k, v = (torch.randn(sum(lengths), heads, D, requires_grad=True) for heads in (Hq, 2, 2))
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
    with Counter() as counter:
        packed_attention(q, k, v, bounds, max(lengths), window=window).sum().backward()
    blocks = {name: (tile[name]["BLOCK_M"], tile[name]["BLOCK_N"]) for name in ("forward", "dq", "dkdv")}
    pairs = {
        name: tiled_pairs(lengths, *block, window, by_keys=name == "dkdv") for name, block in blocks.items()
    }
    assert counter.total.flops == attention_flops(pairs, tile["forward"]["BLOCK_D"], Hq)


@needs_interpreter
@pytest.mark.parametrize("window", [None, 300, 20])
def test_decode_attention_loads_the_keys_that_its_rows_see_and_no_others(window):
    lengths, W, (Hq, Hkv, D) = [300, 3, 600, 0, 5 - 2**32], 513, (4, 2, 8)
    q, cache = torch.randn(5, Hq, D), torch.randn(5, Hkv, W, D)
    with Counter() as counter:
        decode_attention(q, cache, cache, torch.tensor(lengths), window=window)
    expected = decode_bytes(lengths, W, (Hq, Hkv, D), 4, window)
    found = counter.by_operator["kit::decode_attention"]
    assert found - expected == Count(flops=found.flops)


def test_one_long_row_beside_short_ones_adds_its_own_keys_alone():
    heads, W = (14, 2, 64), 16_384
    short, long, all_long = (
        decode_bytes(lengths, W, heads, 2).bytes
        for lengths in ([200] * 32, [16_000] + [200] * 31, [16_000] * 32)
    )
    keys = 2 * 2 * 64 * 2  # bytes per position
    assert 0 <= long - short - 15_800 * keys <= 0.2 * 15_800 * keys  # and its splits, written and read
    assert all_long > 15 * long


def test_the_command_prints_the_table_and_names_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    rows = main(Config(num_tokens=1000, ignored=0.1))
    out = capsys.readouterr().out
    assert "Counted, not timed" in out and "liger_kernel is not installed here" in out
    assert len(rows) == 9 and [row["ratio"] for row in rows if row["name"] == "ours"] == [1, 1, 1]
    with pytest.raises(ValueError, match=r"ignored is 1\.5 but must be >= 0 and < 1"):
        main(Config(ignored=1.5))


@pytest.mark.slow
@pytest.mark.skipif(INTERPRET, reason="this is the child")
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed (macOS): its kernels cannot be counted")
def test_this_file_passes_in_the_interpreter(record_property):
    pass_in_the_interpreter(__file__, record_property, "-rs")
