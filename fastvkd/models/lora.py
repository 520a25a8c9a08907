"""Low-rank adapters on the LLM's linear layers: y = W x + (alpha / r) B A x, with W frozen (LoRA, arXiv 2106.09685).

A and B are parameters of the linear layer itself, `<layer>.lora_A` (r, in) and `<layer>.lora_B` (out, r). A forward
hook adds their part. So every other name stays, and a quantised W works too. `merged` folds adapters into weights.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fastvkd.errors import ModelError

_A, _B = ".lora_A", ".lora_B"


def add_adapters(
    llm: nn.Module, names: dict[int, str], *, rank: int, alpha: float, seed: int
) -> list[tuple[str, nn.Parameter]]:
    """Put an adapter on every linear layer of `llm` and return their (live name, parameter) pairs.

    B starts at zero, so the model's output does not change. `names` maps the id of a module to its live name in the
    whole model. Raises ModelError when `llm` has no linear layer.
    """
    generator = torch.Generator().manual_seed(seed)
    found: list[tuple[str, nn.Parameter]] = []
    for module in llm.modules():
        if not isinstance(module, nn.Linear):
            continue
        device, dtype = module.weight.device, _compute_dtype(module)
        a = torch.empty(rank, module.in_features).uniform_(-1, 1, generator=generator) / math.sqrt(module.in_features)
        module.register_parameter("lora_A", nn.Parameter(a.to(device, dtype)))
        module.register_parameter(
            "lora_B", nn.Parameter(torch.zeros(module.out_features, rank, device=device, dtype=dtype))
        )
        module.register_forward_hook(_Adapter(alpha / rank))
        name = names[id(module)]
        found += [(name + _A, module.lora_A), (name + _B, module.lora_B)]  # type: ignore[list-item]
    if not found:
        raise ModelError("trainable=lora: the LLM has no linear layer that is loaded; train vision+projector, or all")
    return found


class _Adapter:
    """The forward hook. It takes the adapter's weights from the module, so a deep copy uses its own."""

    def __init__(self, scale: float):
        self.scale = scale

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        a, b = module.lora_A, module.lora_B
        return output + self.scale * nn.functional.linear(nn.functional.linear(inputs[0].to(a.dtype), a), b)  # type: ignore[arg-type]


def _compute_dtype(linear: nn.Linear) -> torch.dtype:
    """The dtype of an adapter: the layer's own, or the compute dtype of a 4-bit layer."""
    dtype = getattr(linear, "compute_dtype", None) or linear.weight.dtype
    return dtype if dtype.is_floating_point else torch.float16


def adapted(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Weight name -> names of its adapter (A, B), for those of `names` that are adapters."""
    return {n.removesuffix(_A) + ".weight": (n, n.removesuffix(_A) + _B) for n in names if n.endswith(_A)}


def merged_weight(weight: Tensor, a: Tensor, b: Tensor, *, alpha: float) -> Tensor:
    """W + (alpha / r) B A, computed in float32, in the dtype of W (out, in)."""
    return (weight.float() + (alpha / len(a)) * (b.float() @ a.float())).to(weight.dtype)


def merged(weights: dict[str, Tensor], original: Callable[[str], Tensor], *, alpha: float) -> dict[str, Tensor]:
    """A checkpoint's `weights` with every adapter folded into the `original` weight of its layer."""
    pairs = adapted(weights)
    folded = {
        name: merged_weight(original(name), weights[a], weights[b], alpha=alpha) for name, (a, b) in pairs.items()
    }
    parts = {part for pair in pairs.values() for part in pair}
    return {name: value for name, value in weights.items() if name not in parts} | folded
