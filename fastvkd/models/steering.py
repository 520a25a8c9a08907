"""Test-time steering: hooks that push hidden states of chosen LLM layers along a direction. No weight changes.

`fastvkd.unlearning.steering` finds the direction. Whoever has the weights can take the hooks off: steering suppresses
knowledge and does not remove it. Legend: H width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastvkd.errors import ModelError
from fastvkd.files import write_atomically
from fastvkd.models import families
from fastvkd.models.families import family_of


@dataclass(frozen=True)
class Steering:
    """By LLM layer (0 is the first): direction (H,), and weight (H,) and bias () of the gate."""

    directions: dict[int, Tensor]
    weights: dict[int, Tensor]
    biases: dict[int, Tensor]
    strength: float = 1.0

    def shift(self, layer: int, hidden: Tensor) -> Tensor:
        """strength * gate(h) * direction for hidden states (..., H), in their dtype."""
        weight, bias, direction = (
            part[layer].to(hidden.device) for part in (self.weights, self.biases, self.directions)
        )
        gate = (hidden.float() @ weight + bias).clamp(0, 1)
        return (self.strength * gate[..., None] * direction).to(hidden.dtype)

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all. Raises TrainingError where that cannot be."""
        tensors = {
            f"{part}.{layer}": value.contiguous()
            for part, values in (("direction", self.directions), ("weight", self.weights), ("bias", self.biases))
            for layer, value in values.items()
        }
        write_atomically(path, save(tensors, {"strength": str(self.strength)}))


def load_steering(path: Path) -> Steering:
    """Read what `Steering.save` wrote. Raises ModelError for another file."""
    parts: dict[str, dict[int, Tensor]] = {"direction": {}, "weight": {}, "bias": {}}
    try:
        with safe_open(path, "pt") as file:
            strength = float((file.metadata() or {})["strength"])
            for name in file.keys():  # noqa: SIM118 - not a dict
                part, layer = name.split(".")
                parts[part][int(layer)] = file.get_tensor(name)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ModelError(f"{path}: not a steering file ({' '.join(str(error).split())}); fit one anew") from error
    return Steering(parts["direction"], parts["weight"], parts["bias"], strength)


def attach(model: nn.Module, steering: Steering) -> list[RemovableHandle]:
    """Steer `model` at every token of any forward pass from now on, until the returned hooks are removed.

    Raises ModelError for a layer that the model lacks.
    """
    layers = decoder_layers(model)
    if max(steering.directions) >= len(layers):
        raise ModelError(f"steering is for layer {max(steering.directions)}, but the model has {len(layers)} layers")
    return [layers[layer].register_forward_hook(_hook(steering, layer)) for layer in steering.directions]


def _hook(steering: Steering, layer: int) -> Callable[..., Any]:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + steering.shift(layer, output[0]), *output[1:])
        return output + steering.shift(layer, output)

    return hook


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    layers = families.language_model(model, family_of(model)).layers
    assert isinstance(layers, nn.ModuleList)
    return layers
