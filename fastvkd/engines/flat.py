"""Masters in a few long buffers, so that an 8-bit optimiser is called a few times a step and not hundreds of times.

bitsandbytes updates one tensor a call. A call costs the host far longer than the GPU: LLaVA-1.5 trains 377 tensors. In
a buffer every tensor begins a new block of those that share a scale, so that it gets the very bits that it gets alone.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from fastvkd.engines.optimizers import optimizer_over, parameter_groups

BLOCK = 256  # weights that share a scale, in bitsandbytes' 8-bit moments
SMALLEST = 4096  # bitsandbytes keeps 32-bit moments for tensors of fewer weights
LONGEST = 2**25  # weights in a buffer, where no tensor has more: 128 MiB, which gathering gradients takes beside them


class Buffer:
    """Some masters behind one another: `flat` holds them all, `masters` are views of it.

    indices: the positions of the masters in the optimiser's state, as it is saved.
    """

    def __init__(self, indices: Sequence[int], values: Sequence[Tensor]):
        self.indices = indices
        self._lengths = [math.ceil(value.numel() / BLOCK) * BLOCK for value in values]
        self._starts = [end - length for end, length in zip(accumulate(self._lengths), self._lengths, strict=True)]
        self.flat = nn.Parameter(torch.zeros(sum(self._lengths), device=values[0].device))
        self._padding = torch.zeros(BLOCK, device=values[0].device)
        self.masters = [
            nn.Parameter(self.flat.detach()[start : start + value.numel()].view(value.shape))
            for start, value in zip(self._starts, values, strict=True)
        ]
        with torch.no_grad():
            for master, value in zip(self.masters, values, strict=True):
                master.copy_(value)

    def take_gradients(self) -> None:
        """Move the masters' gradients into that of `flat`. Where only some have one, the others count as zero."""
        if all(master.grad is None for master in self.masters):
            return
        pieces: list[Tensor] = []
        for master, length in zip(self.masters, self._lengths, strict=True):
            gradient = torch.zeros_like(master) if master.grad is None else master.grad
            pieces += [gradient.reshape(-1), self._padding[: length - master.numel()]]
            master.grad = None
        self.flat.grad = torch.cat(pieces)

    def split(self, state: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
        """By index, each master's part of the optimiser's `state` of `flat`; tensors are views."""
        return {
            index: {key: self._part(key, value, start, master) for key, value in state.items()}
            for index, start, master in zip(self.indices, self._starts, self.masters, strict=True)
        }

    def _part(self, key: str, value: Any, start: int, master: Tensor) -> Any:
        if key.startswith("state"):  # ademamix has two moments in one: (2, N)
            return value[..., start : start + master.numel()].view(*value.shape[:-1], *master.shape)
        if key.startswith("absmax"):
            return value[..., start // BLOCK : math.ceil((start + master.numel()) / BLOCK)]
        return value  # the step, and the values that codes stand for

    def join(self, states: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
        """The optimiser's state of `flat`, of its masters' states by index; the opposite of `split`.

        Masters that have none, since they never had a gradient, and the gaps between masters get moments of zero.
        """
        placed = zip(self.indices, self._starts, self.masters, strict=True)
        found = [(start, master, states[index]) for index, start, master in placed if index in states]
        if not found:
            return {}
        _, master, first = found[0]
        joined: dict[str, Any] = {}
        for key, value in first.items():
            if key.startswith("state"):
                joined[key] = value.new_zeros(*value.shape[: value.dim() - master.dim()], len(self.flat))
                if value.dtype == torch.uint8:  # code 0 stands for the most negative moment of its block
                    joined[key].fill_(int((first[key.replace("state", "qmap")] == 0).nonzero()[0]))
            elif key.startswith("absmax"):
                joined[key] = value.new_zeros(*value.shape[:-1], len(self.flat) // BLOCK)
            else:
                joined[key] = value
        for start, master, state in found:
            for key in joined:
                if key.startswith(("state", "absmax")):
                    self._part(key, joined[key], start, master).copy_(state[key])
        return joined


class FlatOptimizer:
    """An 8-bit optimiser over masters of `named_parameters` in buffers; what the local engine needs of an optimiser.

    Its saved state is that of the same optimiser over the masters one by one. As under ZeRO, a weight that lacks a
    gradient counts as one whose gradient is zero.
    """

    def __init__(
        self, named_parameters: Sequence[tuple[str, nn.Parameter]], *, weight_decay: float, **settings: Any
    ) -> None:
        groups: list[dict[str, Any]] = []
        self.buffers: list[Buffer] = []
        position = 0
        masters: dict[int, nn.Parameter] = {}  # by id of the working weight
        for group in parameter_groups(named_parameters, weight_decay):
            members = list(enumerate(group["params"], position))
            position += len(members)
            for eight_bit in (True, False):
                alike = [(i, p) for i, p in members if (group["eight_bit"] and p.numel() >= SMALLEST) == eight_bit]
                buffers = [Buffer([i for i, _ in part], [p.detach() for _, p in part]) for part in _parts(alike)]
                if buffers:
                    groups.append({**group, "params": [b.flat for b in buffers], "eight_bit": eight_bit})
                self.buffers += buffers
                made = [master for buffer in buffers for master in buffer.masters]
                masters |= {id(p): master for (_, p), master in zip(alike, made, strict=True)}
        self.masters = {name: masters[id(parameter)] for name, parameter in named_parameters}
        self._optimizer = optimizer_over(groups, weight_decay=weight_decay, **settings)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def step(self) -> None:
        for buffer in self.buffers:
            buffer.take_gradients()
        self._optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        state: dict[int, dict[str, Any]] = {}
        for buffer in self.buffers:
            if buffer.flat in self._optimizer.state:
                state |= buffer.split(self._optimizer.state[buffer.flat])
        return {"state": dict(sorted(state.items())), "param_groups": self.param_groups}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take up moments as `state_dict` gives them, or bitsandbytes' own optimisers, which nest what is 8-bit."""
        states = {
            index: {
                key: value
                for outer, content in state.items()
                for key, value in (content.items() if isinstance(content, dict) else [(outer, content)])
            }
            for index, state in saved["state"].items()
        }
        joined = {i: state for i, buffer in enumerate(self.buffers) if (state := buffer.join(states))}
        own = self._optimizer.state_dict()
        self._optimizer.load_state_dict({"state": joined, "param_groups": own["param_groups"]})


def _parts(parameters: Sequence[tuple[int, nn.Parameter]]) -> list[list[tuple[int, nn.Parameter]]]:
    """The parameters, in order, in parts of at most `LONGEST` weights, where none has more by itself."""
    parts: list[list[tuple[int, nn.Parameter]]] = []
    room = 0
    for index, parameter in parameters:
        if not parts or parameter.numel() > room:
            parts.append([])
            room = LONGEST
        parts[-1].append((index, parameter))
        room -= parameter.numel()
    return parts
