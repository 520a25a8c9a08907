"""Saliency masks for partial fine-tuning: Fisher information, bit-packed masks, and masked gradients.

A mask takes one bit a weight (or a neuron), 1/32 of a float32 tensor, and is computed once before training.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastvkd_kernels.backend import ELEMENTS_PER_PROGRAM, LAUNCH_OPTIONS, choose_backend, jit, on_device, tl

GRANULARITIES = ("weight", "neuron")


@dataclass(frozen=True)
class SaliencyMask:
    """Which weights of a parameter may move. Bit j of byte i is entry 8 i + j, row-major; 1 = trainable.

    `bits` is uint8 (ceil(entries / 8),). Entries are the weights, or with granularity "neuron" the rows of dimension 0:
    a neuron's weights move together. Bits past the last entry are 0.
    """

    bits: Tensor
    shape: torch.Size
    granularity: str

    @property
    def entries(self) -> int:
        return self.shape.numel() if self.granularity == "weight" else self.shape[0]

    def count(self) -> int:
        """Number of trainable weights (waits for the device)."""
        trainable = int(_unpack(self.bits, self.entries).sum())
        return trainable if self.granularity == "weight" else trainable * (self.shape.numel() // self.shape[0])

    def to_bool(self) -> Tensor:
        """The mask as a bool tensor that broadcasts to `shape`: `shape` itself, or (rows, 1, ...) for neurons."""
        entries = _unpack(self.bits, self.entries)
        if self.granularity == "weight":
            return entries.view(self.shape)
        return entries.view(-1, *[1] * (len(self.shape) - 1))

    def to(self, device: torch.device | str) -> "SaliencyMask":
        return SaliencyMask(self.bits.to(device), self.shape, self.granularity)


# ------------------------------------------------------------------------------------------------------------ kernels

BYTES_PER_PROGRAM = 128  # of the mask, each made from 8 entries


@jit
def fisher_accumulate_kernel(fisher, grad, numel, scale, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < numel
    g = tl.load(grad + o, mask=m, other=0).to(tl.float32)
    tl.store(fisher + o, tl.load(fisher + o, mask=m, other=0) + scale * (g * g), mask=m)


@jit
def threshold_mask_kernel(forget, retain, bits, n_entries, threshold, BLOCK: tl.constexpr):
    o_byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_bit = tl.arange(0, 8)
    entry = o_byte[:, None] * 8 + o_bit[None, :]
    m = entry < n_entries
    f = tl.load(forget + entry, mask=m, other=0)
    r = tl.load(retain + entry, mask=m, other=0)
    trainable = ((f >= threshold * r) & (f > 0)).to(tl.int32)
    byte = tl.sum(trainable << o_bit[None, :], 1)
    tl.store(bits + o_byte, byte.to(tl.uint8), mask=o_byte * 8 < n_entries)


@jit
def apply_mask_kernel(grad, bits, numel, n_per_entry, PER_WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """Writes zeros only; the gradient is not read."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < numel
    entry = o if PER_WEIGHT else o // n_per_entry
    byte = tl.load(bits + entry // 8, mask=m, other=0).to(tl.int32)
    frozen = ((byte >> (entry % 8).to(tl.int32)) & 1) == 0
    tl.store(grad + o, tl.zeros([BLOCK], grad.dtype.element_ty), mask=m & frozen)


# --------------------------------------------------------------------------------------------------------- operations


def fisher_accumulate_(fisher: Tensor, grad: Tensor, *, scale: float = 1.0, backend: str = "auto") -> Tensor:
    """fisher += scale * grad^2 in place and return it: the diagonal of the empirical Fisher information.

    `fisher` is float32 (in float16 a squared gradient underflows), `grad` of the same shape in any float dtype; the
    square is taken in float32. Raises TypeError or ValueError where dtype or shape do not fit.
    """
    if fisher.dtype != torch.float32:
        raise TypeError(f"fisher has dtype {fisher.dtype}: float32 is needed, since squared gradients underflow below")
    if fisher.shape != grad.shape or fisher.device != grad.device:
        raise ValueError(
            f"fisher {tuple(fisher.shape)} on {fisher.device} and grad {tuple(grad.shape)} on {grad.device} differ"
        )
    if not grad.is_floating_point():
        raise TypeError(f"grad has dtype {grad.dtype}: a float dtype is needed")
    chosen = choose_backend(backend, fisher, grad)
    grad = grad.detach()
    # the kernel addresses dense row-major tensors; torch's own operation takes any other layout
    if chosen == "torch" or not (fisher.is_contiguous() and grad.is_contiguous()):
        grad32 = grad.float()
        return fisher.addcmul_(grad32, grad32, value=scale)
    n = fisher.numel()
    if n:
        with on_device(fisher):
            fisher_accumulate_kernel[(-(-n // ELEMENTS_PER_PROGRAM),)](
                fisher=fisher, grad=grad, numel=n, scale=scale, BLOCK=ELEMENTS_PER_PROGRAM, **LAUNCH_OPTIONS
            )
    return fisher


def saliency_mask(
    fisher_forget: Tensor,
    fisher_retain: Tensor,
    *,
    threshold: float | None = None,
    fraction: float | None = None,
    granularity: str = "weight",
    backend: str = "auto",
) -> SaliencyMask:
    """Mask of the weights (or neurons) that matter for the forget set and little for the retain set.

    The score is the Fisher ratio F_forget / F_retain (MMUnlearner, arXiv 2502.11051). For granularity "neuron" the
    Fisher values of a neuron's weights (dimension 0) are added first. Exactly one of the two rules is given:

    - threshold >= 0: trainable where F_forget >= threshold * F_retain and F_forget > 0 (no division by F_retain = 0)
    - 0 <= fraction <= 1: the round(fraction * entries) entries of highest ratio; of equal ones the first

    Both Fisher tensors are float32 of the parameter's shape, finite and not negative. ValueError otherwise.
    """
    if (threshold is None) == (fraction is None):
        raise ValueError(f"give one of threshold and fraction, found threshold={threshold}, fraction={fraction}")
    if threshold is not None and not threshold >= 0:
        raise ValueError(f"threshold={threshold} must be 0 or more")
    if fraction is not None and not 0 <= fraction <= 1:
        raise ValueError(f"fraction={fraction} must lie between 0 and 1")
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity={granularity!r} is unknown: use one of {', '.join(GRANULARITIES)}")
    if fisher_forget.shape != fisher_retain.shape or fisher_forget.dim() == 0:
        raise ValueError(
            f"fisher_forget {tuple(fisher_forget.shape)} and fisher_retain {tuple(fisher_retain.shape)} "
            "must have the parameter's shape, of one dimension or more"
        )
    for name, fisher in (("fisher_forget", fisher_forget), ("fisher_retain", fisher_retain)):
        if fisher.dtype != torch.float32:
            raise ValueError(f"{name} has dtype {fisher.dtype}: float32 is needed")
        # sum() is NaN or infinite if any value is, and needs no temporary of the tensor's size
        if fisher.numel() and not (torch.isfinite(fisher.sum()) and fisher.min() >= 0):
            raise ValueError(f"{name} holds values that are negative or not finite: accumulate it again in float32")
    chosen = choose_backend(backend, fisher_forget, fisher_retain)
    forget, retain = fisher_forget.reshape(-1), fisher_retain.reshape(-1)
    if granularity == "neuron":
        forget, retain = (f.reshape(f.shape[0], -1).sum(1) for f in (fisher_forget, fisher_retain))
    if fraction is not None:
        bits = _pack(_highest(forget / retain.clamp_min(torch.finfo(torch.float32).tiny), fraction))
    else:
        assert threshold is not None
        bits = _threshold_bits(forget, retain, threshold, chosen)
    return SaliencyMask(bits, fisher_forget.shape, granularity)


def _threshold_bits(forget: Tensor, retain: Tensor, threshold: float, backend: str) -> Tensor:
    if backend == "torch":
        return _pack((forget >= threshold * retain) & (forget > 0))
    bits = forget.new_empty(-(-forget.numel() // 8), dtype=torch.uint8)
    if bits.numel():
        with on_device(forget):
            threshold_mask_kernel[(-(-bits.numel() // BYTES_PER_PROGRAM),)](
                forget=forget.contiguous(),
                retain=retain.contiguous(),
                bits=bits,
                n_entries=forget.numel(),
                threshold=threshold,
                BLOCK=BYTES_PER_PROGRAM,
                **LAUNCH_OPTIONS,
            )
    return bits


def _highest(ratio: Tensor, fraction: float) -> Tensor:
    """(n,) bool: the round(fraction * n) highest values; of those equal to the last one, the first in order."""
    n = ratio.numel()
    k = round(fraction * n)
    if k == 0 or n == 0:
        return torch.zeros_like(ratio, dtype=torch.bool)
    last = ratio.kthvalue(n - k + 1).values  # cheaper than a sort: no index per weight
    above, equal = ratio > last, ratio == last
    return above | (equal & (equal.cumsum(0) <= k - above.sum()))


def apply_mask_(grad: Tensor, mask: SaliencyMask, *, backend: str = "auto") -> Tensor:
    """Set `grad` to zero in place wherever the mask's bit is 0, and return it; other values stay bit-identical.

    `grad` has the mask's shape, any dtype. A masked NaN or infinity becomes 0 too. ValueError if shape or device
    differ.
    """
    if grad.shape != mask.shape or grad.device != mask.bits.device:
        raise ValueError(
            f"grad {tuple(grad.shape)} on {grad.device} does not fit the mask of {tuple(mask.shape)} "
            f"on {mask.bits.device}"
        )
    # the kernel addresses a dense row-major tensor; torch's own operation takes any other layout
    if choose_backend(backend, grad, mask.bits) == "torch" or not grad.is_contiguous():
        return grad.masked_fill_(~mask.to_bool(), 0)
    n = grad.numel()
    if n:
        with on_device(grad):
            apply_mask_kernel[(-(-n // ELEMENTS_PER_PROGRAM),)](
                grad=grad,
                bits=mask.bits,
                numel=n,
                n_per_entry=n // mask.entries,
                PER_WEIGHT=mask.granularity == "weight",
                BLOCK=ELEMENTS_PER_PROGRAM,
                **LAUNCH_OPTIONS,
            )
    return grad


def _pack(entries: Tensor) -> Tensor:
    """(n,) bool -> (ceil(n / 8),) uint8, bit j of byte i being entry 8 i + j."""
    padded = torch.nn.functional.pad(entries.view(torch.uint8), (0, -entries.numel() % 8)).view(-1, 8)
    shift = torch.arange(8, dtype=torch.uint8, device=entries.device)
    return (padded << shift).sum(1, dtype=torch.uint8)


def _unpack(bits: Tensor, entries: int) -> Tensor:
    """The inverse of `_pack`: (ceil(n / 8),) uint8 -> (n,) bool."""
    shift = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(1) >> shift) & 1).view(-1)[:entries].bool()
