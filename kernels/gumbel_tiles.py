"""The Triton kernels of kit.kernels.gumbel, which says what they compute and how they share the work."""

from kit.kernels.backend import tl, triton


@triton.jit
def _unsigned_fold(x, shift: tl.constexpr):
    return ((x >> shift) & ((1 << (64 - shift)) - 1)) ^ x


@triton.jit
def _hash(x):
    x = _unsigned_fold(x, 30) * -0x40A7B892E31B1A47
    x = _unsigned_fold(x, 27) * -0x6B2FB644ECCEEE15
    return _unsigned_fold(x, 31)


@triton.jit
def _random_bits(key, position, cols):
    """Return 52 random bits per column, the integers from which `gumbel` computes u."""
    stream = _hash(key + position * -0x61C8864680B583EB)
    return (_hash(stream + cols.to(tl.int64) * -0x2917014799A6026D) >> 12) & ((1 << 52) - 1)


@triton.jit
def _rough_gumbel(bits):
    """Return -log(-log u) in fp32. Near u = 1, log u is a series in w = 1 - u, which has all its bits."""
    u = (bits.to(tl.float32) + 0.5) * 2.220446049250313e-16  # 2^-52
    w = ((((1 << 52) - 1) - bits).to(tl.float32) + 0.5) * 2.220446049250313e-16
    t = w / (2.0 - w)  # -log(1 - w) = 2 atanh(t); t <= 1/3
    t2 = t * t
    series = 1 / 7 + t2 * (1 / 9 + t2 * (1 / 11 + t2 * (1 / 13)))
    series = 2.0 * t * (1.0 + t2 * (1 / 3 + t2 * (1 / 5 + t2 * series)))
    return -tl.log(tl.where(w < 0.5, series, -tl.log(u)))


@triton.jit
def _exact_gumbel(bits):
    u = (bits.to(tl.float64) + 0.5) * 2.220446049250313e-16
    return -tl.log(-tl.log(u))


@triton.jit
def _scaled(row_ptr, cols, V, temperature):
    """Load logits of a row, divided by the temperature as torch divides on a CPU; -inf beyond the last."""
    z = tl.load(row_ptr + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
    return tl.div_rn(z, temperature)


@triton.jit
def _race_kernel(
    logits_ptr, keys_ptr, positions_ptr, threshold_ptr, parts_ptr,
    row_stride, V, temperature, noise,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Store a tile's largest z, its sum of exp(z - largest), and its best rough z + g.

    noise: 1, or 0 = greedy. parts: (3, N, tiles). threshold: (N,), the smallest z kept; None = all.
    """
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)  # row * row_stride may pass 2**31
    cols = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    z = _scaled(logits_ptr + row * row_stride, cols, V, temperature)
    if threshold_ptr is not None:
        z = tl.where(z >= tl.load(threshold_ptr + row), z, -float("inf"))

    best = tl.max(z, 0)
    largest = tl.maximum(best, -1e30)  # not -inf: a tile of nothing but -inf would compute -inf - -inf = nan
    total = tl.sum(tl.exp(z - largest), 0)
    if best > -float("inf"):  # most tiles of a cut row keep nothing
        bits = _random_bits(tl.load(keys_ptr + row), tl.load(positions_ptr + row), cols)
        best = tl.max(z + noise * _rough_gumbel(bits), 0)

    place = row * tl.num_programs(1) + tile
    size = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    tl.store(parts_ptr + place, largest)
    tl.store(parts_ptr + size + place, total)
    tl.store(parts_ptr + 2 * size + place, best)


@triton.jit
def _join_kernel(
    logits_ptr, keys_ptr, positions_ptr, threshold_ptr, parts_ptr, tokens_ptr, logprobs_ptr,
    row_stride, V, num_tiles, temperature, noise,
    BLOCK_V: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Join the tiles of a row: draw the token in float64 where the rough race was close, and its log-prob."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    tiles = tl.arange(0, TILES)
    parts_ptr += row * num_tiles + tiles
    size = tl.num_programs(0).to(tl.int64) * num_tiles
    largest = tl.load(parts_ptr, mask=tiles < num_tiles, other=-1e30)
    totals = tl.load(parts_ptr + size, mask=tiles < num_tiles, other=0.0)
    rough = tl.load(parts_ptr + 2 * size, mask=tiles < num_tiles, other=-float("inf"))

    row_largest = tl.max(largest, 0)
    logsumexp = row_largest + tl.log(tl.sum(totals * tl.exp(largest - row_largest), 0))
    rough_best = tl.max(rough, 0)
    # The rough noise errs by 2^-22 of up to 2^6 (lg2.approx), and z + g is rounded to 2^-24 of its size.
    # These are ten times that, for both sides: a tile more costs microseconds.
    close = rough >= rough_best - (0.000244140625 + 9.5367431640625e-07 * tl.abs(rough_best))

    token, best = tl.full((), 0, tl.int32), tl.full((), -float("inf"), tl.float64)
    key, position = tl.load(keys_ptr + row), tl.load(positions_ptr + row)
    tile = tl.min(tl.where(close, tiles, TILES), 0)
    while tile < TILES:
        cols = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        z = _scaled(logits_ptr, cols, V, temperature)
        if threshold_ptr is not None:
            z = tl.where(z >= tl.load(threshold_ptr + row), z, -float("inf"))
        z = tl.where(z == z, z, -float("inf"))  # a NaN is seen in the log-prob; the token stays below V
        score = z.to(tl.float64) + noise * _exact_gumbel(_random_bits(key, position, cols))
        tile_best, first = tl.max(score, 0), tl.argmax(score, 0)
        token = tl.where(tile_best > best, tile * BLOCK_V + first, token)
        best = tl.where(tile_best > best, tile_best, best)
        tile = tl.min(tl.where(close & (tiles > tile), tiles, TILES), 0)

    z_token = tl.div_rn(tl.load(logits_ptr + token).to(tl.float32), temperature)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(logprobs_ptr + row, z_token - logsumexp)


@triton.jit
def _mass(row_ptr, V, temperature, largest, bound, BLOCK_V: tl.constexpr):
    """Return the sum of exp(z - largest) over a row's z >= bound; NaN if one is NaN."""
    total = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        z = _scaled(row_ptr, start + tl.arange(0, BLOCK_V), V, temperature)
        total += tl.where(z < bound, 0.0, tl.exp(z - largest))
    return tl.sum(total, 0)


@triton.jit
def _reordered(bits):
    """Map the bits of fp32 numbers to integers in the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _cut_kernel(
    logits_ptr, values_ptr, threshold_ptr,
    row_stride, V, K, top_k, temperature, top_p,
    BLOCK_V: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Store the smallest z of each row that is kept. values: (N, K), each row's largest logits in order."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    values_ptr += row * K
    i = tl.arange(0, CANDIDATES)
    z = _scaled(values_ptr, i, K, temperature)
    largest = tl.max(z, 0)
    floor = tl.full((), -float("inf"), tl.float32)
    if top_k > 0:
        floor = tl.div_rn(tl.load(values_ptr + top_k - 1).to(tl.float32), temperature)

    total = _mass(logits_ptr, V, temperature, largest, floor, BLOCK_V)
    p = tl.exp(z - largest)
    kept = (tl.cumsum(p, 0) - p < top_p * total) & (z >= floor) & (i < K)
    threshold = tl.min(tl.where(kept, z, float("inf")), 0)

    # all candidates are kept and others may be: the smallest z above which there is less than top_p
    if (tl.sum(kept.to(tl.int32), 0) == CANDIDATES) & (threshold > floor):
        low = _reordered(floor.to(tl.int32, bitcast=True)).to(tl.int64)
        high = _reordered(threshold.to(tl.int32, bitcast=True)).to(tl.int64)
        while low < high:
            middle = (low + high) >> 1
            next_z = _reordered((middle + 1).to(tl.int32)).to(tl.float32, bitcast=True)
            is_kept = _mass(logits_ptr, V, temperature, largest, next_z, BLOCK_V) < top_p * total
            high = tl.where(is_kept, middle, high)
            low = tl.where(is_kept, low, middle + 1)
        threshold = _reordered(high.to(tl.int32)).to(tl.float32, bitcast=True)
    tl.store(threshold_ptr + row, threshold)
