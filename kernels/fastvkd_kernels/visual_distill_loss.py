"""Distillation loss on visual tokens: gather, distance, weighting and gradient in one pass over the rows.

Letters: T rows of the flattened hidden states, N visual tokens among them, M target rows, H hidden size.
The forward pass already computes the gradient, so nothing but it is kept for backward.
"""

import torch
from torch import Tensor

from fastvkd_kernels.backend import choose_backend

DISTANCES = ("mse", "cosine", "smooth_l1")
HIDDEN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
TARGET_DTYPES = (*HIDDEN_DTYPES, *FLOAT8_DTYPES)


def visual_distill_loss(
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
    return_rows: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Weighted sum over visual tokens of the distance between hidden state and target.

    With x_n = hidden[rows[n]], t_n = target[target_rows[n]] and d_n the distance of the two:

        loss = sum_n weight_n * (relu(margin - d_n) if repel_n else d_n)

    - "mse": d = scale * mean_h (x - t)^2
    - "cosine": d = 1 - x.t / (|x| |t|); a zero vector gives d = 1 and a zero gradient; `scale` is not used
    - "smooth_l1": d = scale * mean_h of (e^2 / (2 beta) if |e| < beta else |e| - beta / 2), e = x - t

    Args:
        hidden: (..., H) float32, bfloat16, float16 (or float64, torch only), taken as (T, H). Any strides are read in
            place while the last dimension is dense and the leading ones fold into two; else one copy is made.
        rows: (N,) int32 or int64, the visual tokens, each row at most once.
        target: (M, H), any float dtype including float8_e4m3fn; constant (refused if it requires grad).
        target_rows: (N,) int32 or int64, the target row of each visual token; default: n, with M = N.
        weight: (N,) float32, any sign; default 1 / N.
        repel: (N,) bool, these tokens are pushed away from their target until d >= margin.
        return_rows: also return the detached (N,) distances d.
        backend: "auto" (Triton on a GPU, torch elsewhere), "triton" or "torch".

    Returns:
        The float32 scalar (float64 for float64 hidden); N = 0 gives 0. Its gradient goes to `hidden` only, in
        hidden's dtype and zero outside `rows`. All arithmetic is float32, sums run in a fixed order (bitwise
        repeatable), nothing waits for the GPU. Extra memory: the gradient (for float16 kept in float32 until backward,
        since 1 / (N H) underflows there) and 8 bytes a row. There is no second derivative.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not fit. On a GPU nothing can be read back:
        a row outside its range makes the loss NaN there (and raises IndexError on the CPU).
    """
    _check(hidden, rows, target, target_rows, weight, repel, distance, scale, beta)
    chosen = choose_backend(backend, hidden, rows, target, target_rows, weight, repel)
    with_gradient = torch.is_grad_enabled() and hidden.requires_grad
    loss, distances, _ = _forward(
        hidden, rows, target, target_rows, weight, repel, margin, distance, scale, beta, with_gradient, chosen
    )
    return (loss, distances.detach()) if return_rows else loss


def _check(
    hidden: Tensor,
    rows: Tensor,
    target: Tensor,
    target_rows: Tensor | None,
    weight: Tensor | None,
    repel: Tensor | None,
    distance: str,
    scale: float,
    beta: float,
) -> None:
    if distance not in DISTANCES:
        raise ValueError(f"distance={distance!r} is unknown: use one of {', '.join(DISTANCES)}")
    if beta <= 0:
        raise ValueError(f"beta={beta} must be above 0")
    if not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number, found {type(scale).__name__}")
    if hidden.dtype not in HIDDEN_DTYPES:
        raise TypeError(f"hidden has dtype {hidden.dtype}: float32, bfloat16, float16 or float64 is needed")
    if target.dtype not in TARGET_DTYPES:
        raise TypeError(f"target has dtype {target.dtype}: a float dtype is needed")
    if hidden.dim() < 2 or target.dim() != 2 or hidden.shape[-1] != target.shape[-1] or hidden.shape[-1] == 0:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and target {tuple(target.shape)} do not fit: (..., H) and (M, H), H > 0"
        )
    if target.requires_grad or (weight is not None and weight.requires_grad):
        name = "target" if target.requires_grad else "weight"
        raise ValueError(f"{name} requires grad, but it is a constant of this loss: pass {name}.detach()")
    n_rows = rows.shape[0] if rows.dim() == 1 else -1
    for name, index in (("rows", rows), ("target_rows", target_rows)):
        if index is None:
            continue
        if index.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} has dtype {index.dtype}: int32 or int64 is needed")
        if index.dim() != 1 or index.shape[0] != n_rows:
            raise ValueError(f"{name} has shape {tuple(index.shape)}: (N,) is needed, the same N for all row arguments")
    if target_rows is None and target.shape[0] != n_rows:
        raise ValueError(f"target has {target.shape[0]} rows for {n_rows} visual tokens: pass target_rows to map them")
    if weight is not None and (weight.shape != rows.shape or not weight.is_floating_point()):
        raise ValueError(f"weight is {weight.dtype} {tuple(weight.shape)}: float (N,) = ({n_rows},) is needed")
    if repel is not None and (repel.shape != rows.shape or repel.dtype != torch.bool):
        raise ValueError(f"repel is {repel.dtype} {tuple(repel.shape)}: bool (N,) = ({n_rows},) is needed")
    for name, tensor in (
        ("rows", rows),
        ("target", target),
        ("target_rows", target_rows),
        ("weight", weight),
        ("repel", repel),
    ):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device} and hidden on {hidden.device}: put both on one device")


# ---------------------------------------------------------------------------------------------------- plain-torch twin


def _select_rows(table: Tensor, index: Tensor) -> Tensor:
    if table.dtype in FLOAT8_DTYPES:  # index_select is not implemented for float8
        return table.view(torch.uint8).index_select(0, index).view(table.dtype)
    return table.index_select(0, index)


def distill_rows_torch(
    hidden: Tensor,
    rows: Tensor,
    target: Tensor,
    target_rows: Tensor | None,
    weight: Tensor | None,
    repel: Tensor | None,
    margin: float,
    distance: str,
    scale: float,
    beta: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The twin: loss, (N,) distances, and hidden's gradient (empty without `with_gradient`).

    Rows are taken in chunks whose temporaries stay in a CPU's cache; the arithmetic is the kernel's.
    """
    H = hidden.shape[-1]
    N = rows.shape[0]
    hidden_TH = hidden.reshape(-1, H)
    T = hidden_TH.shape[0]
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    gradient_dtype = _gradient_dtype(hidden.dtype)
    if hidden.device.type == "cpu":  # on a GPU this check would wait for the device
        seen = torch.zeros(T, dtype=torch.bool)
        seen[rows.long()] = True
        if int(seen.sum()) != N:
            raise ValueError(f"rows holds {N - int(seen.sum())} repeated entries: each visual token may appear once")

    gradient = hidden.new_zeros(hidden.shape if with_gradient else 0, dtype=gradient_dtype)
    gradient_TH = gradient.view(-1, H)
    distances_N = hidden.new_empty(N, dtype=dtype)
    weight_N = hidden.new_full((N,), 1 / max(N, 1), dtype=dtype) if weight is None else weight.to(dtype)

    elements = 2**18 if hidden.device.type == "cpu" else 2**27
    rows_per_chunk = max(1, elements // H)
    for start in range(0, N, rows_per_chunk):
        chunk = slice(start, start + rows_per_chunk)
        x = hidden_TH.index_select(0, rows[chunk]).to(dtype)
        t = (target[chunk] if target_rows is None else _select_rows(target, target_rows[chunk])).to(dtype)
        if distance == "cosine":
            # a zero vector gets the factor 0, hence cos = 0 and no gradient
            x_norm2, t_norm2 = (x * x).sum(-1), (t * t).sum(-1)
            x_inverse = torch.where(x_norm2 > 0, x_norm2.rsqrt(), 0)
            t_inverse = torch.where(t_norm2 > 0, t_norm2.rsqrt(), 0)
            cosine = (x * t).sum(-1) * x_inverse * t_inverse
            d = 1 - cosine
        else:
            error = x.sub_(t)
            if distance == "mse":
                d = (error * error).sum(-1) * (scale / H)
            else:
                clamped = (error / beta).clamp_(-1, 1)
                # for |e| < beta: e^2 / 2 beta; beyond: |e| - beta / 2; both are c (e - beta c / 2), c = clamp(e / beta)
                d = (clamped * (error - (beta / 2) * clamped)).sum(-1) * (scale / H)
        distances_N[chunk] = d
        if not with_gradient:
            continue
        factor = weight_N[chunk]
        if repel is not None:
            factor = torch.where(repel[chunk], torch.where(d < margin, -factor, 0), factor)
        if distance == "mse":
            slope = error.mul_((factor * (2 * scale / H)).unsqueeze(1))
        elif distance == "smooth_l1":
            slope = clamped.mul_((factor * (scale / H)).unsqueeze(1))
        else:
            along_x = (factor * cosine * x_inverse * x_inverse).unsqueeze(1)
            along_t = (factor * x_inverse * t_inverse).unsqueeze(1)
            slope = x.mul_(along_x).sub_(t * along_t)
        gradient_TH.index_copy_(0, rows[chunk].long(), slope.to(gradient_dtype))

    term_N = distances_N if repel is None else torch.where(repel, (margin - distances_N).relu(), distances_N)
    return (weight_N * term_N).sum(), distances_N, gradient


def _gradient_dtype(hidden_dtype: torch.dtype) -> torch.dtype:
    # An unscaled gradient of the order 1 / (N H) underflows in float16; backward rounds it after the loss scale.
    return torch.float32 if hidden_dtype == torch.float16 else hidden_dtype


# ------------------------------------------------------------------------------------------ registration with torch


@torch.library.custom_op("fastvkd::visual_distill_loss", mutates_args=())
def _forward(
    hidden: Tensor,
    rows: Tensor,
    target: Tensor,
    target_rows: Tensor | None,
    weight: Tensor | None,
    repel: Tensor | None,
    margin: float,
    distance: str,
    scale: float,
    beta: float,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return distill_rows_torch(
        hidden, rows, target, target_rows, weight, repel, margin, distance, scale, beta, with_gradient
    )


@_forward.register_fake
def _forward_fake(
    hidden, rows, target, target_rows, weight, repel, margin, distance, scale, beta, with_gradient, backend
):
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    gradient_shape = hidden.shape if with_gradient else (0,)
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(rows.shape[0], dtype=dtype),
        hidden.new_empty(gradient_shape, dtype=_gradient_dtype(hidden.dtype)),
    )


@torch.library.custom_op("fastvkd::scale_gradient", mutates_args=())
def _scale_gradient(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return (gradient * factor).to(dtype)


@_scale_gradient.register_fake
def _scale_gradient_fake(gradient, factor, dtype):
    return torch.empty_like(gradient, dtype=dtype)


def _setup_context(ctx, inputs, output):
    _, distances, gradient = output
    ctx.mark_non_differentiable(distances, gradient)
    ctx.save_for_backward(gradient)
    ctx.dtype = inputs[0].dtype


def _backward(ctx, grad_loss, grad_distances, grad_gradient):
    if torch.is_grad_enabled():  # create_graph=True: the gradient would silently count as a constant
        raise RuntimeError(
            "visual_distill_loss has no second derivative, its gradient being computed in the forward pass: "
            "call backward without create_graph=True"
        )
    (gradient,) = ctx.saved_tensors
    return _scale_gradient(gradient, grad_loss, ctx.dtype), *(None,) * 11


_forward.register_autograd(_backward, setup_context=_setup_context)
