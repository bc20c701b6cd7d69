"""
AdamW with 8-bit states, in one pass over memory, for fp32 weights, bf16 weights, and exact bf16 weights,
which keep the other 16 bits of the fp32 weight as one more state, the rest.

    m = beta1 m + (1 - beta1) g                      v = beta2 v + (1 - beta2) g^2
    p = (1 - lr decay) p - lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)

    m and sqrt(v): 8-bit codes and a scale per block of 256 (kernels/adamw8bit_blocks.py)
    the bits of an exact weight, as fp32: (the bits of the bf16 weight << 16) + rest, a signed 16-bit number

How it works. A program reads p, g and the codes of a few blocks, decodes, updates in fp32, encodes again with
new scales, and writes. The torch path does the same operations in the same order, and the GPU's compiler
fuses none of them (enable_fp_fusion=False). So both give the same bits, except where torch's fp32 square
root, which is off by one bit at times, decides between two codes. There is a floor: a v that is not 0 never
gets the code 0, or its next update would be m / eps.

Without a rest, bf16 weights are rounded stochastically: up with the probability equal to the fraction cut
off, so that the mean is exact. With a rest, nothing is cut off: after any number of updates, bf16 weight and
rest together are, bit for bit, the fp32 weight after the same gradients. The bf16 weight, which the model
computes with, is the nearest to it. Ties go away from zero: if they went to even, a rest could be 32,768,
which no int16 holds. A model that was loaded in bf16 starts with rests of 0.

NaN and infinity are never hidden: an element with such a gradient becomes NaN at once, and its block of 256
in the next step. So does a block with a gradient above 1.8e19, whose square is no fp32 number. Watch the loss
or the gradient norm to find it early. Infinity has the rest 0, and every NaN becomes 0x7fc0 with the rest 0:
rounding another NaN could carry into its exponent or sign, and make it infinity or -0. A finite weight above
3.396e38 is infinity in bf16, as always, but not together with its rest.

Bytes per weight, besides p and g: 2 + 8 / 256, and 2 more for the rest (fp32 states: 8). Gemma-3-1B, 1.0e9
weights: 1.9 GiB, with rests 3.8 GiB (fp32 states: 7.5 GiB). A step moves 10 bytes per weight for bf16 p and
g, once, and 4 more for the rest. On a CPU the temporaries are a few MiB, whatever the parameter's size. The
number of tokens does not matter here.
"""

import math

import torch
from torch import Tensor

from kit.kernels.adamw8bit_blocks import (
    BLOCK,
    M_LEVELS,
    V_LEVELS,
    encode,
    in_blocks,
    largest,
    level,
    random_bits,
    torch_encode,
    torch_level,
    torch_random_bits,
)
from kit.kernels.backend import tl, triton, uses_triton

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
def _load(ptr, offsets, mask):
    """Load as fp32. bf16 comes as int16, the upper half of an fp32 number: exact in the interpreter too."""
    x = tl.load(ptr + offsets, mask=mask, other=0)
    if ptr.dtype.element_ty == tl.int16:
        return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _update_kernel(
    p_ptr, g_ptr, m_ptr, m_scale_ptr, v_ptr, v_scale_ptr, rest_ptr,
    N, first_element, key,
    gradient_scale, keep1, take1, keep2, take2, correction, eps, rate, shrink,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, M_LEVELS: tl.constexpr, V_LEVELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)  # int64: a head of 262,144 x 8,192 has 2**31 numbers
    block = program * BLOCKS + tl.arange(0, BLOCKS)
    offsets = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # (BLOCKS, BLOCK)
    inside, block_inside = offsets < N, block * BLOCK < N
    p = _load(p_ptr, offsets, inside)
    if rest_ptr is not None:
        rest = tl.load(rest_ptr + offsets, mask=inside, other=0).to(tl.int32)
        p = (p.to(tl.int32, bitcast=True) + rest).to(tl.float32, bitcast=True)
    g = _load(g_ptr, offsets, inside) * gradient_scale
    m_code = tl.load(m_ptr + offsets, mask=inside, other=0).to(tl.float32)
    v_code = tl.load(v_ptr + offsets, mask=inside, other=0).to(tl.float32)
    m_scale = tl.load(m_scale_ptr + block, mask=block_inside, other=0.0)[:, None]
    v_scale = tl.load(v_scale_ptr + block, mask=block_inside, other=0.0)[:, None]

    m = level(m_code, M_LEVELS) * m_scale
    m = tl.where(m_code < 0, -m, m) * keep1 + g * take1
    root_v = level(v_code, V_LEVELS) * v_scale
    root_v = tl.sqrt_rn(root_v * root_v * keep2 + g * g * take2)
    p = p * shrink - tl.div_rn(m, root_v * correction + eps) * rate

    random = random_bits(key, offsets + first_element)
    m_scale, v_scale = largest(m), largest(root_v)
    m_code = encode(tl.abs(m), m_scale[:, None], (random >> 16) & 0xFFFFFF, M_LEVELS)
    v_code = encode(root_v, v_scale[:, None], (random >> 40) & 0xFFFFFF, V_LEVELS)
    v_code = tl.where((v_code == 0) & (root_v > 0) & (v_scale < float("inf"))[:, None], 1.0, v_code)
    tl.store(m_ptr + offsets, tl.where(m < 0, -m_code, m_code).to(tl.int8), mask=inside)
    tl.store(v_ptr + offsets, v_code.to(tl.uint8), mask=inside)
    tl.store(m_scale_ptr + block, m_scale, mask=block_inside)
    tl.store(v_scale_ptr + block, v_scale, mask=block_inside)
    if p_ptr.dtype.element_ty == tl.int16:
        # a NaN of all ones plus anything would turn into -0
        bits = tl.where(p != p, 0x7FC00000, p.to(tl.int32, bitcast=True))
        if rest_ptr is None:
            bits += (random & 0xFFFF).to(tl.int32)
        else:
            bits += 0x8000  # half of a bf16 number's last bit: to the nearest
            tl.store(rest_ptr + offsets, ((bits & 0xFFFF) - 0x8000).to(tl.int16), mask=inside)
        p = (bits >> 16).to(tl.int16)
    tl.store(p_ptr + offsets, p, mask=inside)


def exact_weight(p: Tensor, rest: Tensor) -> Tensor:
    """Return the fp32 weights of bf16 weights and their rests, in p's shape.

    Integers only, because some CPUs round denormal numbers to 0 when they convert them.
    """
    bits = p.view(torch.int16).to(torch.int32) << 16
    return bits.add_(rest.view(p.shape)).view(torch.float32)


def _torch_update(
    p, g, m_codes, m_scales, v_codes, v_scales, rest, first_element, key,
    gradient_scale, keep1, take1, keep2, take2, correction, eps, rate, shrink,
):  # fmt: skip
    """Update as _update_kernel does, in torch.

    Without add(alpha=) and addcmul: they fuse multiply and add if the CPU can, and the bits would differ.
    """
    for start in range(0, len(p), CPU_SLAB):
        part = slice(start, min(start + CPU_SLAB, len(p)))
        count, blocks = part.stop - start, slice(start // BLOCK, -(-part.stop // BLOCK))
        gradient = in_blocks(g[part]) * gradient_scale
        code = in_blocks(m_codes[part])
        m = torch_level(code, M_LEVELS).mul_(m_scales[blocks, None]).copysign_(code)
        m.mul_(keep1).add_(gradient * take1)
        v = torch_level(in_blocks(v_codes[part]), V_LEVELS).mul_(v_scales[blocks, None]).square_().mul_(keep2)
        v.add_(gradient.square_().mul_(take2))
        root_v = v.double().sqrt_().float()  # torch's fp32 root is off by one bit at times
        weight = in_blocks(p[part] if rest is None else exact_weight(p[part], rest[part])) * shrink
        weight.sub_((m / (root_v * correction).add_(eps)).mul_(rate))

        random = torch_random_bits(key, first_element + start, m.numel(), p.device)
        size, floor = m.abs(), (root_v > 0).float()
        m_scales[blocks], v_scales[blocks] = size.amax(1), root_v.amax(1)
        code = torch_encode(size, m_scales[blocks, None], (random >> 16).bitwise_and_(0xFFFFFF), M_LEVELS)
        m_codes[part] = code.copysign_(m).view(-1)[:count]
        code = torch_encode(root_v, v_scales[blocks, None], (random >> 40).bitwise_and_(0xFFFFFF), V_LEVELS)
        v_codes[part] = code.maximum(floor.mul_(v_scales[blocks, None] < torch.inf)).view(-1)[:count]

        weight = weight.view(-1)[:count]
        if p.dtype != torch.bfloat16:
            p[part] = weight
            continue
        bits = weight.view(torch.int32).masked_fill_(weight.isnan(), 0x7FC00000)
        if rest is None:
            bits.add_(random.bitwise_and_(0xFFFF).view(-1)[:count])
        else:
            bits.add_(0x8000)
            rest[part] = bits.bitwise_and(0xFFFF).sub_(0x8000)
        p[part].view(torch.int16).copy_(bits >> 16)


STATES = "m_codes", "m_scales", "v_codes", "v_scales"


@torch.library.custom_op("kit::adamw8bit_", mutates_args=("parameter", *STATES, "rest"))
def _update_(
    parameter: Tensor, gradient: Tensor, m_codes: Tensor, m_scales: Tensor, v_codes: Tensor, v_scales: Tensor,
    rest: Tensor | None, first_element: int, key: int,
    gradient_scale: float, keep1: float, take1: float, keep2: float, take2: float,
    correction: float, eps: float, rate: float, shrink: float,
) -> None:  # fmt: skip
    N = parameter.numel()
    states = (m_codes, m_scales, v_codes, v_scales, rest)
    numbers = (first_element, key, gradient_scale, keep1, take1, keep2, take2, correction, eps, rate, shrink)
    p, g = parameter.view(-1), gradient.view(-1)
    # m_scales are fp32: the kernel does no bf16 arithmetic, so the interpreter runs it for bf16 weights too
    if not uses_triton(m_scales):
        _torch_update(p, g, *states, *numbers)
    elif N:
        p, g = (x.view(torch.int16) if x.dtype == torch.bfloat16 else x for x in (p, g))
        with torch.cuda.device_of(p):
            _update_kernel[(triton.cdiv(N, BLOCK * BLOCKS),)](
                p, g, *states, N, *numbers,
                BLOCK, BLOCKS, M_LEVELS, V_LEVELS, num_warps=NUM_WARPS, enable_fp_fusion=False,
            )  # fmt: skip


@_update_.register_fake
def _(*arguments):
    return None


def init_state(parameter: Tensor, *, exact: bool = False) -> dict[str, Tensor]:
    """Return the state of a parameter that was never updated, zeros on its device.

    N numbers have m_codes (N,) int8, v_codes (N,) uint8, and m_scales and v_scales (ceil(N / 256),) fp32.
    exact: add a bf16 parameter's rest, (N,) int16. The caller keeps, moves and saves them, as well as the
    step number and the seed.
    """
    return {
        name: torch.zeros(size, dtype=dtype, device=parameter.device)
        for name, dtype, size in state_layout(parameter.numel(), exact)
    }


def state_layout(N: int, exact: bool) -> list[tuple[str, torch.dtype, int]]:
    """Return (name, dtype, size) of each tensor of the state of N numbers."""
    dtypes, blocks = (torch.int8, torch.float32, torch.uint8, torch.float32), -(-N // BLOCK)
    layout = list(zip(STATES, dtypes, (N, blocks) * 2, strict=True))
    return [*layout, ("rest", torch.int16, N)] if exact else layout


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


def check_settings(*, betas, eps, lr=0.0, weight_decay=0.0) -> None:
    """Raise ValueError for a setting out of range."""
    tiny = torch.finfo(torch.float32).tiny
    for name, value, fits, rule in (
        ("lr", lr, 0 <= lr < math.inf, "a number >= 0"),
        ("betas", betas, 0 <= betas[0] < 1 and 0 <= betas[1] < 1, "two numbers in [0, 1)"),
        ("eps", eps, eps >= tiny, "an fp32 number > 0: a weight without gradient divides by it"),
        ("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "a number >= 0"),
    ):
        if not fits:
            raise ValueError(f"{name} is {value} but must be {rule}")


@torch.no_grad()
def adamw8bit_(
    parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], *, step: int, lr: float, seed: int,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
    index: int = 0, first_element: int = 0, gradient_scale: float = 1.0,
) -> None:  # fmt: skip
    """Do one step of AdamW with decoupled decay (Loshchilov & Hutter, 2019), in place on parameter and state.

    parameter: fp32, or bf16 (rounded stochastically, or exact if its state has a rest), any shape,
    contiguous. gradient: the same shape, bf16, fp16 or fp32; copied if it is not contiguous; multiplied by
    gradient_scale (a clipping factor, 1 / number of tokens) inside the kernel. state: from init_state, on the
    parameter's device. step: from 1. The random bits depend on (seed, step, index, element); index is the
    number of the parameter in the model.

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
    if "rest" in state and parameter.dtype != torch.bfloat16:
        raise ValueError(
            f"state has a rest but parameter is {parameter.dtype}, whose bits are all there; use "
            "init_state(parameter), or load the model in bf16"
        )
    for name, dtype, size in state_layout(N, "rest" in state):
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
    if step < 1:
        raise ValueError(f"step is {step} but must be >= 1: the first update is step 1")
    check_settings(betas=betas, eps=eps)

    _update_(
        parameter, gradient.contiguous(), *(state[name] for name in STATES), state.get("rest"),
        first_element, _stream_key(seed, step, index), gradient_scale, beta1, 1 - beta1, beta2, 1 - beta2,
        1 / math.sqrt(1 - beta2**step), eps, lr / (1 - beta1**step), 1 - lr * weight_decay,
    )  # fmt: skip
