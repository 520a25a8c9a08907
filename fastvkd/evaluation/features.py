"""What enters the LLM for each photo, for every family: the features at the site `projector`."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from fastvkd.evaluation.inputs import evaluating
from fastvkd.models import families
from fastvkd.models.visual_path import VisualPath, collate_images
from fastvkd.photos import decode_image
from fastvkd.records import Photo

_BATCH = 32


def token_features(model: nn.Module, processor: Any, photos: Sequence[Photo]) -> Iterator[Tensor]:
    """(visual tokens, H) float32 on the CPU, photo by photo: all of them at once would be gigabytes. Raises `DataError`
    for a photo that cannot be decoded."""
    path = VisualPath(model, ("projector",))
    config: Any = families.base_model(model).config
    device = next(model.parameters()).device
    for start in range(0, len(photos), _BATCH):
        images = [decode_image(photo.data, photo.source) for photo in photos[start : start + _BATCH]]
        with evaluating(model):
            seen = path(collate_images(processor, config, images).to(device))["projector"]
            counts = seen.image_of_row.bincount(minlength=len(images)).tolist()
            tokens = seen.gathered().float().cpu()
        yield from tokens.split(counts)


def mean_features(model: nn.Module, processor: Any, photos: Sequence[Photo]) -> np.ndarray:
    """(photos, H) float64: the mean over the visual tokens of each photo."""
    return np.stack([tokens.double().mean(0).numpy() for tokens in token_features(model, processor, photos)])
