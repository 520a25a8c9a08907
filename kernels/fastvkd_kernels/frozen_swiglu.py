"""SwiGLU between frozen projections: silu(gate) * up, saving gate and up and no intermediate."""

import torch
from torch import Tensor

from fastvkd_kernels.backend import ELEMENTS_PER_PROGRAM, LAUNCH_OPTIONS, choose_backend, jit, on_device, tl

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def frozen_swiglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """silu(gate) * up, silu(g) = g / (1 + exp(-g)) (arXiv 2002.05202), with both input gradients.

    Args:
        gate, up: the same shape and dtype: float32, bfloat16 or float16 (float64: torch only); copied where not
            contiguous.
        backend: "auto" (Triton on a GPU, torch elsewhere), "triton" or "torch".

    Returns:
        The product in the same dtype. Arithmetic is float32 and rounded once. Eager code also keeps silu(gate) for
        backward; here backward computes it again. There is no second derivative.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    if gate.dtype not in DTYPES or up.dtype != gate.dtype:
        raise TypeError(f"gate is {gate.dtype} and up {up.dtype}: one float dtype for both is needed")
    if gate.shape != up.shape or gate.device != up.device:
        raise ValueError(
            f"gate {tuple(gate.shape)} on {gate.device} and up {tuple(up.shape)} on {up.device} must be the same"
        )
    return _forward(gate, up, choose_backend(backend, gate, up))


# ------------------------------------------------------------------------------------------------------------ kernels


@jit
def swiglu_kernel(gate, up, y, numel, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < numel
    g = tl.load(gate + o, mask=m, other=0).to(tl.float32)
    u = tl.load(up + o, mask=m, other=0).to(tl.float32)
    tl.store(y + o, (g / (1.0 + tl.exp(-g)) * u).to(y.dtype.element_ty), mask=m)


@jit
def swiglu_backward_kernel(gate, up, grad_y, grad_gate, grad_up, numel, BLOCK: tl.constexpr):
    """With s = sigmoid(gate): grad_up = grad_y gate s, grad_gate = grad_y up s (1 + gate (1 - s))."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < numel
    g = tl.load(gate + o, mask=m, other=0).to(tl.float32)
    u = tl.load(up + o, mask=m, other=0).to(tl.float32)
    dy = tl.load(grad_y + o, mask=m, other=0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-g))
    tl.store(grad_up + o, (dy * g * s).to(grad_up.dtype.element_ty), mask=m)
    tl.store(grad_gate + o, (dy * u * s * (1.0 + g * (1.0 - s))).to(grad_gate.dtype.element_ty), mask=m)


def swiglu_triton(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    n = y.numel()
    if n:
        with on_device(gate):
            swiglu_kernel[(-(-n // ELEMENTS_PER_PROGRAM),)](
                gate=gate, up=up, y=y, numel=n, BLOCK=ELEMENTS_PER_PROGRAM, **LAUNCH_OPTIONS
            )
    return y


def swiglu_backward_triton(gate: Tensor, up: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    gate, up, grad_y = gate.contiguous(), up.contiguous(), grad_y.contiguous()
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    n = gate.numel()
    if n:
        with on_device(gate):
            swiglu_backward_kernel[(-(-n // ELEMENTS_PER_PROGRAM),)](
                gate=gate,
                up=up,
                grad_y=grad_y,
                grad_gate=grad_gate,
                grad_up=grad_up,
                numel=n,
                BLOCK=ELEMENTS_PER_PROGRAM,
                **LAUNCH_OPTIONS,
            )
    return grad_gate, grad_up


# ---------------------------------------------------------------------------------------------------- plain-torch twin


def _widened(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32) for tensor in tensors]


def swiglu_torch(gate: Tensor, up: Tensor) -> Tensor:
    g, u = _widened(gate, up)
    return (torch.nn.functional.silu(g) * u).to(gate.dtype).contiguous()


def swiglu_backward_torch(gate: Tensor, up: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    g, u, dy = _widened(gate, up, grad_y)
    grad_gate = torch.ops.aten.silu_backward(dy * u, g)
    grad_up = torch.nn.functional.silu(g).mul_(dy)
    return grad_gate.to(gate.dtype).contiguous(), grad_up.to(up.dtype).contiguous()


# ------------------------------------------------------------------------------------------ registration with torch


@torch.library.custom_op("fastvkd::frozen_swiglu", mutates_args=())
def _forward(gate: Tensor, up: Tensor, backend: str) -> Tensor:
    return (swiglu_triton if backend == "triton" else swiglu_torch)(gate, up)


@torch.library.custom_op("fastvkd::frozen_swiglu_backward", mutates_args=())
def _input_gradients(gate: Tensor, up: Tensor, grad_y: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return (swiglu_backward_triton if backend == "triton" else swiglu_backward_torch)(gate, up, grad_y)


@_forward.register_fake
def _forward_fake(gate, up, backend):
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@_input_gradients.register_fake
def _input_gradients_fake(gate, up, grad_y, backend):
    return tuple(torch.empty_like(gate, memory_format=torch.contiguous_format) for _ in range(2))


def _setup_context(ctx, inputs, output):
    gate, up, ctx.backend = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx, grad_y):
    if torch.is_grad_enabled():  # create_graph=True: the gradient would silently count as a constant
        raise RuntimeError("frozen_swiglu has no second derivative: call backward without create_graph=True")
    gate, up = ctx.saved_tensors
    return *_input_gradients(gate, up, grad_y, ctx.backend), None


_forward.register_autograd(_backward, setup_context=_setup_context)
