"""Which implementation runs (the Triton kernel or its plain-torch twin) and how a kernel is launched."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # published for Linux only; elsewhere the twins run
    triton = None
    tl = SimpleNamespace(constexpr=int)  # all that a kernel's signature needs

# Triton decides when a kernel is decorated whether it is interpreted, so one look at import time is enough.
INTERPRETED: bool = triton is not None and bool(triton.knobs.runtime.interpret)


# Fused multiply-adds are asked for explicitly, so that no environment variable changes a result.
LAUNCH_OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}

# Elements that one program of an element-wise kernel handles: 8 a thread with Triton's 4 warps, 16 bytes in 16 bit.
ELEMENTS_PER_PROGRAM = 1024


def jit(kernel: Any) -> Any:
    """`triton.jit` where Triton exists; elsewhere the undecorated function, which nothing ever calls.

    Triton does not specialise on sizes named `n_*`: they change from batch to batch, and each variant would compile
    anew. It does on an element count named `numel`: only if 16 divides it are 16-byte loads possible.
    """
    if triton is None:
        return kernel
    sizes = [name for name in kernel.__code__.co_varnames[: kernel.__code__.co_argcount] if name.startswith("n_")]
    return triton.jit(kernel, do_not_specialize=sizes)


def block_and_warps(H: int) -> tuple[int, int]:
    """Block size and number of warps for a kernel whose programs take one row of H elements each.

    One block holds the row up to 8,192 elements; beyond, the kernel loops over blocks. A thread of a 32-lane warp has
    at most 16 elements: of two float32 rows and their gradient these take far fewer than 128 registers, so nothing
    spills.
    """
    block = min(1 << (H - 1).bit_length(), 8192)
    return block, min(max(block // 512, 1), 16)


def on_device(tensor: Tensor) -> Any:
    """Context in which kernels launch on the tensor's GPU (no effect for a CPU tensor)."""
    return torch.cuda.device_of(tensor)


def choose_backend(backend: str, *tensors: Tensor | None) -> str:
    """Resolve `backend` ("auto", "triton" or "torch") for these tensors to "triton" or "torch".

    "auto" takes Triton when all tensors are on a GPU, and torch otherwise (also for float64, which the kernels do
    not compute). Raises ValueError for an unknown name, RuntimeError where "triton" cannot run.
    """
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend={backend!r} is unknown: use 'auto', 'triton' or 'torch'")
    present = [tensor for tensor in tensors if tensor is not None]
    on_gpu = all(tensor.is_cuda for tensor in present)
    wide = any(tensor.is_floating_point() and tensor.element_size() == 8 for tensor in present[:1])
    if backend == "auto":
        return "triton" if on_gpu and triton is not None and not wide else "torch"
    if backend == "triton":
        if triton is None:
            raise RuntimeError(
                "backend='triton' needs the triton package, which is not installed: use 'auto' or 'torch'"
            )
        if wide:
            raise RuntimeError("backend='triton' computes in float32 and takes no float64 tensor: use 'torch'")
        if not on_gpu and not INTERPRETED:
            where = sorted({str(tensor.device) for tensor in present})
            raise RuntimeError(
                f"backend='triton' needs GPU tensors, found {', '.join(where)}: use backend='auto', or set "
                "TRITON_INTERPRET=1 before Python starts to interpret the kernel on the CPU"
            )
    return backend
