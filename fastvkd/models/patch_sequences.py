"""Qwen-VL's vision tower with few launches: sequences of patches of one length in one attention call, laid out ahead.

Qwen's tower takes the patches of all images as one long sequence, and attention stays within a piece of it: a window,
or an image. transformers calls attention once a piece and layer, with lengths that it reads back from the device. Here
pieces of one length are one batch, and what follows from the sizes of the images alone is computed on the host.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from fastvkd.models import families
from fastvkd.models.families import family_of

Grid = tuple[int, int, int]  # frames, rows and columns of the patches of an image
SIZES = ("image_grid_thw", "image_sizes")  # inputs that a model reads on the host only


def moved(inputs: Mapping[str, Tensor], device: torch.device | str, *, non_blocking: bool = False) -> dict[str, Tensor]:
    """Inputs of a model on `device`, but for the `SIZES` of images: read back from a GPU, they would wait for it."""
    return {
        name: value if name in SIZES else value.to(device, non_blocking=non_blocking) for name, value in inputs.items()
    }


@dataclass(frozen=True)
class Pieces:
    """How a sequence of N patches falls into pieces that attend to themselves.

    groups: (pieces, patches of each) for every length that occurs. order: (N,) int64, the patches group by group; None
    where they lie so already. back: its inverse.
    """

    groups: tuple[tuple[int, int], ...]
    order: Tensor | None
    back: Tensor | None

    def to(self, device: torch.device, non_blocking: bool = False) -> "Pieces":
        order, back = (None if t is None else t.to(device, non_blocking=non_blocking) for t in (self.order, self.back))
        return Pieces(self.groups, order, back)


def pieces_of(lengths: Sequence[int]) -> Pieces:
    """`Pieces` of these lengths, which lie one behind the other."""
    starts: dict[int, list[int]] = {}
    end = 0
    for length in lengths:
        starts.setdefault(length, []).append(end)
        end += length
    groups = tuple((len(firsts), length) for length, firsts in starts.items())
    order = torch.cat([(torch.tensor(f)[:, None] + torch.arange(n)).flatten() for n, f in starts.items()])
    if torch.equal(order, torch.arange(end)):
        return Pieces(groups, None, None)
    return Pieces(groups, order, order.argsort())


def batch_pieces(model: nn.Module) -> None:
    """Have the tower of a Qwen-VL `model` attend to pieces of one length at once; other models are left alone.

    Outputs and gradients stay as they are up to rounding. It lasts as long as the model, of which it changes neither
    names, weights nor classes; copies have it too. FlashAttention takes pieces of any length by itself and is left out.
    """
    family = family_of(model)
    if family.tower != "visual":
        return
    tower: Any = families.tower(model, family)
    tower.register_forward_pre_hook(_lay_out, with_kwargs=True)
    for block in families.tower_blocks(model, family):
        attention: Any = block.attn
        # accelerate puts a forward of its own before a module's, which moves what goes in to the module's device
        own = "_old_forward" if hasattr(attention, "_hf_hook") else "forward"
        attention_class: Any = type(attention)
        setattr(attention, own, MethodType(_attention_forward(attention_class), attention))


def rope_positions(token_types: Tensor, grids: Sequence[Grid], merge: int) -> Tensor:
    """(3, B, T) int64 positions under M-RoPE, in time, height and width, of texts with images and without videos.

    token_types: (B, T), 1 at image tokens and else 0; images do not touch. grids: of all images, row by row. merge:
    patches a side of one token. Text counts on in all three. An image's tokens stand at its place plus frame, row and
    column; the text behind it goes on behind the longer of its sides (Qwen2-VL, arXiv 2409.12191, section 2.1).
    """
    images = iter(grids)
    rows = []
    for types in token_types.tolist():
        parts: list[Tensor] = []
        place = at = 0
        while at < len(types):
            end = at
            while end < len(types) and types[end] == types[at]:
                end += 1
            if types[at]:
                frames, height, width = next(images)
                axes = [torch.arange(n) + place for n in (frames, height // merge, width // merge)]
                parts.append(torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1))
                place += max(height, width) // merge
            else:
                parts.append((torch.arange(end - at) + place).expand(3, -1))
                place += end - at
            at = end
        rows.append(torch.cat(parts, dim=1))
    return torch.stack(rows, dim=1)


def _lay_out(tower: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hands the tower what it would compute from the sizes of the images. These are best left on the host."""
    if is_flash_attention_requested(tower.config):
        return args, kwargs
    grid = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
    sides = (tower.spatial_merge_size, getattr(tower, "window_size", 0), tower.config.patch_size)
    table = (tower.num_grid_per_side, tower.interpolation_align_corners) if hasattr(tower, "pos_embed") else None
    device = (args[0] if args else kwargs["hidden_states"]).device
    known = _layout(tuple(map(tuple, grid.tolist())), *sides, table)
    return args, {**kwargs, **{name: value.to(device, non_blocking=True) for name, value in known.items()}}


@lru_cache(maxsize=16)
def _layout(grids: tuple[Grid, ...], merge: int, window: int, patch: int, table: Any) -> dict[str, Any]:
    """What transformers' towers take under these names instead of computing it, on the host."""
    grid = torch.tensor(grids)
    found: dict[str, Any] = {
        "position_ids": get_vision_position_ids(grid, merge),
        "cu_seqlens": _pieces_between(get_vision_cu_seqlens(grid)),
    }
    if window:
        found["window_index"], ends = get_vision_window_index(grid, merge, window, patch)
        found["cu_window_seqlens"] = _pieces_between(ends)
    if table is not None:
        side, align_corners = table
        found["interp_indices"], found["interp_weights"] = get_vision_interpolation_indices_and_weights(
            grid, num_grid_per_side=side, align_corners=align_corners, spatial_merge_size=merge
        )
    return found


def _pieces_between(ends: Tensor) -> Pieces:
    return pieces_of(ends.diff().tolist())


class _Reordered(torch.autograd.Function):
    """`x[order]`, whose gradient is another such read; torch's own adds up, atomically on a GPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(order, back)
        return x[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, back = ctx.saved_tensors
        return _Reordered.apply(grad, back, order), None, None


@torch.compiler.disable  # or torch would compile it anew for every batch of other sizes
def _attended(
    module: Any, attend: Callable[..., Any], pieces: Pieces, query: Tensor, key: Tensor, value: Tensor, options: Any
) -> Tensor:
    """(N, D) attention within pieces that lie group by group; queries and the others are (N, heads, D / heads)."""
    options = {"scaling": module.scaling, "is_causal": False, "attention_mask": None, **options}
    options["dropout"] = module.attention_dropout if module.training else 0.0
    found, first = [], 0
    for count, length in pieces.groups:
        here = slice(first, first := first + count * length)
        batch = (t[here].unflatten(0, (count, length)).transpose(1, 2) for t in (query, key, value))
        found.append(attend(module, *batch, **options)[0].flatten(0, 1))
    return torch.cat(found).flatten(1)


# One function for all layers of a class: torch.compile would compile every layer anew for a function of its own.
@cache
def _attention_forward(attention_class: type[nn.Module]) -> Callable[..., Tensor]:
    names = vars(sys.modules[attention_class.__module__])
    rotated, eager = names["apply_rotary_pos_emb_vision"], names["eager_attention_forward"]
    original: Any = attention_class.forward

    def forward(
        module: Any, hidden_states: Tensor, cu_seqlens: Any, position_embeddings: Any = None, **kwargs: Any
    ) -> Tensor:
        """(N, D) -> (N, D), as `attention_class` does it."""
        if not isinstance(cu_seqlens, Pieces):
            return original(module, hidden_states, cu_seqlens, position_embeddings=position_embeddings, **kwargs)
        pieces = cu_seqlens
        cos, sin = position_embeddings
        if pieces.order is not None:
            hidden_states = _Reordered.apply(hidden_states, pieces.order, pieces.back)
            cos, sin = cos[pieces.order], sin[pieces.order]
        query, key, value = module.qkv(hidden_states).unflatten(-1, (3, module.num_heads, -1)).unbind(1)
        query, key = rotated(query, key, cos, sin)
        kwargs.pop("max_seqlen", None)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)
        output = module.proj(_attended(module, attend, pieces, query, key, value, kwargs))
        return output if pieces.order is None else _Reordered.apply(output, pieces.back, pieces.order)

    return forward
