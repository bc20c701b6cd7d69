"""How kernels are judged: at most twice torch's own error against float64, and no overflow of an offset."""

import mmap

import pytest
import torch


def rms(x):
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def run(function, inputs, upstream, dtype):
    """Return the outputs of function(*inputs) in dtype, then the inputs' gradients under `upstream`."""
    leaves = [x.to(dtype).clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    read = [output.detach().clone() for output in outputs]
    torch.autograd.backward(outputs, [dy.to(dtype).clone() for dy in upstream])
    return [*read, *(leaf.grad for leaf in leaves)]


def check(function, reference, inputs, upstream, dtype):
    """Compare outputs and gradients. One unit in the last place is added: torch may be exact by luck."""
    inputs = [x.to(dtype) for x in inputs]  # the same rounded numbers for all three
    upstream = [dy.to(dtype) for dy in upstream]
    truth = run(reference, inputs, upstream, torch.float64)
    theirs, ours = (run(f, inputs, upstream, dtype) for f in (reference, function))
    for i, (right, torchs, found) in enumerate(zip(truth, theirs, ours, strict=True)):
        assert found.dtype == dtype and found.shape == right.shape and not found.isnan().any(), i
        error, allowed = rms(found - right), rms(torchs - right)
        assert error <= 2 * allowed + torch.finfo(dtype).eps * rms(right), (i, error, allowed)


@pytest.fixture
def poisoned(monkeypatch):
    """Fill fresh memory with NaN: what a kernel leaves unwritten shows."""
    for owner, name in ((torch, "empty_like"), (torch.Tensor, "new_empty")):
        allocate = getattr(owner, name)

        def fill(*args, allocate=allocate, **options):
            x = allocate(*args, **options)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        monkeypatch.setattr(owner, name, fill)


def far_memory(num_elements, dtype=torch.float16):
    """Return a tensor of many elements of which only the pages that are touched take memory."""
    num_bytes = num_elements * torch.finfo(dtype).bits // 8
    no_reserve = 0x4000
    space = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.frombuffer(space, dtype=dtype)


def run_as_program(number, monkeypatch):
    """Let a kernel's only program run as number `number`, in an interpreter that raises on int32 overflow."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder

    def create_get_program_id(axis, get=builder.create_get_program_id):
        handle = get(axis)
        handle.data = handle.data + handle.data.dtype.type(number if axis == 0 else 0)
        return handle

    monkeypatch.setattr(builder, "options", interpreter.InterpreterOptions(debug=True))
    monkeypatch.setattr(builder, "create_get_program_id", create_get_program_id)
