"""Which implementation runs: the Triton kernel, or its plain-torch twin. No arithmetic lives here."""

from torch import Tensor

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # published for Linux only; elsewhere the twins run
    triton = None
    tl = None

# Triton decides when a kernel is decorated whether it is interpreted, so one look at import time is enough.
INTERPRETED: bool = triton is not None and bool(triton.knobs.runtime.interpret)


def jit(kernel):
    """`triton.jit` where Triton exists; elsewhere the undecorated function, which nothing ever calls."""
    return kernel if triton is None else triton.jit(kernel)


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
