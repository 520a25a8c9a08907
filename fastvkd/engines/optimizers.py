"""Optimisers by the name the user writes. Norms and biases keep 32-bit moments where the others are 8-bit.

The 8-bit ones are bitsandbytes' own (Dettmers et al., arXiv 2110.02861); AdEMAMix is arXiv 2409.03137, Lion 2302.06675.
"""

import difflib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastvkd.errors import SettingsError

# Bytes of optimiser state per trainable weight, masters not included; `planning` counts with the same table.
MOMENT_BYTES: dict[str, float] = {
    "adamw_torch": 8.0,
    "adamw_8bit": 2 + 8 / 256,  # two uint8 moments, one float32 absmax per block of 256 each
    "paged_adamw_8bit": 2 + 8 / 256,
    "lion_8bit": 1 + 4 / 256,
    "ademamix_8bit": 3 + 12 / 256,
}
EIGHT_BIT = tuple(name for name in MOMENT_BYTES if name.endswith("8bit"))
# 1-D parameters (norms, biases, class embedding) are 0.1 % of the weights but their moments span orders of magnitude.
MOMENT_BYTES_32BIT: dict[str, int] = {
    "adamw_torch": 8,
    "adamw_8bit": 8,
    "paged_adamw_8bit": 8,
    "lion_8bit": 4,
    "ademamix_8bit": 12,
}


def check_optimizer(optim: str) -> None:
    """Refuse an unknown optimiser name, proposing the nearest known one."""
    if optim not in MOMENT_BYTES:
        near = difflib.get_close_matches(optim, MOMENT_BYTES, n=1, cutoff=0.0)[0]
        raise SettingsError(f"optim={optim!r}: did you mean {near!r}? Known: {', '.join(MOMENT_BYTES)}")


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """At most two groups: matrices (decayed), and 1-D parameters (never decayed, 32-bit moments).

    ZeRO flattens each group into one buffer, so the groups keep the two apart there too.
    """
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for _, parameter in named_parameters:
        # Under ZeRO-3 a partitioned parameter is empty; its real shape is `ds_shape`.
        (matrices if len(getattr(parameter, "ds_shape", parameter.shape)) >= 2 else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "eight_bit": True},
        {"params": vectors, "weight_decay": 0.0, "eight_bit": False},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    optim: str,
    learning_rate: float,
    weight_decay: float,
    max_steps: int,
    device: torch.device,
) -> torch.optim.Optimizer:
    """The optimiser called `optim` over float32 masters (or over what DeepSpeed will make its masters from).

    AdEMAMix warms its slow average up over `max_steps`, as in its paper. On a CPU a paged optimiser is the ordinary
    one: there is no GPU memory to page out of. Raises SettingsError for an unknown name.
    """
    groups = parameter_groups(named_parameters, weight_decay)
    return optimizer_over(
        groups,
        optim=optim,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        max_steps=max_steps,
        device=device,
    )


def optimizer_over(
    groups: Any, *, optim: str, learning_rate: float, weight_decay: float, max_steps: int, device: torch.device
) -> torch.optim.Optimizer:
    """As `build_optimizer`, of groups as `parameter_groups` gives them."""
    check_optimizer(optim)
    if optim == "adamw_torch":
        for group in groups:
            del group["eight_bit"]
        return torch.optim.AdamW(groups, lr=learning_rate, fused=device.type == "cuda")

    import bitsandbytes as bnb  # late: it takes seconds to import and the plain optimiser does not need it

    optimizer: Any
    if optim == "lion_8bit":
        optimizer = bnb.optim.Lion8bit(groups, lr=learning_rate, weight_decay=weight_decay)
    elif optim == "ademamix_8bit":
        optimizer = bnb.optim.AdEMAMix8bit(
            groups, lr=learning_rate, weight_decay=weight_decay, t_alpha=max_steps, t_beta3=max_steps
        )
    elif optim == "paged_adamw_8bit" and device.type != "cpu":
        optimizer = bnb.optim.PagedAdamW8bit(groups, lr=learning_rate, weight_decay=weight_decay)
    else:
        optimizer = bnb.optim.AdamW8bit(groups, lr=learning_rate, weight_decay=weight_decay)
    _keep_vectors_32bit(optimizer)
    _keep_zero_moments_zero(optimizer, device)
    _step_without_waiting(optimizer)
    return optimizer


def page_moments(optimizer: Any) -> None:
    """Put moments that a checkpoint brought where a paged optimiser has its own: they came as ordinary tensors, which
    the host cannot page out. Small ones stay, as bitsandbytes has it. Nothing happens to another optimiser."""
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, state in optimizer.state.items():
        for name in ("state1", "state2"):
            moment = state.get(name)
            if moment is None or getattr(moment, "is_paged", False):
                continue
            paged = optimizer.get_state_buffer(parameter, dtype=moment.dtype)
            if getattr(paged, "is_paged", False):
                state[name] = paged.copy_(moment)


def _keep_vectors_32bit(optimizer: Any) -> None:
    """Override the moments' width by position (group, index), which still holds after ZeRO has replaced the parameters.

    bitsandbytes keeps overrides in a process-wide singleton by `id(parameter)`, and an id is used again once its
    parameter is gone. So each of our optimisers gets a manager of its own.
    """
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.__new__(GlobalOptimManager)
    manager.initialize()
    for group_index, group in enumerate(optimizer.param_groups):
        if not group["eight_bit"]:
            for index in range(len(group["params"])):
                manager.index2config[(group_index, index)] = {"optim_bits": 32}
    optimizer.mng = manager


def _keep_zero_moments_zero(optimizer: Any, device: torch.device) -> None:
    """Keeps the first moment of a weight exactly zero where its gradient always is (masked out), so it never moves.

    Two things would break that.

    - bitsandbytes starts a moment as code 0, which reads as -1.0 * absmax 0 = -0.0. A gradient of -0.0 (a negative one
      times a zero mask) keeps that sign. The CUDA kernel then takes the next code below zero to keep it.
    - The CPU kernel rounds through a coarse table, in which zero becomes 2e-5 of the block's largest moment.

    A second moment that is not zero does no harm: the update is 0 / sqrt(v).
    """
    from bitsandbytes.functional import create_dynamic_map

    def clear_negative_zeros(optimizer: Any, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not optimizer.state[parameter]:
                    parameter.grad.add_(0.0)  # -0.0 + 0.0 is +0.0

    optimizer.register_step_pre_hook(clear_negative_zeros)
    if device.type != "cpu":
        return
    codes = create_dynamic_map(signed=True)
    zero_code = int((codes == 0).nonzero())
    block = torch.zeros(256)
    block[0] = 1.0
    rounded_zero = int(torch.ops.bitsandbytes.quantize_blockwise(block, codes, 256)[0][1])
    if rounded_zero == zero_code:
        return

    def snap_to_zero(optimizer: Any, *_: Any) -> None:
        for state in optimizer.state.values():
            moment = state.get("state1")
            if moment is not None and moment.dtype == torch.uint8:
                moment.masked_fill_(moment == rounded_zero, zero_code)

    optimizer.register_step_post_hook(snap_to_zero)


def _step_without_waiting(optimizer: Any) -> None:
    """Leaves out bitsandbytes' wait for the whole GPU after every parameter: hundreds of times a step.

    Paged moments need the wait, since the host may touch their memory; there it stays. Others do not need it on the
    default stream: the update kernels always go there, in order with everything before and after them.
    """
    if optimizer.is_paged:
        return
    import bitsandbytes.optim.optimizer

    implementation: Any = bitsandbytes.optim.optimizer
    step = optimizer.step

    def step_without_waiting(closure: Any = None) -> Any:
        if torch.cuda.is_available() and torch.cuda.current_stream() != torch.cuda.default_stream():
            return step(closure)
        wait = implementation.sync_gpu
        implementation.sync_gpu = lambda tensor: None
        try:
            return step(closure)
        finally:
            implementation.sync_gpu = wait

    optimizer.step = step_without_waiting
