"""What a run says of its size."""

import torch
from torch import nn

from fastvkd.unlearning.ingredients import Runner, Trained


def test_weights_that_zero3_has_split_are_counted_whole() -> None:
    """DeepSpeed leaves an empty tensor in place of a weight and notes its size beside it."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    sizes = [parameter.numel() for parameter in model.parameters()]
    chosen = list(model[1].named_parameters())
    for split in (False, True):
        if split:
            for parameter, size in zip(model.parameters(), sizes, strict=True):
                parameter.data = torch.empty(0)
                parameter.ds_numel = size
        trained = Trained(model, chosen, None, Runner(model))
        assert (trained.trainable_parameters, trained.frozen_parameters) == (25, 16)
