"""Put the frozen-LLM operations into the frozen decoder layers of a Llama-like model, and take them out again."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import nn

from fastvkd_kernels.frozen_rms_norm import frozen_rms_norm
from fastvkd_kernels.frozen_swiglu import frozen_swiglu

# Classes whose forward is exactly y = weight * x / rms(x), or down(silu(gate(x)) * up(x)). Others look alike and are
# not: Gemma's norm multiplies by 1 + weight.
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen2_5_VL", "Qwen3", "Qwen3VLText")
RMS_NORMS = tuple(f"{family}RMSNorm" for family in FAMILIES)
SWIGLU_MLPS = tuple(f"{family}MLP" for family in FAMILIES)


@contextmanager
def patch_frozen(model: nn.Module, *, backend: str = "auto") -> Iterator[dict[str, int]]:
    """Context in which frozen RMSNorm and SwiGLU modules of Llama, Mistral, Qwen2 and Qwen3 decoder layers save less.

    Decoder layers are modules named `*DecoderLayer`. A module in one is patched if its class is known and none of its
    parameters requires grad on entry. Weights, names and the state dict stay as they are. On exit, also after an error,
    every module has its own forward back. Yields the numbers of patched modules: {"rms_norm": ..., "swiglu": ...}.
    Raises ValueError when nothing in the model can be patched.
    """
    patched: list[nn.Module] = []
    counts = {"rms_norm": 0, "swiglu": 0}
    try:
        for layer in model.modules():
            if not type(layer).__name__.endswith("DecoderLayer"):
                continue
            for module in layer.modules():
                if "forward" in vars(module) or any(parameter.requires_grad for parameter in module.parameters()):
                    continue
                name = type(module).__name__
                if name in RMS_NORMS:
                    module.forward = MethodType(_rms_norm_forward(backend), module)
                    counts["rms_norm"] += 1
                elif name in SWIGLU_MLPS and _is_silu(module.act_fn):
                    module.forward = MethodType(_swiglu_forward(backend), module)
                    counts["swiglu"] += 1
                else:
                    continue
                patched.append(module)
        if not patched:
            raise ValueError(
                f"{type(model).__name__} holds no frozen decoder layer of {', '.join(FAMILIES)}: freeze the LLM first "
                "(requires_grad_(False)), or run it unpatched"
            )
        yield counts
    finally:
        for module in patched:
            del module.forward


def _is_silu(activation: Any) -> bool:
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"


# One function for all modules of a kind: torch.compile would compile every layer anew for a function of its own.
@cache
def _rms_norm_forward(backend: str):
    def forward(norm: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if norm.weight.dtype != hidden_states.dtype:  # the module's own code would promote to the wider dtype
            return type(norm).forward(norm, hidden_states)
        return frozen_rms_norm(hidden_states, norm.weight, norm.variance_epsilon, backend=backend)

    return forward


@cache
def _swiglu_forward(backend: str):
    def forward(mlp: Any, x: torch.Tensor) -> torch.Tensor:
        return mlp.down_proj(frozen_swiglu(mlp.gate_proj(x), mlp.up_proj(x), backend=backend))

    return forward
