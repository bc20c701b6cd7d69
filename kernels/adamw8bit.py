"""
AdamW with 8-bit states, in one pass over memory; bf16 weights are rounded stochastically.

    m = beta1 m + (1 - beta1) g                      v = beta2 v + (1 - beta2) g^2
    p = (1 - lr decay) p - lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)

    a number x of a state, in a block of 256  x = scale * (code / L)^4, scale = the block's largest |x|, fp32
    m: L = 127 and a sign (int8)              sqrt(v): L = 255 (uint8)

How it works. A program reads p, g and the codes of a few blocks, decodes, updates in fp32, encodes again
with new scales, and writes. Every rounding to fewer bits, of m, of sqrt(v) and of a bf16 p, is stochastic:
up with the probability equal to the fraction cut off, so that the mean is exact. The random bits are a hash
of (seed, step, parameter, element). They need no state, and they depend neither on a resume, nor on the
launch, nor on the device. The torch path does the same operations in the same order, and the GPU's compiler
fuses none of them (enable_fp_fusion=False). So both give the same bits, except where torch's fp32 square
root, which is off by one bit at times, decides between two codes.

The states are rounded stochastically too: with beta2 = 0.999 v falls by 0.1 % per step, and codes are 0.8 %
to 20 % apart, so that rounding to nearest would never let it fall. And there is a floor: a v that is not 0
never gets the code 0, or its next update would be m / eps.

NaN and infinity are never hidden: an element with such a gradient becomes NaN at once, and its block of 256
in the next step. So does a block with a gradient above 1.8e19, whose square is no fp32 number. Watch the loss
or the gradient norm to find it early.

Bytes per weight, besides p and g: 2 + 8 / 256 (fp32 states: 8). Gemma-3-1B, 1.0e9 weights: 1.9 GiB (7.5 GiB).
A step moves 10 bytes per weight for bf16 p and g, once. On a CPU the temporaries are a few MiB, whatever the
parameter's size. The number of tokens does not matter here.
"""

import math

import torch
from torch import Tensor

from kit.kernels.backend import tl, triton, uses_triton

BLOCK = 256  # numbers per scale: 1.6 % more bytes than the codes alone; one warp's 16-byte loads of bf16
M_LEVELS, V_LEVELS = 127, 255  # the largest int8 and uint8
# Why the power 4, and the root of v. Relative error of the update against float64 AdamW after 3,000 steps, if
# the scales of a block's gradients are log-normal with sigma 0.7 / 2.0 and all is rounded stochastically:
# power 2 of sqrt(v) 0.09 / 0.85; power 4 of sqrt(v) 0.10 / 0.22; power 4 of v 0.10 / 0.61; the bits of an fp8
# number (E4M3, E5M3 for v) 0.15 / 0.18. Rounded to nearest it is 0.08 / 0.17, and 0.10 / 0.40 with the tables
# of bitsandbytes. But if half of a block's gradients fall to 3 %, rounding to nearest leaves v 25 times too
# large 2,000 steps later (those tables: 10), and the weights are 61 % (51 %) off; stochastically: 17 %.
BLOCKS = 4  # blocks per program: 8 numbers per thread, one 16-byte load of bf16
NUM_WARPS = 4
CPU_SLAB = 256 * BLOCK  # torch path, numbers at a time: some ten temporaries of 256 KiB stay in the L2 cache


def adamw_reference(parameter, gradient, m, v, *, step, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    """Return (p, m, v) after an update without 8-bit states or rounding, in the dtype of its arguments."""
    beta1, beta2 = betas
    m = beta1 * m + (1 - beta1) * gradient
    v = beta2 * v + (1 - beta2) * gradient.square()
    denominator = (v / (1 - beta2**step)).sqrt() + eps
    return (1 - lr * weight_decay) * parameter - lr / (1 - beta1**step) * m / denominator, m, v


@triton.jit
def _random_bits(key, element):
    """Hash key + element * the golden ratio to an int64: splitmix64's finaliser (Steele et al., 2014)."""
    x = element * -0x61C8864680B583EB + key
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47  # >> keeps the sign: mask it off
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _load(ptr, offsets, mask):
    """Load as fp32. bf16 comes as int16, the upper half of an fp32 number: exact in the interpreter too."""
    x = tl.load(ptr + offsets, mask=mask, other=0)
    if ptr.dtype.element_ty == tl.int16:
        return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _level(code, LEVELS: tl.constexpr):
    """Return (code / L)^4."""
    root = code * (1.0 / LEVELS)
    square = root * root
    return square * square


@triton.jit
def _largest(x):
    """Return the largest |x| of every row, compared as integers: an fp32 maximum would drop a NaN."""
    return tl.max(tl.abs(x).to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)


@triton.jit
def _encode(x, scale, random, LEVELS: tl.constexpr):
    """Return the codes, as fp32, of x >= 0; 0 where the scale is 0, infinite or NaN. random: 24 bits."""
    usable = (scale > 0) & (scale < float("inf"))
    x = tl.where(usable, tl.div_rn(x, tl.where(usable, scale, 1.0)), 0.0)
    lower = tl.minimum(tl.floor(tl.sqrt_rn(tl.sqrt_rn(x)) * LEVELS), LEVELS - 1)
    low = _level(lower, LEVELS)
    gap = _level(lower + 1, LEVELS) - low
    u = random.to(tl.float32) * (1.0 / (1 << 24))
    return lower + tl.where(u * gap < x - low, 1.0, 0.0)


@triton.jit
def _update_kernel(
    p_ptr, g_ptr, m_ptr, m_scale_ptr, v_ptr, v_scale_ptr,
    N, first_element, key,
    gradient_scale, keep1, take1, keep2, take2, correction, eps, rate, shrink,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, M_LEVELS: tl.constexpr, V_LEVELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)  # int64: a head of 262,144 x 8,192 has 2**31 numbers
    block = program * BLOCKS + tl.arange(0, BLOCKS)
    offsets = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # (BLOCKS, BLOCK)
    inside, block_inside = offsets < N, block * BLOCK < N
    p = _load(p_ptr, offsets, inside)
    g = _load(g_ptr, offsets, inside) * gradient_scale
    m_code = tl.load(m_ptr + offsets, mask=inside, other=0).to(tl.float32)
    v_code = tl.load(v_ptr + offsets, mask=inside, other=0).to(tl.float32)
    m_scale = tl.load(m_scale_ptr + block, mask=block_inside, other=0.0)[:, None]
    v_scale = tl.load(v_scale_ptr + block, mask=block_inside, other=0.0)[:, None]

    m = _level(m_code, M_LEVELS) * m_scale
    m = tl.where(m_code < 0, -m, m) * keep1 + g * take1
    root_v = _level(v_code, V_LEVELS) * v_scale
    root_v = tl.sqrt_rn(root_v * root_v * keep2 + g * g * take2)
    p = p * shrink - tl.div_rn(m, root_v * correction + eps) * rate

    random = _random_bits(key, offsets + first_element)
    m_scale, v_scale = _largest(m), _largest(root_v)
    m_code = _encode(tl.abs(m), m_scale[:, None], (random >> 16) & 0xFFFFFF, M_LEVELS)
    v_code = _encode(root_v, v_scale[:, None], (random >> 40) & 0xFFFFFF, V_LEVELS)
    v_code = tl.where((v_code == 0) & (root_v > 0) & (v_scale < float("inf"))[:, None], 1.0, v_code)
    tl.store(m_ptr + offsets, tl.where(m < 0, -m_code, m_code).to(tl.int8), mask=inside)
    tl.store(v_ptr + offsets, v_code.to(tl.uint8), mask=inside)
    tl.store(m_scale_ptr + block, m_scale, mask=block_inside)
    tl.store(v_scale_ptr + block, v_scale, mask=block_inside)
    if p_ptr.dtype.element_ty == tl.int16:
        # a NaN of all ones plus anything would turn into -0
        bits = tl.where(p != p, 0x7FC00000, p.to(tl.int32, bitcast=True))
        p = ((bits + (random & 0xFFFF).to(tl.int32)) >> 16).to(tl.int16)
    tl.store(p_ptr + offsets, p, mask=inside)


def _torch_random_bits(key: int, first: int, count: int, device) -> Tensor:
    """Return _random_bits of elements first .. first + count - 1, (count / BLOCK, BLOCK) int64."""
    x = torch.arange(first, first + count, device=device).mul_(-0x61C8864680B583EB).add_(key)
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
    return x.view(-1, BLOCK)


def _torch_level(code: Tensor, levels: int) -> Tensor:
    return (code * (1.0 / levels)).square_().square_()


def _torch_encode(x: Tensor, scale: Tensor, random: Tensor, levels: int) -> Tensor:
    """Encode as _encode does, in torch; overwrites x."""
    usable = (scale > 0) & (scale < torch.inf)
    x = x.div_(scale.where(usable, 1.0)).masked_fill_(~usable, 0.0)
    lower = x.sqrt().sqrt_().mul_(levels).floor_().clamp_(max=levels - 1)
    low = _torch_level(lower, levels)
    gap = _torch_level(lower + 1, levels).sub_(low)
    return lower.add_(random.float().mul_(1.0 / (1 << 24)).mul_(gap).lt(x.sub_(low)))


def _rows(x: Tensor, dtype=torch.float32) -> Tensor:
    """Reshape (n,) to (blocks, BLOCK); the last block is filled up with zeros."""
    x, missing = x.to(dtype), -len(x) % BLOCK
    return (torch.nn.functional.pad(x, (0, missing)) if missing else x).view(-1, BLOCK)


def _torch_update(
    p, g, m_codes, m_scales, v_codes, v_scales, first_element, key,
    gradient_scale, keep1, take1, keep2, take2, correction, eps, rate, shrink,
):  # fmt: skip
    """Update as _update_kernel does, in torch.

    Without add(alpha=) and addcmul: they fuse multiply and add if the CPU can, and the bits would differ.
    """
    for start in range(0, len(p), CPU_SLAB):
        part = slice(start, min(start + CPU_SLAB, len(p)))
        count, blocks = part.stop - start, slice(start // BLOCK, -(-part.stop // BLOCK))
        gradient = _rows(g[part]) * gradient_scale
        code = _rows(m_codes[part])
        m = _torch_level(code, M_LEVELS).mul_(m_scales[blocks, None]).copysign_(code)
        m.mul_(keep1).add_(gradient * take1)
        v = _torch_level(_rows(v_codes[part]), V_LEVELS).mul_(v_scales[blocks, None]).square_().mul_(keep2)
        v.add_(gradient.square_().mul_(take2))
        root_v = v.double().sqrt_().float()  # torch's fp32 root is off by one bit at times
        weight = _rows(p[part]) * shrink
        weight.sub_((m / (root_v * correction).add_(eps)).mul_(rate))

        random = _torch_random_bits(key, first_element + start, m.numel(), p.device)
        size, floor = m.abs(), (root_v > 0).float()
        m_scales[blocks], v_scales[blocks] = size.amax(1), root_v.amax(1)
        code = _torch_encode(size, m_scales[blocks, None], (random >> 16).bitwise_and_(0xFFFFFF), M_LEVELS)
        m_codes[part] = code.copysign_(m).view(-1)[:count]
        code = _torch_encode(root_v, v_scales[blocks, None], (random >> 40).bitwise_and_(0xFFFFFF), V_LEVELS)
        v_codes[part] = code.maximum(floor.mul_(v_scales[blocks, None] < torch.inf)).view(-1)[:count]
        if p.dtype == torch.bfloat16:
            bits = weight.view(torch.int32).masked_fill_(weight.isnan(), 0x7FC00000)
            bits.add_(random.bitwise_and_(0xFFFF))
            bits.bitwise_and_(-(1 << 16))  # the upper half of an fp32 number is a bf16 number
        p[part] = weight.view(-1)[:count]


STATES = "m_codes", "m_scales", "v_codes", "v_scales"


@torch.library.custom_op("kit::adamw8bit_", mutates_args=("parameter", *STATES))
def _update_(
    parameter: Tensor, gradient: Tensor, m_codes: Tensor, m_scales: Tensor, v_codes: Tensor, v_scales: Tensor,
    first_element: int, key: int,
    gradient_scale: float, keep1: float, take1: float, keep2: float, take2: float,
    correction: float, eps: float, rate: float, shrink: float,
) -> None:  # fmt: skip
    N = parameter.numel()
    states = (m_codes, m_scales, v_codes, v_scales)
    numbers = (first_element, key, gradient_scale, keep1, take1, keep2, take2, correction, eps, rate, shrink)
    p, g = parameter.view(-1), gradient.view(-1)
    # m_scales are fp32: the kernel does no bf16 arithmetic, so the interpreter runs it for bf16 weights too
    if not uses_triton(m_scales):
        _torch_update(p, g, *states, *numbers)
    elif N:
        p, g = (x.view(torch.int16) if x.dtype == torch.bfloat16 else x for x in (p, g))
        with torch.cuda.device_of(p):
            _update_kernel[(triton.cdiv(N, BLOCK * BLOCKS),)](
                p, g, m_codes, m_scales, v_codes, v_scales, N, *numbers,
                BLOCK, BLOCKS, M_LEVELS, V_LEVELS, num_warps=NUM_WARPS, enable_fp_fusion=False,
            )  # fmt: skip


@_update_.register_fake
def _(*arguments):
    return None


def init_state(parameter: Tensor) -> dict[str, Tensor]:
    """Return the state of a parameter that was never updated, zeros on its device.

    N numbers have m_codes (N,) int8, v_codes (N,) uint8, and m_scales and v_scales (ceil(N / 256),) fp32. The
    caller keeps, moves and saves them, as well as the step number and the seed.
    """
    return {
        name: torch.zeros(size, dtype=dtype, device=parameter.device)
        for name, dtype, size in _state_layout(parameter.numel())
    }


def _state_layout(N: int) -> list[tuple[str, torch.dtype, int]]:
    """Return (name, dtype, size) of each tensor of the state of N numbers."""
    sizes = {"codes": N, "scales": -(-N // BLOCK)}
    dtypes = torch.int8, torch.float32, torch.uint8, torch.float32
    return [(name, dtype, sizes[name[2:]]) for name, dtype in zip(STATES, dtypes, strict=True)]


def state_slice(state: dict[str, Tensor], first_element: int, num_elements: int) -> dict[str, Tensor]:
    """Return views of the state of elements first_element .. first_element + num_elements - 1.

    Elements are those of the flattened parameter. Raises ValueError if the slice does not begin and end
    between two blocks of 256 (it may end where the parameter does).
    """
    N, end = len(state["m_codes"]), first_element + num_elements
    if not 0 <= first_element <= end <= N or first_element % BLOCK or (end % BLOCK and end != N):
        raise ValueError(
            f"the slice is elements {first_element} to {end} of {N}, but {BLOCK} neighbours share a scale; "
            f"begin at a multiple of {BLOCK} and end at one, or at {N}"
        )
    blocks, elements = slice(first_element // BLOCK, -(-end // BLOCK)), slice(first_element, end)
    return {name: x[blocks if name.endswith("_scales") else elements] for name, x in state.items()}


def _stream_key(seed: int, step: int, index: int) -> int:
    """Return the key of one update's random bits, a signed 64-bit integer.

    Large odd multipliers keep neighbours apart. The key is odd, because Triton would compile a second kernel
    for multiples of 16.
    """
    key = seed * 0x9E6D62D06F6A9A9B + step * 0xD1342543DE82EF95 + index * 0x94D049BB133111EB
    return (key + 2**63) % 2**64 - 2**63 | 1


@torch.no_grad()
def adamw8bit_(
    parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], *, step: int, lr: float, seed: int,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
    index: int = 0, first_element: int = 0, gradient_scale: float = 1.0,
) -> None:  # fmt: skip
    """Do one step of AdamW with decoupled decay (Loshchilov & Hutter, 2019), in place on parameter and state.

    parameter: bf16 (rounded stochastically) or fp32 (not rounded), any shape, contiguous. gradient: the same
    shape, bf16, fp16 or fp32; copied if it is not contiguous; multiplied by gradient_scale (a clipping
    factor, 1 / number of tokens) inside the kernel. state: from init_state, on the parameter's device. step:
    from 1. The random bits depend on (seed, step, index, element); index is the number of the parameter in
    the model.

    For a slice of a large parameter, such as rows of an embedding, pass first_element = its place in the
    flattened parameter and state_slice(state, ...). Slices in any order give the bits of one whole update.

    NaN and infinite gradients are not checked for (a GPU would have to wait): they make their element NaN at
    once and its block of 256 in the next step. Raises ValueError for arguments that do not fit.
    """
    N, (beta1, beta2) = parameter.numel(), betas
    if parameter.dtype not in (torch.float32, torch.bfloat16) or not parameter.is_contiguous():
        raise ValueError(
            f"parameter is {parameter.dtype} with strides {parameter.stride()} for shape "
            f"{tuple(parameter.shape)}; it is updated in place, so it must be contiguous fp32 or bf16: use "
            "parameter.contiguous(), or load the model in one of these"
        )
    floating = torch.float32, torch.bfloat16, torch.float16
    if gradient.shape != parameter.shape or gradient.dtype not in floating:
        raise ValueError(
            f"gradient is {gradient.dtype} {tuple(gradient.shape)} but parameter {tuple(parameter.shape)}; "
            "pass a bf16, fp16 or fp32 gradient of the parameter's shape"
        )
    for name, dtype, size in _state_layout(N):
        x = state.get(name)
        if x is None or x.dtype != dtype or x.shape != (size,) or not x.is_contiguous():
            found = "missing" if x is None else f"{x.dtype} {tuple(x.shape)}, strides {x.stride()}"
            raise ValueError(
                f"state[{name!r}] is {found} but a parameter of {N} numbers needs {dtype} ({size},), "
                "contiguous; use init_state(parameter), for a slice state_slice"
            )
        if x.device != parameter.device:
            raise ValueError(
                f"state[{name!r}] is on {x.device} but parameter on {parameter.device}; move the state first"
            )
    if gradient.device != parameter.device:
        raise ValueError(
            f"gradient is on {gradient.device} but parameter on {parameter.device}; move the gradient first"
        )
    if first_element < 0 or first_element % BLOCK:
        raise ValueError(
            f"first_element is {first_element} but {BLOCK} neighbours share a scale; cut at multiples of it"
        )
    tiny = torch.finfo(torch.float32).tiny
    for name, value, fits, rule in (
        ("step", step, step >= 1, ">= 1: the first update is step 1"),
        ("betas", betas, 0 <= beta1 < 1 and 0 <= beta2 < 1, "two numbers in [0, 1)"),
        ("eps", eps, eps >= tiny, "an fp32 number > 0: a weight without gradient divides by it"),
    ):
        if not fits:
            raise ValueError(f"{name} is {value} but must be {rule}")

    _update_(
        parameter, gradient.contiguous(), *(state[name] for name in STATES),
        first_element, _stream_key(seed, step, index), gradient_scale, beta1, 1 - beta1, beta2, 1 - beta2,
        1 / math.sqrt(1 - beta2**step), eps, lr / (1 - beta1**step), 1 - lr * weight_decay,
    )  # fmt: skip
