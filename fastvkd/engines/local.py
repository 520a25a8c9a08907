"""The engine for one process: float32 masters, clipping, accumulation and schedule without DeepSpeed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fastvkd.engines.flat import FlatOptimizer
from fastvkd.engines.optimizers import EIGHT_BIT, build_optimizer, check_optimizer, page_moments
from fastvkd.engines.schedule import Schedule
from fastvkd.errors import SettingsError, TrainingError


class LocalEngine:
    """Trains `named_parameters` (HF live names) on one device; see `protocol.Engine` for the methods' contracts.

    Each half-precision parameter gets a float32 master. At lr 1e-5 an update is below half a unit in the last place of
    a bf16 weight, so the weight alone would not move. Float32 parameters are their own masters. Gradients are
    accumulated in float32 either way. With 8-bit moments the masters lie in a few long buffers (`FlatOptimizer`), where
    these moments are not paged: pages of a long one would come and go as a whole.
    With `trains` False weights are only kept and saved, and have no masters.
    """

    def __init__(
        self,
        named_parameters: list[tuple[str, nn.Parameter]],
        *,
        module: nn.Module,
        optim: str,
        learning_rate: float,
        weight_decay: float,
        max_grad_norm: float,
        gradient_accumulation_steps: int,
        warmup_steps: int,
        max_steps: int,
        lr_scheduler_type: str,
        device: torch.device,
        trains: bool = True,
    ) -> None:
        if gradient_accumulation_steps < 1:
            raise SettingsError(f"gradient_accumulation_steps={gradient_accumulation_steps}: must be at least 1")
        if not named_parameters:
            raise TrainingError("nothing to train: no parameter was given to the engine; check `trainable`")
        self.rank = 0
        self.world_size = 1
        self.device = device
        self.forward_module = module
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.updates = 0
        self._micro_steps = 0
        self._optim = optim
        self.base_learning_rate = learning_rate
        self._max_grad_norm = max_grad_norm
        self.schedule = Schedule(lr_scheduler_type, warmup_steps=warmup_steps, max_steps=max_steps)
        self._parameters = dict(named_parameters)
        check_optimizer(optim)
        settings: dict[str, Any] = {
            "optim": optim,
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "max_steps": max_steps,
            "device": device,
        }
        have_masters = all(parameter.dtype != torch.float32 for _, parameter in named_parameters)
        pages = optim.startswith("paged") and device.type != "cpu"
        self._optimizer: FlatOptimizer | torch.optim.Optimizer
        if trains and optim in EIGHT_BIT and have_masters and not pages:
            self._optimizer = FlatOptimizer(named_parameters, **settings)
            self._masters = self._optimizer.masters
        else:
            self._masters = {
                name: _master_of(parameter) if trains else parameter for name, parameter in named_parameters
            }
            self._optimizer = build_optimizer(self._masters.items(), **settings)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(_move_gradient_to(self._masters[name]))
            for name, parameter in named_parameters
            if self._masters[name] is not parameter
        ]

    def backward(self, loss: Tensor) -> None:
        (loss / self.gradient_accumulation_steps).backward()

    def step(self) -> Tensor | None:
        self._micro_steps += 1
        if self._micro_steps < self.gradient_accumulation_steps:
            return None
        self._micro_steps = 0
        masters = [master for master in self._masters.values() if master.grad is not None]
        if not masters:
            raise TrainingError("no trainable parameter received a gradient: the loss does not depend on any of them")
        norm = get_total_norm([master.grad for master in masters if master.grad is not None])
        if self._max_grad_norm > 0:
            clip_grads_with_norm_(masters, self._max_grad_norm, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._copy_masters_to_parameters()
        self.updates += 1
        return norm

    def release(self) -> None:
        """Let go of the parameters, so that another engine may train them: no gradient of theirs goes to a master any
        more."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self._parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def _copy_masters_to_parameters(self) -> None:
        lower = [name for name, master in self._masters.items() if master is not self._parameters[name]]
        if lower:
            torch._foreach_copy_([self._parameters[n] for n in lower], [self._masters[n] for n in lower])

    def learning_rate(self) -> float:
        return self.base_learning_rate * self.schedule.factor(self.updates)

    def state_dict(self) -> dict[str, Any]:
        if self._micro_steps:
            raise RuntimeError("state_dict() inside a gradient accumulation would lose the gradients gathered so far")
        return {
            "names": list(self._masters),
            "optim": self._optim,
            "updates": self.updates,
            "world_size": 1,
            "layout": "local",
            "masters": {name: master.detach() for name, master in self._masters.items()},
            "moments": self._optimizer.state_dict()["state"],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> bool:
        shapes = {name: tuple(master.shape) for name, master in self._masters.items()}
        check_same_parameters(state, shapes=shapes, optim=self._optim)
        for name, master in self._masters.items():
            master.copy_(state["masters"][name])
        self._copy_masters_to_parameters()
        self.updates = state["updates"]
        self._micro_steps = 0
        if state["layout"] != "local":
            return False
        # The groups come from this run's settings, so a changed weight decay takes effect. The moments come from disk.
        own = self._optimizer.state_dict()
        self._optimizer.load_state_dict({"state": state["moments"], "param_groups": own["param_groups"]})
        page_moments(self._optimizer)
        return True

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._parameters.items()}

    def mean_over_ranks(self, values: Tensor) -> Tensor:
        return values

    def any_rank(self, flag: bool) -> bool:
        return flag


def _master_of(parameter: nn.Parameter) -> nn.Parameter:
    """The float32 weight that is updated: the parameter itself, or a copy."""
    return parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().float())


def _move_gradient_to(master: nn.Parameter) -> Callable[[Tensor], None]:
    """A hook that adds a fresh half-precision gradient to the master's float32 one and frees it at once."""

    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.to(torch.float32)
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    return hook


def check_same_parameters(state: dict[str, Any], *, shapes: dict[str, tuple[int, ...]], optim: str) -> None:
    """Refuse a saved state whose trainable parameters, by name and shape, or optimiser are not this run's."""
    names = list(shapes)
    if state["names"] != names:
        missing = sorted(set(names) ^ set(state["names"]))
        what = f"{missing[0]!r} is in only one of them" if missing else "their order differs"
        raise TrainingError(
            f"the checkpoint trains {len(state['names'])} parameters and this run {len(names)} ({what}): "
            "resume with the settings of the run (`trainable`, `sites`), or start in a new output_dir"
        )
    if state["optim"] != optim:
        raise TrainingError(
            f"the checkpoint was written with optim={state['optim']!r}, this run has optim={optim!r}: "
            "resume with the same optimiser, or start in a new output_dir"
        )
    for name, shape in shapes.items():
        saved = state["masters"].get(name)
        found = "no such weight" if saved is None else f"shape {tuple(saved.shape)}"
        if saved is None or tuple(saved.shape) != shape:
            raise TrainingError(
                f"the checkpoint's .safetensors files have {found} for {name}, this run has shape {shape}: delete that "
                "checkpoint and resume from an older one"
            )
