"""The engine for several GPUs: DeepSpeed ZeRO-0 to 3 behind the same protocol as the local engine.

DeepSpeed's optimiser gets the trainable parameters only. So nothing frozen is reduced, and a checkpoint gathers the
trainable ones by name.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils.cpp_extension import get_default_build_root

from fastvkd.engines.local import check_same_parameters
from fastvkd.engines.optimizers import build_optimizer, page_moments, parameter_groups
from fastvkd.engines.schedule import Schedule
from fastvkd.errors import TrainingError

log = logging.getLogger("fastvkd")
_BUILD_LOCK_SECONDS = 300.0  # what DeepSpeed compiles for a CPU takes one or two minutes


@contextlib.contextmanager
def locks_end(seconds: float) -> Iterator[None]:
    """Meanwhile take away locks so old on what torch compiles: a process that is killed while it compiles leaves one,
    and all later ones would wait for ever."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    done = threading.Event()

    def look() -> None:
        while True:
            for lock in root.glob("**/deepspeed_*/lock"):
                with contextlib.suppress(OSError):
                    if time.time() - lock.stat().st_mtime > seconds:
                        lock.unlink()
                        log.warning("%s: left by a process that was killed while it compiled; removed", lock)
            if done.wait(5.0):
                return

    thread = threading.Thread(target=look, name="fastvkd-locks", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def start_deepspeed(ds_config: dict[str, Any]) -> Any:
    """Join the job's process group and select this rank's device; call before any model is loaded.

    Returns an object that must stay alive until the model is loaded: under ZeRO-3 it makes transformers partition the
    weights while reading them, so that no rank ever holds the whole model.
    """
    with locks_end(_BUILD_LOCK_SECONDS):
        deepspeed.init_distributed(verbose=False)
    if get_accelerator().device_name() != "cpu":
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    if ds_config["zero_optimization"]["stage"] < 3:
        return None
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(ds_config)


def leave_deepspeed() -> None:
    """Leave the job's process group; call last, see `environment.end_process`."""
    if dist.is_initialized():
        dist.destroy_process_group()


class DeepSpeedEngine:
    """Trains `named_parameters` (HF live names), part of `module`, over all ranks; see `protocol.Engine`.

    `module.forward(batch)` returns the loss terms and must be called through `forward_module`, on every rank at every
    step: under ZeRO-3 a rank that skips the tower leaves the others waiting in a gather. `ds_config` comes from
    `complete_ds_config`. Parameters outside `named_parameters` must have requires_grad False.

    Gradients are averaged over ranks, so with equal micro-batches the result is that of one process with the global
    batch. DeepSpeed's ZeRO optimisers look at the gradient norm on the host once a step.
    """

    def __init__(
        self,
        module: nn.Module,
        named_parameters: list[tuple[str, nn.Parameter]],
        ds_config: dict[str, Any],
        *,
        optim: str,
        learning_rate: float,
        weight_decay: float,
        warmup_steps: int,
        max_steps: int,
        lr_scheduler_type: str,
    ) -> None:
        if not named_parameters:
            raise TrainingError("nothing to train: no parameter was given to the engine; check `trainable`")
        zero = ds_config["zero_optimization"]
        self._stage: int = zero["stage"]
        self._bf16: bool = ds_config["bf16"]["enabled"]
        self._swaps_moments = (zero.get("offload_optimizer") or {}).get("device") == "nvme"
        self._optim = optim
        self.base_learning_rate = learning_rate
        self.schedule = Schedule(lr_scheduler_type, warmup_steps=warmup_steps, max_steps=max_steps)
        self._parameters = dict(named_parameters)
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.device = torch.device(get_accelerator().current_device_name())
        self.gradient_accumulation_steps: int = ds_config["gradient_accumulation_steps"]
        self.updates = 0
        self._micro_steps = 0
        offloaded = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
        self._optimizer: torch.optim.Optimizer
        if offloaded and self.device.type != "cpu":
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            groups = parameter_groups(named_parameters, weight_decay)
            self._optimizer = DeepSpeedCPUAdam(groups, lr=0.0, adamw_mode=True)
        else:
            self._optimizer = build_optimizer(
                named_parameters,
                optim=optim,
                learning_rate=0.0,  # set before every update; DeepSpeed makes one of its own while setting up
                weight_decay=weight_decay,
                max_steps=max_steps,
                device=self.device,
            )
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=self._optimizer, config=ds_config)
        self.forward_module: nn.Module = self._engine
        if isinstance(self._engine.optimizer, FP16_UnfusedOptimizer):
            self._optimizer.state.clear()  # that update would count as Adam's first and falsify its bias correction

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> Tensor | None:
        self._micro_steps += 1
        boundary = self._micro_steps == self.gradient_accumulation_steps
        norm: Any = None
        if boundary:
            self._micro_steps = 0
            for group in self._engine.optimizer.param_groups:
                group["lr"] = self.learning_rate()
            if self._stage == 0 and not self._bf16:  # DeepSpeed keeps no norm in this one case
                norm = get_total_norm([p.grad for p in self._parameters.values() if p.grad is not None])
        self._engine.step()
        if not boundary:
            return None
        self.updates += 1
        norm = self._engine.get_global_grad_norm() if norm is None else norm
        return torch.as_tensor(norm, dtype=torch.float32, device=self.device)

    def learning_rate(self) -> float:
        return self.base_learning_rate * self.schedule.factor(self.updates)

    def state_dict(self) -> dict[str, Any]:
        if self._micro_steps:
            raise RuntimeError("state_dict() inside a gradient accumulation would lose the gradients gathered so far")
        masters: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            master = self._get_master(parameter)
            if self.rank == 0:
                masters[name] = master.to("cpu", torch.float32)
        return {
            "names": list(self._parameters),
            "optim": self._optim,
            "updates": self.updates,
            "world_size": self.world_size,
            "layout": self._layout,
            "masters": masters,
            # Moments that lie on NVMe stay there and start anew after a resume.
            "moments": None if self._swaps_moments else self._moments(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self._parameters.items()}
        check_same_parameters(state, shapes=shapes, optim=self._optim)
        for name, parameter in self._parameters.items():
            self._set_weight(parameter, state["masters"][name].to(self.device))
        self.updates = state["updates"]
        self._micro_steps = 0
        same_layout = (state["layout"], state["world_size"]) == (self._layout, self.world_size)
        if not same_layout or state["moments"] is None:
            return False
        with _MomentsInPlace(self._engine.optimizer, self._stage):
            groups = self._optimizer.state_dict()["param_groups"]
            self._optimizer.load_state_dict({"state": state["moments"], "param_groups": groups})
            page_moments(self._optimizer)
        return True

    def weights(self) -> dict[str, Tensor]:
        whole: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self._stage == 3):
                if self.rank == 0:
                    whole[name] = parameter.detach().cpu().clone()
        return whole

    def mean_over_ranks(self, values: Tensor) -> Tensor:
        mean = values.detach().to(torch.float32, copy=True)
        dist.all_reduce(mean)
        return mean / self.world_size

    def any_rank(self, flag: bool) -> bool:
        flags = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags.item())

    @property
    def _layout(self) -> str:
        return f"zero{self._stage}"

    def _moments(self) -> dict[Any, Any]:
        with _MomentsInPlace(self._engine.optimizer, self._stage):
            return self._optimizer.state_dict()["state"]

    def _unfused_masters(self) -> dict[int, Tensor]:
        wrapper = self._engine.optimizer
        assert isinstance(wrapper, FP16_UnfusedOptimizer)
        pairs = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
        return {id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}

    def _get_master(self, parameter: nn.Parameter) -> Tensor:
        """The float32 value of the whole parameter; collective under ZeRO-1 to 3."""
        if self._stage > 0:
            return safe_get_full_fp32_param(parameter)
        return self._unfused_masters()[id(parameter)].detach() if self._bf16 else parameter.detach()

    @torch.no_grad()
    def _set_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set master and working weight of one parameter from its whole float32 value, the same on every rank."""
        if self._stage > 0:
            safe_set_full_fp32_param(parameter, value)
        elif self._bf16:
            self._unfused_masters()[id(parameter)].copy_(value)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self._stage == 3):
            parameter.copy_(value)


class _MomentsInPlace:
    """Context in which the parameters are in the optimiser's groups. ZeRO-3 takes them out between steps."""

    def __init__(self, optimizer: Any, stage: int) -> None:
        self._optimizer = optimizer if stage == 3 else None

    def __enter__(self) -> None:
        if self._optimizer is not None:
            self._optimizer._set_fp32_optimizer_param_groups()

    def __exit__(self, *_: object) -> None:
        if self._optimizer is not None:
            self._optimizer._clear_fp32_optimizer_param_groups()
