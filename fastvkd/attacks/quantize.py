"""Quantised weights: rounding to 8 or 4 bits undoes changes that are smaller than half a step, and what an unlearning
method had only nudged away may return (Zhang et al., arXiv 2410.16454).

The whole model is quantised, tower and projector too, since that is where unlearning took place: bitsandbytes' own
linear layers, on a GPU or a CPU. `load_model(quantize_llm=...)` is for training and leaves the visual part alone.
"""

import copy
import logging
from typing import Any, Literal, get_args

import torch
from torch import nn

from fastvkd.errors import SettingsError

Bits = Literal["int8", "nf4"]
BITS: tuple[str, ...] = get_args(Bits)


def quantized(model: nn.Module, bits: str) -> nn.Module:
    """A copy of `model` whose linear layers, all but the output head, hold int8 (row-wise absmax, LLM.int8) or nf4
    (blocks of 64) weights and compute in the model's dtype.

    Raises SettingsError for another kind.
    """
    import bitsandbytes as bnb

    if bits not in BITS:
        raise SettingsError(f"quantize: {bits!r} is not known; allowed: {', '.join(BITS)}")
    # It says for every layer and batch that int8 inputs are rounded, which is what this attack is about.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    found: Any = copy.deepcopy(model)
    head = found.get_output_embeddings()
    for name, module in list(found.named_modules()):
        if type(module) is not nn.Linear or module is head:
            continue
        device, dtype = module.weight.device, module.weight.dtype
        bias = module.bias is not None
        new: Any
        if bits == "nf4":
            new = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias, compute_dtype=dtype, quant_type="nf4"
            )
            new.weight = bnb.nn.Params4bit(module.weight.data.cpu(), requires_grad=False, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(
                module.in_features, module.out_features, bias, has_fp16_weights=False, threshold=0.0
            )
            new.weight = bnb.nn.Int8Params(module.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
        if bias:
            new.bias = nn.Parameter(module.bias.data.clone(), requires_grad=False)
        parent, _, last = name.rpartition(".")
        setattr(found.get_submodule(parent), last, new.to(device))
    return found.eval()


def dequantized(module: nn.Module) -> torch.Tensor:
    """(out, in) float32: the weights that a quantised layer computes with."""
    import bitsandbytes as bnb

    layer: Any = module
    if isinstance(module, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    state = layer.state
    scale = state.SCB if state.SCB is not None else layer.weight.SCB
    values = state.CB if state.CB is not None else layer.weight.data
    return values.float() * scale.float()[:, None] / 127
