"""Kernels of fastvkd: each operation as a Triton kernel and as the plain-torch twin that it is tested against."""

from fastvkd_kernels.frozen_rms_norm import frozen_rms_norm
from fastvkd_kernels.frozen_swiglu import frozen_swiglu
from fastvkd_kernels.patch_frozen import patch_frozen
from fastvkd_kernels.saliency import SaliencyMask, apply_mask_, fisher_accumulate_, saliency_mask
from fastvkd_kernels.visual_distill_loss import visual_distill_loss

__all__ = [
    "SaliencyMask",
    "apply_mask_",
    "fisher_accumulate_",
    "frozen_rms_norm",
    "frozen_swiglu",
    "patch_frozen",
    "saliency_mask",
    "visual_distill_loss",
]
