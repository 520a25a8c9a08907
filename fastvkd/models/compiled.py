"""torch.compile of what repeats in a model: the vision tower's blocks and the decoder's layers."""

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastvkd.errors import SettingsError
from fastvkd.models import families
from fastvkd.models.families import family_of


@contextmanager
def compiled_blocks(*models: nn.Module) -> Iterator[int]:
    """Context in which every tower block and decoder layer of `models` runs compiled; yields their number.

    Blocks of one class share one compiled function, so a deep model compiles as fast as a shallow one. Only `forward`
    is replaced: hooks on a block still run, outside the compiled code, and names and weights stay as they are.

    Raises SettingsError when a block cannot be compiled here (no C++ compiler, for example).
    """
    blocks: list[Any] = []
    for model in models:
        family = family_of(model)
        layers: Any = families.language_model(model, family)
        blocks += [*families.tower_blocks(model, family), *layers.layers]
    static = all(family_of(model).fixed_resolution for model in models)
    unique = list({id(block): block for block in blocks}.values())
    try:
        for block in unique:
            block.forward = types.MethodType(_compiled_forward(type(block), static), block)
        yield len(unique)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        reason = str(error).strip().splitlines()[0]
        raise SettingsError(f"compile=true: torch.compile failed here ({reason}); set compile=false") from error
    finally:
        for block in unique:
            vars(block).pop("forward", None)


_COMPILED: dict[tuple[type[nn.Module], bool], Any] = {}


def _compiled_forward(block_class: type[nn.Module], static: bool) -> Any:
    """With `static` each shape has a compiled version. Else torch makes the code general at a second shape."""
    key = (block_class, static)
    if key not in _COMPILED:
        _COMPILED[key] = torch.compile(block_class.forward, dynamic=False if static else None)
    return _COMPILED[key]
