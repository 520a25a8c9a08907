"""One perturbation of all photos: do a few grey levels on every pixel, the same for each photo, bring the answers back?

After SUA (arXiv 2506.17265), without the term that hides the perturbation from a detector. It is found on the forget
photos by signs of gradients, and judged on photos that it was not found on. Found on a model that never knew these
people it teaches which answers are theirs, so its accuracy is compared with gold's, and with that on strangers' photos.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastvkd.attacks.asking import Asked, choices_of
from fastvkd.attacks.relearning import Attacker, answer_losses
from fastvkd.models.families import base_model, family_of, tower, training_only
from fastvkd.photos import decode_image
from fastvkd.records import Photo, Profile

STEP = 0.1  # of its size, in one step
_PIXELS = ("pixel_values", "hidden_states")  # what towers call their photos


class Perturbation:
    """What is added to every photo in front of the tower, after resizing and normalising, which it undoes: `delta` is
    in units of the pixels' range [0, 1], and no pixel leaves that range. It is not rounded to 8 bits.

    - A tower that takes photos as (..., 3, S, S) has one delta (3, S, S), the same for all tiles of a photo. Where
      photos differ in size it is that of the first, repeated or cut.
    - A tower that takes packed patches (patches, 3 * T * P * P) has one delta (3, P * P) of a patch, the same for all
      patches and for the T frames into which a photo is doubled.

    Args:
        photo: one that says which of the two.
    """

    def __init__(self, model: nn.Module, processor: Any, photo: Photo) -> None:
        images = processor.image_processor
        self._tower, device = tower(model, family_of(model)), next(model.parameters()).device
        normal = (images.image_mean, images.image_std) if images.do_normalize else ([0.0] * 3, [1.0] * 3)
        self._mean, self._std = (torch.tensor(of, dtype=torch.float32, device=device) for of in normal)
        image = decode_image(photo.data, photo.source)
        pixels = images(images=[image], return_tensors="pt")["pixel_values"]
        self._packed = pixels.ndim == 2
        vision: Any = base_model(model).config
        self._frames = getattr(vision.vision_config, "temporal_patch_size", 1) if self._packed else 1
        shape = (3, pixels.shape[-1] // (3 * self._frames)) if self._packed else tuple(pixels.shape[-3:])
        self.delta = torch.zeros(shape, device=device)

    @contextmanager
    def added(self) -> Iterator[None]:
        """Photos that reach the tower carry the perturbation meanwhile."""

        def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (self.on(args[0]), *args[1:]), kwargs
            name = next(name for name in _PIXELS if name in kwargs)
            return args, kwargs | {name: self.on(kwargs[name])}

        handle = self._tower.register_forward_pre_hook(add, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def on(self, pixels: Tensor) -> Tensor:
        """Normalised pixels with the perturbation, in their own shape and dtype."""
        if self._packed:
            delta = self.delta[:, None].expand(-1, self._frames, -1).flatten()
            mean, std = (of.repeat_interleave(len(delta) // 3) for of in (self._mean, self._std))
        else:
            height, width = pixels.shape[-2:]
            rows, columns = (-(-size // own) for size, own in zip((height, width), self.delta.shape[1:], strict=True))
            delta = self.delta.repeat(1, rows, columns)[:, :height, :width]
            mean, std = (of[:, None, None] for of in (self._mean, self._std))
        in_range = (pixels.float() * std + mean + delta).clamp(0, 1)
        return ((in_range - mean) / std).to(pixels.dtype)


def find(
    model: nn.Module,
    processor: Any,
    attacker: Attacker,
    photo: Photo,
    *,
    size: float,
    steps: int,
    micro_batch: int = 16,
    gradient_checkpointing: bool = False,
) -> Perturbation:
    """The perturbation of at most `size` (of the pixels' range) a pixel that makes the attacker's answers likely: signs
    of gradients, each step a tenth of `size`. `model` is left as it was."""
    found = Perturbation(model, processor, photo)
    found.delta.requires_grad_(True)
    try:
        with training_only(model, []), found.added():
            for step in range(1, steps + 1):
                found.delta.grad = None
                batches = attacker.batches(step, micro_batch)
                for loss in answer_losses(model, batches, found.delta.device, gradient_checkpointing):
                    loss.backward()
                with torch.no_grad():
                    assert found.delta.grad is not None
                    found.delta.sub_(STEP * size * found.delta.grad.sign()).clamp_(-size, size)
    finally:
        found.delta.requires_grad_(False)
    return found


def strangers_as_forgotten(
    strangers: Sequence[Profile], forgotten: Sequence[Profile], limit: int | None, seed: int
) -> list[Asked]:
    """Photos of strangers, each with the questions about one forgotten person, as if it showed that one: at most
    `limit` questions. Right answers to them are what a perturbation teaches about nobody."""
    people = list({profile.entity: profile for profile in forgotten if profile.visual.choice}.values())
    photos = [(profile.entity, photo) for profile in strangers for photo in profile.photos]
    if not people or not photos:
        return []
    order = np.random.default_rng([seed, 39]).permutation(len(photos))
    asked = [
        Asked(photos[i][0], photos[i][1], choice)
        for turn, i in enumerate(order)
        for choice in people[turn % len(people)].visual.choice
    ]
    return asked if limit is None else asked[:limit]


def judged_by(
    cells: Mapping[str, Sequence[Profile]], judged: Sequence[Profile], limit: int | None, seed: int
) -> dict[str, list[Asked]]:
    """What is asked: "unseen", about photos that the perturbation was not found on, and "strangers", where the data
    have some."""
    sets = {
        "unseen": choices_of(judged, limit, seed),
        "strangers": strangers_as_forgotten(cells.get("stranger", ()), cells["forget"], limit, seed),
    }
    return {name: asked for name, asked in sets.items() if asked}
