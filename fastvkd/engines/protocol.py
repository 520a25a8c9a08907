"""What the training loop may ask of an engine. One process and a DeepSpeed job thus share one loop.

An engine owns the optimiser, the float32 masters, the learning-rate schedule and the talk between ranks. It knows
nothing of objectives, data or checkpoints on disk.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastvkd.engines.schedule import Schedule


class Engine(Protocol):
    """One optimiser over the trainable visual parameters; implemented by `LocalEngine` and `DeepSpeedEngine`."""

    rank: int
    world_size: int
    device: torch.device
    forward_module: nn.Module  # call this one, not the bare module: DeepSpeed gathers and prefetches through it
    gradient_accumulation_steps: int
    updates: int  # optimiser updates done so far, also after a resume
    base_learning_rate: float  # what `schedule` gives factors of; a loop may set both between updates
    schedule: Schedule

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of `loss` (scalar, not yet divided by the accumulation steps)."""
        ...

    def step(self) -> Tensor | None:
        """Call once after every `backward`.

        Inside an accumulation it returns None. At its end it clips, updates, advances the schedule and clears the
        gradients. It then returns the gradient norm before clipping, a float32 scalar tensor on `device`. Reading that
        waits for the device; the engine does not.
        """
        ...

    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that this rank needs beside the weights to go on bit-exactly; collective under DeepSpeed.

        Keys: `names`, `optim`, `updates`, `micro_steps`, `world_size`, `masters` (name -> float32 tensor of the whole
        parameter, only on rank 0) and `moments` (this rank's part). Tensors are references: save before stepping on.
        """
        ...

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Take up `state_dict()`'s value again; collective under DeepSpeed.

        Weights are set from `masters`. Returns False when the moments could not be used (another world size or ZeRO
        stage); they then start from zero. Raises TrainingError where parameters or optimiser differ.
        """
        ...

    def weights(self) -> dict[str, Tensor]:
        """Trainable weights, whole, under their HF live names, in their working dtype; collective under DeepSpeed.

        Only the trainable parameters are gathered, one at a time, and only rank 0 receives them (others get {}).
        """
        ...

    def mean_over_ranks(self, values: Tensor) -> Tensor:
        """Element-wise mean over all ranks (the same tensor for one rank); collective."""
        ...

    def any_rank(self, flag: bool) -> bool:
        """True on every rank when `flag` is true on at least one, so that ranks stop together; collective."""
        ...
