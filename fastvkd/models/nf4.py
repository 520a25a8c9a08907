"""bitsandbytes' 4-bit linear layer, made to compute the same on every CPU. On other devices it is left as it is.

This module is imported only where a layer is quantised: bitsandbytes takes seconds to import and may be absent.
"""

import copy
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from torch.nn import functional as F

# Weights that share a scale, bitsandbytes' default: in the order of memory, across rows where they end first.
BLOCK = 64


class Linear4bit(bnb.nn.Linear4bit):
    """On a CPU it multiplies with the dequantised weights, in the compute dtype, whatever the widths of the layer.

    bitsandbytes itself has two other ways, each on some CPUs only:

    - With AVX512-BF16 the first pass without a gradient packs the weights anew, for a product in bfloat16 that has no
      gradient. It refuses widths that 64 (in) or 32 (out) does not divide, and `dequantize_4bit` cannot read it.
    - With AVX512, `dequantize_4bit` takes every row for the start of a block. Where 64 does not divide `in_features`
      that is wrong: weights get another block's scale.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return _Product.apply(x.to(dtype), bias, self).to(x.dtype)


class _Product(torch.autograd.Function):
    """`x @ weight.T + bias`, (..., in) to (..., out). It keeps 4 bits a weight; the backward pass dequantises again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, layer: Linear4bit) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(x, dequantized(layer, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        for_x, for_bias, _ = ctx.needs_input_grad
        return (
            grad @ dequantized(ctx.layer, grad.dtype) if for_x else None,
            grad.flatten(0, -2).sum(0) if for_bias else None,
            None,
        )


def dequantized(layer: Linear4bit, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(out, in) in `dtype`: the weights that the layer computes with."""
    weight: Any = layer.weight
    count = layer.in_features * layer.out_features
    codes = weight.data.view(torch.uint8).flatten()  # two a byte
    if count % BLOCK:  # fill the last block
        codes = F.pad(codes, (0, -(-count // BLOCK) * BLOCK // 2 - len(codes)))
    state = copy.copy(weight.quant_state)
    state.shape, state.dtype = (2 * len(codes) // BLOCK, BLOCK), dtype  # a block a row: no CPU can mistake its scale
    values = bnb.functional.dequantize_4bit(codes[:, None], state)
    return values.flatten()[:count].view(layer.out_features, layer.in_features)


def same_on_every_cpu(model: nn.Module) -> None:
    """Makes the 4-bit layers of a model that transformers has loaded `Linear4bit` of this module, in place."""
    for module in model.modules():
        if type(module) is bnb.nn.Linear4bit:
            module.__class__ = Linear4bit
