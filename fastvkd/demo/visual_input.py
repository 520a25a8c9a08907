"""How photos enter a model that the demo trains, batch by batch and without its processor: as pixels, which may be
moved and lit, as the inputs of its tower, and among the tokens of a prompt.

Legend: N photos, S their side in pixels, T visual tokens, H width.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastvkd.demo.people import PHOTO_SIZE
from fastvkd.models.families import base_model, family_of, image_token_id, tower
from fastvkd.models.prompts import chat_prompt
from fastvkd.photos import decode_image
from fastvkd.records import Photo


class VisualInput:
    """For a family whose tower takes (N, 3, S, S) and whose visual tokens are a square grid. Others override what
    differs; families whose visual tokens see what follows them cannot be trained this way.

    prefix: ids of the prompt up to the end of the image, as the processor expands it. positions: of these, (axes,
    length), with one axis, or three under M-RoPE. side: of the grid of visual tokens.
    """

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor, self.family = model, processor, family_of(model)
        self.image_token_id = image_token_id(model.config)
        text = chat_prompt(processor, "", image=True).partition("\n")[0]
        blank = Image.new("RGB", (PHOTO_SIZE, PHOTO_SIZE))
        encoded = processor(text=[text], images=[[blank]], add_special_tokens=False, return_tensors="pt")
        self.prefix: list[int] = encoded["input_ids"][0].tolist()
        self.positions = self.positions_of(encoded)
        self.side = math.isqrt(self.prefix.count(self.image_token_id))

    def positions_of(self, encoded: Any) -> np.ndarray:
        """Of a prompt with its photo as the processor encodes it."""
        return np.arange(encoded["input_ids"].shape[1])[None]

    def pixels(self, photos: Sequence[Photo]) -> Tensor:
        """(N, 3, S, S), float32."""
        images = [decode_image(photo.data, photo.source) for photo in photos]
        return self.photos_of(self.processor.image_processor(images, return_tensors="pt")["pixel_values"])

    def photos_of(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, S, S) of what the image processor makes of photos: undoes `inputs`."""
        return pixel_values

    def inputs(self, pixels: Tensor) -> dict[str, Tensor]:
        """What the tower takes of `pixels` (N, 3, S, S)."""
        return {"pixel_values": pixels}

    def features(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What enters the LLM at image positions, (N * T, H), and what its first layers add there (deepstack)."""
        output = base_model(self.model).get_image_features(**self.inputs(pixels))  # type: ignore[operator]
        later = getattr(output, "deepstack_features", None) or []
        return _joined(output.pooler_output), [_joined(features) for features in later]

    def patches(self) -> tuple[Any, Tensor | None]:
        """The tower's convolution that embeds patches, and its table of positions (..., H), if it has one."""
        vision = tower(self.model, self.family)
        convolution = next(module for module in vision.modules() if isinstance(module, nn.Conv2d | nn.Conv3d))
        tables = ("position_embedding", "pos_embed")
        table = (p for name, p in vision.named_parameters() if any(table in name for table in tables))
        return convolution, next(table, None)


def _joined(features: Any) -> Tensor:
    return torch.cat(tuple(features)).flatten(0, -2)
