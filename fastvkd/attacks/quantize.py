"""Quantised weights. Rounding to 8 or 4 bits undoes changes smaller than half a step, so knowledge that was only nudged
away may return (Zhang et al., arXiv 2410.16454).

The whole model is quantised by bitsandbytes' own linear layers, on a GPU or a CPU: tower and projector too, since
unlearning took place there. `load_model(quantize_llm=...)` is for training and leaves the visual part alone.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import nn

from fastvkd.errors import SettingsError

Bits = Literal["int8", "nf4"]
BITS: tuple[str, ...] = get_args(Bits)


@contextmanager
def quantized(model: nn.Module, bits: str) -> Iterator[nn.Module]:
    """`model` itself, whose linear layers, all but the output head, hold quantised weights meanwhile.

    int8 has one absmax a row (LLM.int8). nf4 has one for each block of 64 weights in the order of memory, so any width
    will do. Layers compute in the model's dtype. Their own weights wait in host memory, so that a device never holds
    more than the model, and come back bit by bit.

    Raises SettingsError for another kind.
    """
    if bits not in BITS:
        raise SettingsError(f"quantize: {bits!r} is not known; allowed: {', '.join(BITS)}")
    # It warns for every layer and batch that int8 inputs are rounded. This attack wants just that.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    whole: Any = model
    head = whole.get_output_embeddings()
    layers = [(name, m) for name, m in model.named_modules() if type(m) is nn.Linear and m is not head]
    own: list[tuple[str, nn.Linear, torch.device]] = []
    try:
        for name, layer in layers:
            device = layer.weight.device
            own.append((name, layer.to("cpu"), device))
            _put(model, name, _rounded(layer, bits).to(device))
        yield model
    finally:
        for name, layer, device in own:
            _put(model, name, layer.to(device))


def _rounded(layer: nn.Linear, bits: str) -> nn.Module:
    """A layer of bitsandbytes with the weights of a `layer` on the CPU; they are rounded where it is moved to."""
    import bitsandbytes as bnb

    from fastvkd.models import nf4

    bias, dtype = layer.bias is not None, layer.weight.dtype
    new: Any
    if bits == "nf4":
        new = nf4.Linear4bit(layer.in_features, layer.out_features, bias, compute_dtype=dtype, quant_type="nf4")
        new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    else:
        new = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, bias, has_fp16_weights=False, threshold=0.0)
        new.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    if bias:
        new.bias = nn.Parameter(layer.bias.data.clone(), requires_grad=False)
    return new.eval()


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def left_alone(model: nn.Module) -> list[str]:
    """The linear layers of a `quantized` model that still hold their own weights, by name."""
    import bitsandbytes as bnb

    rounded = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, rounded)
    ]


def dequantized(module: nn.Module) -> torch.Tensor:
    """(out, in) float32: the weights that a layer of a `quantized` model computes with."""
    from fastvkd.models import nf4

    if isinstance(module, nf4.Linear4bit):
        return nf4.dequantized(module, module.compute_dtype or torch.float32).float()
    layer: Any = module
    state = layer.state
    scale = state.SCB if state.SCB is not None else layer.weight.SCB
    values = state.CB if state.CB is not None else layer.weight.data
    return values.float() * scale.float()[:, None] / 127
