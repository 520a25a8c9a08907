"""Projector matrices W + sin(D): W stays as it is, D is trained from zero, and no entry moves by more than 1.

D is a parameter of the linear layer itself, `<layer>.sine` (out, in), and a forward hook adds its part, as adapters do
(`lora`). Source: SineProject, arXiv 2511.18444 (eq. 9 and 10).
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fastvkd.errors import ModelError

_SINE = ".sine"


def add_sines(model: nn.Module, projector: Iterable[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    """Put a D on every linear layer whose weight is among `projector` and return their (live name, parameter) pairs.

    The model's output does not change. Raises ModelError when there is no such layer.
    """
    wanted = {id(p): name for name, p in projector}
    found: list[tuple[str, nn.Parameter]] = []
    for module in model.modules():
        if isinstance(module, nn.Linear) and id(module.weight) in wanted:
            sine = nn.Parameter(torch.zeros_like(module.weight))
            module.register_parameter("sine", sine)
            module.register_forward_hook(_add)
            found.append((wanted[id(module.weight)].removesuffix(".weight") + _SINE, sine))
    if not found:
        raise ModelError("trainable=sine: the projector has no linear layer; set trainable=projector")
    return found


def _add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    sine: Tensor = module.sine  # type: ignore[assignment]
    return output + nn.functional.linear(inputs[0], sine.sin())


def modulated(names: Iterable[str]) -> dict[str, tuple[str]]:
    """Weight name -> name of its D, for those of `names` that are one."""
    return {n.removesuffix(_SINE) + ".weight": (n,) for n in names if n.endswith(_SINE)}


def modulated_weight(weight: Tensor, sine: Tensor) -> Tensor:
    """W + sin(D), computed in float32, in the dtype of W."""
    return (weight.float() + sine.float().sin()).to(weight.dtype)


def merged(weights: dict[str, Tensor], original: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """A checkpoint's `weights` with every D folded into the `original` weight of its layer."""
    parts = modulated(weights)
    folded = {name: modulated_weight(original(name), weights[part]) for name, (part,) in parts.items()}
    return {name: value for name, value in weights.items() if not name.endswith(_SINE)} | folded
