"""RMSNorm whose weight is frozen: input gradient only, and nothing saved for backward but the input itself."""

import torch
from torch import Tensor

from fastvkd_kernels.backend import LAUNCH_OPTIONS, block_and_warps, choose_backend, jit, on_device, tl

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def frozen_rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, backend: str = "auto") -> Tensor:
    """y = weight * x / sqrt(mean_h x^2 + eps) (arXiv 1910.07467), for a weight that is not trained.

    Args:
        x: (..., H) float32, bfloat16 or float16 (float64: torch only); copied where it is not contiguous.
        weight: (H,) any float dtype, constant (refused if it requires grad).
        eps: added to the mean square.
        backend: "auto" (Triton on a GPU, torch elsewhere), "triton" or "torch".

    Returns:
        (..., H) in x's dtype. Arithmetic is float32 and rounded once, at the end. transformers' modules round the
        normalised x first, so in 16 bit the two may differ by a unit in the last place. Backward computes the
        statistics again, from the row that it reads anyway. There is no second derivative.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    if x.dtype not in DTYPES or not weight.is_floating_point():
        raise TypeError(f"x is {x.dtype} and weight {weight.dtype}: float32, bfloat16, float16 or float64 is needed")
    if x.dim() == 0 or weight.shape != x.shape[-1:] or x.shape[-1] == 0:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit: (..., H) and (H,), H > 0")
    if weight.requires_grad:
        raise ValueError("weight requires grad, but this norm computes no gradient for it: use torch's rms_norm")
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device} and x on {x.device}: put both on one device")
    return _forward(x, weight, eps, choose_backend(backend, x, weight))


# ------------------------------------------------------------------------------------------------------------ kernels


@jit
def rms_norm_kernel(x, weight, y, eps, H: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    p_x, p_y = x + row * H, y + row * H
    o_h = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o_h, mask=o_h < H, other=0).to(tl.float32)
    square = b_x * b_x
    if H > BLOCK:
        for start in range(BLOCK, H, BLOCK):
            more = tl.load(p_x + start + o_h, mask=start + o_h < H, other=0).to(tl.float32)
            square += more * more
    inverse_rms = 1.0 / tl.sqrt(tl.sum(square, 0) * (1.0 / H) + eps)
    b_w = tl.load(weight + o_h, mask=o_h < H, other=0).to(tl.float32)
    tl.store(p_y + o_h, (b_x * inverse_rms * b_w).to(y.dtype.element_ty), mask=o_h < H)
    if H > BLOCK:
        for start in range(BLOCK, H, BLOCK):
            m_h = start + o_h < H
            more = tl.load(p_x + start + o_h, mask=m_h, other=0).to(tl.float32)
            b_w = tl.load(weight + start + o_h, mask=m_h, other=0).to(tl.float32)
            tl.store(p_y + start + o_h, (more * inverse_rms * b_w).to(y.dtype.element_ty), mask=m_h)


@jit
def rms_norm_backward_kernel(x, weight, grad_y, grad_x, eps, H: tl.constexpr, BLOCK: tl.constexpr):
    """With g = weight * grad_y and r = 1 / rms(x): grad_x = r g - x r^3 mean(g x)."""
    row = tl.program_id(0).to(tl.int64)
    p_x, p_g, p_out = x + row * H, grad_y + row * H, grad_x + row * H
    o_h = tl.arange(0, BLOCK)
    m_h = o_h < H
    b_x = tl.load(p_x + o_h, mask=m_h, other=0).to(tl.float32)
    b_w = tl.load(weight + o_h, mask=m_h, other=0).to(tl.float32)
    b_g = tl.load(p_g + o_h, mask=m_h, other=0).to(tl.float32) * b_w
    square = b_x * b_x
    product = b_g * b_x
    if H > BLOCK:
        for start in range(BLOCK, H, BLOCK):
            m_b = start + o_h < H
            more_x = tl.load(p_x + start + o_h, mask=m_b, other=0).to(tl.float32)
            more_w = tl.load(weight + start + o_h, mask=m_b, other=0).to(tl.float32)
            more_g = tl.load(p_g + start + o_h, mask=m_b, other=0).to(tl.float32) * more_w
            square += more_x * more_x
            product += more_g * more_x
    inverse_rms = 1.0 / tl.sqrt(tl.sum(square, 0) * (1.0 / H) + eps)
    along_x = inverse_rms * inverse_rms * inverse_rms * (tl.sum(product, 0) * (1.0 / H))
    tl.store(p_out + o_h, (inverse_rms * b_g - along_x * b_x).to(grad_x.dtype.element_ty), mask=m_h)
    if H > BLOCK:
        for start in range(BLOCK, H, BLOCK):
            m_b = start + o_h < H
            more_x = tl.load(p_x + start + o_h, mask=m_b, other=0).to(tl.float32)
            more_w = tl.load(weight + start + o_h, mask=m_b, other=0).to(tl.float32)
            more_g = tl.load(p_g + start + o_h, mask=m_b, other=0).to(tl.float32) * more_w
            slope = inverse_rms * more_g - along_x * more_x
            tl.store(p_out + start + o_h, slope.to(grad_x.dtype.element_ty), mask=m_b)


def rms_norm_triton(x: Tensor, weight: Tensor, grad_y: Tensor | None, eps: float) -> Tensor:
    """y, or with `grad_y` the gradient of x."""
    H = x.shape[-1]
    block, num_warps = block_and_warps(H)
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    programs = x.numel() // H
    if programs == 0:
        return out
    shared = dict(x=x, weight=weight, eps=eps, H=H, BLOCK=block, num_warps=num_warps, **LAUNCH_OPTIONS)
    with on_device(x):
        if grad_y is None:
            rms_norm_kernel[(programs,)](y=out, **shared)
        else:
            rms_norm_backward_kernel[(programs,)](grad_y=grad_y.contiguous(), grad_x=out, **shared)
    return out


# ---------------------------------------------------------------------------------------------------- plain-torch twin


def rms_norm_torch(x: Tensor, weight: Tensor, grad_y: Tensor | None, eps: float) -> Tensor:
    """y, or with `grad_y` the gradient of x; the arithmetic is the kernels'."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_wide = x.to(dtype)
    inverse_rms = (x_wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    if grad_y is None:
        out = x_wide * inverse_rms * weight.to(dtype)
    else:
        g = grad_y.to(dtype) * weight.to(dtype)
        out = inverse_rms * g - x_wide * (inverse_rms**3 * (g * x_wide).mean(-1, keepdim=True))
    return out.to(x.dtype, memory_format=torch.contiguous_format, copy=True)


# ------------------------------------------------------------------------------------------ registration with torch


@torch.library.custom_op("fastvkd::frozen_rms_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, eps: float, backend: str) -> Tensor:
    return (rms_norm_triton if backend == "triton" else rms_norm_torch)(x, weight, None, eps)


@torch.library.custom_op("fastvkd::frozen_rms_norm_backward", mutates_args=())
def _input_gradient(x: Tensor, weight: Tensor, grad_y: Tensor, eps: float, backend: str) -> Tensor:
    return (rms_norm_triton if backend == "triton" else rms_norm_torch)(x, weight, grad_y, eps)


@_forward.register_fake
def _forward_fake(x, weight, eps, backend):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_input_gradient.register_fake
def _input_gradient_fake(x, weight, grad_y, eps, backend):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    x, weight, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad_y):
    if torch.is_grad_enabled():  # create_graph=True: the gradient would silently count as a constant
        raise RuntimeError("frozen_rms_norm has no second derivative: call backward without create_graph=True")
    x, weight = ctx.saved_tensors
    return _input_gradient(x, weight, grad_y, ctx.eps, ctx.backend), None, None, None


_forward.register_autograd(_backward, setup_context=_setup_context)
