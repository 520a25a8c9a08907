"""Distillation loss on visual tokens: gather, distance, weighting and gradient in one pass over the rows.

Letters: T rows of the flattened hidden states, N visual tokens among them, M target rows, H hidden size.
The forward pass already computes the gradient, so nothing but it is kept for backward.
"""

import torch
from torch import Tensor

from fastvkd_kernels.backend import (
    ELEMENTS_PER_PROGRAM,
    LAUNCH_OPTIONS,
    block_and_warps,
    choose_backend,
    jit,
    on_device,
    tl,
)

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
    - "cosine": d = 1 - x.t / (|x| |t|); a zero vector gives d = 1 and a zero gradient; `scale` is not used; the
      subtraction resolves no distance below about 1e-7
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
        hidden's dtype and zero outside `rows`. All arithmetic is float32. Sums run in a fixed order, so results are
        bitwise repeatable. Nothing waits for the GPU. Extra memory is the gradient and 8 bytes a row; a float16
        gradient is kept in float32 until backward, since 1 / (N H) underflows. There is no second derivative.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not fit.
        IndexError: on a CPU, a row outside its range. On a GPU nothing can be read back: there the loss becomes NaN.
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

    Rows are taken in chunks whose temporaries stay in a CPU's cache. The arithmetic is the kernel's.
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
            factor = torch.where(repel[chunk], torch.where(d >= margin, 0, -factor), factor)
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


# ------------------------------------------------------------------------------------------------------------ kernels
# p_ pointer, o_ offsets, m_ mask. A program handles one row: of hidden with a gradient to write, else one visual token.


@jit
def load_float32(p, m, FLOAT8: tl.constexpr):
    """Masked load, widened to float32. float8 comes as uint8 and is decoded here, since GPUs before sm_89 cannot.

    Moved to float16's bit positions an e4m3 number keeps its value but for the exponent bias: 15 - 7, a factor 256.
    """
    raw = tl.load(p, mask=m, other=0)
    if FLOAT8 == "e4m3fn":
        bits = ((raw & 0x80).to(tl.uint16) << 8) | ((raw & 0x7F).to(tl.uint16) << 7)
        value = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return tl.where((raw & 0x7F) == 0x7F, float("nan"), value)
    elif FLOAT8 == "e5m2":
        return (raw.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return raw.to(tl.float32)


@jit
def smooth_l1_slope(error, beta):
    return tl.minimum(tl.maximum(error / beta, -1.0), 1.0)


@jit
def distance_sums(x, t, beta, DISTANCE: tl.constexpr):
    """The element-wise terms whose sums over H make the distance: (|x|^2, |t|^2, x.t), or one of them used."""
    if DISTANCE == "cosine":
        return x * x, t * t, x * t
    error = x - t
    if DISTANCE == "mse":
        return error * error, error, error
    else:
        # for |e| < beta: e^2 / 2 beta; beyond: |e| - beta / 2; both are c (e - beta c / 2), c = clamp(e / beta, -1, 1)
        slope = smooth_l1_slope(error, beta)
        return slope * (error - 0.5 * beta * slope), error, error


@jit
def distance_gradient(x, t, along_x, along_t, beta, DISTANCE: tl.constexpr):
    if DISTANCE == "cosine":
        return along_x * x - along_t * t
    elif DISTANCE == "mse":
        return along_x * (x - t)
    else:
        return along_x * smooth_l1_slope(x - t, beta)


@jit
def index_tokens_kernel(rows, token_of_row, distances, n_tokens, n_rows, BLOCK: tl.constexpr):
    """token_of_row[rows[n]] = n, and NaN distances, which stay where a row is out of range or comes twice."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n_tokens
    row = tl.load(rows + o_n, mask=m_n, other=-1).to(tl.int64)
    tl.store(token_of_row + row, o_n.to(tl.int32), mask=m_n & (row >= 0) & (row < n_rows))
    tl.store(distances + o_n, tl.full([BLOCK], float("nan"), tl.float32), mask=m_n)


@jit
def distill_rows_kernel(
    hidden,
    rows,
    target,
    target_rows,
    weight,
    repel,
    token_of_row,
    distances,
    gradient,
    n_rows,
    n_targets,
    n_inner,
    stride_outer,
    stride_inner,
    stride_target,
    uniform_weight,
    margin,
    scale_per_element,
    beta,
    H: tl.constexpr,
    DISTANCE: tl.constexpr,
    FLOAT8: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Distance of one visual token, and its row of the gradient (zeros for a row that is no visual token)."""
    if gradient is not None:
        row = tl.program_id(0).to(tl.int64)
        token = tl.load(token_of_row + row).to(tl.int64)
        inside = token >= 0
    else:
        token = tl.program_id(0).to(tl.int64)
        row = tl.load(rows + token).to(tl.int64)
        inside = (row >= 0) & (row < n_rows)
    target_row = token
    if target_rows is not None:
        target_row = tl.load(target_rows + token, mask=inside, other=0).to(tl.int64)
    known_target = (target_row >= 0) & (target_row < n_targets)
    # A row that is no visual token reads nothing: all its values are 0, and so are distance sums and gradient.
    readable = tl.where(inside & known_target, H, 0)
    p_x = hidden + (row // n_inner) * stride_outer + (row % n_inner) * stride_inner
    p_t = target + target_row * stride_target

    o_h = tl.arange(0, BLOCK)
    m_h = o_h < readable
    x = tl.load(p_x + o_h, mask=m_h, other=0).to(tl.float32)
    t = load_float32(p_t + o_h, m_h, FLOAT8)
    sum_0, sum_1, sum_2 = distance_sums(x, t, beta, DISTANCE)
    if H > BLOCK:
        for start in range(BLOCK, H, BLOCK):
            o_b = start + o_h
            m_b = o_b < readable
            x_b = tl.load(p_x + o_b, mask=m_b, other=0).to(tl.float32)
            t_b = load_float32(p_t + o_b, m_b, FLOAT8)
            part_0, part_1, part_2 = distance_sums(x_b, t_b, beta, DISTANCE)
            sum_0 += part_0
            if DISTANCE == "cosine":
                sum_1 += part_1
                sum_2 += part_2

    if DISTANCE == "cosine":
        x_norm2, t_norm2 = tl.sum(sum_0, 0), tl.sum(sum_1, 0)
        # a zero vector gets the factor 0, hence cos = 0 and no gradient
        x_inverse = tl.where(x_norm2 == 0, 0.0, 1.0 / tl.sqrt(x_norm2))
        t_inverse = tl.where(t_norm2 == 0, 0.0, 1.0 / tl.sqrt(t_norm2))
        cosine = tl.sum(sum_2, 0) * x_inverse * t_inverse
        d = 1.0 - cosine
    else:
        d = tl.sum(sum_0, 0) * scale_per_element
    d = tl.where(inside & known_target, d, float("nan"))

    if gradient is not None:
        if weight is not None:
            factor = tl.load(weight + token, mask=inside, other=0).to(tl.float32)
        else:
            factor = tl.where(inside, uniform_weight, 0.0)
        if repel is not None:
            pushed = tl.load(repel + token, mask=inside, other=0) != 0
            factor = tl.where(pushed, tl.where(d >= margin, 0.0, -factor), factor)
        factor = tl.where(inside & (known_target == 0), float("nan"), factor)
        if DISTANCE == "cosine":
            along_x = factor * cosine * x_inverse * x_inverse
            along_t = factor * x_inverse * t_inverse
        elif DISTANCE == "mse":
            along_x = factor * (2.0 * scale_per_element)
            along_t = 0.0
        else:
            along_x = factor * scale_per_element
            along_t = 0.0
        p_g = gradient + row * H
        slope = distance_gradient(x, t, along_x, along_t, beta, DISTANCE)
        tl.store(p_g + o_h, slope.to(gradient.dtype.element_ty), mask=o_h < H)
        if H > BLOCK:
            for start in range(BLOCK, H, BLOCK):
                o_b = start + o_h
                m_b = o_b < readable
                x_b = tl.load(p_x + o_b, mask=m_b, other=0).to(tl.float32)
                t_b = load_float32(p_t + o_b, m_b, FLOAT8)
                slope_b = distance_gradient(x_b, t_b, along_x, along_t, beta, DISTANCE)
                tl.store(p_g + o_b, slope_b.to(gradient.dtype.element_ty), mask=o_b < H)
        tl.store(distances + token, d, mask=inside)
    else:
        tl.store(distances + token, d)


@jit
def reduce_loss_kernel(distances, weight, repel, loss, n_tokens, uniform_weight, margin, BLOCK: tl.constexpr):
    """The weighted sum of all distances by one program, in a fixed order."""
    o_n = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    start = 0
    while start < n_tokens:  # not range: Triton 3.6's interpreter cannot take a bound from an argument
        m_n = start + o_n < n_tokens
        d = tl.load(distances + start + o_n, mask=m_n, other=0)
        if repel is not None:
            pushed = tl.load(repel + start + o_n, mask=m_n, other=0) != 0
            d = tl.where(pushed, tl.where(d >= margin, 0.0, margin - d), d)  # a NaN distance stays NaN
        if weight is not None:
            total += tl.load(weight + start + o_n, mask=m_n, other=0).to(tl.float32) * d
        else:
            total += tl.where(m_n, uniform_weight * d, 0.0)
        start += BLOCK
    tl.store(loss, tl.sum(total, 0))


@jit
def scale_gradient_kernel(gradient, factor, out, numel, BLOCK: tl.constexpr):
    """out = gradient * factor; in place (`out` None) nothing is read or written where the factor is 1."""
    f = tl.load(factor).to(tl.float32)
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if out is not None:
        m = o < numel
        tl.store(out + o, (tl.load(gradient + o, mask=m).to(tl.float32) * f).to(out.dtype.element_ty), mask=m)
    else:
        m = o < tl.where(f != 1.0, numel, 0)
        tl.store(gradient + o, (tl.load(gradient + o, mask=m).to(tl.float32) * f).to(gradient.dtype.element_ty), mask=m)


def fold_leading_dimensions(hidden: Tensor) -> tuple[Tensor, int, int, int]:
    """(tensor, inner size, outer stride, inner stride): row r starts at r // inner * outer stride + r % inner * inner
    stride. The tensor is `hidden` itself, or a copy where its last dimension is not dense or two strides do not do.
    """
    H = hidden.shape[-1]
    if hidden.stride(-1) == 1 or H == 1:
        folded: list[list[int]] = []  # [size, stride] with mergeable neighbours merged
        for size, stride in zip(hidden.shape[:-1], hidden.stride()[:-1], strict=True):
            if size == 1:
                continue
            if folded and folded[-1][1] == stride * size:
                folded[-1] = [folded[-1][0] * size, stride]
            else:
                folded.append([size, stride])
        if len(folded) <= 2:
            (_, outer), (inner_size, inner) = [[1, 0], [1, 0], *folded][-2:]
            return hidden, max(inner_size, 1), outer, inner
    copy = hidden.contiguous()
    return copy, max(copy.numel() // H, 1), 0, H


def distill_rows_triton(
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
    """Loss, (N,) distances, and hidden's gradient (empty without `with_gradient`), by the kernels above."""
    H = hidden.shape[-1]
    N = rows.shape[0]
    T = hidden.numel() // H
    hidden, inner_size, stride_outer, stride_inner = fold_leading_dimensions(hidden)
    target = target if target.stride(-1) == 1 or H == 1 else target.contiguous()
    float8 = {torch.float8_e4m3fn: "e4m3fn", torch.float8_e5m2: "e5m2"}.get(target.dtype)
    rows, target_rows, weight, repel = (  # type: ignore[assignment]
        None if tensor is None else tensor.contiguous() for tensor in (rows, target_rows, weight, repel)
    )
    assert rows is not None
    repel = None if repel is None else repel.view(torch.uint8)
    uniform_weight = 1 / max(N, 1)

    loss = hidden.new_zeros((), dtype=torch.float32)
    distances_N = hidden.new_empty(N, dtype=torch.float32)
    gradient = token_of_row_T = None
    if with_gradient:
        gradient = torch.empty(hidden.shape, dtype=_gradient_dtype(hidden.dtype), device=hidden.device)
        token_of_row_T = hidden.new_full((T,), -1, dtype=torch.int32)
    block, num_warps = block_and_warps(H)
    with on_device(hidden):
        if with_gradient and N:
            index_tokens_kernel[(-(-N // ELEMENTS_PER_PROGRAM),)](
                rows=rows,
                token_of_row=token_of_row_T,
                distances=distances_N,
                n_tokens=N,
                n_rows=T,
                BLOCK=ELEMENTS_PER_PROGRAM,
                **LAUNCH_OPTIONS,
            )
        programs = T if with_gradient else N
        if programs:
            distill_rows_kernel[(programs,)](
                hidden=hidden,
                rows=rows,
                target=target if float8 is None else target.view(torch.uint8),
                target_rows=target_rows,
                weight=weight,
                repel=repel,
                token_of_row=token_of_row_T,
                distances=distances_N,
                gradient=gradient,
                n_rows=T,
                n_targets=target.shape[0],
                n_inner=inner_size,
                stride_outer=stride_outer,
                stride_inner=stride_inner,
                stride_target=target.stride(0),
                uniform_weight=uniform_weight,
                margin=margin,
                scale_per_element=scale / H,
                beta=beta,
                H=H,
                DISTANCE=distance,
                FLOAT8=float8,
                BLOCK=block,
                num_warps=num_warps,
                **LAUNCH_OPTIONS,
            )
        if N:
            reduce_loss_kernel[(1,)](
                distances=distances_N,
                weight=weight,
                repel=repel,
                loss=loss,
                n_tokens=N,
                uniform_weight=uniform_weight,
                margin=margin,
                BLOCK=4096,
                num_warps=8,
                **LAUNCH_OPTIONS,
            )
    return loss, distances_N, hidden.new_empty(0) if gradient is None else gradient


def scale_gradient_triton(gradient: Tensor, factor: Tensor, out: Tensor | None) -> None:
    """out = gradient * factor, in place where `out` is None. Both are contiguous."""
    n = gradient.numel()
    if n == 0:
        return
    with on_device(gradient):
        scale_gradient_kernel[(-(-n // ELEMENTS_PER_PROGRAM),)](
            gradient=gradient, factor=factor, out=out, numel=n, BLOCK=ELEMENTS_PER_PROGRAM, **LAUNCH_OPTIONS
        )


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
    implementation = distill_rows_triton if backend == "triton" else distill_rows_torch
    return implementation(
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
def _scale_gradient(gradient: Tensor, factor: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    if backend != "triton":
        return (gradient * factor).to(dtype)
    out = torch.empty_like(gradient, dtype=dtype)
    scale_gradient_triton(gradient, factor, out)
    return out


@_scale_gradient.register_fake
def _scale_gradient_fake(gradient, factor, dtype, backend):
    return torch.empty_like(gradient, dtype=dtype)


@torch.library.custom_op("fastvkd::scale_gradient_", mutates_args={"gradient"})
def _scale_gradient_(gradient: Tensor, factor: Tensor, backend: str) -> None:
    if backend == "triton":
        scale_gradient_triton(gradient, factor, None)
    elif factor.device.type != "cpu" or factor.item() != 1:  # only on a CPU is looking at the factor free
        gradient.mul_(factor)


def _setup_context(ctx, inputs, output):
    _, distances, gradient = output
    ctx.mark_non_differentiable(distances, gradient)
    ctx.set_materialize_grads(False)  # else backward is handed zeros of the gradient's size, which nobody reads
    ctx.save_for_backward(gradient)
    ctx.dtype = inputs[0].dtype
    ctx.backend = inputs[-1]


def _backward(ctx, grad_loss, grad_distances, grad_gradient):
    if torch.is_grad_enabled():  # create_graph=True: the gradient would silently count as a constant
        raise RuntimeError(
            "visual_distill_loss has no second derivative, its gradient being computed in the forward pass: "
            "call backward without create_graph=True"
        )
    if grad_loss is None:
        return (None,) * 12
    (gradient,) = ctx.saved_tensors
    # In place, unless retain_graph=True lets a second backward come for the saved gradient, or torch.compile traces
    # this with a subclass of Tensor: mutation is then for the compiler to arrange.
    traced = type(gradient) is not Tensor
    if traced or gradient.dtype != ctx.dtype or torch._C._autograd._get_current_graph_task_keep_graph():
        gradient = _scale_gradient(gradient, grad_loss, ctx.dtype, ctx.backend)
    else:
        _scale_gradient_(gradient, grad_loss, ctx.backend)
    return gradient, *(None,) * 11


_forward.register_autograd(_backward, setup_context=_setup_context)
