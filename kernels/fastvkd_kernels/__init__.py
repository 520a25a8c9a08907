"""Kernels of fastvkd: each operation as a Triton kernel and as the plain-torch twin that it is tested against."""

from fastvkd_kernels.saliency import SaliencyMask, apply_mask_, fisher_accumulate_, saliency_mask
from fastvkd_kernels.visual_distill_loss import visual_distill_loss

__all__ = ["SaliencyMask", "apply_mask_", "fisher_accumulate_", "saliency_mask", "visual_distill_loss"]
