"""The correctness gate that every implementation of the distillation loss passes: twin, interpreted kernel and GPU.

Both the implementation and plain eager code (autograd, everything in the input's dtype) are compared with a float64
computation by autograd from the same rounded inputs. The implementation's error may not exceed eager's by more than
1e-5 of the truth's scale, so no tolerance is guessed.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SLACK = 1e-5
DISTANCES = ("mse", "cosine", "smooth_l1")
HIDDEN_SIZES = (1, 63, 96, 576, 1000, 4096, 5120)


def eager_rows(x: Tensor, t: Tensor, distance: str, scale: float, beta: float) -> Tensor:
    if distance == "mse":
        return scale * F.mse_loss(x, t, reduction="none").mean(-1)
    if distance == "cosine":
        return 1 - F.cosine_similarity(x, t, dim=-1)
    return scale * F.smooth_l1_loss(x, t, reduction="none", beta=beta).mean(-1)


def eager_loss(
    hidden: Tensor,
    rows: Tensor,
    target: Tensor,
    *,
    target_rows: Tensor | None = None,
    weight: Tensor | None = None,
    repel: Tensor | None = None,
    margin: float = 1.0,
    distance: str = "mse",
    scale: float = 1.0,
    beta: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, distances, sum of the terms' absolute values), the way anyone would write it, in hidden's dtype."""
    x = hidden.reshape(-1, hidden.shape[-1])[rows]
    t = target.to(hidden.dtype)
    t = t if target_rows is None else t[target_rows]
    d = eager_rows(x, t, distance, scale, beta)
    term = d if repel is None else torch.where(repel, (margin - d).relu(), d)
    w = torch.full_like(d, 1 / max(rows.numel(), 1)) if weight is None else weight.to(d.dtype)
    return (w * term).sum(), d, (w * term).abs().sum()


def make_case(
    H: int,
    dtype: torch.dtype,
    distance: str,
    *,
    target_dtype: torch.dtype | None = None,
    layout: str = "dense",
    options: bool = True,
    n: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `visual_distill_loss`: a (2, 5, H) hidden in the given layout and n visual tokens among its rows.

    With `options` the targets are mapped, the weights random with both signs, and the margin lies in the widest gap of
    the distances (so that no implementation lands on the other side by rounding) with repelled rows on both sides.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    B, S = 2, 5
    if layout == "dense":
        hidden = random(B, S, H).to(dtype)
    elif layout == "sliced":  # tokens cut from a longer sequence, hidden from a wider buffer
        hidden = random(B, S + 3, H + 5).to(dtype)[:, 2 : 2 + S, 3 : 3 + H]
    elif layout == "transposed":
        hidden = random(S, B, H).to(dtype).transpose(0, 1)
    elif layout == "unfoldable":  # the last dimension is not dense
        hidden = random(B, H, S).to(dtype).transpose(1, 2)
    else:
        raise ValueError(layout)
    rows = torch.randperm(B * S, generator=generator)[:n]
    case: dict[str, Any] = dict(hidden=hidden, rows=rows, distance=distance)
    M = 3 if options else n
    case["target"] = random(M, H).to(target_dtype or dtype)
    if options:
        case |= dict(target_rows=torch.randint(0, M, (n,), generator=generator), weight=random(n), scale=0.7, beta=0.5)
        if n:
            case["repel"] = torch.arange(n) % 3 != 0
            truth = {k: v.double() if k in ("hidden", "target", "weight") else v for k, v in case.items()}
            d = eager_loss(**truth)[1][case["repel"]].sort().values
            if d.numel() > 1:
                widest = int((d[1:] - d[:-1]).argmax())
                case["margin"] = float(d[widest] + d[widest + 1]) / 2
    return case


def moved_to(case: dict[str, Any], device: str) -> dict[str, Any]:
    """`case` on `device` with its strides; `Tensor.to` would make a slice of a larger tensor contiguous."""

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        whole = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
        return whole.to(device, copy=True).as_strided(value.shape, value.stride(), value.storage_offset())

    return {key: move(value) for key, value in case.items()}


def _run(loss_rows: Callable[..., tuple[Tensor, ...]], case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    hidden = case["hidden"].detach().requires_grad_()
    loss, distances, *_ = loss_rows(**{**case, "hidden": hidden})
    (gradient,) = torch.autograd.grad(loss, hidden, allow_unused=True)
    gradient = torch.zeros_like(hidden) if gradient is None else gradient
    assert gradient.dtype == hidden.dtype and gradient.shape == hidden.shape
    return loss.detach(), distances.detach(), gradient


def _error(value: Tensor, truth: Tensor, scale: Tensor) -> float:
    if truth.numel() == 0:
        assert value.numel() == 0
        return 0.0
    return float((value.double() - truth).abs().max() / scale.clamp_min(torch.finfo(torch.float64).tiny))


def check_distill_loss(implementation: Callable[..., Any], case: dict[str, Any]) -> None:
    """Raise AssertionError where loss, distances or gradient are further from the float64 truth than eager code's."""
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in case.items()}
    truth = _run(eager_loss, wide)
    eager = _run(eager_loss, case)
    ours = _run(lambda **kwargs: implementation(**kwargs, return_rows=True), case)
    scales = [
        eager_loss(**wide)[2],
        truth[1].abs().amax() if truth[1].numel() else torch.zeros(()),
        truth[2].abs().amax(),
    ]
    n = case["rows"].numel()
    if case["distance"] == "cosine" and n:
        # 1 - cos and the gradient's two terms cancel where directions nearly agree, in eager float32 code too: the
        # scale is the size of what cancels (for the gradient a twentieth of it, which is reached at 3 degrees; for
        # H = 1 all of it, since the direction of a number has no slope)
        H = case["hidden"].shape[-1]
        weight = wide.get("weight", torch.full((n,), 1 / n, device=truth[2].device)).abs()
        norms = wide["hidden"].reshape(-1, H)[case["rows"]].norm(dim=-1)
        part = 1 if H == 1 else 0.05
        scales = [weight.sum(), torch.ones(()), torch.maximum(scales[2], part * (weight / norms).max())]
    for name, value, reference, expected, scale in zip(
        ("loss", "distances", "gradient"), ours, eager, truth, scales, strict=True
    ):
        if float(scale) == 0:
            assert not value.any(), f"{name} should be zero"
            continue
        error, allowed = _error(value, expected, scale), _error(reference, expected, scale) + SLACK
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e} (eager + {SLACK})"
        if name != "gradient":  # float32 arithmetic whatever the input's dtype
            assert error <= SLACK, f"{name}: error {error:.2e}, allowed {SLACK} for float32 arithmetic"
    others = torch.ones(truth[2].shape[:-1].numel(), dtype=torch.bool)
    others[case["rows"].cpu().long()] = False
    assert not ours[2].reshape(-1, ours[2].shape[-1])[others.to(ours[2].device)].any(), "gradient outside the rows"


def round_bfloat16_as_hardware_does() -> None:
    """Make Triton's interpreter round float32 to bfloat16 to the nearest, ties to even; by itself it truncates.

    Compiled kernels use `cvt.rn.bf16` (checked in test_ahead_of_time.py), so this brings the interpreter to what runs.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return original(self, src, dst_type)
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16).numpy()
        return interpreter.TensorHandle(rounded.view(np.uint16).reshape(src.data.shape), dst_type.scalar)

    interpreter.InterpreterBuilder.cast_impl = cast_impl
    # the conversions are lambdas that look the method up on self, so they follow


def eager_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As transformers writes it: float32 statistics, rounded to x's dtype before the weight is applied."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normalised.to(x.dtype)


def eager_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def worst_error(
    function: Callable[..., Tensor], truth: Callable[..., Tensor], inputs: list[Tensor], grad_y: Tensor
) -> list[float]:
    """Largest error of the output and of each input's gradient against `truth` in float64, over the truth's maximum."""
    results = []
    for f, dtype in ((function, inputs[0].dtype), (truth, torch.float64)):
        leaves = [tensor.to(dtype).detach().requires_grad_() for tensor in inputs]
        y = f(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, grad_y.to(y.dtype))])
    return [_error(value, expected, expected.abs().amax()) for value, expected in zip(*results, strict=True)]
